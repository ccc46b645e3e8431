"""The base class of rewards, and the sum of their weighted scores."""

import math
import traceback
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import run_on_leader
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.rewards.normalization import RUNNING, Normalizer
from rlhf_lightning.safe_points import safe_point
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Episode
from rlhf_lightning.user_exits import no_exit, raised_at


class RewardError(UserError):
    """A reward raised an exception."""


class Reward(Settings, nn.Module):
    """Base class of rewards. A subclass scores episodes; the terms are weighted and added.

    Args:
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under; by default the class's.
        normalize: Brings scores to a common scale before they are clipped and weighted.
        clip: Largest absolute value after normalization; None for no clipping.

    Raises:
        ConfigError: If the name is empty, or a number is out of range.

    Example:
        >>> class Brevity(Reward):
        ...     def score(self, episodes):
        ...         return [1.0 if len(self.text(episode)) < 100 else 0.0 for episode in episodes]
        >>> reward = Brevity(weight=0.5)
        >>> reward.score([Episode(prompt=[], row={}, group=0)])
        [1.0]
    """

    def __init__(
        self,
        weight: float = 1.0,
        name: str | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.name = type(self).__name__ if name is None else name
        if not self.name:
            raise ConfigError(f"a {type(self).__name__} has an empty name; its scores are logged under the name")
        check_finite(f"the weight of the reward {self.name}", weight)
        check_finite(f"the clip of the reward {self.name}", clip)
        if clip is not None and clip <= 0:
            raise ConfigError(f"the clip of the reward {self.name} is {clip}; it must be above 0")
        self.normalize, self.clip = normalize, clip

    skip_special_tokens = True
    """True if responses are read without special tokens and the text that ended them, as environments see them."""
    _renderer: Renderer | None = None

    def bind(self, renderer: Renderer) -> None:
        """Load what the reward needs; called once, before the first episode.

        Args:
            renderer: The policy's renderer.
        """
        self._renderer = renderer
        self.hide([text for text in (*renderer.template.markers, *renderer.stop_strings) if text.strip()])
        if self.normalize is not None:
            self.normalize.bind(renderer, self.score)

    def hide(self, texts: Sequence[str]) -> None:
        """Record texts that responses are read without.

        Args:
            texts: The texts, for example special tokens of the template.

        Raises:
            ConfigError: If a score depends on one of them.
        """

    def refuse_hidden(self, setting: str, text: str | None) -> None:
        """Raise `ConfigError` if a setting depends on a text that responses are read without.

        Args:
            setting: The setting, as the message names it.
            text: The text that it depends on, if any.
        """
        if text is not None and self.skip_special_tokens:
            raise ConfigError(
                f"the reward {self.name}: {setting} can only match if a response contains {text!r}, but responses are "
                "read without special tokens and without the text that ended them. Set skip_special_tokens: false on "
                "the reward, or remove that text from the setting"
            )

    def texts(self, episode: Episode) -> list[str]:
        """The policy's message in each of its turns, as this reward reads it."""
        if self.skip_special_tokens:
            return [message["content"] or "" for message in episode.responses if message["role"] == "assistant"]
        if self._renderer is None:
            raise ConfigError(f"the reward {self.name}: call bind first; reading special tokens needs a tokenizer")
        return [self._renderer.tokenizer.decode(ids, skip_special_tokens=False) for ids in episode.sampled_turns()]

    def text(self, episode: Episode) -> str:
        """The policy's last message, as this reward reads it."""
        return next(reversed(self.texts(episode)), "")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` or `ConfigError` if prompts of the training data cannot be scored."""

    @abstractmethod
    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """Score episodes.

        Args:
            episodes: Finished episodes, `N` of them.

        Returns:
            `N` numbers; None where this term does not apply.
        """

    def amounts(self, scores: Sequence[float | None], running: str) -> list[float | None]:
        """What scores contribute to the reward: normalized, clipped, weighted.

        Args:
            scores: As `score` returns them.
            running: See `total_rewards`.
        """
        values = [score for score in scores if score is not None]
        if self.normalize is not None:
            values = self.normalize.normalized(values, running)
        if self.clip is not None:
            values = [min(self.clip, max(-self.clip, value)) for value in values]
        found = iter(values)
        return [None if score is None else self.weight * next(found) for score in scores]


def total_rewards(
    episodes: Sequence[Episode],
    rewards: Sequence[Reward],
    truncated_reward: float | None = None,
    running: str = "off",
) -> None:
    """Score every term, store the scores in `episode.terms`, and set `episode.reward` to their weighted sum.

    Failed episodes are not scored.

    Args:
        episodes: Finished episodes.
        rewards: The terms.
        truncated_reward: Replaces the reward of an episode that ran out of tokens.
        running: What rewards with running normalization do: `update` the statistics with these scores (all ranks
            together), `use` them as they are, or `off` for raw scores, so that held-out scores stay comparable over
            time.

    Raises:
        ConfigError: If a term returns the wrong number of scores, or something other than finite numbers.
    """
    if running not in RUNNING:
        raise ValueError(f"running is {running!r}; it must be one of {', '.join(RUNNING)}")
    played = [episode for episode in episodes if not episode.failed]
    totals = [episode.environment_reward for episode in played]
    for part in rewards:
        safe_point()
        scores, details = run_on_leader(partial(_scores_and_details, part, played))
        for i, amount in enumerate(part.amounts(scores, running)):
            played[i].terms[part.name], played[i].details = scores[i], details[i]
            totals[i] += 0.0 if amount is None else amount
    for episode, total in zip(played, totals, strict=True):
        episode.reward = truncated_reward if episode.truncated and truncated_reward is not None else total


def _scores_and_details(part: Reward, episodes: Sequence[Episode]) -> tuple[list[float | None], list[dict[str, Any]]]:
    """A term's scores, and the details that it recorded on the episodes."""
    return _scores(part, episodes), [episode.details for episode in episodes]


def _scores(part: Reward, episodes: Sequence[Episode]) -> list[float | None]:
    """A term's scores, checked."""
    if not episodes:
        return []
    try:
        with no_exit():
            returned: Any = part.score(episodes)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(_failure(part, episodes, error)) from error
    if isinstance(returned, str) or not hasattr(returned, "__iter__"):
        raise ConfigError(
            f"the reward {part.name} returned {_short(returned)}; it must return a list with one number per episode"
        )
    try:
        scores = list(returned)
    except TypeError:  # a zero-dimensional tensor
        scores = [returned]
    if len(scores) != len(episodes):
        raise ConfigError(f"the reward {part.name} returned {len(scores)} numbers for {len(episodes)} episodes")
    return [_number(score, part.name, episode) for score, episode in zip(scores, episodes, strict=True)]


def _failure(part: Reward, episodes: Sequence[Episode], error: Exception) -> str:
    """Message about an exception in a reward: where it was raised, and for which episode (found one by one)."""
    label = f"{len(episodes)} episodes together (each can be scored alone), the first being {episodes[0].label}"
    for episode in episodes:
        try:
            with no_exit():
                part.score([episode])
        except Exception as alone:  # noqa: BLE001 - it is reported
            error, label = alone, episode.label
            break
    frame = raised_at(error) or traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return (
        f"the reward {part.name} failed with {text} ({frame.filename}:{frame.lineno} in {frame.name}) for {label}. "
        "Fix it, or return None for episodes that it does not apply to; the same command then resumes the run."
    )


def _number(score: Any, name: str, episode: Episode) -> float | None:
    """A score as a finite float, or None."""
    if score is None:
        return None
    value = score
    if hasattr(score, "item"):  # converts tensors and numpy numbers; booleans become Python ones and are refused
        with suppress(ValueError, RuntimeError):
            value = score.item()
    if isinstance(value, bool) or not hasattr(value, "__float__") or not _finite(value):
        raise ConfigError(
            f"the reward {name} returned {_short(score)} for {episode.label}; it must be a finite number, or None"
        )
    return float(value)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):
        return False


def check_finite(name: str, value: Any) -> None:
    """Raise `ConfigError` unless a setting is None or a finite number."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
