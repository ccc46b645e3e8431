"""Splits a causal model into its decoder, which runs at all positions, and its head, which runs only where needed."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlhf_lightning.models.logits import HeadLogprobsFunction, RoundedLogitsFunction, head_logprobs
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.sharding import full_tensor, run_unsharded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


class Backbone:
    """Decoder and head of a `…ForCausalLM`, with or without a `PeftModel` around it.

    `separable` is True if decoder and head, with the model's logit scale or cap, reproduce the model's own logits. The
    constructor checks this numerically. A model that fails the check is run as a whole, at every position.

    Args:
        model: A Hugging Face causal model, or a `PeftModel` around one.

    Example:
        ```python
        backbone = Backbone(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
        states = backbone.decoder(input_ids=input_ids, use_cache=False)[0]
        last_logits = backbone.logits(states[:, -1])  # [B, V]
        ```
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_of(model)
        self.model = model
        self.decoder = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        self.lm_head = base.get_output_embeddings()
        self.vocabulary = base.get_input_embeddings().weight.shape[0]
        self._adjust = _logit_adjustment(base.config.get_text_config())
        self.separable = self.decoder is not base and self.lm_head is not None and self._agree()
        if not self.separable:
            log.info(
                "the head of %s cannot be run separately, so logits are computed at every position", type(base).__name__
            )

    def logits(self, states: Tensor, head_weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., H]`; in the head's own precision under autocast if that is wide.

        In bfloat16, logits between 16 and 32 would be multiples of 0.125. On a CPU under autocast, factors may be
        rounded to bfloat16, but logits are not (see `RoundedLogitsFunction`).

        Args:
            states: Hidden states.
            head_weights: Replace the weights of the head, by name.
        """
        head = self.lm_head if head_weights is None else partial(functional_call, self.lm_head, dict(head_weights))
        if not self.wide_head:
            return self.adjusted(head(states))
        rounded = self._rounds_head(states)
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(self.lm_head.weight.dtype)
            if not rounded:
                return self.adjusted(head(states))
            weight = self.lm_head.weight if head_weights is None else head_weights["weight"]
            logits = RoundedLogitsFunction.apply(states.flatten(0, -2), weight)
            return self.adjusted(logits.unflatten(0, states.shape[:-1]))

    def adjusted(self, logits: Tensor) -> Tensor:
        """Outputs of the head with the model's soft cap or scale."""
        return logits if self._adjust is None else self._adjust(logits)

    def fuses_logprobs(self) -> bool:
        """True if `logprobs` can be used: with a plain float32 head on a CPU under autocast to bfloat16."""
        return self._adjust is None and self._rounds_head(self.lm_head.weight)

    def logprobs(
        self, states: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of targets, entropy and correctness, from hidden states without a tensor of all logits.

        Args:
            states: `[n, H]`.
            targets: Token ids, `[n]`.
            temperature: Temperature of the softmax.
            details: Also compute entropy and correctness.

        Returns:
            As `TokenLogprobsFunction`, `[n]` each.
        """
        weight = self.lm_head.weight
        with torch.autocast(states.device.type, enabled=False):
            states = states.to(weight.dtype)
            trains = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
            compute = HeadLogprobsFunction.apply if trains else head_logprobs
            return compute(states, weight, targets, temperature, details)

    def _rounds_head(self, states: Tensor) -> bool:
        """True if the head may be computed from rounded factors: a plain layer, under autocast on a CPU."""
        head, device = self.lm_head, states.device.type
        return (
            device == "cpu"
            and torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) == torch.bfloat16
            and type(head) is nn.Linear
            and type(head.weight) is nn.Parameter
            and head.weight.dtype == torch.float32
            and head.bias is None
        )

    def fixed_head(self) -> Callable[[Tensor], Tensor]:
        """`logits` with the present weights of the head, even after the model has been moved or sharded again.

        With a sharded model, all ranks must call this together, outside of `run_unsharded`.
        """
        weights = {name: full_tensor(weight.detach()) for name, weight in self.lm_head.named_parameters()}
        return partial(self.logits, head_weights=weights)

    @property
    def wide_head(self) -> bool:
        """True if the head's weights are float32 or float64."""
        return self.lm_head is not None and self.lm_head.weight.dtype in (torch.float32, torch.float64)

    @torch.no_grad()
    def _agree(self) -> bool:
        """Compare the logits of decoder and head with the model's own logits on a few tokens."""
        ids = torch.arange(6, device=self.lm_head.weight.device)[None] * 7919 % self.vocabulary
        with in_mode(self.model, training=False), torch.autocast(ids.device.type, enabled=False):
            ours = run_unsharded(self.model, lambda: self.logits(self.decoder(input_ids=ids, use_cache=False)[0]))
            theirs = self.model(input_ids=ids, use_cache=False).logits
        return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)


def _logit_adjustment(config: "PretrainedConfig") -> Callable[[Tensor], Tensor] | None:
    """The function that a model applies to logits: a soft cap (Gemma 2), a factor (Cohere), a divisor (Granite)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    if not cap and scale == divisor == 1.0:
        return None

    def adjust(logits: Tensor) -> Tensor:
        if scale != 1.0 or divisor != 1.0:
            logits = logits * (scale / divisor)
        return torch.tanh(logits / cap) * cap if cap else logits

    return adjust


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context manager that puts a model in training or eval mode, and afterwards restores the mode of every submodule.

    Args:
        model: The model.
        training: True for training mode, False for eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
