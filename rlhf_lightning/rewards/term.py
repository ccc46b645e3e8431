"""Rewards in a run, with their models and normalization statistics, and the weighted sum of all terms."""

import math
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import run_on_leader, safe_point
from rlhf_lightning.errors import ConfigError, UserError, is_finite, short
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.normalization import RUNNING
from rlhf_lightning.sys_exit import no_exit, raised_at
from rlhf_lightning.types import Episode

UncheckedScore = float | Tensor | Sequence[float | None] | None
"""Return value of a user's reward for an episode; `_number` rejects anything but a number or None."""


class RewardError(UserError):
    """A reward raised an exception."""


class RewardTerm(nn.Module):
    """A reward with its models and the statistics of its normalization.

    Args:
        reward: The settings.
        renderer: The policy's renderer.
        stop: Texts that end a response, in addition to the template's end of turn.

    Raises:
        ConfigError: If the reward cannot be built, or depends on a text that is removed from responses.

    Example:
        >>> term = RewardTerm(KeywordReward(["risk"]), Renderer(tokenizer))  # doctest: +SKIP
        >>> total_rewards(episodes, [term])  # doctest: +SKIP
    """

    def __init__(self, reward: Reward, renderer: Renderer, stop: Sequence[str] = ()) -> None:
        super().__init__()
        self.reward, self.name, self._tokenizer = reward, reward.name, renderer.tokenizer
        markers = (*renderer.template.markers, *renderer.stop_strings)
        self._hidden = [*(text for text in markers if text.strip()), *stop]
        """Texts that are removed from responses before they are scored."""
        reward.check_hidden(self._hidden)
        self.scorer = reward.build(renderer)
        self.models = nn.ModuleList(self.scorer.models)
        self.statistics = None if reward.normalize is None else reward.normalize.build(renderer, self.score)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `DataError` or `ConfigError` if prompts of the training data cannot be scored."""
        self.reward.check(prompts)
        self.reward.check_hidden(self._hidden, [(prompt.row, prompt.where) for prompt in prompts])

    def score(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Score episodes, and check the scores.

        Args:
            episodes: Finished episodes, `N` of them.

        Returns:
            `N` finite numbers; None where this term does not apply.

        Raises:
            RewardError: If the reward raised an exception.
            ConfigError: If it returned the wrong number of scores, or something other than finite numbers.
        """
        if not episodes:
            return []
        self.reward.check_hidden(self._hidden, [(e.row, e.where or e.label) for e in episodes])
        if not self.reward.skip_special_tokens:
            for episode in episodes:
                turns = episode.sampled_turns()
                episode.sampled_texts = [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in turns]
        try:
            with no_exit():
                returned = self.scorer.score(episodes)
        except UserError:
            raise
        except Exception as error:
            raise RewardError(self._failure(episodes, error)) from error
        if isinstance(returned, str) or not hasattr(returned, "__iter__"):
            raise ConfigError(
                f"the reward {self.name} returned {short(returned)}; it must return a list with one number per episode"
            )
        scores: list[UncheckedScore]
        try:
            scores = list(returned)
        except TypeError:  # a zero-dimensional tensor
            scores = [returned]
        if len(scores) != len(episodes):
            raise ConfigError(f"the reward {self.name} returned {len(scores)} numbers for {len(episodes)} episodes")
        return [_number(score, self.name, episode) for score, episode in zip(scores, episodes, strict=True)]

    def scores_and_details(self, episodes: Sequence[Episode]) -> tuple[list[float | None], list[dict[str, float]]]:
        """The result of `score`, and the details that the reward recorded on each episode."""
        return self.score(episodes), [episode.details for episode in episodes]

    def amounts(self, scores: Sequence[float | None], running_normalization: str) -> list[float | None]:
        """Contributions to the reward: the scores, normalized, clipped and weighted.

        Args:
            scores: The scores, as `score` returns them.
            running_normalization: See `total_rewards`.
        """
        values, clip = [score for score in scores if score is not None], self.reward.clip
        if self.statistics is not None:
            values = self.statistics.normalized(values, running_normalization)
        if clip is not None:
            values = [min(clip, max(-clip, value)) for value in values]
        remaining = iter(values)
        return [None if score is None else self.reward.weight * next(remaining) for score in scores]

    def _failure(self, episodes: Sequence[Episode], error: Exception) -> str:
        """Error message for an exception in the reward, with the line and the episode (found by scoring one by one)."""
        label = f"{len(episodes)} episodes together (each can be scored alone); the first is {episodes[0].label}"
        for episode in episodes:
            try:
                with no_exit():
                    self.scorer.score([episode])
            except Exception as error_of_one:  # noqa: BLE001 - it is reported
                error, label = error_of_one, episode.label
                break
        frame = raised_at(error) or traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return (
            f"the reward {self.name} failed with {text} ({frame.filename}:{frame.lineno} in {frame.name}) for {label}. "
            "Fix the reward, or return None for episodes that it does not apply to; the same command then resumes the "
            "run."
        )


def total_rewards(
    episodes: Sequence[Episode],
    terms: Sequence[RewardTerm],
    truncated_reward: float | None = None,
    running_normalization: str = "off",
) -> None:
    """Score every term, store the scores in `episode.terms`, and set `episode.reward` to their weighted sum.

    Failed episodes are not scored.

    Args:
        episodes: Finished episodes.
        terms: The terms.
        truncated_reward: Replaces the reward of an episode that ran out of tokens.
        running_normalization: How rewards with running normalization treat these scores: `update` adds them to the
            statistics (all ranks together) and normalizes them, `use` only normalizes them, and `off` returns raw
            scores, so that held-out scores stay comparable over time.

    Raises:
        ConfigError: If a term returns the wrong number of scores, or something other than finite numbers.
    """
    if running_normalization not in RUNNING:
        raise ValueError(f"running_normalization is {running_normalization!r}; it must be one of {', '.join(RUNNING)}")
    completed = [episode for episode in episodes if not episode.failed]
    totals = [episode.environment_reward for episode in completed]
    for term in terms:
        safe_point()
        scores, details = run_on_leader(partial(term.scores_and_details, completed))
        for i, amount in enumerate(term.amounts(scores, running_normalization)):
            completed[i].terms[term.name], completed[i].details = scores[i], details[i]
            totals[i] += 0.0 if amount is None else amount
    for episode, total in zip(completed, totals, strict=True):
        if not is_finite(total):
            raise ConfigError(f"the weighted rewards of {episode.label} sum to {total!r}, which exceeds float32")
        episode.reward = truncated_reward if episode.truncated and truncated_reward is not None else total


def _number(score: UncheckedScore, name: str, episode: Episode) -> float | None:
    """A score as a finite float, or None."""
    if score is None:
        return None
    value, number = score, math.nan
    if hasattr(score, "item"):  # converts tensors and numpy numbers; booleans become Python ones and are refused
        with suppress(ValueError, RuntimeError):
            value = score.item()
    if hasattr(value, "__float__") and not isinstance(value, bool):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(value)
    if not is_finite(number):
        raise ConfigError(
            f"the reward {name} returned {short(score)} for {episode.label}; it must be a finite number, or None"
        )
    return number
