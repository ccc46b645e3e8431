"""A policy one round old, to sample from: what an asynchronous run does, defined so that it can be repeated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.sharding import copy_weight, full_tensor


class PolicySnapshot:
    """The trained weights of a model as they were when the last round was sampled; at first, as they are.

    Args:
        model: the policy. Its weights that require no gradient do not change, and are not kept.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._weights: dict[str, Tensor] | None = None

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @contextmanager
    @torch.no_grad()
    def stale(self) -> Iterator[None]:
        """The model with the weights of the round before; then its own again, which the next round will have."""
        trained = self._trained()
        current = {name: weight.detach().clone() for name, weight in trained.items()}
        for name, weight in (self._weights or {}).items():
            copy_weight(trained[name], weight)
        try:
            yield
        finally:
            for name, weight in current.items():
                trained[name].copy_(weight)
        self._weights = current

    def state_dict(self) -> dict[str, Tensor] | None:
        """The weights that the next round is sampled with; all ranks must call it."""
        return None if self._weights is None else {name: full_tensor(weight) for name, weight in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        """Go on from there."""
        device = next(self._model.parameters()).device
        self._weights = None if state is None else {name: weight.to(device) for name, weight in state.items()}
