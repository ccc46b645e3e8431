"""A causal model in two parts: the decoder, which runs at every position, and the head, where logits are wanted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.lora import base_of

log = logging.getLogger(__name__)
FEW = 64


class Parts:
    """Decoder and head of a `…ForCausalLM`, or of peft around one.

    Whether they can be run apart (with the model's logit scale or cap) is checked by numbers: `apart`.
    """

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        self.model = model
        self.decoder = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        self.head = base.get_output_embeddings()
        self.vocabulary = base.get_input_embeddings().weight.shape[0]
        self._adjust = _logit_adjustment(base.config.get_text_config())
        self.apart = self.decoder is not base and self.head is not None and self._agree()
        if not self.apart:
            log.info("%s computes its logits its own way; it is run whole, at every position", type(base).__name__)

    def logits(self, states: Tensor) -> Tensor:
        """`[n, V]` from hidden states `[n, H]`."""
        plain = type(self.head) is nn.Linear and self.head.bias is None and not torch.is_grad_enabled()
        if plain and states.device.type == "cpu" and len(states) <= FEW:
            # The same product the other way round: for a few rows a CPU takes little more than half the time for it.
            return self._adjust((self.head.weight @ states.t()).t().contiguous())
        return self._adjust(self.head(states))

    @torch.no_grad()
    def _agree(self) -> bool:
        ids = torch.arange(6, device=self.head.weight.device)[None] * 7919 % self.vocabulary
        with evaluating(self.model):
            ours = self.logits(self.decoder(input_ids=ids, use_cache=False)[0][0])
            theirs = self.model(input_ids=ids, use_cache=False).logits[0]
        return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)


def _logit_adjustment(config: Any) -> Any:
    """What some models do to logits after the head: a soft cap (Gemma 2), a factor (Cohere), a divisor (Granite)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def adjust(logits: Tensor) -> Tensor:
        if scale != 1.0 or divisor != 1.0:
            logits = logits * (scale / divisor)
        return torch.tanh(logits / cap) * cap if cap else logits

    return adjust


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while; the mode of each of its parts comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
