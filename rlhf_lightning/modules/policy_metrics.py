"""Metrics of policy RL: of an optimizer step, of held-out prompts, and the reason for a step without trained tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from rlhf_lightning.models.token_logprobs import TokenLogprobsOutput
from rlhf_lightning.objectives.policy import PolicyObjective
from rlhf_lightning.rollout.statistics import episode_kl
from rlhf_lightning.types import Episode

if TYPE_CHECKING:
    from rlhf_lightning.types import RolloutBatch

RETURNED = ("log_ratio_mean", "clip_fraction", "log_ratio_clamped")
"""Metrics of the mini-batch that a training step returns in addition to the loss."""
NUMBERS = ("loss", "value_loss", "entropy", "logprob_gap", "divergence", *RETURNED)
"""Metrics that are summed over an optimizer step."""
LARGEST = ("log_ratio_max",)
ROUND_ON_BAR = ("reward", "kl", "truncated")
OF_REWARD = ("reward", "zero_variance_groups")
"""Statistics of a round that have no meaning without a reward."""
WHY = {
    "truncated": "truncated episodes",
    "failed_episodes": "failed episodes",
    "zero_variance_groups": "groups with equal rewards",
}


def step_sums(
    output: TokenLogprobsOutput, batch: "RolloutBatch", objective: PolicyObjective, clamped: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Compute the metrics of a mini-batch.

    Args:
        output: Log-probabilities and entropies under the current policy, in nats, `[B, T]`.
        batch: The mini-batch.
        objective: The policy loss.
        clamped: 1 at tokens whose log-ratio is clamped, `[B, T]`.

    Returns:
        The sum over sampled tokens and the number of tokens for each metric, and the maxima by name.
    """
    assert output.entropy is not None
    loss_mask, old, logprobs = batch["loss_mask"], batch["old_logprobs"], output.logprobs.detach()
    log_ratio = ((logprobs - old) * loss_mask).abs()
    sums = {
        "entropy": output.entropy.detach(),
        "log_ratio_mean": log_ratio,
        "clip_fraction": objective.clipped(logprobs, old, batch["advantages"], loss_mask),
        "log_ratio_clamped": clamped,
    }
    if batch.get("first"):
        sums["logprob_gap"] = ((logprobs - batch.get("sampling_logprobs", old)) * loss_mask).abs()
    if output.divergence is not None:
        sums["divergence"] = output.divergence.detach()
    count = loss_mask.sum()
    return {name: (values.sum(), count) for name, values in sums.items()}, {"log_ratio_max": log_ratio.max()}


def reference_distance(output: TokenLogprobsOutput, batch: "RolloutBatch") -> dict[str, Tensor]:
    """Largest and mean |log p - log p_ref| over a mini-batch's sampled tokens, both as the trainer computes them."""
    loss_mask = batch["loss_mask"]
    distance = ((output.logprobs.detach() - batch["reference_logprobs"]) * loss_mask).abs()
    mean = distance.sum() / loss_mask.sum().clamp(min=1)
    return {"reference_distance_max": distance.max(), "reference_distance_mean": mean}


def why_empty(statistics: Mapping[str, float]) -> str:
    """Explain from a round's statistics why no token was trained, and what to change."""
    found = ", ".join(f"{statistics[name]:.0%} {WHY[name]}" for name in WHY if name in statistics)
    return (
        f"The last round had {found or 'no statistics'}. If responses are truncated, raise sampler.max_tokens or "
        "leave out model.mask_truncated. If all rewards of a group are equal, use other prompts or rewards, a "
        "larger data.group_size, or model.resample_groups. See samples.jsonl."
    )


class HeldOut(nn.Module):
    """Means over held-out prompts, exact over ranks.

    Covers the reward of a greedy and of a sampled response, and of the sampled one the length, truncation, KL, and
    divergence from a teacher.

    Example:
        >>> [name for name, metric in HeldOut().logged(["kl", "divergence"])]
        ['reward_greedy', 'reward_sampled', 'response_tokens', 'truncated']
    """

    def __init__(self) -> None:
        super().__init__()
        self.reward_greedy, self.reward_sampled = MeanMetric(), MeanMetric()
        self.response_tokens, self.truncated, self.kl = MeanMetric(), MeanMetric(), MeanMetric()
        self.divergence = MeanMetric()

    def add(self, greedy: Sequence[Episode], sampled: Sequence[Episode]) -> None:
        """Add the episodes of a batch of prompts.

        Args:
            greedy: Episodes sampled at temperature 0.
            sampled: Episodes sampled at the sampler's temperature.
        """
        for episode in (episode for episode in greedy if not episode.failed):
            self.reward_greedy.update(episode.reward)
        for episode in (episode for episode in sampled if not episode.failed):
            self.reward_sampled.update(episode.reward)
            self.response_tokens.update(float(episode.response_tokens))
            self.truncated.update(float(episode.truncated))
            self.kl.update(episode_kl(episode))

    def logged(self, without: Sequence[str] = (), rewarded: bool = True) -> Iterator[tuple[str, Metric]]:
        """Names and metrics to log.

        Args:
            without: Names to leave out: `kl` (nats per episode) without a reference, `divergence` (nats per token)
                without a teacher.
            rewarded: False to leave out rewards as well.
        """
        for name, metric in self.named_children():
            if isinstance(metric, Metric) and name not in without and (rewarded or not name.startswith("reward")):
                yield name, metric
