"""Checks of the reward: no signal within groups, over-optimization, and collapse."""

from statistics import fmean, stdev
from typing import TYPE_CHECKING

from rlhf_lightning.diagnostics.check import Check, MedianAbove, Numbers, positive
from rlhf_lightning.diagnostics.curves import FIRST, SMOOTH, Curves, together, trend

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule


class NoSignal(MedianAbove):
    """In most groups, all episodes have the same reward.

    Args:
        limit: Fraction of the groups.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> NoSignal(limit=0.5, rounds=1).severity(Curves.of(zero_variance_groups=[1.0]))
        2.0
    """

    name, watched = "no_signal", ("zero_variance_groups",)
    meaning = "In most groups all rewards are equal, so that their advantages are 0 and most of a round is wasted."
    remedy = (
        "Usual remedy: prompts that are neither too easy nor too hard, a larger group_size, a higher sampler "
        "temperature, a reward with more than two values, or model.resample_groups."
    )

    def __init__(self, limit: float = 0.8, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)

    def applies(self, module: "PolicyRLModule") -> bool:
        return module.rewarded  # without a reward, a teacher's distributions are learned


class OverOptimized(Check):
    """The trained reward rises while the gold reward falls.

    Args:
        gold: Name of the reward term that is only measured (`weight: 0`).
        trend: t-statistic that the slopes must reach, upward for the reward and downward for the gold reward.
        rounds: Number of rounds to consider.

    Example:
        >>> OverOptimized(gold="judge").watched
        ('reward', 'reward_judge', 'kl')
    """

    name = "over_optimized"
    meaning = "The reward rises while the gold reward falls: the policy exploits errors of the reward model."
    remedy = "Usual remedy: a higher kl coefficient, an earlier stop, a larger reward model, or an ensemble of them."

    def __init__(self, gold: str = "gold", trend: float = 3.0, rounds: int = 20) -> None:
        super().__init__(rounds)
        self.gold, self.trend = f"reward_{gold}", positive(self, "trend", trend)
        self.watched = ("reward", self.gold, "kl")

    def severity(self, curves: Curves) -> float | None:
        if self.gold not in curves:
            return None
        reward, gold = together(curves["reward"], curves[self.gold], self.rounds)
        return min(trend(reward), -trend(gold)) / self.trend if len(gold) == self.rounds else None

    def numbers(self, curves: Curves) -> Numbers:
        reward, gold = together(curves["reward"], curves[self.gold], self.rounds)
        half = self.rounds // 2
        numbers = {
            "reward_before": fmean(reward[:half]),
            "reward": fmean(reward[half:]),
            "gold_before": fmean(gold[:half]),
            "gold": fmean(gold[half:]),
        }
        kl = curves.last("kl", self.rounds)
        return {**numbers, "kl": kl[-1]} if kl else numbers


class RewardCollapse(Check):
    """The reward has lost most of its gain, or fallen below its start.

    Args:
        lost: Fraction of the gain from the first 10 rounds to the peak that must be lost.
        deviations: Smallest loss that counts, in standard deviations of the first 10 rounds, because pure noise has a
            peak as well.

    Example:
        >>> RewardCollapse(lost=0.5).name
        'reward_collapse'
    """

    name, watched = "reward_collapse", ("reward",)
    meaning = "The reward has lost most of its gain, or has fallen below its start."
    remedy = (
        "Usual remedy: export the best checkpoint instead of the last; use a lower learning rate or a higher kl "
        "coefficient."
    )

    def __init__(self, lost: float = 0.8, deviations: float = 6.0) -> None:
        super().__init__(rounds=SMOOTH)
        self.lost, self.deviations = positive(self, "lost", lost), positive(self, "deviations", deviations)

    def severity(self, curves: Curves) -> float | None:
        level, start = curves.level("reward", self.rounds), curves.start("reward", FIRST)
        if level is None or start is None:
            return None
        first, peak = curves["reward"].first, curves["reward"].peak
        noise = max(self.deviations * stdev(first), 0.1 * abs(start))
        return (peak - level) / max(self.lost * (peak - start), noise, 1e-12)

    def numbers(self, curves: Curves) -> Numbers:
        return {
            "reward_at_first": curves.start("reward", FIRST) or 0.0,
            "reward_at_its_peak": curves["reward"].peak,
            "reward": curves.level("reward", self.rounds) or 0.0,
        }
