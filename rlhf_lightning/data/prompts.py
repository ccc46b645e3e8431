"""Data module for policy RL: prompts to answer, or recorded episodes to learn from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rlhf_lightning.data.base import RowDataModule
from rlhf_lightning.data.batching import DrawCounts, Example
from rlhf_lightning.data.columns import refuse_media, refuse_weight, unmarked, with_system
from rlhf_lightning.data.conversations import conversation, has_conversation, tool_schemas
from rlhf_lightning.data.records import RowError, Source, require, require_list
from rlhf_lightning.data.rendering import Renderer, as_prompt
from rlhf_lightning.data.splits import RowKey, conversation_key, row_key
from rlhf_lightning.errors import MOST, ConfigError, check_whole
from rlhf_lightning.types import Counts, Message, RolloutBatch, Row, StepBatch, Tokenizer, ToolSchema

NOT_OF_PROMPTS = {
    "batch_size": "prompts_per_round (for training), or data.eval_batch_size (for validation)",
    "max_length": "max_prompt_tokens, and limit responses with model.sampler.max_tokens",
}
"""Settings of other stages, and what to set instead."""

MOST_RESPONSES = 2**16
"""Largest number of responses to a prompt; a group is kept in memory until it is complete."""


@dataclass
class Prompt:
    """A prompt with its messages, its token ids including the generation prompt, and its data row.

    Example:
        >>> Prompt(messages=[{"role": "user", "content": "Hi"}], ids=[5, 6, 7], row={"prompt": "Hi"}).tokens
        3
    """

    messages: list[Message]
    ids: list[int]
    row: Row
    tools: list[ToolSchema] | None = None
    index: int = 0
    """Position in the dataset."""
    where: str = ""
    """File and line of the row."""

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)

    @property
    def trained(self) -> int:
        """0, because no part of a prompt is trained."""
        return 0

    def counts(self) -> Counts:
        """One prompt."""
        return {"prompts": 1.0}

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of the prompt, up to the beginning of the response."""
        return f"{tokenizer.decode(self.ids, skip_special_tokens=False)}⟦"


class PromptBatch(StepBatch):
    """A batch of prompts, as lists; the sampler batches their tokens."""

    prompts: list[Prompt]
    weights: list[float]
    """1 for each prompt; 0 for a prompt that is only there so that each rank has one."""


class RoundLoader(DrawCounts, Protocol):
    """Interface of the loader of rounds."""

    def __iter__(self) -> Iterator[RolloutBatch]: ...


@runtime_checkable
class RolloutSource(Protocol):
    """Interface of the module that makes the episodes."""

    def recorded_episode(self, data: Row) -> Sequence[Example]:
        """The example of a recorded episode."""

    def rollout_loader(self, data: "PromptDataModule") -> "RoundLoader":
        """The loader of a round's batches around the prompts of the data module."""


def prompt_messages(data: Row) -> list[Message]:
    """The messages of a row to answer: its `prompt`, or its conversation up to the last assistant turn.

    Raises:
        RowError: If there is nothing to answer.
    """
    if data.get("prompt") is not None:
        return unmarked(with_system(data, as_prompt(data["prompt"])))
    if not has_conversation(data):
        require(data, "prompt")
    messages = conversation(data)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError("the conversation has no message before its assistant turn to use as a prompt")
    return unmarked(messages)


def prompt_example(renderer: Renderer, data: Row, index: int = 0) -> Prompt:
    """The prompt of a row; see `prompt_messages`.

    Args:
        renderer: Turns messages into tokens.
        data: The row.
        index: Position of the row in the dataset.

    Raises:
        RowError: If the row cannot be used as a prompt.
    """
    refuse_media(data)
    messages, tools = prompt_messages(data), tool_schemas(data)
    renderer.refuse_lost(messages, tools)
    return Prompt(messages, renderer.prompt(messages, tools), data, tools, index)


def collate_prompts(rows: list[Prompt], weights: list[float]) -> PromptBatch:
    """A batch of prompts."""
    return {"prompts": rows, "weights": weights}


def kept_prompts(batch: PromptBatch) -> list[Prompt]:
    """The prompts of a batch with weight 1."""
    return [prompt for prompt, weight in zip(batch["prompts"], batch["weights"], strict=True) if weight]


class PromptDataModule(RowDataModule[Example, PromptBatch]):
    """Data module of prompts for policy RL: JSON rows with `prompt` (string or messages) and other columns, or lines.

    In `fit`, its loader is the module's rollout loader, which collects episodes round by round. Further arguments are
    those of `RowDataModule`.

    Args:
        train: Rows to train on; blank lines are skipped and counted.
        validation: Rows to validate on.
        episodes: Recorded episodes (JSONL) to learn from instead of sampling; see `rollout.recorded`.
        prompts_per_round: Number of prompts answered with one state of the policy, over all devices.
        group_size: Number of responses to each prompt.
        update_epochs: Number of passes over the episodes of a round.
        minibatches: Number of training steps in each pass; a multiple of `accumulate_grad_batches`.
        max_prompt_tokens: Maximum number of tokens of a prompt. Longer prompts are refused, or skipped with `overlong:
            skip`.
        eval_batch_size: Number of prompts per validation, test or predict step on one device; by default the number of
            responses in a round. The sampler decodes up to `sampler.slots` of them together.
        lines: Read every line of a file as a prompt, whatever its name; by default only for `.txt`.
        **kwargs: Arguments of `RowDataModule`.

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        >>> data = PromptDataModule(train=[{"prompt": "What is 2 + 2?", "answer": "4"}], group_size=4)
        >>> data.prompts_per_round
        16
    """

    stage_kind = "policy"

    text_key = "prompt"

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        episodes: Source | None = None,
        prompts_per_round: int = 16,
        group_size: int = 8,
        update_epochs: int = 1,
        minibatches: int = 1,
        max_prompt_tokens: int = 1024,
        eval_batch_size: int | None = None,
        lines: bool = False,
        **kwargs: Any,
    ) -> None:
        if train is not None and episodes is not None:
            raise ConfigError(
                "data.train and data.episodes are both set; give either prompts to sample from, or recorded episodes"
            )
        for name, ours in NOT_OF_PROMPTS.items():
            if name in kwargs:
                raise ConfigError(f"data.{name} has no meaning in policy stages; set data.{ours}")
        check_whole("data.max_prompt_tokens", max_prompt_tokens)
        # A fixed batch_size: prompts_per_round and group_size determine the rows of a step.
        super().__init__(
            train if episodes is None else episodes,
            validation,
            batch_size=8,
            max_length=max_prompt_tokens,
            eval_batch_size=eval_batch_size,
            **kwargs,
        )
        self.recorded = episodes is not None
        if self.cache is not None:
            raise ConfigError(
                "data.cache has no use in policy stages, where sampling takes the time; leave it out, or set "
                "data.streaming for a large file"
            )
        if self.streaming is not None and self.recorded:
            raise ConfigError(
                "data.episodes are grouped over all rows, so they cannot be streamed; leave out data.streaming"
            )
        if self.mixture is not None and self.recorded:
            raise ConfigError("data.episodes has weights, which only data.train takes; give a list of the files")
        if self.mixture is not None and self.mixture.stopping == "all_exhausted":
            raise ConfigError(
                "data.stopping_strategy is all_exhausted, but a prompt must not occur twice in a round; choose "
                "first_exhausted or all_exhausted_without_replacement"
            )
        if self.recorded and self.validation_split:
            raise ConfigError(
                "data.validation_split holds out prompts of data.train, but data.episodes is set; use data.validation "
                "instead"
            )
        if self.recorded and self.filter is not None:
            raise ConfigError(
                "data.filter reads texts, but recorded episodes (data.episodes) consist of tokens; filter the texts "
                "before you record episodes"
            )
        if self.filter is not None and self.streaming is not None:
            raise ConfigError(
                "data.filter cannot be combined with data.streaming in policy stages, whose rounds take a known number "
                "of rows; leave out data.streaming, or filter the file once with rlhf filter apply"
            )
        self.lines = lines
        for name, value in (
            ("prompts_per_round", prompts_per_round),
            ("group_size", group_size),
            ("update_epochs", update_epochs),
            ("minibatches", minibatches),
        ):
            check_whole(f"data.{name}", value, most=MOST_RESPONSES if name == "group_size" else MOST)
        self.prompts_per_round, self.group_size = prompts_per_round, group_size
        self.update_epochs, self.minibatches = update_epochs, minibatches
        self.eval_batch_size = eval_batch_size or prompts_per_round * group_size

    def examples(self, name: str) -> Callable[[Row], Sequence[Example]]:
        if name == "train" and self.recorded:
            return self.module.recorded_episode
        return self._prompt if name == "predict" else self._weighed

    @property
    def module(self) -> RolloutSource:
        """The trainer's policy module, which makes the episodes.

        Raises:
            ConfigError: If the Trainer has no such module.
        """
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, RolloutSource):
            raise ConfigError("PromptDataModule needs a PolicyRLModule; pass both to the same Trainer")
        return module

    def _weighed(self, data: Row) -> list[Prompt]:
        refuse_weight(data)
        return self._prompt(data)

    def _prompt(self, data: Row) -> list[Prompt]:
        prompt = prompt_example(self.renderer, data)
        self.too_long(prompt.tokens, name="data.max_prompt_tokens", can_truncate=False)
        return [prompt]

    def key(self, data: Row) -> RowKey:
        """Key of a row: its messages, or its tokens for recorded episodes that have only tokens."""
        if not self.recorded:
            messages = prompt_messages(data)
            return conversation_key(messages, tool_schemas(data), None)
        if data.get("prompt") is not None or has_conversation(data):
            return row_key(prompt_example(self.renderer, data).ids, None)
        if data.get("tokens") is not None:
            tokens, loss_mask = require_list(data, "tokens"), require_list(data, "loss_mask")
            sampled = next((i for i, flag in enumerate(loss_mask) if flag), 0)
            return row_key(tokens[:sampled], tokens[sampled:])
        require(data, "prompt_tokens", "response_tokens")
        return row_key(data["prompt_tokens"], data["response_tokens"])

    def collate(self, rows: list[Example], weights: list[float]) -> PromptBatch:
        return collate_prompts([row for row in rows if isinstance(row, Prompt)], weights)

    def train_dataloader(self) -> Iterable[RolloutBatch]:
        """The module's rollout loader, which wraps the loader of prompts."""
        loader = self.module.rollout_loader(self)
        self.train_loader = loader
        return loader
