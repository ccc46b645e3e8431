"""The base class of rewards, which users subclass to score episodes."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import located
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, is_finite
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Episode, Row


class EpisodeScorer(Protocol):
    """Scores episodes: a reward itself, or the object that its `build` returns."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """Models that move to other devices together with the trained module."""

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """See `Reward.score`."""


class Reward(Settings):
    """Base class of rewards. A subclass scores episodes; the rewards of a run are weighted and added.

    A reward contains only settings. `RewardTerm` adds the state of a run: models, statistics, the policy's renderer. A
    subclass that scores each episode by itself implements `score_one`; a subclass that compares or batches episodes
    implements `score`; and a subclass that loads a model implements `build`.

    Args:
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging; by default the class name.
        normalize: Normalizes scores before they are clipped and weighted.
        clip: Largest absolute value after normalization; None for no clipping.

    Raises:
        ConfigError: If the name is empty, or a number is out of range.

    Example:
        >>> class Brevity(Reward):
        ...     def score_one(self, episode):
        ...         return 1.0 if len(self.text(episode)) < 100 else 0.0
        >>> reward = Brevity(weight=0.5)
        >>> reward.score([Episode(prompt=[], row={}, group=0)])
        [1.0]
    """

    skip_special_tokens = True
    """True if responses are read without special tokens and the text that ended them, as environments read them."""
    scored_by_model = False
    """True if a preference model computes the scores."""
    models: Sequence[nn.Module] = ()

    def __init__(
        self,
        weight: float = 1.0,
        name: str | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
    ) -> None:
        self.weight = weight
        self.name = type(self).__name__ if name is None else name
        if not self.name:
            raise ConfigError(f"a {type(self).__name__} has an empty name, but its scores are logged under the name")
        check_finite(f"the weight of the reward {self.name}", weight)
        check_finite(f"the clip of the reward {self.name}", clip)
        if clip is not None and clip <= 0:
            raise ConfigError(f"the clip of the reward {self.name} is {clip}; it must be above 0")
        self.normalize, self.clip = normalize, clip

    def build(self, renderer: Renderer) -> EpisodeScorer:
        """Load what the reward needs, and return the object that scores; by default the reward itself.

        Called once, before the first episode.

        Args:
            renderer: The policy's renderer.
        """
        return self

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """Score episodes.

        Args:
            episodes: Finished episodes, `N` of them.

        Returns:
            `N` numbers; None where this term does not apply.

        Raises:
            DataError: If a row cannot be scored; with file and line.
        """
        found = []
        for episode in episodes:
            with located(episode.where or episode.label):
                found.append(self.score_one(episode))
        return found

    def score_one(self, episode: Episode) -> float | None:
        """Score an episode.

        Args:
            episode: A finished episode.

        Returns:
            A number; None if this term does not apply.

        Raises:
            RowError: If its row cannot be scored.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not implement score_one; a reward with its own build is scored through "
            "RewardTerm(reward, renderer)"
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` or `ConfigError` if prompts of the training data cannot be scored."""
        for prompt in prompts:
            with located(prompt.where):
                self.check_row(prompt.row)

    def check_row(self, row: Row) -> None:
        """Raise `RowError` if a row of the training data cannot be scored."""

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        """Check that no score depends on a text that is removed from responses before they are scored.

        Args:
            texts: The texts, for example special tokens of the template.
            rows: Data rows that the score may depend on, each with its location for error messages.

        Raises:
            ConfigError: If a setting depends on such a text.
            DataError: If a column of a row depends on such a text.
        """

    def refuse_hidden(self, setting: str, text: str | None) -> None:
        """Raise `ConfigError` if a setting depends on a text that is removed from responses.

        Args:
            setting: The setting, for the error message.
            text: The text that the setting depends on, if any.
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
        if episode.sampled_texts is None:
            raise ConfigError(
                f"the reward {self.name} needs a tokenizer to read special tokens; score with RewardTerm(reward, "
                "renderer)"
            )
        return episode.sampled_texts

    def text(self, episode: Episode) -> str:
        """The policy's last message, as this reward reads it."""
        return next(reversed(self.texts(episode)), "")


def check_finite(name: str, value: float | None) -> None:
    """Raise `ConfigError` unless a setting is None or a finite number.

    Args:
        name: Name of the setting, for the error message.
        value: Its value.
    """
    if value is not None and not is_finite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")
