"""Preference models whose disagreement says which comparisons to ask people about first."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.labeling.comparisons import Comparison
from rlhf_lightning.models.reward_model import RewardModel

BATCH = 32
"""Number of comparisons that are scored together."""


class Ensemble:
    """Several preference models.

    Their disagreement is the variance over the models of σ(s_0 − s_1), the probability with which a model with the
    scores s_0 and s_1 prefers the first answer: 0 if all say the same, at most 0.25. Source: Christiano et al. 2017,
    section 2.2.4 (arXiv:1706.03741).

    Args:
        models: At least two preference models.

    Raises:
        ConfigError: If there are fewer.

    Example:
        >>> ensemble = Ensemble([RewardModel("runs/a/model"), RewardModel("runs/b/model")])  # doctest: +SKIP
        >>> ensemble.scored(comparisons)[0].disagreement  # doctest: +SKIP
    """

    def __init__(self, models: Sequence[RewardModel]) -> None:
        if len(models) < 2:
            raise ConfigError(
                f"--pick uncertain needs at least two preference models, but there are {len(models)}: "
                "--reward MODEL --reward OTHER"
            )
        self.models = models

    def scored(self, comparisons: Sequence[Comparison]) -> list[Comparison]:
        """The comparisons with their disagreement.

        Args:
            comparisons: The comparisons.
        """
        found: list[Comparison] = []
        for start in range(0, len(comparisons), BATCH):
            part = comparisons[start : start + BATCH]
            chances = torch.stack([self._chances(model, part) for model in self.models])
            spread = chances.var(0, correction=0).tolist()
            found += [replace(one, disagreement=value) for one, value in zip(part, spread, strict=True)]
        return found

    @staticmethod
    def _chances(model: RewardModel, comparisons: Sequence[Comparison]) -> torch.Tensor:
        """Probabilities `[N]` with which a model prefers the first answer."""
        prompts = [one.question.messages for one in comparisons for _ in one.candidates]
        tools = [one.question.tools for one in comparisons for _ in one.candidates]
        responses = [candidate.messages for one in comparisons for candidate in one.candidates]
        scores = model.score(prompts, responses, tools).float().view(-1, 2)
        return (scores[:, 0] - scores[:, 1]).sigmoid().cpu()
