"""Pairwise comparison within a group: each response against the other responses to its prompt."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

from rlhf_lightning.environments.user_calls import TimeLimitError, check_limit, run_calls
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.types import Episode

OUTCOMES = ("probability", "sign")


class PairwiseReward(Reward):
    """Wins minus losses against the other responses of the group, divided by their number: from −1 to 1.

    Each pair is judged in both orders and the two verdicts are averaged, which cancels a judge's position bias. The
    bias is logged as `reward_NAME_order_bias`. The term does not apply to a group of one.

    Args:
        judge: Called as `judge(prompt, a, b)` with the prompt's messages and two responses as text, sync or async; the
            function, or its dotted path in YAML.
        outcome: The judge's return value: the `probability` that a is better (0 to 1), or a `sign`: 1, 0 (tie) or -1.
        timeout: Seconds that a call may take.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging; by default the judge's name.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Raises:
        ConfigError: If `outcome` is unknown, or `judge` is not callable.

    Example:
        >>> def longer(prompt, a, b):
        ...     return (len(a) > len(b)) - (len(a) < len(b))
        >>> replies = [[{"role": "assistant", "content": text}] for text in ("Hi", "Hello")]
        >>> episodes = [Episode(prompt=[], row={}, group=0, responses=reply) for reply in replies]
        >>> PairwiseReward(longer, outcome="sign").score(episodes)
        [-1.0, 1.0]
    """

    def __init__(
        self,
        judge: Callable,
        outcome: str = "probability",
        timeout: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name or getattr(judge, "__name__", None))
        self.skip_special_tokens = skip_special_tokens
        if outcome not in OUTCOMES:
            raise ConfigError(
                f"the reward {self.name}: outcome is {outcome!r}; it must be one of {', '.join(OUTCOMES)}"
            )
        if not callable(judge):
            raise ConfigError(f"the reward {self.name}: the judge {judge!r} is not callable")
        check_limit(f"the timeout of the reward {self.name}", timeout)
        self.judge_of, self.outcome, self.timeout = judge, outcome, timeout

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        pairs = pairs_in_groups(episodes)
        return win_margins(self.name, episodes, pairs, self._verdicts(pairs))

    def _verdicts(self, pairs: Sequence[tuple[Episode, Episode]]) -> list[tuple[float, float]]:
        """For each pair, two numbers from −1 to 1: how much better a is judged in the order (a, b), and b in (b, a)."""
        texts = {id(episode): self.text(episode) for pair in pairs for episode in pair}
        different = [(a, b) for a, b in pairs if texts[id(a)] != texts[id(b)]]
        orders = [order for a, b in different for order in ((a, b), (b, a))]
        calls = [partial(self.judge_of, a.prompt, texts[id(a)], texts[id(b)]) for a, b in orders]
        values = []
        for (a, b), outcome in zip(orders, run_calls(calls, self.timeout), strict=True):
            where = f"the reward {self.name}, {a.label} against {b.label}"
            if isinstance(outcome.error, TimeLimitError):
                raise TimeLimitError(f"{where}: {outcome.error}") from outcome.error
            if outcome.error is not None:
                raise outcome.error
            values.append(self._checked(outcome.value, where))
        verdicts = iter(zip(values[::2], values[1::2], strict=True))
        # Equal texts are a tie; the judge is not called.
        return [next(verdicts) if texts[id(a)] != texts[id(b)] else (0.0, 0.0) for a, b in pairs]

    def _checked(self, value: float, where: str) -> float:
        """A verdict as a number from −1 to 1."""
        value = value.item() if hasattr(value, "item") else value
        check_finite(f"{where}: the judge's verdict", 0.5 if value is None else value)
        if self.outcome == "sign" and value in (-1, 0, 1):
            return float(value)
        if self.outcome == "probability" and value is not None and 0 <= value <= 1:
            return 2 * float(value) - 1
        wanted = "1, 0 or -1" if self.outcome == "sign" else "a probability from 0 to 1"
        raise ConfigError(f"{where}: the judge returned {value!r}; it must return {wanted}")


def pairs_in_groups(episodes: Sequence[Episode]) -> list[tuple[Episode, Episode]]:
    """All pairs of episodes with the same prompt."""
    groups: dict[int, list[Episode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.group].append(episode)
    return [pair for group in groups.values() for pair in combinations(group, 2)]


def win_margins(
    name: str,
    episodes: Sequence[Episode],
    pairs: Sequence[tuple[Episode, Episode]],
    verdicts: Sequence[tuple[float, float] | None],
) -> list[float | None]:
    """Wins minus losses of each episode divided by the number of its pairs, from −1 to 1; None without a pair.

    Records the mean preference for the first position as the detail `NAME_order_bias`.

    Args:
        name: Name of the reward.
        episodes: The episodes, `N` of them.
        pairs: Pairs of them.
        verdicts: For each pair, two numbers from −1 to 1: how much better a is judged in the order (a, b), and b in
            (b, a). None for a pair without a verdict, which counts for neither episode.
    """
    wins: dict[int, list[float]] = {id(episode): [] for episode in episodes}
    bias: dict[int, list[float]] = {id(episode): [] for episode in episodes}
    for (a, b), verdict in zip(pairs, verdicts, strict=True):
        if verdict is None:
            continue
        forward, backward = verdict
        margin = (forward - backward) / 2
        wins[id(a)].append(margin)
        wins[id(b)].append(-margin)
        for episode in (a, b):
            bias[id(episode)].append(abs(forward + backward) / 2)
    for episode in episodes:
        if bias[id(episode)]:
            episode.details[f"{name}_order_bias"] = _mean(bias[id(episode)])
    return [_mean(wins[id(episode)]) if wins[id(episode)] else None for episode in episodes]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
