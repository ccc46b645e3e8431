"""Records shared by all subpackages (rows, messages, episodes, batches), and the protocol for tokenizers.

Shapes: B examples, N rows of tokens (for pairs, 2B), T tokens of the longest row, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Required, TypeAlias, TypedDict

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor, nn

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
"""Any value that JSON can represent."""
Row: TypeAlias = dict[str, JSON]
"""A row of data, by column."""
ToolCall: TypeAlias = dict[str, JSON]
"""A tool call as in OpenAI's API, `{id, type, function: {name, arguments}}`, with arguments as an object."""
ToolSchema: TypeAlias = dict[str, JSON]
"""A tool as templates expect it, `{type: function, function: {name, description, parameters}}`."""
TemplateMessage: TypeAlias = dict[str, Any]
"""A message as it is passed to a chat template; its content may be a list of parts or an object."""
Counts: TypeAlias = dict[str, float]
"""Contributions of examples to the denominators of an optimizer step, by name: `tokens`, `sequences`, `pairs`, …"""
StateDict: TypeAlias = dict[str, Any]
"""Plain values and tensors by name: a checkpoint, or the state of a callback in it, as Lightning types them."""
STOP_REASONS = ("stop", "length", "tokens", "turns", "context", "failed")
"""Why an episode ended; see `Episode.stop_reason`."""
ReasoningKey = Literal["reasoning_content", "thinking", "reasoning"]
"""Keys under which datasets store the reasoning of a turn."""


class Message(TypedDict, total=False):
    """A message of a conversation. Messages of data rows may have further keys for the chat template.

    Example:
        >>> message: Message = {"role": "user", "content": "What is 2 + 2?"}
        >>> message["content"]
        'What is 2 + 2?'
    """

    role: Required[str]
    """`system`, `developer`, `user`, `assistant`, `tool`, or another role that the template supports."""
    content: Required[str | None]
    """The text; None in a turn that only calls tools."""
    tool_calls: list[ToolCall]
    tool_call_id: str
    """In a tool result: the id of the call."""
    name: str
    """In a tool result: the name of the tool."""
    reasoning_content: str
    thinking: str
    reasoning: str
    """The model's reasoning, under one of the three keys (`ReasoningKey`)."""
    trainable: bool
    """False to exclude the message from training. True to train on it with `train_on: trainable`."""


# -- tokenizers --------------------------------------------------------------------------------------------------------


TemplateSource: TypeAlias = str | dict[str, str] | None
"""A chat template, or several templates by name."""


ModelSource: TypeAlias = "str | Path | nn.Module | None"
"""A model's folder or Hub id, or the model itself."""


class Encoding(TypedDict, total=False):
    """What a tokenizer returns for a text."""

    input_ids: Required[list[int]]
    offset_mapping: list[tuple[int, int]]
    """Start and end (exclusive) of each token in characters, if requested."""


class AddedToken(Protocol):
    """A token that was added to a tokenizer's vocabulary; `str(token)` is its text."""

    special: bool


class Tokenizer(Protocol):
    """The interface that the package requires of a tokenizer; the tokenizers of transformers implement it."""

    name_or_path: str
    is_fast: bool
    chat_template: TemplateSource
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    unk_token: str | None
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, AddedToken]

    def __len__(self) -> int: ...

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> Encoding: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_chat_template(self, chat_template: str | None = None, tools: list[ToolSchema] | None = None) -> str: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[TemplateMessage],
        tools: list[ToolSchema] | None = None,
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **variables: JSON,
    ) -> str: ...

    def add_special_tokens(self, special_tokens_dict: dict[str, str]) -> int: ...

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]: ...


class LoadedTokenizer(Tokenizer, Protocol):
    """A tokenizer returned by `load_tokenizer`."""

    was_ended: bool
    """True if its template ends with the last turn, as the template of a reward model does (`ended_templates`)."""


# -- batches ----------------------------------------------------------------------------------------------------------


class StepBatch(TypedDict, total=False):
    """Keys that the package's dataloaders add to a batch.

    A batch of another dataloader needs only the keys that are marked as required.
    """

    denominators: Counts
    """Counts over all micro-batches and ranks of the optimizer step; the losses are divided by them."""
    where: list[str]
    """File and line of each example if known, for error messages."""


class TokenBatch(TypedDict, total=False):
    """Rows of tokens, padded on the right."""

    input_ids: Required[Tensor]
    """Token ids, int64 `[N, T]`."""
    loss_mask: Required[Tensor]
    """1 on trained tokens, 0 elsewhere, float32 `[N, T]`. Token t is predicted from the tokens before it."""
    lengths: Tensor
    """Number of tokens of each row without padding, int64 `[N]`."""


class SFTBatch(TokenBatch, StepBatch, total=False):
    """A batch of supervised fine-tuning; N = B."""

    text_bytes: Tensor
    """UTF-8 bytes of each row's trained text, float32 `[B]`: the denominator of bits per byte."""


class PreferenceTokens(TokenBatch, total=False):
    """Rows of tokens that a preference loss scores."""

    reference_logprobs: Tensor
    """Stored log-probabilities of the reference, in nats, float32 `[N, T]`; 0 outside responses."""
    shared_lengths: Tensor
    """Number of tokens of the shorter of the two responses of each row's pair, `[N]`, of the type of `loss_mask`."""


class PreferenceBatch(PreferenceTokens, StepBatch, total=False):
    """A batch of preferences: pairs (N = 2B: all chosen rows, then all rejected ones), labels (N = B), or rankings."""

    weights: Tensor
    """1 for each example, 0 for a filler that keeps the ranks in step, float32 `[B]`."""
    margin: Tensor
    """Pairs: how much better the chosen response is, in units of the score, float32 `[B]`; 0 if unknown."""
    ties: Tensor
    """Pairs: 1 if neither response is better, float32 `[B]`."""
    labels: Tensor
    """Labels: 1 for a desirable response, 0 for an undesirable one, float32 `[B]`."""
    mismatched: PreferenceTokens
    """Labels: each prompt with the response to another prompt, for losses that estimate the KL from such rows."""
    ranking: Tensor
    """Rankings: index of each row's ranking within the batch, int64 `[N]`, ascending."""
    ranks: Tensor
    """Rankings: rank of each row, 0 for the best, int64 `[N]`."""
    category: Tensor
    """Index of each example's category in `category_names`, -1 for none, int64 `[B]`."""
    category_names: list[str]
    """Names of all categories in the data."""


class RolloutBatch(TokenBatch, StepBatch, total=False):
    """A mini-batch of a round of policy RL; rows are `TrainingSample`s (N = B). Values are 0 where `loss_mask` is 0."""

    sampling_logprobs: Tensor
    """Log-probabilities that the sampler recorded, in nats, at its temperature, float32 `[N, T]`."""
    old_logprobs: Required[Tensor]
    """The policy's log-probabilities at the start of the round, in nats, float32 `[N, T]`: the ratio's denominator."""
    advantages: Required[Tensor]
    """Advantage of each token, in reward units, float32 `[N, T]`; a dataloader of your own may give `[N, 1]`."""
    reference_logprobs: Tensor
    """The reference's log-probabilities, in nats, at the sampler's temperature, float32 `[N, T]`; 0 without one."""
    values: Tensor
    """The critic's estimates before each sampled token, in reward units, float32 `[N, T]`; 0 without a critic."""
    returns: Tensor
    """The critic's targets, in reward units, float32 `[N, T]`; 0 without a critic."""
    round: int
    """Index of the round over all epochs."""
    first: bool
    """True in the first optimizer step of a round."""
    statistics: dict[str, float] | None
    """Means over the round's episodes, on the first batch of a round; None on the others."""


# -- samples and episodes ---------------------------------------------------------------------------------------------


@dataclass
class Completion:
    """A sampled response.

    Attributes:
        ids: Token ids, including the stop token.
        logprobs: Log-probability of each token when it was sampled, in nats.

    Example:
        >>> Completion(ids=[5, 2], logprobs=[-0.1, -0.7], stop_reason="stop").stop_reason
        'stop'
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str = "length"
    """`stop` (a stop token or stop text) or `length` (the token budget was used up)."""


@dataclass
class TrainingSample:
    """One row of tokens of an episode. An episode has several if the chat template re-renders earlier turns.

    Each list is as long as `ids`, or empty if it was not computed. Values are 0 where `loss_mask` is 0.

    Attributes:
        ids: Token ids of prompt, responses and the environment's messages.
        advantages: Advantage of each token, in reward units.
        reference_logprobs: The reference's log-probabilities, in nats, at the sampling temperature.

    Example:
        >>> sample = TrainingSample(ids=[1, 2, 3], loss_mask=[0, 1, 1], sampling_logprobs=[0.0, -0.1, -0.7])
        >>> sample.actions
        2
    """

    ids: list[int]
    loss_mask: list[int]
    """1 on the tokens that the policy sampled, 0 elsewhere."""
    sampling_logprobs: list[float]
    """The sampler's log-probabilities when the tokens were sampled, in nats, at its temperature."""
    advantages: list[float] = field(default_factory=list)
    reference_logprobs: list[float] = field(default_factory=list)
    recomputed_logprobs: list[float] = field(default_factory=list)
    """The trainer's log-probabilities before the first update of the round, in nats; empty if not needed."""
    values: list[float] = field(default_factory=list)
    """The critic's estimates before each sampled token, in reward units."""
    returns: list[float] = field(default_factory=list)
    """The critic's targets, in reward units."""
    policy_version: int | None = None
    """Index of the round at whose start the policy had the weights that sampled the tokens; None if unknown."""
    group: int = 0
    """Group of the episode. Rows of a group are kept adjacent, so that their common prompt is computed once."""

    @property
    def old_logprobs(self) -> list[float]:
        """Log-probabilities of the policy at the start of the round, in nats: recomputed, or else the sampler's."""
        return self.recomputed_logprobs or self.sampling_logprobs

    @property
    def actions(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.loss_mask)

    def counts(self) -> Counts:
        """The row's contribution to the denominators of its optimizer step."""
        return {"tokens": float(self.actions), "sequences": float(self.actions > 0)}


class Answer(TypedDict):
    """A response to a prompt, as `predict` and `rlhf generate` return it."""

    index: int
    """Position of the prompt in the data."""
    prompt: list[Message]
    response: str
    stop_reason: str
    response_tokens: int


class EpisodeRecord(TypedDict, total=False):
    """An episode as a row of `samples.jsonl`; the fields are those of `Episode`."""

    prompt: Required[list[Message]]
    response: Required[str]
    responses: Required[list[Message]]
    reward: Required[float]
    terms: Required[dict[str, float | None]]
    advantage: Required[float | None]
    stop_reason: Required[str]
    response_tokens: Required[int]
    error: str


@dataclass
class Episode:
    """One conversation of the policy with an environment, and its reward.

    Attributes:
        prompt: Messages that the policy saw first.
        row: The data row.
        tools: Schemas of the tools that the template shows.
        environment_reward: Sum of the environment's rewards.
        terms: Score of each reward term by name, unweighted; None where a term does not apply.
        reward: The total reward.
        advantage: The episode's advantage; None until it is computed.
        metrics: Metrics that the environment reported.

    Example:
        >>> reply = [{"role": "assistant", "content": "4"}]
        >>> episode = Episode(prompt=[{"role": "user", "content": "2 + 2?"}], row={}, group=0, responses=reply)
        >>> episode.response
        '4'
    """

    prompt: list[Message]
    row: Row
    group: int
    """Index of the prompt in the data; the episodes of a group answer the same prompt."""
    sample_index: int = 0
    """Index of the response within its group."""
    tools: list[ToolSchema] | None = None
    responses: list[Message] = field(default_factory=list)
    """Messages after the prompt, both the policy's and the environment's."""
    training_samples: list[TrainingSample] = field(default_factory=list)
    stop_reason: str = ""
    """Why the episode ended.

    - `stop`: it ended with a complete response.
    - `length`: a response ran out of tokens and was truncated.
    - `tokens`: no tokens were left for another turn.
    - `turns`: the limit on turns was reached.
    - `context`: the model's context had no room for another response.
    - `failed`: its environment failed, and the episode was dropped.
    """
    stopped_by_text: bool = False
    """True if a stop text of the sampler ended the last response, which then lacks the template's end of turn."""
    environment_reward: float = 0.0
    terms: dict[str, float | None] = field(default_factory=dict)
    reward: float = 0.0
    advantage: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    """Additional measurements of the rewards, by name; logged as `reward_NAME`."""
    sampled_texts: list[str] | None = None
    """The policy's messages exactly as sampled, with special tokens; None until a reward reads them."""
    where: str = ""
    """File and line of the prompt, if known."""
    masked: bool = False
    """True if the episode is left out of the loss; its reward still counts in the baseline of its group."""
    error: str | None = None
    """The error that made the episode fail; None if it did not fail."""

    @property
    def failed(self) -> bool:
        """True if its environment failed. The episode then has no training samples and no reward."""
        return self.error is not None

    @property
    def label(self) -> str:
        """The episode's name in error messages."""
        return f"{self.where or f'prompt {self.group}'}, sample {self.sample_index}"

    @property
    def response(self) -> str:
        """The policy's last message."""
        contents = [message["content"] or "" for message in self.responses if message["role"] == "assistant"]
        return contents[-1] if contents else ""

    @property
    def truncated(self) -> bool:
        """True if the last response ran out of tokens, which ended the episode."""
        return self.stop_reason == "length"

    @property
    def response_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(training_sample.actions for training_sample in self.training_samples)

    def sampled_turns(self) -> list[list[int]]:
        """Tokens that the policy sampled in each of its turns, including those that ended the turn."""
        turns: list[list[int]] = []
        for training_sample in self.training_samples:
            previous = 0
            for token, sampled in zip(training_sample.ids, training_sample.loss_mask, strict=True):
                if sampled and not previous:
                    turns.append([])
                if sampled:
                    turns[-1].append(token)
                previous = sampled
        return turns

    def answer(self) -> Answer:
        """The response, with its prompt."""
        return {
            "index": self.group,
            "prompt": self.prompt,
            "response": self.response,
            "stop_reason": self.stop_reason,
            "response_tokens": self.response_tokens,
        }

    def record(self) -> EpisodeRecord:
        """The episode as a row of `samples.jsonl`."""
        record: EpisodeRecord = {
            "prompt": self.prompt,
            "response": self.response,
            "responses": self.responses,
            "reward": self.reward,
            "terms": self.terms,
            "advantage": self.advantage,
            "stop_reason": self.stop_reason,
            "response_tokens": self.response_tokens,
        }
        if self.error is not None:
            record["error"] = self.error
        return record

    def end_indicators(self) -> dict[str, float]:
        """1 for the way in which the episode ended and 0 for the others, by logged name; their means are fractions."""
        ended = {f"stop_{reason}": float(self.stop_reason == reason) for reason in STOP_REASONS if reason != "failed"}
        return {**ended, "failed_episodes": float(self.failed)}


# -- filter -----------------------------------------------------------------------------------------------------------

FILTER_ACTIONS = ("mark", "drop", "block")
"""What a rule of a filter does with a text that it matches, from the mildest to the strictest."""


@dataclass(frozen=True)
class FilterMatch:
    """A text that matches a rule of a filter.

    Attributes:
        rule: Name of the rule.
        action: The rule's action, one of `FILTER_ACTIONS`.
        text: The matched part of the text, verbatim; for a classifier or a judge the whole text. Cut off after 200
            characters.
        where: Place of the text in its row, for example `messages[1].content`; empty for a text without a row.
        role: Role of the text; see `filtering.rules.ROLES`.

    Example:
        >>> FilterMatch("cards", "drop", "credit  card").rule
        'cards'
    """

    rule: str
    action: str
    text: str
    where: str = ""
    role: str | None = None
    score: float | None = None
    """The classifier's probability of the label, or the share of the judge's votes; None for terms and patterns."""
    failure: str = ""
    """Why the rule could not be applied, if its `on_failure: match` counts that as a match."""


@dataclass(frozen=True)
class FilterDecision:
    """What a filter decides about a text or a row.

    Attributes:
        matches: All matches, in the order of the rules.

    Example:
        >>> FilterDecision((FilterMatch("spam", "mark", "buy"), FilterMatch("cards", "drop", "credit card"))).action
        'drop'
    """

    matches: tuple[FilterMatch, ...] = ()

    @property
    def action(self) -> str:
        """The strictest action of the matches; `pass` if there are none."""
        return max((match.action for match in self.matches), key=FILTER_ACTIONS.index, default="pass")

    @property
    def withheld(self) -> bool:
        """True if the action is `drop` or `block`."""
        return self.action in ("drop", "block")

    @property
    def rules(self) -> list[str]:
        """Names of the rules that match, in their order."""
        return list(dict.fromkeys(match.rule for match in self.matches))

    @property
    def summary(self) -> str:
        """The rules that match in one line, with the first match of each."""
        first = {match.rule: match.failure or repr(match.text) for match in reversed(self.matches)}
        return ", ".join(f"rule {rule}: {first[rule]}" for rule in self.rules)
