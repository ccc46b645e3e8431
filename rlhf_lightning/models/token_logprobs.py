"""Computes log-probabilities of given tokens, for all of training.

The head runs only at positions whose next token is trained or scored. Beyond a byte budget, logits are computed in
chunks and recomputed in backward, so that memory does not grow with vocabulary × length.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.logits import TokenLogprobsFunction
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import prefix_lengths, scored_positions
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.tensor_parallel import local

LOGIT_BYTES = 256 * 2**20


class TokenLogprobsOutput(NamedTuple):
    """Results per token, `[B, T]` each, 0 where the mask is 0.

    Attributes:
        logprobs: Log-probability of the token, in nats.
        entropy: Entropy of the distribution at the token, in nats; None without `details`.
        correct: 1 where no token is more likely; None without `details`.
        values: The value head's estimate before the token, in reward units; None without `details` or a value head.

    Example:
        >>> TokenLogprobsOutput(torch.zeros(1, 3)).entropy is None
        True
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None


class TokenLogprobs:
    """Scores given tokens with a causal model.

    Args:
        model: A `…ForCausalLM`, or a `PeftModel` around one. A model is run as a whole if its head cannot be run
            separately (see `Backbone`).
        max_tokens_per_batch: Number of tokens that the decoder computes at once, see `PackedForward`.
        logit_bytes: Largest size of logits kept in memory, in bytes; larger logits are recomputed in backward.
        value_head: Value head of a critic that shares the model.

    Raises:
        ConfigError: If a value head is given, but the model's head cannot be run separately.

    Example:
        ```python
        token_logprobs = TokenLogprobs(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
        logprobs = token_logprobs(input_ids, loss_mask).logprobs  # [B, T], nats
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        max_tokens_per_batch: int | None = None,
        logit_bytes: int = LOGIT_BYTES,
        value_head: nn.Linear | None = None,
    ) -> None:
        self.backbone, self.logit_bytes, self.value_head = Backbone(model), logit_bytes, value_head
        self.packed_forward = PackedForward(model, self.backbone.decoder, max_tokens_per_batch)
        if value_head is not None and not self.backbone.separable:
            raise ConfigError(
                f"critic.shared: the hidden states of {type(base_of(model)).__name__} cannot be computed without its "
                "head; leave it out"
            )

    def __call__(
        self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0, details: bool = False
    ) -> TokenLogprobsOutput:
        """Score the tokens with mask 1. A prompt that several rows share is computed once.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to score, `[B, T]`; position 0 cannot be scored.
            temperature: Temperature of the softmax.
            details: Also compute entropies, a flag if the token is the most likely one, and values.

        Returns:
            Log-probabilities in nats, and the details, `[B, T]` each.
        """
        if input_ids.shape[1] == 1:
            wide = self(
                nn.functional.pad(input_ids, (0, 1)), nn.functional.pad(loss_mask, (0, 1)), temperature, details
            )
            return TokenLogprobsOutput(*[None if part is None else part[:, :1] for part in wide])  # type: ignore[arg-type]
        kept, counts = scored_positions(loss_mask)
        if self.backbone.separable:
            rows, columns, parts = run_unsharded(
                self.backbone.model, self._apart, input_ids, loss_mask, kept, temperature, details
            )
        else:
            rows, columns = nn.functional.pad(kept, (1, 0)).nonzero(as_tuple=True)
            logits = self.backbone.model(input_ids=input_ids, use_cache=False).logits[rows, columns - 1]
            parts = TokenLogprobsFunction.apply(logits, input_ids[rows, columns], temperature, details)
        full = [
            None if part is None else part.new_zeros(loss_mask.shape).index_put((rows, columns), part * counts)
            for part in parts
        ]
        return TokenLogprobsOutput(*full)  # type: ignore[arg-type]

    def _apart(
        self, input_ids: Tensor, loss_mask: Tensor, kept: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Run the decoder on packed rows, and the head on kept positions.

        Returns:
            Rows, columns and results of the scored tokens.
        """
        hidden = self.packed_forward(input_ids, nn.functional.pad(kept, (0, 1)), prefix_lengths(loss_mask))
        rows, columns = hidden.rows, hidden.columns + 1
        parts = self._from_hidden(hidden.states, input_ids[rows, columns], temperature, details)
        if details and self.value_head is not None:
            parts = (*parts, state_values(self.value_head, hidden.states))
        return rows, columns, parts

    def _from_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor | None, ...]:
        """Score targets `[n]` from hidden states `[n, H]`, in chunks if their logits exceed the budget."""

        def score(states: Tensor, ids: Tensor) -> tuple[Tensor | None, ...]:
            return TokenLogprobsFunction.apply(self.backbone.logits(states), ids, temperature, details)

        size = self.backbone.lm_head.weight.element_size() if self.backbone.wide_head else hidden.element_size()
        chunk = max(1, self.logit_bytes // (size * self.backbone.vocabulary))
        if len(hidden) <= chunk:
            return score(hidden, targets)
        pieces = [
            checkpoint(score, states, ids, use_reentrant=False)
            for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))


def state_values(head: nn.Linear, states: Tensor) -> Tensor:
    """Values `[n]` of hidden states `[n, H]` from a head with one output, in float32 or wider."""
    return run_unsharded(head, _values, head, states)


def _values(head: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        weight, bias = local(head.weight).to(dtype), local(head.bias).to(dtype)
        return nn.functional.linear(states.to(dtype), weight, bias).squeeze(-1)
