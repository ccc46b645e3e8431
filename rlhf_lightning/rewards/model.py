"""Rewards from trained preference models (one model, or an ensemble), and base classes of all rewards with a model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.imports import imported
from rlhf_lightning.models.offload import Placement, check_place
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.rewards.base import EpisodeScorer, Reward, check_finite
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.types import Episode


class ModelBased(Reward):
    """Base class of rewards whose scores come from models."""

    scored_by_model = True

    def __init__(
        self,
        weight: float,
        name: str,
        dtype: str,
        device: str | None,
        normalize: Normalizer | None,
        clip: float | None,
        offload: bool,
        scorer: str | None = None,
    ) -> None:
        super().__init__(weight, name, normalize, clip)
        if scorer is not None:
            imported(scorer, f"the scorer of the reward {name}:")
        check_place(f"the reward {name}", device, offload)
        self.dtype, self.device, self.offload = dtype, device, offload

    def load(self, folder: str, renderer: Renderer) -> "RewardModelScores":
        """Load a model.

        Args:
            folder: The model folder.
            renderer: The policy's renderer.
        """
        return RewardModelScores(RewardModel(folder, self.dtype), renderer, self.device, self.offload)


class ModelReward(ModelBased):
    """A trained preference model with any scorer.

    If it has the policy's tokenizer and template, it scores the sampled tokens. Otherwise, and for responses that a
    stop text of the sampler ended, it renders the messages with its own template and scores these tokens.

    Args:
        model: The model folder.
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under.
        dtype: Data type of the weights.
        device: Device of the model (`cpu`, `cuda:1`); by default the policy's device.
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
        super().__init__(weight, name, dtype, device, normalize, clip, offload, scorer)
        self.model = model

    def build(self, renderer: Renderer) -> EpisodeScorer:
        return self.load(self.model, renderer)


class EnsembleReward(ModelBased):
    """Mean of several preference models minus their disagreement: mean − coefficient · standard deviation (over n).

    A policy that exploits an error of one model rarely finds an error that all models share (Coste et al., arXiv
    2310.02743). The deviation is logged as `reward_NAME_std`. The scores of the models must have the same scale, for
    example because they were trained with the same recipe.

    Args:
        models: The model folders, two or more.
        coefficient: Weight of the standard deviation, not negative.
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under.
        dtype: Data type of the weights.
        device: Device of the models (`cpu`, `cuda:1`); by default the policy's device.
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
        super().__init__(weight, name, dtype, device, normalize, clip, offload, scorer)
        if isinstance(models, str) or len(set(models)) < 2 or len(set(models)) < len(models):
            raise ConfigError(f"the reward {name}: models is {models}; it must list at least two different folders")
        check_finite(f"the coefficient of the reward {name}", coefficient)
        if coefficient < 0:
            raise ConfigError(
                f"the coefficient of the reward {name} is {coefficient}; it must not be negative, because that would "
                "reward disagreement"
            )
        self.folders, self.coefficient = models, coefficient

    def build(self, renderer: Renderer) -> EpisodeScorer:
        members = [self.load(folder, renderer) for folder in self.folders]
        return EnsembleScores(members, self.coefficient, f"{self.name}_std")


class PlacedModel:
    """A model that scores, on its device.

    Args:
        model: The model.
        device: Device of the model; by default the policy's device.
        offload: Keep the weights in CPU memory except while a round is scored.

    Attributes:
        models: The model; empty if `device` is set, because the model then must not move with the trained module.
    """

    def __init__(self, model: nn.Module, device: str | None, offload: bool) -> None:
        self.models: Sequence[nn.Module] = [model] if device is None else []
        if device is not None:
            model.to(device)
        self.placement = Placement(model, offload=True) if offload else None

    def on_device(self) -> AbstractContextManager[torch.device | None]:
        """Context manager in which the model is on the device where it runs."""
        return self.placement.on_device() if self.placement else nullcontext()


class RewardModelScores(PlacedModel):
    """The scores of a preference model.

    Args:
        judge: The model.
        renderer: The policy's renderer.
        device: See `PlacedModel`.
        offload: See `PlacedModel`.

    Attributes:
        by_tokens: True if the model has the policy's tokenizer and template, so that it can score the sampled tokens.
    """

    def __init__(
        self, judge: RewardModel, renderer: Renderer, device: str | None = None, offload: bool = False
    ) -> None:
        super().__init__(judge, device, offload)
        self.judge = judge
        self.policy, self.by_tokens = renderer, judge.same_tokens(renderer)

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """See `Reward.score`; None for an episode without a response."""
        # An episode whose prompt left no room for a response has nothing to score.
        answered = [i for i, episode in enumerate(episodes) if episode.response_tokens]
        by_tokens = [i for i in answered if self._renders_equally(episodes[i])]
        by_messages = sorted(set(answered) - set(by_tokens))
        scores: list[float | None] = [None] * len(episodes)
        with self.on_device():
            for indices, scorer in ((by_tokens, self._score_tokens), (by_messages, self._score_messages)):
                if indices:
                    for i, score in zip(indices, scorer([episodes[i] for i in indices]), strict=True):
                        scores[i] = score
        return scores

    def _renders_equally(self, episode: Episode) -> bool:
        """True if the model's rendering of the episode would be exactly the policy's tokens."""
        if not self.by_tokens or episode.stopped_by_text:
            return False
        prompt = (episode.prompt, episode.tools)
        return self.policy.completed(*prompt) == self.judge.renderer.completed(*prompt)

    def _score_tokens(self, episodes: Sequence[Episode]) -> list[float]:
        """Score the sampled tokens."""
        rows = [last_turn(episode) for episode in episodes]
        scores: list[float] = self.judge.score_tokens([ids for ids, _ in rows], [mask for _, mask in rows]).tolist()
        return scores

    def _score_messages(self, episodes: Sequence[Episode]) -> list[float]:
        """Score the messages, rendered with the model's own template."""
        last = [max(i for i, m in enumerate(e.responses) if m["role"] == "assistant") for e in episodes]
        prompts = [episode.prompt + episode.responses[:i] for episode, i in zip(episodes, last, strict=True)]
        answers = [[episode.responses[i]] for episode, i in zip(episodes, last, strict=True)]
        tools = [episode.tools for episode in episodes]
        scores: list[float] = self.judge.score(prompts, answers, tools, allow_blank=True).tolist()
        return scores


class EnsembleScores:
    """The scores of an ensemble.

    Args:
        members: The scores of its models.
        coefficient: Weight of the standard deviation.
        detail: Name under which the deviation is recorded on the episodes.
    """

    def __init__(self, members: Sequence[RewardModelScores], coefficient: float, detail: str) -> None:
        self.members, self.coefficient, self.detail = members, coefficient, detail
        self.models: Sequence[nn.Module] = [model for member in members for model in member.models]

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """See `Reward.score`; None for an episode without a response."""
        columns = [member.score(episodes) for member in self.members]
        found: list[float | None] = []
        for episode, scores in zip(episodes, zip(*columns, strict=True), strict=True):
            if any(score is None for score in scores):
                found.append(None)
                continue
            values = torch.tensor(scores, dtype=torch.float64)
            deviation = float(values.std(correction=0))
            episode.details[self.detail] = deviation
            found.append(float(values.mean()) - self.coefficient * deviation)
        return found


def last_turn(episode: Episode) -> tuple[list[int], list[int]]:
    """The row with the last response, cut after it, and a mask that is 1 only on that response."""
    training_sample = next(
        training_sample for training_sample in reversed(episode.training_samples) if training_sample.actions
    )
    end = len(training_sample.loss_mask) - training_sample.loss_mask[::-1].index(1)
    start = end
    while start and training_sample.loss_mask[start - 1]:
        start -= 1
    return training_sample.ids[:end], [0] * start + [1] * (end - start)
