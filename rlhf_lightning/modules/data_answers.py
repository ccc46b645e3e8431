"""Answers of the data as training samples, which on-policy distillation can mix with sampled ones (λ of GKD)."""

from collections.abc import Sequence

import torch

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.conversations import conversation, has_conversation
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.types import Episode, Message, TrainingSample

MIXING = 1_000_033
"""Part of the seed that selects prompts, so that it differs from the seeds that tokens are sampled with."""


def split_prompts(
    prompts: Sequence[Prompt], on_policy_fraction: float, seed: Sequence[int]
) -> tuple[list[Prompt], list[Prompt]]:
    """Select at random which prompts the policy answers. The choice for a prompt does not depend on rank or batch.

    Args:
        prompts: The prompts of a round.
        on_policy_fraction: Probability that the policy answers a prompt.
        seed: Integers that distinguish the rounds of a run.

    Returns:
        The prompts that the policy answers, and those that keep the answer of the data.
    """
    sampled, answered = list[Prompt](), list[Prompt]()
    for prompt in prompts:
        generator = torch.Generator().manual_seed(mix_seeds(*seed, prompt.index, MIXING))
        chosen = float(torch.rand((), generator=generator, dtype=torch.float64)) < on_policy_fraction
        (sampled if chosen else answered).append(prompt)
    return sampled, answered


def answer_episode(renderer: Renderer, prompt: Prompt, max_tokens: int) -> Episode:
    """The answer of the data to a prompt, as an episode without log-probabilities and with advantage 0.

    Args:
        renderer: Turns messages into tokens.
        prompt: The prompt, with its data row.
        max_tokens: Tokens of the answer that are kept, as of a sampled response.

    Raises:
        DataError: If the row cannot be rendered; with file and line.
    """
    try:
        rows = renderer.conversation(_answered(prompt), prompt.tools, "last_assistant")
    except RowError as error:
        raise DataError(f"{prompt.where or f'prompt {prompt.index}'}: {error}") from None
    samples = []
    for row in rows:
        trained = [i for i, flag in enumerate(row.loss_mask) if flag][:max_tokens]
        end = trained[-1] + 1
        nothing = [0.0] * end
        samples.append(TrainingSample(row.ids[:end], row.loss_mask[:end], nothing, advantages=nothing))
    return Episode(prompt.messages, prompt.row, prompt.index, training_samples=samples, where=prompt.where)


def check_answers(prompts: Sequence[Prompt], group_size: int) -> None:
    """Check that the data answer every prompt, once.

    Args:
        prompts: The training prompts.
        group_size: Number of responses that are sampled to each prompt.

    Raises:
        ConfigError: If more than one response is sampled to a prompt.
        DataError: If a row has no answer; with file and line.
    """
    if group_size > 1:
        raise ConfigError(
            f"data.group_size is {group_size}, but distillation.on_policy_fraction is below 1, and the data have one "
            "answer to each prompt. Set data.group_size to 1"
        )
    for prompt in prompts:
        _answered(prompt)


def _answered(prompt: Prompt) -> list[Message]:
    """The conversation of a prompt's row, which ends with an answer."""
    if has_conversation(prompt.row) and (messages := conversation(prompt.row))[-1]["role"] == "assistant":
        return messages
    raise DataError(
        f"{prompt.where or f'prompt {prompt.index}'}: the row has no answer, but distillation.on_policy_fraction is "
        "below 1. Add a completion beside the prompt, or messages that end with an answer of the assistant"
    )
