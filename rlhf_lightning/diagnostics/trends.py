"""Failures that show in how the curves of policy RL move."""

from statistics import fmean, median, stdev
from typing import Any

from rlhf_lightning.diagnostics.checks import Check, Numbers, positive
from rlhf_lightning.diagnostics.curves import FIRST, RECENT, SMOOTH, Curves, correlation, together, trend


class GrowingKL(Check):
    """KL has doubled within a few rounds and bought no reward: how PPO diverges.

    Args:
        growth: of the median KL from the first to the second half of the rounds.
        floor: nats a response under which growth means nothing.
        trend: t of the slope of the reward from which on it counts as rising.
        rounds: looked at.
    """

    name, watched = "growing_kl", ("kl", "reward")
    meaning = "KL grows fast while the reward does not rise: the policy diverges."
    remedy = (
        "Usual remedy: a lower learning rate of the policy, larger mini-batches, fewer update_epochs or rounds; a "
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
    """Mean k1 stays below 0, which no expectation over the policy's own samples can.

    Args:
        limit: nats a response that it must be below 0, in every round. rounds: in a row.
    """

    name, watched = "negative_kl", ("kl",)
    meaning = (
        "The measured KL stays negative, which the KL of a policy over its own samples cannot be: sampler and trainer "
        "disagree, or the policy is sampled at another temperature or with tokens cut off."
    )
    remedy = "Usual remedy: sampler at top_p 1, top_k 0, the same precision in both, no dropout; see logprob_gap."

    def __init__(self, limit: float = 0.05, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)

    def applies(self, module: Any) -> bool:
        return getattr(module, "samples_rollouts", True)

    def severity(self, curves: Curves) -> float | None:
        values = curves.last("kl", self.rounds)
        return -max(values) / self.limit if len(values) == self.rounds else None

    def numbers(self, curves: Curves) -> Numbers:
        return {"kl": max(curves["kl"].last(self.rounds))}


class OverOptimized(Check):
    """The reward that is trained on rises, the gold reward falls.

    Args:
        gold: name of the part of the reward that is only measured (`weight: 0`).
        trend: t of the slopes, upwards and downwards, from which on they count.
        rounds: looked at.
    """

    name = "over_optimized"
    meaning = "The reward rises while the gold reward falls: the policy exploits faults of the reward model."
    remedy = "Usual remedy: a higher kl coefficient, an earlier stop, a larger reward model or an ensemble of them."

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


class _SinceStart(Check):
    """Compares the median of the last rounds of its last number with the mean of as many first ones."""

    def levels(self, curves: Curves) -> tuple[float, float] | None:
        """At the start, and now."""
        start, now = (at(self.watched[-1], self.rounds) for at in (curves.start, curves.level))
        return None if start is None or now is None else (start, now)

    def numbers(self, curves: Curves) -> Numbers:
        start, now = self.levels(curves) or (0.0, 0.0)
        return {f"{self.watched[-1]}_at_first": start, self.watched[-1]: now}


class LengthHacking(_SinceStart):
    """The reward goes with length, and responses have grown.

    Args:
        correlation: of length and reward over the episodes of a round.
        growth: of the mean length since the first rounds.
        rounds: of which the median is taken, and that are the first.
    """

    name, watched = "length_hacking", ("length_reward_correlation", "response_tokens")
    meaning = "Longer responses are rewarded more, and responses have grown: length may be all that is learned."
    remedy = (
        "Usual remedy: read samples.jsonl; a length term in the reward, pairs of equal length for the reward model, or "
        "an aggregation without length bias (constant)."
    )

    def __init__(self, correlation: float = 0.5, growth: float = 1.5, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.correlation = positive(self, "correlation", correlation)
        self.growth = positive(self, "growth", growth)

    def severity(self, curves: Curves) -> float | None:
        r, lengths = curves.level(self.watched[0], self.rounds), self.levels(curves)
        if r is None or lengths is None or not lengths[0]:
            return None
        return min(r / self.correlation, lengths[1] / lengths[0] / self.growth)

    def numbers(self, curves: Curves) -> Numbers:
        return {self.watched[0]: curves.level(self.watched[0], self.rounds) or 0.0, **super().numbers(curves)}


class EntropyCollapse(_SinceStart):
    """Entropy has fallen to a fraction of what it was in the first rounds.

    Args:
        fraction: of the mean entropy of the first rounds. rounds: of which the median is taken, and that are the first.
    """

    name, watched = "entropy_collapse", ("entropy",)
    meaning = "The policy hardly varies its responses any more: it explores nothing, and groups lose their signal."
    remedy = (
        "Usual remedy: a lower learning rate, an entropy bonus, a higher clip_high (DAPO: 0.28), a higher kl "
        "coefficient, or an earlier stop."
    )

    def __init__(self, fraction: float = 0.2, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.fraction = positive(self, "fraction", fraction)

    def severity(self, curves: Curves) -> float | None:
        levels = self.levels(curves)
        if levels is None or levels[0] <= 0:
            return None
        return self.fraction * levels[0] / max(levels[1], 1e-12)


class RepeatedText(_SinceStart):
    """Responses repeat themselves more than they did.

    Args:
        limit: repeated part of the 4-grams of a response (seq-rep-4 of Welleck et al. 2019).
        rise: since the first rounds, so that a start that repeats itself is not held against RL.
        rounds: of which the median is taken, and that are the first.
    """

    name, watched = "repeated_text", ("repeated_ngrams",)
    meaning = "Responses repeat themselves: the policy has found a loop that is rewarded, or cannot end its turn."
    remedy = "Usual remedy: read samples.jsonl; a repetition term in the reward, a higher kl coefficient."

    def __init__(self, limit: float = 0.2, rise: float = 0.1, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit, self.rise = positive(self, "limit", limit), positive(self, "rise", rise)

    def severity(self, curves: Curves) -> float | None:
        levels = self.levels(curves)
        if levels is None:
            return None
        start, now = levels
        return min(now / self.limit, (now - start) / self.rise)


class UselessCritic(Check):
    """The critic explains nothing of the returns, round after round.

    Args:
        rounds: in a row with an explained variance of at most 0.
    """

    name, watched = "useless_critic", ("explained_variance",)
    meaning = "The critic's values explain nothing of the returns; advantages are noisier than without a critic."
    remedy = (
        "Usual remedy: value warm-up rounds, a higher learning rate of the critic, a start from the reward model; or "
        "advantages of the group in place of a critic."
    )

    def __init__(self, rounds: int = 10) -> None:
        super().__init__(rounds)

    def severity(self, curves: Curves) -> float | None:
        values = curves.last("explained_variance", self.rounds)
        return 1.0 - max(values) if len(values) == self.rounds else None

    def numbers(self, curves: Curves) -> Numbers:
        return {"explained_variance": max(curves["explained_variance"].last(self.rounds))}


class RewardCollapse(Check):
    """The reward has lost most of what it had gained, or fallen below where it started.

    Args:
        lost: part of the gain from the first 10 rounds to the peak.
        deviations: between the first 10 rounds, that a loss must have at least: a curve of noise has a peak as well.
    """

    name, watched = "reward_collapse", ("reward",)
    meaning = "The reward has fallen back to where it started, or below."
    remedy = "Usual remedy: the best checkpoint in place of the last, a lower learning rate, a higher kl coefficient."

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
