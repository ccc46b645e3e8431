"""Log-probabilities of given tokens: the one place where they are computed in training.

The head runs on kept positions only, those whose token is trained or scored. Beyond a byte budget their logits are
computed in chunks and again in backward, so that memory does not grow with vocabulary × length.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.logits import TokenLogprobs
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.parts import Parts
from rlhf_lightning.models.sharding import through
from rlhf_lightning.models.tensor_parallel import local

LOGIT_BYTES = 256 * 2**20


class TokenScores(NamedTuple):
    """Per token, `[B, T]`, 0 where nothing was asked for: `logprobs` in nats, and on request `entropy`, `correct`.

    `values` come with the details where a value head is set: what it says before the token is drawn.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None


class TokenScorer:
    """Scores tokens with a causal model.

    Args:
        model: a `…ForCausalLM`, or peft around one; one whose head cannot be run apart (`Parts`) is run whole.
        max_tokens: computed at once by the decoder, see `Forward`.
        logit_bytes: of logits that are held; where there are more they are recomputed in backward.
    """

    def __init__(self, model: Any, max_tokens: int | None = None, logit_bytes: int = LOGIT_BYTES) -> None:
        self.parts, self.logit_bytes = Parts(model), logit_bytes
        self.forward = Forward(model, self.parts.decoder, max_tokens)
        self.value_head: nn.Linear | None = None

    def __call__(self, input_ids: Tensor, mask: Tensor, temperature: float = 1.0, details: bool = False) -> TokenScores:
        """Score the tokens whose mask is not 0. What rows have in common before it is computed once.

        Args:
            input_ids: right-padded, `[B, T]`. mask: `[B, T]`; position 0 cannot be scored.
            temperature: of the softmax. details: entropy (nats), and whether the token is the likeliest.
        """
        if input_ids.shape[1] == 1:
            wide = self(nn.functional.pad(input_ids, (0, 1)), nn.functional.pad(mask, (0, 1)), temperature, details)
            return TokenScores(*[None if part is None else part[:, :1] for part in wide])  # type: ignore[arg-type]
        kept = mask[:, 1:] != 0
        if nothing := not kept.any():
            # One token, times 0: all ranks must go through the model, and every weight must get a gradient.
            kept[0, 0] = True
        if self.parts.apart:
            rows, columns, parts = through(self.parts.model, self._apart, input_ids, mask, kept, temperature, details)
        else:
            rows, columns = nn.functional.pad(kept, (1, 0)).nonzero(as_tuple=True)
            logits = self.parts.model(input_ids=input_ids, use_cache=False).logits[rows, columns - 1]
            parts = TokenLogprobs.apply(logits, input_ids[rows, columns], temperature, details)
        full = [
            None if part is None else part.new_zeros(mask.shape).index_put((rows, columns), part * (not nothing))
            for part in parts
        ]
        return TokenScores(*full)  # type: ignore[arg-type]

    def _apart(
        self, input_ids: Tensor, mask: Tensor, kept: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        hidden = self.forward(input_ids, nn.functional.pad(kept, (0, 1)), prefix_lengths(mask))
        rows, columns = hidden.rows, hidden.columns + 1
        parts = self._from_hidden(hidden.states, input_ids[rows, columns], temperature, details)
        if details and self.value_head is not None:
            parts = (*parts, state_values(self.value_head, hidden.states))
        return rows, columns, parts

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor | None, ...]:
        def score(states: Tensor, ids: Tensor) -> tuple[Tensor | None, ...]:
            return TokenLogprobs.apply(self.parts.logits(states), ids, temperature, details)

        chunk = max(1, self.logit_bytes // (hidden.element_size() * self.parts.vocabulary))
        if len(hidden) <= chunk:
            return score(hidden, targets)
        pieces = [
            checkpoint(score, states, ids, use_reentrant=False)
            for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))


def state_values(head: nn.Linear, states: Tensor) -> Tensor:
    """Values `[n]` of hidden states `[n, H]` by a head of one output; float32 or wider, whatever the backbone's."""
    return through(head, _values, head, states)


def _values(head: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        weight, bias = local(head.weight).to(dtype), local(head.bias).to(dtype)
        return nn.functional.linear(states.to(dtype), weight, bias).squeeze(-1)
