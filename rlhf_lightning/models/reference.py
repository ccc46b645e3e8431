"""The frozen policy that KL is measured against: the one the stage started from."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.lora import simple
from rlhf_lightning.models.offload import Place
from rlhf_lightning.models.sharding import copy_weight, full_tensor
from rlhf_lightning.models.token_logprobs import TokenLogprobs

log = logging.getLogger(__name__)


class Reference(nn.Module):
    """Log-probabilities of the start policy.

    With a fresh adapter it is the model with the adapter disabled; with an adapter that is trained on, a frozen second
    copy of it; with full training, a frozen copy of the model.

    Args:
        model: the policy as the stage starts it. fresh_adapter: whether its LoRA adapter was made by this stage.
        max_tokens: computed at once, see `PackedForward`. moves: whether `refresh` will be called.
        device, offload: where a copy of the whole model is, see `Place`.
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
        # A disabled adapter is the start, and nothing later.
        disabled = fresh_adapter and not moves
        # Of adapters that hold more than LoRA's two matrices (embeddings, biases) a second one cannot be added.
        adapted = hasattr(model, "peft_config") and (disabled or simple(model.peft_config["default"]))
        self.mode = "copy" if not adapted else "disabled" if disabled else "adapter"
        self.copy: nn.Module | None = None
        if self.mode == "copy":
            self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        elif self.mode == "adapter":
            _copy_adapter(model)
        # Not registered: the policy belongs to the module that trains it.
        self._policy = [model]
        self._put(device, offload)
        self._scorer = TokenLogprobs(self.copy if self.copy is not None else model, max_tokens)

    def _put(self, device: str | None, offload: bool) -> None:
        self._place: Place | None = None
        if device is None and not offload:
            return
        if self.copy is None:
            log.info(
                "kl.device, kl.offload: the reference is the policy with another adapter, and has no weights to move"
            )
            return
        self._place = Place(self.copy, device, offload)

    @classmethod
    def of(
        cls, model: Any, max_tokens: int | None = None, device: str | None = None, offload: bool = False
    ) -> "Reference":
        """A model that nobody trains, as the reference."""
        reference = cls.__new__(cls)
        nn.Module.__init__(reference)
        disable_dropout(model)
        reference.mode, reference.copy = "copy", model.requires_grad_(False).eval()
        reference._put(device, offload)
        reference._policy, reference._scorer = [model], TokenLogprobs(model, max_tokens)
        return reference

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """`[B, T]`, nats, 0 where the mask is 0."""
        here = input_ids.device
        with self._active(), self._place.there() if self._place else nullcontext(here) as device:
            return self._scorer(input_ids.to(device), loss_mask.to(device), temperature).logprobs.to(here)

    @property
    def parts_to_split(self) -> list[nn.Module]:
        """A copy that stays where it is: one that is moved to and fro is whole on every rank."""
        return [] if self.copy is None or self._place else [self.copy]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that it computes with: without those of an adapter that is trained."""
        for name, value in (self.copy or self._policy[0]).named_parameters():
            adapter = any(part in name for part in (".lora_", ".modules_to_save."))
            if self.mode == "copy" or not adapter or (self.mode == "adapter" and ".reference" in name):
                yield name, value

    def refresh(self) -> None:
        """The policy as it now is becomes the reference."""
        policy = self._policy[0]
        self.load_weights(dict(policy.state_dict() if self.copy is not None else _adapter(policy, "default")))

    def weights(self) -> dict[str, Tensor]:
        """What `refresh` changes, for a checkpoint; all ranks must call it."""
        return {name: full_tensor(value.detach()).clone() for name, value in self._moved().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` gave."""
        for name, value in self._moved().items():
            copy_weight(value, weights[name])

    def _moved(self) -> dict[str, Tensor]:
        return self.copy.state_dict() if self.copy is not None else _adapter(self._policy[0], "reference")

    @contextmanager
    def _active(self) -> Iterator[None]:
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
    trained = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    weights = _adapter(model, "default")
    for name, value in _adapter(model, "reference").items():
        copy_weight(value, weights[name])
    # The second adapter comes with the dropout of its config, whatever the first one's was set to.
    disable_dropout(model)
    _train_default(model, trained)


def _adapter(model: Any, adapter: str) -> dict[str, Tensor]:
    """The weights of an adapter, by their names without its own."""
    named = {tuple(name.split(".")): p.detach() for name, p in model.named_parameters()}
    return {".".join(part for part in name if part != adapter): p for name, p in named.items() if adapter in name}


def _train_default(model: Any, trained: list[nn.Parameter]) -> None:
    """Back to the adapter that is trained: peft, in switching, changes what requires a gradient."""
    model.set_adapter("default")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
