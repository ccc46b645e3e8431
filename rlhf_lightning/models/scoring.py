"""Log-probabilities of given tokens: the one place where they are computed in training.

The head runs on kept positions only, those whose token is trained or scored. Beyond a byte budget their logits are
computed in chunks and again in backward, so that memory does not grow with vocabulary × length.
"""

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.models.lora import base_of

log = logging.getLogger(__name__)
LOGIT_BYTES = 256 * 2**20


class TokenScores(NamedTuple):
    """Per token, `[B, T]`, 0 where nothing was asked for: `logprobs` in nats, and on request `entropy`, `correct`."""

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None


class TokenScorer:
    """Scores tokens with a causal model.

    Args:
        model: a `…ForCausalLM`, or peft around one. Whether its decoder and head can be run apart (with its logit
            scale or cap) is checked by numbers; a model that computes its logits otherwise is run whole.
        logit_bytes: float32 logits held at once; more are recomputed in backward.
    """

    def __init__(self, model: Any, logit_bytes: int = LOGIT_BYTES) -> None:
        base = base_of(model)
        self.model, self.base, self.logit_bytes = model, base, logit_bytes
        self.decoder = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        self.head = base.get_output_embeddings()
        self.adjust = logit_adjustment(base.config.get_text_config())
        self.apart = self._runs_apart()
        if not self.apart:
            log.info("%s computes its logits its own way; it is run whole, at every position", type(base).__name__)

    @torch.no_grad()
    def _runs_apart(self) -> bool:
        if self.head is None or self.decoder is None or self.decoder is self.base:
            return False
        device = self.head.weight.device
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        ids = torch.arange(6, device=device)[None] * 7919 % vocabulary
        with _Evaluating(self.model):
            ours = self.adjust(self.head(self.decoder(input_ids=ids, use_cache=False)[0]))
            theirs = self.model(input_ids=ids, use_cache=False).logits
        return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)

    def __call__(self, input_ids: Tensor, mask: Tensor, temperature: float = 1.0, details: bool = False) -> TokenScores:
        """Score the tokens whose mask is not 0.

        Args:
            input_ids: right-padded, `[B, T]`. mask: `[B, T]`; position 0 cannot be scored.
            temperature: of the softmax. details: entropy (nats) and whether the token is the likeliest, no gradient.
        """
        keep = mask[:, 1:] != 0
        targets = input_ids[:, 1:][keep]
        if self.apart:
            hidden = self.decoder(input_ids=input_ids, use_cache=False)[0][:, :-1][keep]
            parts = self._from_hidden(hidden, targets, temperature, details)
        else:
            logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1][keep]
            parts = _score(logits, targets, temperature, details)
        logprobs, entropy, correct = (None if part is None else _scatter(part, keep) for part in parts)
        assert logprobs is not None
        return TokenScores(logprobs, entropy, correct)

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor | None, ...]:
        def score(rows: Tensor, ids: Tensor) -> tuple[Tensor | None, ...]:
            return _score(self.adjust(self.head(rows)), ids, temperature, details)

        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        chunk = max(1, self.logit_bytes // (4 * vocabulary))
        if len(hidden) <= chunk:
            return score(hidden, targets)
        pieces = [
            checkpoint(score, rows, ids, use_reentrant=False)
            for rows, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))


def _score(logits: Tensor, targets: Tensor, temperature: float, details: bool) -> tuple[Tensor | None, ...]:
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    logits = logits / temperature if temperature != 1.0 else logits
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    if not details:
        return logprobs, None, None
    with torch.no_grad():
        distribution = logits.log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        return logprobs, entropy, (logits.argmax(-1) == targets).to(logprobs.dtype)


def _scatter(values: Tensor, keep: Tensor) -> Tensor:
    full = values.new_zeros(keep.shape[0], keep.shape[1] + 1)
    index = F.pad(keep, (1, 0)).nonzero(as_tuple=True)
    return full.index_put(index, values)


def logit_adjustment(config: Any) -> Any:
    """What some models do to logits after the head: a soft cap (Gemma 2), a factor (Cohere), a divisor (Granite)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def adjust(logits: Tensor) -> Tensor:
        if scale != 1.0 or divisor != 1.0:
            logits = logits * (scale / divisor)
        return torch.tanh(logits / cap) * cap if cap else logits

    return adjust


class _Evaluating:
    """A model in eval mode for a while; the mode of each of its parts comes back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training
