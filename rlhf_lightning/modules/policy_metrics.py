"""What policy RL logs of an optimizer step, and what it says of one in which no token is trained."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf_lightning.models.token_logprobs import TokenLogprobsOutput
from rlhf_lightning.objectives.policy import PolicyObjective

OUTPUTS = ("log_ratio_mean", "clip_fraction", "log_ratio_clamped")
"""What a training step returns of its mini-batch beside the loss."""
NUMBERS = ("loss", "value_loss", "entropy", "logprob_gap", *OUTPUTS)
"""What is added up over an optimizer step."""
LARGEST = ("log_ratio_max",)
ROUND_ON_BAR = ("reward", "kl", "truncated")
WHY = {
    "truncated": "cut off",
    "failed_episodes": "failed in their environment",
    "zero_variance_groups": "groups of equal rewards",
}


def step_sums(
    scores: TokenLogprobsOutput, batch: Mapping[str, Any], objective: PolicyObjective, clamped: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Of a mini-batch: of each number the sum over its sampled tokens and their count; and the largest values."""
    assert scores.entropy is not None
    loss_mask, old, logprobs = batch["loss_mask"], batch["old_logprobs"], scores.logprobs.detach()
    log_ratio = ((logprobs - old) * loss_mask).abs()
    sums = {
        "entropy": scores.entropy.detach(),
        "log_ratio_mean": log_ratio,
        "clip_fraction": objective.clipped(logprobs, old, batch["advantages"], loss_mask),
        "log_ratio_clamped": clamped,
    }
    if batch.get("first"):
        sums["logprob_gap"] = ((logprobs - batch.get("sampling_logprobs", old)) * loss_mask).abs()
    count = loss_mask.sum()
    return {name: (values.sum(), count) for name, values in sums.items()}, {"log_ratio_max": log_ratio.max()}


def why_empty(statistics: Mapping[str, float]) -> str:
    """Why no token of a round was trained, as far as its statistics say, and what to change."""
    found = ", ".join(f"{WHY[name]} {statistics[name]:.0%}" for name in WHY if name in statistics)
    return (
        f"Of the last round: {found or 'nothing is known'}. Where responses are cut off, raise sampler.max_tokens or "
        "leave out model.mask_truncated; where the rewards of each group are equal, take other prompts or rewards, a "
        "larger data.group_size, or model.resample_groups. See samples.jsonl."
    )
