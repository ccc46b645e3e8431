"""Sampling with the policy of the previous round, as in asynchronous RL, but reproducible."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_lightning.models.sharding import copy_weight, full_tensor


class PolicySnapshot:
    """The policy's trained weights at the time when the last round was sampled.

    Before the first round, they are the model's current weights.

    Args:
        model: The policy. Weights that require no gradient do not change and are not stored.

    Example:
        >>> policy = torch.nn.Linear(2, 2)
        >>> snapshot = PolicySnapshot(policy)
        >>> with snapshot.stale():
        ...     pass  # sample here
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights: dict[str, Tensor] | None = None

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @contextmanager
    @torch.no_grad()
    def stale(self) -> Iterator[None]:
        """Run the model with the weights of the previous round, then restore its current ones.

        The current weights are stored for the next round.
        """
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
        """The weights that the next round is sampled with; None before the first. All ranks must call this together."""
        return None if self._weights is None else {name: full_tensor(weight) for name, weight in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        """Restore a `state_dict`."""
        device = next(self._model.parameters()).device
        self._weights = None if state is None else {name: weight.to(device) for name, weight in state.items()}
