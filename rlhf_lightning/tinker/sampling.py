"""Samples and log-probabilities of an adapter, for a client's sampling sessions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.tinker.adapters import AdaptedModel
from rlhf_lightning.tinker.requests import SampleRequest
from rlhf_lightning.types import Completion

HEAD_POSITIONS = 256
"""Number of positions whose logits are computed at once."""


class Top(NamedTuple):
    """The most likely tokens at each of n positions.

    Attributes:
        ids: Token ids, most likely first, int64 `[n, k]`.
        logprobs: Their log-probabilities, in nats, float32 `[n, k]`.

    Example:
        >>> Top(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)).ids.shape
        torch.Size([3, 2])
    """

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class SampleResult:
    """What a client gets for a `SampleRequest`.

    Attributes:
        completions: The samples.
        prompt_tokens: Number of tokens of the prompt.
        prompt_logprobs: Log-probabilities of the last tokens of the prompt, in nats; None if they are not wanted.
        top_prompt: The most likely tokens at these positions; None likewise.
        top_samples: The most likely tokens at each position of each sample; None likewise.
    """

    completions: list[Completion]
    prompt_tokens: int
    prompt_logprobs: list[float] | None
    top_prompt: Top | None
    top_samples: list[Top] | None


@torch.no_grad()
def sample(adapted: AdaptedModel, requests: Sequence[SampleRequest]) -> list[SampleResult]:
    """Answer requests with equal `params` together.

    Args:
        adapted: The model, with the weights of the sampling session loaded.
        requests: The requests.
    """
    prompts = [request.prompt for request in requests for _ in request.seeds]
    seeds = [seed for request in requests for seed in request.seeds]
    completions = iter(adapted.engine.generate(prompts, requests[0].params, seeds))
    return [_result(adapted, request, [next(completions) for _ in request.seeds]) for request in requests]


def _result(adapted: AdaptedModel, request: SampleRequest, completions: list[Completion]) -> SampleResult:
    prompt, scored = list(request.prompt), request.scored
    top_samples = None
    if request.top_samples:
        top_samples = [
            top_logprobs(adapted, [*prompt, *one.ids], len(one.ids), request.top_samples) for one in completions
        ]
    return SampleResult(
        completions,
        len(prompt),
        None if scored is None else _logprobs(adapted, prompt, scored),
        top_logprobs(adapted, prompt, scored, request.top_prompt)
        if scored is not None and request.top_prompt
        else None,
        top_samples,
    )


def _logprobs(adapted: AdaptedModel, ids: list[int], last: int) -> list[float]:
    """Log-probabilities of the last tokens of a row, in nats."""
    found: list[float] = adapted.token_logprobs(*_row(adapted, ids, last)).logprobs[0, len(ids) - last :].tolist()
    return found


def top_logprobs(adapted: AdaptedModel, ids: list[int], last: int, k: int) -> Top:
    """The most likely tokens at the last positions of a row.

    Args:
        adapted: The model.
        ids: Token ids of the row.
        last: Number of positions.
        k: Number of tokens at each.
    """
    if not last:
        return Top(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))
    states, head = adapted.token_logprobs.position_states(*_row(adapted, ids, last))
    found = [head(some).float().log_softmax(-1).topk(k) for some in states.split(HEAD_POSITIONS)]
    return Top(torch.cat([part.indices for part in found]).cpu(), torch.cat([part.values for part in found]).cpu())


def _row(adapted: AdaptedModel, ids: list[int], last: int) -> tuple[Tensor, Tensor]:
    """A row `[1, T]`, and a mask of its last tokens."""
    row = torch.tensor([ids], device=adapted.device)
    loss_mask = torch.zeros_like(row)
    loss_mask[:, len(ids) - last :] = 1
    return row, loss_mask
