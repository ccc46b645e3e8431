"""The frozen policy that the KL is measured against, usually the start of the stage."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_url
from rlhf_lightning.models.loading import check_same_tokens, check_vocabulary, disable_dropout, load_for_scoring
from rlhf_lightning.models.lora import is_adapted, simple
from rlhf_lightning.models.offload import Placement
from rlhf_lightning.models.sharding import copy_weight, full_tensor
from rlhf_lightning.models.token_logprobs import TokenLogprobs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Reference:
    """Log-probabilities of the policy that the stage started from, or of another model.

    With a new adapter, the reference is the model with its adapter disabled; with an adapter that is trained further, a
    frozen second copy of the adapter; with full training, a frozen copy of the model. It is not an `nn.Module`, because
    the policy belongs to the module that trains it; that module registers `copy`, so that the copy moves with it.

    Args:
        model: The policy at the start of the stage, or with `separate` another model.
        fresh_adapter: True if this stage created the policy's adapter.
        max_tokens_per_batch: Number of tokens computed at once, see `PackedForward`.
        moves: True if `refresh` will be called.
        device: Device of a copy of the whole model, see `Placement`.
        offload: Keep such a copy on the CPU while it does not run, see `Placement`.
        separate: True if the model is not the policy. It is not copied; its dropout is disabled, and its gradients are
            turned off.

    Attributes:
        mode: How the model becomes the reference: `copy`, `disabled` or `adapter`.
        copy: The model if it does not share weights with the policy; None if the reference is the policy with another
            adapter.

    Example:
        ```python
        reference = Reference(policy, fresh_adapter=False)
        logprobs = reference.logprobs(input_ids, loss_mask)  # [B, T], nats
        ```
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        fresh_adapter: bool = False,
        max_tokens_per_batch: int | None = None,
        moves: bool = False,
        device: str | None = None,
        offload: bool = False,
        separate: bool = False,
    ) -> None:
        # Disabling the adapter gives the start policy, but cannot give a later policy.
        disabled = fresh_adapter and not moves
        # peft cannot add a second copy of an adapter with more than LoRA's two matrices (embeddings, biases).
        adapted = is_adapted(model) and (disabled or simple(model.peft_config["default"])) and not separate
        self.mode = "copy" if not adapted else "disabled" if disabled else "adapter"
        self.copy: nn.Module | None = None
        if separate:
            disable_dropout(model)
        if self.mode == "copy":
            self.copy = (model if separate else copy.deepcopy(model)).requires_grad_(False).eval()
        elif self.mode == "adapter":
            _copy_adapter(model)
        self.placement = self._placed(device, offload)
        self._policy, self._token_logprobs = (
            model,
            TokenLogprobs(model if self.copy is None else self.copy, max_tokens_per_batch),
        )

    def _placed(self, device: str | None, offload: bool) -> Placement | None:
        """Place a copy of the whole model on its own device, or offload it."""
        if device is None and not offload:
            return None
        if self.copy is None:
            log.info(
                "kl.device and kl.offload have no effect, because the reference is the policy with another adapter; "
                "leave them out"
            )
            return None
        return Placement(self.copy, device, offload)

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the tokens with mask 1.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to compute, `[B, T]`.
            temperature: Temperature of the softmax.

        Returns:
            In nats, `[B, T]`, 0 where the mask is 0.
        """
        here = input_ids.device
        with self._active(), self.placement.on_device() if self.placement else nullcontext(here) as device:
            return self._token_logprobs(input_ids.to(device), loss_mask.to(device), temperature).logprobs.to(here)

    @torch.no_grad()
    def position_states(self, input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Hidden states before the tokens with mask 1, on the reference's device; see `TokenLogprobs.position_states`.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to score, `[B, T]`.
        """
        here = input_ids.device
        with self._active(), self.placement.on_device() if self.placement else nullcontext(here) as device:
            return self._token_logprobs.position_states(input_ids.to(device), loss_mask.to(device))

    @property
    def modules_to_shard(self) -> list[nn.Module]:
        """The modules to shard: a copy that stays on the device. An offloaded copy is not sharded."""
        return [] if self.copy is None or self.placement else [self.copy]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the reference, excluding the trained adapter."""
        for name, value in (self.copy or self._policy).named_parameters():
            adapter = any(part in name for part in (".lora_", ".modules_to_save."))
            if self.mode == "copy" or not adapter or (self.mode == "adapter" and ".reference" in name):
                yield name, value

    def refresh(self) -> None:
        """Make the policy's current weights the reference."""
        policy = self._policy
        self.load_weights(dict(policy.state_dict() if self.copy is not None else _adapter(policy, "default")))

    def weights(self) -> dict[str, Tensor]:
        """Gather the weights that `refresh` changes, for a checkpoint; all ranks must call this."""
        return {name: full_tensor(value.detach()).clone() for name, value in self._refreshed().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore the result of `weights`; all ranks must call this."""
        for name, value in self._refreshed().items():
            copy_weight(value, weights[name])

    def _refreshed(self) -> dict[str, Tensor]:
        """Tensors that `refresh` overwrites, by name."""
        return self.copy.state_dict() if self.copy is not None else _adapter(self._policy, "reference")

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Context manager in which the model is the reference."""
        model = self._policy
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


def load_reference(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    max_tokens_per_batch: int | None = None,
    device: str | None = None,
    offload: bool = False,
    name: str = "the reference",
    compared: bool = False,
) -> Reference:
    """Load a model other than the policy as the reference.

    Args:
        source: Model folder or Hub id.
        tokenizer: The policy's tokenizer.
        dtype: Data type of its weights, for example `float32`.
        max_tokens_per_batch: See `Reference`.
        device: See `Reference`.
        offload: See `Reference`.
        name: Name of the model, for messages.
        compared: True if its vocabulary was already compared with the policy's.

    Raises:
        ConfigError: If the model cannot be loaded, or has another vocabulary.
    """
    if is_url(source):
        raise ConfigError(
            f"{name} is {source!r}, but its weights must be on this machine; name a model folder or Hub id. Only the "
            "reference of policy RL (model.kl.reference) may be a server"
        )
    if not compared:
        check_same_tokens(source, tokenizer, name)
    model = load_for_scoring(source, "CAUSAL_LM", dtype)
    check_vocabulary(model, tokenizer, name)
    return Reference(model, max_tokens_per_batch=max_tokens_per_batch, device=device, offload=offload, separate=True)


def _copy_adapter(model: "PeftModel") -> None:
    """Add a frozen second copy of the model's adapter, named `reference`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    weights = _adapter(model, "default")
    for name, value in _adapter(model, "reference").items():
        copy_weight(value, weights[name])
    # peft creates the second adapter with the dropout of the config, even if that of the first adapter is disabled.
    disable_dropout(model)
    _train_default(model, trained)


def _adapter(model: "PeftModel", adapter: str) -> dict[str, Tensor]:
    """Weights of an adapter, by their names without the adapter's name."""
    named = {tuple(name.split(".")): p.detach() for name, p in model.named_parameters()}
    return {".".join(part for part in name if part != adapter): p for name, p in named.items() if adapter in name}


def _train_default(model: "PeftModel", trained: list[nn.Parameter]) -> None:
    """Switch back to the trained adapter, and restore `requires_grad`, which peft changes when switching."""
    model.set_adapter("default")
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
