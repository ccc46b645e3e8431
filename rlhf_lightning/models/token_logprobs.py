"""Log-probabilities of given tokens: the one place where they are computed in training.

The head runs on kept positions only, those whose token is trained or scored. Beyond a byte budget their logits are
computed in chunks and again in backward, so that memory does not grow with vocabulary × length.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.logits import TokenLogprobsFunction
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.tensor_parallel import local

LOGIT_BYTES = 256 * 2**20


class TokenLogprobsOutput(NamedTuple):
    """Per token, `[B, T]`, 0 where nothing was asked for: `logprobs` in nats, and on request `entropy`, `correct`.

    `values` come with the details where a value head is set: what it says before the token is sampled.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None


class TokenLogprobs:
    """Scores tokens with a causal model.

    Args:
        model: a `…ForCausalLM`, or peft around one; one whose head cannot be run apart (`Backbone`) is run whole.
        max_tokens: computed at once by the decoder, see `PackedForward`.
        logit_bytes: of logits that are held; where there are more they are recomputed in backward.
    """

    def __init__(self, model: Any, max_tokens: int | None = None, logit_bytes: int = LOGIT_BYTES) -> None:
        self.backbone, self.logit_bytes = Backbone(model), logit_bytes
        self.packed_forward = PackedForward(model, self.backbone.decoder, max_tokens)
        self.value_head: nn.Linear | None = None

    def __call__(
        self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0, details: bool = False
    ) -> TokenLogprobsOutput:
        """Score the tokens whose mask is not 0. What rows have in common before it is computed once.

        Args:
            input_ids: right-padded, `[B, T]`. loss_mask: `[B, T]`; position 0 cannot be scored.
            temperature: of the softmax. details: entropy (nats), and whether the token is the likeliest.
        """
        if input_ids.shape[1] == 1:
            wide = self(
                nn.functional.pad(input_ids, (0, 1)), nn.functional.pad(loss_mask, (0, 1)), temperature, details
            )
            return TokenLogprobsOutput(*[None if part is None else part[:, :1] for part in wide])  # type: ignore[arg-type]
        kept = loss_mask[:, 1:] != 0
        if nothing := not kept.any():
            # One token, times 0: all ranks must go through the model, and every weight must get a gradient.
            kept[0, 0] = True
        if self.backbone.separable:
            rows, columns, parts = run_unsharded(
                self.backbone.model, self._apart, input_ids, loss_mask, kept, temperature, details
            )
        else:
            rows, columns = nn.functional.pad(kept, (1, 0)).nonzero(as_tuple=True)
            logits = self.backbone.model(input_ids=input_ids, use_cache=False).logits[rows, columns - 1]
            parts = TokenLogprobsFunction.apply(logits, input_ids[rows, columns], temperature, details)
        full = [
            None if part is None else part.new_zeros(loss_mask.shape).index_put((rows, columns), part * (not nothing))
            for part in parts
        ]
        return TokenLogprobsOutput(*full)  # type: ignore[arg-type]

    def _apart(
        self, input_ids: Tensor, loss_mask: Tensor, kept: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        hidden = self.packed_forward(input_ids, nn.functional.pad(kept, (0, 1)), prefix_lengths(loss_mask))
        rows, columns = hidden.rows, hidden.columns + 1
        parts = self._from_hidden(hidden.states, input_ids[rows, columns], temperature, details)
        if details and self.value_head is not None:
            parts = (*parts, state_values(self.value_head, hidden.states))
        return rows, columns, parts

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor | None, ...]:
        def score(states: Tensor, ids: Tensor) -> tuple[Tensor | None, ...]:
            return TokenLogprobsFunction.apply(self.backbone.logits(states), ids, temperature, details)

        chunk = max(1, self.logit_bytes // (hidden.element_size() * self.backbone.vocabulary))
        if len(hidden) <= chunk:
            return score(hidden, targets)
        pieces = [
            checkpoint(score, states, ids, use_reentrant=False)
            for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))


def state_values(head: nn.Linear, states: Tensor) -> Tensor:
    """Values `[n]` of hidden states `[n, H]` by a head of one output; float32 or wider, whatever the backbone's."""
    return run_unsharded(head, _values, head, states)


def _values(head: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        weight, bias = local(head.weight).to(dtype), local(head.bias).to(dtype)
        return nn.functional.linear(states.to(dtype), weight, bias).squeeze(-1)
