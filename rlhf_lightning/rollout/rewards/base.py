"""What a reward is, and how parts are added up."""

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
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.interrupts import no_exit, raised_at
from rlhf_lightning.models.safe_points import safe_point
from rlhf_lightning.rollout.episodes import Episode
from rlhf_lightning.rollout.ranks import once
from rlhf_lightning.rollout.rewards.normalise import RUNNING, Normaliser


class RewardError(UserError):
    """A reward raised an exception."""


class Reward(nn.Module):
    """A part of the reward. A subclass scores episodes; the parts are weighted and added.

    Args:
        weight: of this part; 0 only measures it.
        name: under which it is logged; the class's by default.
        normalise: brings scores to a common scale before they are clipped and weighted.
        clip: the largest absolute value, after normalising.
    """

    def __init__(
        self,
        weight: float = 1.0,
        name: str | None = None,
        normalise: Normaliser | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.name = type(self).__name__ if name is None else name
        if not self.name:
            raise ConfigError(f"a {type(self).__name__} has an empty name; it is logged under it")
        check_finite(f"the weight of the reward {self.name}", weight)
        check_finite(f"the clip of the reward {self.name}", clip)
        if clip is not None and clip <= 0:
            raise ConfigError(f"the clip of the reward {self.name} is {clip}; it must be above 0")
        self.normalise, self.clip = normalise, clip

    skip_special_tokens = True
    """Whether responses are read without special tokens and what ended them, as environments see them."""
    _renderer: Renderer | None = None

    def bind(self, renderer: Renderer) -> None:
        """Load what the reward needs; called once, before the first episode, with the policy's renderer."""
        self._renderer = renderer
        self.hide([text for text in (*renderer.template.markers, *renderer.stop_strings) if text.strip()])
        if self.normalise is not None:
            self.normalise.bind(renderer, self.score)

    def hide(self, texts: Sequence[str]) -> None:
        """Take note of texts that responses are read without; raise `ConfigError` where a score would need one."""

    def refuse_hidden(self, setting: str, text: str | None) -> None:
        """Raise `ConfigError` where a setting needs a text that responses are read without."""
        if text is not None and self.skip_special_tokens:
            raise ConfigError(
                f"the reward {self.name}: {setting} can only match where a response has {text!r}, and responses are "
                "read without special tokens and without the text that ended them. Set skip_special_tokens: false on "
                "the reward, or leave it out there"
            )

    def texts(self, episode: Episode) -> list[str]:
        """What the policy said in each of its turns, as this reward reads it."""
        if self.skip_special_tokens:
            return [message["content"] or "" for message in episode.responses if message["role"] == "assistant"]
        if self._renderer is None:
            raise ConfigError(f"the reward {self.name}: call bind first; special tokens are read by a tokenizer")
        return [self._renderer.tokenizer.decode(ids, skip_special_tokens=False) for ids in episode.drawn()]

    def text(self, episode: Episode) -> str:
        """What the policy said last, as this reward reads it."""
        return next(reversed(self.texts(episode)), "")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` or `ConfigError` where the prompts that will be trained on cannot be scored."""

    @abstractmethod
    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """A number for each episode; None where this part does not apply to it."""

    def amounts(self, scores: Sequence[float | None], running: str) -> list[float | None]:
        """What scores add to the reward: normalised, clipped, weighted."""
        values = [score for score in scores if score is not None]
        if self.normalise is not None:
            values = self.normalise.normalised(values, running)
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
    """Score every part, keep the scores apart in `episode.parts`, and set `episode.reward` to their weighted sum.

    An episode that failed is scored by none.

    Args:
        truncated_reward: replaces the reward of an episode that ran out of tokens.
        running: what rewards that are normalised by running statistics do: `update` these by the scores (all ranks
            together), `use` them as they are, or `off`: leave scores as they are, so that what is held out stays
            comparable from one time to the next.

    Raises:
        ConfigError: a part that returns the wrong count, or something that is no finite number.
    """
    if running not in RUNNING:
        raise ValueError(f"running is {running!r}; one of {', '.join(RUNNING)}")
    played = [episode for episode in episodes if not episode.failed]
    totals = [episode.environment_reward for episode in played]
    for part in rewards:
        safe_point()
        scores, details = once(partial(_asked, part, played))
        for i, amount in enumerate(part.amounts(scores, running)):
            played[i].parts[part.name], played[i].details = scores[i], details[i]
            totals[i] += 0.0 if amount is None else amount
    for episode, total in zip(played, totals, strict=True):
        episode.reward = truncated_reward if episode.truncated and truncated_reward is not None else total


def _asked(part: Reward, episodes: Sequence[Episode]) -> tuple[list[float | None], list[dict[str, Any]]]:
    """The scores of a part, and what it noted of the episodes."""
    return _scores(part, episodes), [episode.details for episode in episodes]


def _scores(part: Reward, episodes: Sequence[Episode]) -> list[float | None]:
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
            f"the reward {part.name} returned {_short(returned)}; it must return a list of one number for each episode"
        )
    try:
        scores = list(returned)
    except TypeError:  # a tensor without dimensions
        scores = [returned]
    if len(scores) != len(episodes):
        raise ConfigError(f"the reward {part.name} returned {len(scores)} numbers for {len(episodes)} episodes")
    return [_number(score, part.name, episode) for score, episode in zip(scores, episodes, strict=True)]


def _failure(part: Reward, episodes: Sequence[Episode], error: Exception) -> str:
    """What a reward raised, where in its code, and for which episode, found by scoring them one by one."""
    label = f"{len(episodes)} episodes together (each alone can be scored), the first {episodes[0].label}"
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
        "Mend it, or return None where it does not apply; the same command then resumes the run."
    )


def _number(score: Any, name: str, episode: Episode) -> float | None:
    if score is None:
        return None
    value = score
    if hasattr(score, "item"):  # tensors and numpy numbers, which say there whether they are booleans
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
