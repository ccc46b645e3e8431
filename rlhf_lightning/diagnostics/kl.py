"""Checks of the KL: the policy moves too far or too fast from the reference, or the measured KL is impossible."""

from statistics import median
from typing import TYPE_CHECKING

from rlhf_lightning.diagnostics.check import Check, MedianAbove, Numbers, positive
from rlhf_lightning.diagnostics.curves import RECENT, Curves, correlation, together, trend

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule


class HighKL(MedianAbove):
    """The policy is far from the reference.

    Learned rewards are over-optimized at some tens of nats per episode (Stiennon et al. 2020, section 4.3, arXiv
    2009.01325; Gao et al. 2023, arXiv 2210.10760). Verifiers tolerate more.

    Args:
        limit: KL in nats per episode.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> HighKL(limit=50.0, rounds=1).severity(Curves.of(kl=[25.0]))
        0.5
    """

    name, watched = "high_kl", ("kl",)
    meaning = "The policy is so far from the reference that the scores of a learned reward are no longer reliable."
    remedy = "Usual remedy: a higher kl coefficient, a lower learning rate, or an earlier stop."

    def __init__(self, limit: float = 50.0, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class GrowingKL(Check):
    """The KL has doubled within a few rounds without a gain in reward, a sign of divergence.

    Args:
        growth: Ratio of the median KL in the second half of the rounds to that in the first half.
        floor: KL in nats per episode below which growth is ignored.
        trend: t-statistic of the slope of the reward at or above which the reward counts as rising.
        rounds: Number of rounds to consider.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> GrowingKL(rounds=2).severity(Curves.of(kl=[5.0, 20.0], reward=[1.0, 1.0]))
        2.0
    """

    name, watched = "growing_kl", ("kl", "reward")
    meaning = "The KL grows fast while the reward does not rise, so the policy is diverging."
    remedy = (
        "Usual remedy: a lower learning rate for the policy, larger mini-batches, fewer update_epochs or rounds, or a "
        "higher kl coefficient."
    )

    def __init__(self, growth: float = 2.0, floor: float = 5.0, trend: float = 2.0, rounds: int = 10) -> None:
        super().__init__(rounds)
        self.growth, self.floor = positive(self, "growth", growth), positive(self, "floor", floor)
        self.trend = positive(self, "trend", trend)

    def _halves(self, curves: Curves) -> tuple[float, float] | None:
        kl = curves.last("kl", self.rounds)
        half = len(kl) // 2
        return (median(kl[:half]), median(kl[half:])) if half and len(kl) == self.rounds else None

    def severity(self, curves: Curves) -> float | None:
        halves = self._halves(curves)
        if halves is None or "reward" not in curves:
            return None
        before, after = halves
        if trend(curves["reward"].last(self.rounds)) >= self.trend:
            return 0.0
        return min(after / (self.growth * max(before, 1e-9)), after / self.floor)

    def numbers(self, curves: Curves) -> Numbers:
        before, after = self._halves(curves) or (0.0, 0.0)
        numbers = {"kl_before": before, "kl": after}
        r = correlation(*together(curves["kl"], curves["reward"], RECENT))
        return numbers if r is None else {**numbers, "correlation_of_kl_and_reward": r}


class NegativeKL(Check):
    """The mean of k1 stays below 0, which is impossible for the expectation over the policy's own samples.

    Args:
        limit: Distance below 0, in nats per episode, that the KL must exceed in every round.
        rounds: Number of consecutive rounds.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> NegativeKL(limit=0.5, rounds=1).severity(Curves.of(kl=[-1.0]))
        2.0
    """

    name, watched = "negative_kl", ("kl",)
    meaning = (
        "The measured KL stays negative, which is impossible for a policy on its own samples: sampler and trainer "
        "disagree, or the policy is sampled at another temperature or with top_p or top_k."
    )
    remedy = (
        "Usual remedy: sampler.top_p 1 and top_k 0, the same precision in sampler and trainer, and no dropout; see "
        "logprob_gap."
    )

    def __init__(self, limit: float = 0.05, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)

    def applies(self, module: "PolicyRLModule") -> bool:
        return module.samples_rollouts

    def severity(self, curves: Curves) -> float | None:
        values = curves.last("kl", self.rounds)
        return -max(values) / self.limit if len(values) == self.rounds else None

    def numbers(self, curves: Curves) -> Numbers:
        return {"kl": max(curves["kl"].last(self.rounds))}
