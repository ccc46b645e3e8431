"""Checks of responses: truncation, length as a proxy for reward, repetition, and loss of variety."""

from rlhf_lightning.diagnostics.check import MedianAbove, Numbers, SinceStart, positive
from rlhf_lightning.diagnostics.curves import FIRST, RECENT, Curves, noise


class Truncation(MedianAbove):
    """Many responses are truncated.

    Args:
        limit: Fraction of the episodes.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> Truncation(limit=0.25, rounds=1).severity(Curves.of(truncated=[0.5]))
        2.0
    """

    name, watched = "truncation", ("truncated",)
    meaning = "Many responses reach max_tokens and are truncated, so the rewards are for unfinished text."
    remedy = (
        "Usual remedy: a larger sampler.max_tokens, truncated_reward or OverlongPenalty; if responses are truncated "
        "from the start, SFT on conversations with a trained end token."
    )

    def __init__(self, limit: float = 0.3, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class LengthHacking(SinceStart):
    """The reward correlates with length, and responses have become longer.

    Args:
        correlation: Correlation of length and reward over the episodes of a round.
        growth: Ratio of the mean length to that of the first rounds.
        rounds: Number of rounds for the median, and number of first rounds.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> curves = Curves.of(length_reward_correlation=[0.5, 1.0], response_tokens=[10.0, 30.0])
        >>> LengthHacking(rounds=1).severity(curves)
        2.0
    """

    name, watched = "length_hacking", ("length_reward_correlation", "response_tokens")
    meaning = "Longer responses get higher rewards, and responses have become longer: the policy may learn only length."
    remedy = (
        "Usual remedy: read samples.jsonl; add a length term to the reward, train the reward model on pairs of equal "
        "length, or use an aggregation without length bias (constant)."
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


class LengthCollapse(SinceStart):
    """Responses have become much shorter while the reward rose.

    Args:
        fraction: Ratio of the mean length to that of the first rounds.
        deviations: Smallest rise of the reward since the first rounds that counts, in standard deviations of the reward
            around its trend (`curves.noise` of the last 40 rounds; at least 10 rounds are needed).
        rounds: Number of rounds for the median, and number of first rounds.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> curves = Curves.of(reward=[i / 20 for i in range(11)], response_tokens=[40.0] * 10 + [10.0])
        >>> LengthCollapse(fraction=0.5, rounds=1).severity(curves)
        2.0
    """

    name, watched = "length_collapse", ("reward", "response_tokens")
    meaning = "The reward has risen while responses have become much shorter, and may have lost content."
    remedy = (
        "Usual remedy: compare samples of the first and last rounds; add a reward from a preference model or a target "
        "length (LengthReward), or use a higher kl coefficient."
    )

    def __init__(self, fraction: float = 0.5, deviations: float = 3.0, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.fraction = positive(self, "fraction", fraction)
        self.deviations = positive(self, "deviations", deviations)

    def severity(self, curves: Curves) -> float | None:
        levels, rewards, recent = self.levels(curves), self._rewards(curves), curves.last("reward", RECENT)
        if levels is None or rewards is None or len(recent) < FIRST:
            return None
        # The deviation of the first rounds would not do: it is large if the reward rises within them.
        rise = (rewards[1] - rewards[0]) / max(self.deviations * noise(recent), 1e-12)
        return min(self.fraction * levels[0] / max(levels[1], 1e-12), rise)

    def numbers(self, curves: Curves) -> Numbers:
        start, now = self._rewards(curves) or (0.0, 0.0)
        return {"reward_at_first": start, "reward": now, **super().numbers(curves)}

    def _rewards(self, curves: Curves) -> tuple[float, float] | None:
        """The reward at the start and now; None before there are enough rounds."""
        start, now = curves.start("reward", self.rounds), curves.level("reward", self.rounds)
        return None if start is None or now is None else (start, now)


class RepeatedText(SinceStart):
    """Responses repeat themselves more than at the start.

    Args:
        limit: Fraction of repeated 4-grams in an episode (seq-rep-4 of Welleck et al. 2019, arXiv 1908.04319).
        rise: Increase since the first rounds, so that repetition of the start model does not count.
        rounds: Number of rounds for the median, and number of first rounds.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> RepeatedText(limit=0.25, rise=0.25, rounds=1).severity(Curves.of(repeated_ngrams=[0.0, 0.5]))
        2.0
    """

    name, watched = "repeated_text", ("repeated_ngrams",)
    meaning = "Responses repeat themselves: repetition is rewarded, or the policy does not end its turns."
    remedy = "Usual remedy: read samples.jsonl; add a repetition term to the reward, or use a higher kl coefficient."

    def __init__(self, limit: float = 0.2, rise: float = 0.1, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit, self.rise = positive(self, "limit", limit), positive(self, "rise", rise)

    def severity(self, curves: Curves) -> float | None:
        levels = self.levels(curves)
        if levels is None:
            return None
        start, now = levels
        return min(now / self.limit, (now - start) / self.rise)


class EntropyCollapse(SinceStart):
    """The entropy has fallen to a fraction of its level in the first rounds.

    Args:
        fraction: Fraction of the mean entropy of the first rounds.
        rounds: Number of rounds for the median, and number of first rounds.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> EntropyCollapse(fraction=0.25, rounds=1).severity(Curves.of(entropy=[1.0, 0.125]))
        2.0
    """

    name, watched = "entropy_collapse", ("entropy",)
    meaning = "The policy hardly varies its responses, so it stops exploring, and the rewards of a group become equal."
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
