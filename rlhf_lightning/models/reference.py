"""The frozen policy that the KL is measured against, usually the one that the stage started from."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.lora import is_adapted, simple
from rlhf_lightning.models.offload import Placement
from rlhf_lightning.models.sharding import copy_weight, full_tensor
from rlhf_lightning.models.token_logprobs import TokenLogprobs

log = logging.getLogger(__name__)


class Reference(nn.Module):
    """Log-probabilities of the policy that the stage started from.

    With a new adapter, the reference is the model with its adapter disabled; with an adapter that is trained further, a
    frozen second copy of the adapter; with full training, a frozen copy of the model.

    Args:
        model: The policy as the stage starts it.
        fresh_adapter: True if its adapter was created by this stage.
        max_tokens: Tokens computed at once, see `PackedForward`.
        moves: True if `refresh` will be called.
        device: Device of a copy of the whole model, see `Placement`.
        offload: Keep such a copy on the CPU while it does not run, see `Placement`.

    Example:
        ```python
        reference = Reference(policy, fresh_adapter=False)
        logprobs = reference.logprobs(input_ids, loss_mask)  # [B, T], nats
        ```
    """

    def __init__(
        self,
        model: Any,
        fresh_adapter: bool,
        max_tokens: int | None = None,
        moves: bool = False,
        device: str | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        # Disabling the adapter gives the start policy, and cannot give a later one.
        disabled = fresh_adapter and not moves
        # peft cannot add a second copy of an adapter that holds more than LoRA's two matrices (embeddings, biases).
        adapted = is_adapted(model) and (disabled or simple(model.peft_config["default"]))
        self.mode = "copy" if not adapted else "disabled" if disabled else "adapter"
        self.copy: nn.Module | None = None
        if self.mode == "copy":
            self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        elif self.mode == "adapter":
            _copy_adapter(model)
        # In a list so that torch does not register it: the policy belongs to the module that trains it.
        self._policy = [model]
        self._place_copy(device, offload)
        self._scorer = TokenLogprobs(self.copy if self.copy is not None else model, max_tokens)

    def _place_copy(self, device: str | None, offload: bool) -> None:
        """Place a copy of the whole model on its own device, or offload it."""
        self._place: Placement | None = None
        if device is None and not offload:
            return
        if self.copy is None:
            log.info(
                "kl.device and kl.offload have no effect here: the reference is the policy with another adapter; leave "
                "them out"
            )
            return
        self._place = Placement(self.copy, device, offload)

    @classmethod
    def of(
        cls, model: Any, max_tokens: int | None = None, device: str | None = None, offload: bool = False
    ) -> "Reference":
        """Use a frozen model as the reference.

        Args:
            model: The model; its dropout is disabled and its gradients are turned off.
            max_tokens: Tokens computed at once, see `PackedForward`.
            device: Where it stays, see `Placement`.
            offload: Keep it on the CPU while it does not run, see `Placement`.
        """
        reference = cls.__new__(cls)
        nn.Module.__init__(reference)
        disable_dropout(model)
        reference.mode, reference.copy = "copy", model.requires_grad_(False).eval()
        reference._place_copy(device, offload)
        reference._policy, reference._scorer = [model], TokenLogprobs(model, max_tokens)
        return reference

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the tokens whose mask is 1.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to score, `[B, T]`.
            temperature: Temperature of the softmax.

        Returns:
            In nats, `[B, T]`, 0 where the mask is 0.
        """
        here = input_ids.device
        with self._active(), self._place.on_device() if self._place else nullcontext(here) as device:
            return self._scorer(input_ids.to(device), loss_mask.to(device), temperature).logprobs.to(here)

    @property
    def parts_to_split(self) -> list[nn.Module]:
        """The modules to shard: a copy that stays on the device. An offloaded copy is kept unsharded on every rank."""
        return [] if self.copy is None or self._place else [self.copy]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that the reference computes with, excluding the adapter that is trained."""
        for name, value in (self.copy or self._policy[0]).named_parameters():
            adapter = any(part in name for part in (".lora_", ".modules_to_save."))
            if self.mode == "copy" or not adapter or (self.mode == "adapter" and ".reference" in name):
                yield name, value

    def refresh(self) -> None:
        """Make the policy's current weights the reference."""
        policy = self._policy[0]
        self.load_weights(dict(policy.state_dict() if self.copy is not None else _adapter(policy, "default")))

    def weights(self) -> dict[str, Tensor]:
        """Weights that `refresh` changes, for a checkpoint, gathered; all ranks must call it."""
        return {name: full_tensor(value.detach()).clone() for name, value in self._refreshed().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore what `weights` returned; all ranks must call it."""
        for name, value in self._refreshed().items():
            copy_weight(value, weights[name])

    def _refreshed(self) -> dict[str, Tensor]:
        """Tensors that `refresh` overwrites, by name."""
        return self.copy.state_dict() if self.copy is not None else _adapter(self._policy[0], "reference")

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Switch the model to the reference within the context."""
        model = self._policy[0]
        if self.mode == "disabled":
            with model.disable_adapter():
                yield
        elif self.mode == "adapter":
            trained = [p for p in model.parameters() if p.requires_grad]
            model.set_adapter("reference")
            try:
                yield
            finally:
                _train_default(model, trained)
        else:
            yield


def _copy_adapter(model: Any) -> None:
    """Add a frozen second copy of the model's adapter, named `reference`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    weights = _adapter(model, "default")
    for name, value in _adapter(model, "reference").items():
        copy_weight(value, weights[name])
    # peft creates the second adapter with its config's dropout, even if the first one's was disabled.
    disable_dropout(model)
    _train_default(model, trained)


def _adapter(model: Any, adapter: str) -> dict[str, Tensor]:
    """Weights of an adapter, by their names without the adapter's own name."""
    named = {tuple(name.split(".")): p.detach() for name, p in model.named_parameters()}
    return {".".join(part for part in name if part != adapter): p for name, p in named.items() if adapter in name}


def _train_default(model: Any, trained: list[nn.Parameter]) -> None:
    """Switch back to the trained adapter, restoring `requires_grad`, which peft changes when switching."""
    model.set_adapter("default")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
