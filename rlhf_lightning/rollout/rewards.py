"""Rewards: finished episodes in, one number each out."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.rollout.episodes import Episode


class Reward(nn.Module):
    """A part of the reward. A subclass scores episodes; the parts are weighted and added.

    Args:
        weight: of this part.
        name: under which it is logged; the class's by default.
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.name = name or type(self).__name__

    def bind(self, renderer: Renderer) -> None:
        """Load what the reward needs; called once, before the first episode, with the policy's renderer."""

    @abstractmethod
    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """A number for each episode; None where this part does not apply to it."""


class FunctionReward(Reward):
    """A Python function, named in YAML by its dotted path.

    It is called with the keywords that its signature names, each a list with one entry for each episode: `prompts`
    (messages), `completions` (the last response as text), `episodes`, and every column of the data. It returns as
    many numbers; None where it does not apply.

    Args:
        function: the function, or its dotted path in YAML.
        weight: of this part.
        name: under which it is logged; the function's by default.
    """

    def __init__(self, function: Callable, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name or getattr(function, "__name__", None))
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._wanted = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self._required = {p.name for p in parameters if p.name in self._wanted and p.default is p.empty}

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        columns = {key for episode in episodes for key in episode.row}
        offered: dict[str, Any] = {key: [episode.row.get(key) for episode in episodes] for key in columns}
        offered |= {
            "prompts": [episode.prompt for episode in episodes],
            "completions": [episode.response for episode in episodes],
            "episodes": list(episodes),
        }
        if missing := self._required - set(offered):
            raise ConfigError(
                f"the reward function {self.name} wants {sorted(missing)[0]!r}; "
                f"it can have {', '.join(sorted(offered))}"
            )
        return self.function(**{k: v for k, v in offered.items() if self._takes_all or k in self._wanted})


class ModelReward(Reward):
    """A trained preference model, of any scorer.

    Where its tokenizer and template are the policy's, the very tokens that were drawn are scored; else the messages
    are, through its own.

    Args:
        model: the model folder.
        weight: of this part.
        name: under which it is logged.
        dtype: of its weights.
    """

    def __init__(self, model: str, weight: float = 1.0, name: str = "reward_model", dtype: str = "float32") -> None:
        super().__init__(weight, name)
        self.source, self.dtype_name = model, dtype
        self.judge: RewardModel | None = None

    def bind(self, renderer: Renderer) -> None:
        self.judge = RewardModel(self.source, self.dtype_name)
        self._by_tokens = self.judge.same_tokens(renderer)

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        assert self.judge is not None, "bind() comes first"
        answered = [episode for episode in episodes if episode.response_tokens]
        scores = iter(self._score(answered) if answered else [])
        # An episode that had no room for a response has nothing to be scored.
        return [next(scores) if episode.response_tokens else None for episode in episodes]

    def _score(self, episodes: Sequence[Episode]) -> list[float]:
        assert self.judge is not None
        if self._by_tokens:
            rows = [_last_turn(episode) for episode in episodes]
            return self.judge.score_tokens([ids for ids, _ in rows], [mask for _, mask in rows]).tolist()
        last = [max(i for i, m in enumerate(e.responses) if m["role"] == "assistant") for e in episodes]
        prompts = [episode.prompt + episode.responses[:i] for episode, i in zip(episodes, last, strict=True)]
        answers = [[episode.responses[i]] for episode, i in zip(episodes, last, strict=True)]
        tools = [episode.tools for episode in episodes]
        return self.judge.score(prompts, answers, tools, allow_blank=True).tolist()


def _last_turn(episode: Episode) -> tuple[list[int], list[int]]:
    """The row that holds the last response, cut after it, and the mask of that response alone."""
    segment = next(segment for segment in reversed(episode.segments) if segment.actions)
    end = len(segment.mask) - segment.mask[::-1].index(1)
    start = end
    while start and segment.mask[start - 1]:
        start -= 1
    return segment.ids[:end], [0] * start + [1] * (end - start)


class KeywordReward(Reward):
    """A rule: `hit` for a response of at least `min_words` words with one of `keywords`, else `miss`.

    The defaults are the rule of the MinT recipe.
    """

    def __init__(
        self,
        keywords: Sequence[str] = ("specific", "automatic", "risk", "restore", "actionable"),
        min_words: int = 6,
        hit: float = 0.5,
        miss: float = -0.1,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.keywords, self.min_words = [word.lower() for word in keywords], min_words
        self.hit, self.miss = hit, miss

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        return [self._one(episode.response.lower()) for episode in episodes]

    def _one(self, text: str) -> float:
        enough = len(text.split()) >= self.min_words
        return self.hit if enough and any(word in text for word in self.keywords) else self.miss


def total_rewards(
    episodes: Sequence[Episode], rewards: Sequence[Reward], truncated_reward: float | None = None
) -> None:
    """Score every part, keep them apart in `episode.parts`, and set `episode.reward` to their weighted sum.

    Args:
        truncated_reward: replaces the reward of an episode that ran out of tokens.

    Raises:
        ConfigError: a part that returns the wrong count, or something that is no finite number.
    """
    for part in rewards:
        scores = list(part.score(episodes)) if episodes else []
        if len(scores) != len(episodes):
            raise ConfigError(f"the reward {part.name} returned {len(scores)} numbers for {len(episodes)} episodes")
        for episode, score in zip(episodes, scores, strict=True):
            episode.parts[part.name] = None if score is None else _number(score, part.name)
    weights = {part.name: part.weight for part in rewards}
    for episode in episodes:
        parts = [weights[name] * value for name, value in episode.parts.items() if value is not None]
        episode.reward = episode.environment_reward + sum(parts)
        if episode.truncated and truncated_reward is not None:
            episode.reward = truncated_reward


def _number(score: Any, name: str) -> float:
    if isinstance(score, torch.Tensor):
        score = score.item()
    if isinstance(score, bool) or not hasattr(score, "__float__") or not math.isfinite(score):
        raise ConfigError(f"the reward {name} returned {score!r}; it must be a finite number, or None")
    return float(score)
