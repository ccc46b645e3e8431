"""A copy of the policy, to sample from while the policy itself is trained."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PolicyCopy:
    """A copy of the policy whose trained weights change only in `load`.

    Frozen weights do not change during training and are shared with the policy, so with LoRA the copy needs memory for
    the adapters only, and with full fine-tuning for all weights.

    Args:
        policy: The policy, on its device. It must not be sharded.

    Example:
        >>> policy = torch.nn.Linear(2, 2)
        >>> copied = PolicyCopy(policy)
        >>> _ = torch.nn.init.zeros_(policy.weight)
        >>> bool(copied.model.weight.any())
        True
        >>> copied.load()
        >>> bool(copied.model.weight.any())
        False
    """

    def __init__(self, policy: "PreTrainedModel | PeftModel") -> None:
        # deepcopy takes the objects of `memo` instead of copying them.
        memo = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
        self.model = copy.deepcopy(policy, memo)
        self.device = next(policy.parameters()).device
        self._policy = policy
        copies = dict(self.model.named_parameters())
        self._trained = {name: copies[name] for name, weight in policy.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def current(self) -> dict[str, Tensor]:
        """A copy of the policy's trained weights as they are now."""
        return {name: weight.clone() for name, weight in self._current().items()}

    @torch.no_grad()
    def loaded(self) -> dict[str, Tensor]:
        """A copy of the trained weights that were loaded last."""
        return {name: weight.clone() for name, weight in self._trained.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Load trained weights.

        Args:
            weights: As `current` returns them; None for the policy's weights as they are now.

        Raises:
            ConfigError: If weights that were frozen when the copy was made are trained now.
        """
        given = self._current() if weights is None else weights
        # Sampling runs on a stream of its own on a GPU.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, weight in self._trained.items():
            weight.copy_(given[name])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _current(self) -> dict[str, Tensor]:
        weights = dict(self._policy.named_parameters())
        if unfrozen := {name for name, weight in weights.items() if weight.requires_grad} - self._trained.keys():
            raise ConfigError(
                f"weights that were frozen at the start of training are trained now ({min(unfrozen)}), but with "
                "model.max_staleness frozen weights are shared with the copy that samples. Set model.max_staleness: 0, "
                "or unfreeze them from the start"
            )
        return {name: weights[name] for name in self._trained}
