"""Rewards from trained preference models: one model, or an ensemble."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.base import imported
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.offload import Placement, check_place
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.types import Episode


class ModelReward(Reward):
    """A trained preference model with any scorer.

    If its tokenizer and template are the policy's, it scores the sampled tokens themselves. Otherwise it renders the
    messages with its own template; it does so too for responses that were ended by one of the sampler's stop texts.

    Args:
        model: The model folder.
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under.
        dtype: Type of its weights.
        device: Where it stays and runs (`cpu`, `cuda:1`); by default the policy's device.
        normalize: Brings scores to a common scale before they are clipped and weighted.
        clip: Largest absolute value after normalization.
        offload: Keep the weights in CPU memory except while a round is scored.
        scorer: Dotted path of your own scorer class, if the model was trained with one.

    Raises:
        ConfigError: If the scorer cannot be imported, or `device` and `offload` are both set.

    Example:
        ```python
        reward = ModelReward("runs/demo/preference/model", normalize=RunningNorm(), clip=5.0)
        ```
    """

    def __init__(
        self,
        model: str,
        weight: float = 1.0,
        name: str = "reward_model",
        dtype: str = "float32",
        device: str | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
        offload: bool = False,
        scorer: str | None = None,
    ) -> None:
        super().__init__(weight, name, normalize, clip)
        if scorer is not None:
            imported(scorer, f"the scorer of the reward {name}:")
        self.source, self.dtype_name, self.device_name, self.offload = model, dtype, device, offload
        check_place(f"the reward {name}", device, offload)
        self._place: Placement | None = None
        self._judge: RewardModel | None = None
        self._apart: tuple[RewardModel, ...] = ()
        self._policy: Renderer | None = None

    @property
    def judge(self) -> RewardModel | None:
        """The model, once it is loaded."""
        return self._apart[0] if self._apart else self._judge

    def bind(self, renderer: Renderer) -> None:
        judge = RewardModel(self.source, self.dtype_name)
        if self.device_name is None:
            self._judge = judge
            self._place = Placement(judge, offload=True) if self.offload else None
        else:  # in a tuple, so that torch does not register it and move it with the module
            self._apart = (judge.to(self.device_name),)
        self._policy, self._by_tokens = renderer, judge.same_tokens(renderer)
        super().bind(renderer)

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        assert self.judge is not None, "bind() comes first"
        # An episode without room for a response has nothing to score.
        answered = [i for i, episode in enumerate(episodes) if episode.response_tokens]
        sampled = [i for i in answered if self._sees_same_tokens(episodes[i])]
        shown = sorted(set(answered) - set(sampled))
        found: list[float | None] = [None] * len(episodes)
        with self._place.on_device() if self._place else nullcontext():
            for places, scorer in ((sampled, self._score_tokens), (shown, self._score_messages)):
                if places:
                    for i, score in zip(places, scorer([episodes[i] for i in places]), strict=True):
                        found[i] = score
        return found

    def _sees_same_tokens(self, episode: Episode) -> bool:
        """True if the tokens that the policy saw and sampled are exactly those that the model would be shown."""
        assert self.judge is not None
        assert self._policy is not None
        if not self._by_tokens or episode.stopped_by_text:
            return False
        seen = (episode.prompt, episode.tools)
        return self._policy.completed(*seen) == self.judge.renderer.completed(*seen)

    def _score_tokens(self, episodes: Sequence[Episode]) -> list[float]:
        """Score the sampled tokens."""
        assert self.judge is not None
        rows = [last_turn(episode) for episode in episodes]
        return self.judge.score_tokens([ids for ids, _ in rows], [loss_mask for _, loss_mask in rows]).tolist()

    def _score_messages(self, episodes: Sequence[Episode]) -> list[float]:
        """Score the messages, rendered with the model's own template."""
        assert self.judge is not None
        last = [max(i for i, m in enumerate(e.responses) if m["role"] == "assistant") for e in episodes]
        prompts = [episode.prompt + episode.responses[:i] for episode, i in zip(episodes, last, strict=True)]
        answers = [[episode.responses[i]] for episode, i in zip(episodes, last, strict=True)]
        tools = [episode.tools for episode in episodes]
        return self.judge.score(prompts, answers, tools, allow_blank=True).tolist()


class EnsembleReward(Reward):
    """Mean of several preference models minus their disagreement: mean − coefficient · standard deviation (over n).

    A policy that exploits an error of one model seldom finds one that all share (Coste et al., arXiv 2310.02743). The
    deviation is logged as `reward_NAME_std`. The models must score on the same scale, as those of one recipe do.

    Args:
        models: The model folders, two or more.
        coefficient: Weight of the standard deviation, not negative.
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under.
        dtype: Type of their weights.
        device: Where they stay and run (`cpu`, `cuda:1`); by default the policy's device.
        normalize: Brings scores to a common scale before they are clipped and weighted.
        clip: Largest absolute value after normalization.
        offload: Keep the weights in CPU memory except while a round is scored.
        scorer: Dotted path of your own scorer class, if the models were trained with one.

    Raises:
        ConfigError: If fewer than two different models are given, or the coefficient is negative.

    Example:
        ```python
        reward = EnsembleReward([f"runs/seed{seed}/preference/model" for seed in range(3)])
        ```
    """

    def __init__(
        self,
        models: list[str],
        coefficient: float = 1.0,
        weight: float = 1.0,
        name: str = "ensemble",
        dtype: str = "float32",
        device: str | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
        offload: bool = False,
        scorer: str | None = None,
    ) -> None:
        super().__init__(weight, name, normalize, clip)
        if isinstance(models, str) or len(set(models)) < 2 or len(set(models)) < len(models):
            raise ConfigError(f"the reward {name}: models is {models}; it must list at least two different folders")
        check_finite(f"the coefficient of the reward {name}", coefficient)
        if coefficient < 0:
            raise ConfigError(
                f"the coefficient of the reward {name} is {coefficient}; a negative one would reward disagreement"
            )
        self.coefficient = coefficient
        self.members = nn.ModuleList(
            ModelReward(model, dtype=dtype, device=device, offload=offload, scorer=scorer) for model in models
        )

    def bind(self, renderer: Renderer) -> None:
        members: list[Any] = list(self.members)
        for member in members:
            member.bind(renderer)
        super().bind(renderer)

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        members: list[Any] = list(self.members)
        columns = [member.score(episodes) for member in members]
        found: list[float | None] = []
        for episode, scores in zip(episodes, zip(*columns, strict=True), strict=True):
            if any(score is None for score in scores):
                found.append(None)
                continue
            values = torch.tensor(scores, dtype=torch.float64)
            deviation = float(values.std(correction=0))
            episode.details[f"{self.name}_std"] = deviation
            found.append(float(values.mean()) - self.coefficient * deviation)
        return found


def last_turn(episode: Episode) -> tuple[list[int], list[int]]:
    """The row with the last response, cut after it, and a mask that is 1 on that response alone."""
    training_sample = next(
        training_sample for training_sample in reversed(episode.training_samples) if training_sample.actions
    )
    end = len(training_sample.loss_mask) - training_sample.loss_mask[::-1].index(1)
    start = end
    while start and training_sample.loss_mask[start - 1]:
        start -= 1
    return training_sample.ids[:end], [0] * start + [1] * (end - start)
