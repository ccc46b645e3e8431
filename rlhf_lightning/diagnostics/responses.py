"""What responses look like: cut off, longer for the reward, repetitive, or always the same."""

from rlhf_lightning.diagnostics.check import MedianAbove, Numbers, SinceStart, positive
from rlhf_lightning.diagnostics.curves import Curves


class Truncation(MedianAbove):
    """Many responses run out of tokens.

    Args:
        limit: part of the episodes. rounds: of which the median is taken.
    """

    name, watched = "truncation", ("truncated",)
    meaning = "Many responses run out of tokens and are rewarded, or not, for what they did not finish saying."
    remedy = (
        "Usual remedy: a larger sampler.max_tokens, truncated_reward or overlong shaping; if it began high, SFT on "
        "conversations whose end token is trained."
    )

    def __init__(self, limit: float = 0.3, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class LengthHacking(SinceStart):
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


class RepeatedText(SinceStart):
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


class EntropyCollapse(SinceStart):
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
