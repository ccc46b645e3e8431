"""Computes log-probabilities of given tokens, for all of training.

The head runs only at positions before the requested tokens (`loss_mask`). Beyond a byte budget, logits are computed in
chunks and recomputed in backward, so that memory does not grow with vocabulary × length.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.logits import DivergenceFunction, TokenLogprobsFunction
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import kept_positions, prefix_lengths
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.tensor_parallel import local

LOGIT_BYTES = 256 * 2**20
COMPARED = 3
"""Buffers of logits in a comparison: two of the student's, which are overwritten, and the teacher's."""


class Comparison(NamedTuple):
    """A teacher's distributions at a batch's `kept_positions`, and how to compare the student's with them.

    Attributes:
        states: The teacher's hidden states at these positions, in the order of rows and columns, `[n, H]`.
        head: Computes logits `[m, V]` from some of the states, `[m, H]`.
        divergence: Maps logits of student and teacher, `[m, V]` each, to one number per position, `[m]`.

    Example:
        >>> teacher = Comparison(torch.zeros(3, 8), nn.Linear(8, 5), lambda student, teacher: student.sum(-1))
        >>> teacher.head(teacher.states[:2]).shape
        torch.Size([2, 5])
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def logits(self, places: Tensor) -> Tensor:
        """The teacher's logits `[m, V]` at some positions, `[m]`."""
        return self.head(self.states[places.to(self.states.device)]).to(places.device)


class TokenLogprobsOutput(NamedTuple):
    """Results per token, `[B, T]` each, 0 where the mask is 0.

    Attributes:
        logprobs: Log-probability of the token, in nats.
        entropy: Entropy of the distribution at the token, in nats; None without `details`.
        correct: 1 where no token is more likely; None without `details`.
        values: The value head's estimate before the token, in reward units; None without `details` or a value head.
        divergence: Divergence from the teacher's distribution at the token, in nats; None without a teacher.

    Example:
        >>> TokenLogprobsOutput(torch.zeros(1, 3)).entropy is None
        True
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    values: Tensor | None = None
    divergence: Tensor | None = None


class TokenLogprobs:
    """Computes log-probabilities of given tokens under a causal model.

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
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        temperature: float = 1.0,
        details: bool = False,
        teacher: Comparison | None = None,
        targets: Tensor | None = None,
    ) -> TokenLogprobsOutput:
        """Compute log-probabilities of the tokens with mask 1. A prompt that several rows share is computed once.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to compute, `[B, T]`; position 0 has no log-probability.
            temperature: Temperature of the softmax.
            details: Also compute entropies, a flag if the token is the most likely one, and values.
            teacher: A teacher's distributions at the same tokens; also compute the divergence from them.
            targets: Tokens to score instead of those of `input_ids`, each after the same preceding tokens, `[B, T]`.

        Returns:
            Log-probabilities in nats, and the details, `[B, T]` each.
        """
        if input_ids.shape[1] == 1:
            wide = self(*_widened(input_ids, loss_mask), temperature, details, teacher)
            return TokenLogprobsOutput(*[None if part is None else part[:, :1] for part in wide])  # type: ignore[arg-type]
        kept, counts = kept_positions(loss_mask)
        targets = input_ids if targets is None else targets
        if self.backbone.separable:
            rows, columns, parts = run_unsharded(
                self.backbone.model, self._apart, input_ids, loss_mask, targets, kept, temperature, details, teacher
            )
        else:
            rows, columns, logits = self._whole(input_ids, kept)
            places = torch.arange(len(rows), device=rows.device)
            parts = _logprobs_of(logits, targets[rows, columns], temperature, details, teacher, places)
        full = [
            None if part is None else part.new_zeros(loss_mask.shape).index_put((rows, columns), part * counts)
            for part in parts
        ]
        return TokenLogprobsOutput(*full)  # type: ignore[arg-type]

    def position_states(self, input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Hidden states before the tokens with mask 1, and the head for them: what a teacher gives to a `Comparison`.

        With a sharded model, all ranks must call this together.

        Args:
            input_ids: See `__call__`.
            loss_mask: See `__call__`.

        Returns:
            Hidden states in the order of rows and columns, `[n, H]`, and a function from some of them to logits. If the
            head cannot be run separately, the states are the logits.
        """
        if input_ids.shape[1] == 1:
            input_ids, loss_mask = _widened(input_ids, loss_mask)
        kept, _ = kept_positions(loss_mask)
        if not self.backbone.separable:
            return self._whole(input_ids, kept)[2], nn.Identity()
        wanted, model = nn.functional.pad(kept, (0, 1)), self.backbone.model
        hidden = run_unsharded(model, self.packed_forward, input_ids, wanted, prefix_lengths(loss_mask))
        order = (hidden.rows * input_ids.shape[1] + hidden.columns).argsort()
        return hidden.states[order], self.backbone.fixed_head()

    def _whole(self, input_ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the tokens with mask 1, and logits for them, from a model that is run as a whole."""
        rows, columns = nn.functional.pad(kept, (1, 0)).nonzero(as_tuple=True)
        return rows, columns, self.backbone.model(input_ids=input_ids, use_cache=False).logits[rows, columns - 1]

    def _apart(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        targets: Tensor,
        kept: Tensor,
        temperature: float,
        details: bool,
        teacher: Comparison | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Run the decoder on packed rows, and the head on kept positions.

        Returns:
            Rows, columns and results of the tokens with mask 1.
        """
        hidden = self.packed_forward(input_ids, nn.functional.pad(kept, (0, 1)), prefix_lengths(loss_mask))
        rows, columns = hidden.rows, hidden.columns + 1
        # Places of these positions in the teacher's order.
        places = rows if teacher is None else (rows * input_ids.shape[1] + columns).argsort().argsort()
        parts = self._from_hidden(hidden.states, targets[rows, columns], temperature, details, teacher, places)
        if details and self.value_head is not None:
            parts = (*parts[:3], state_values(self.value_head, hidden.states), *parts[4:])
        return rows, columns, parts

    def _from_hidden(
        self,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        details: bool,
        teacher: Comparison | None,
        places: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """`_logprobs_of` targets `[n]` from hidden states `[n, H]`, in chunks if their logits exceed the budget."""

        def compute(states: Tensor, ids: Tensor, places: Tensor) -> tuple[Tensor | None, ...]:
            if fused:
                return (*self.backbone.logprobs(states, ids, temperature, details), None, None)
            return _logprobs_of(self.backbone.logits(states), ids, temperature, details, teacher, places)

        fused = teacher is None and self.backbone.fuses_logprobs()
        size = self.backbone.lm_head.weight.element_size() if self.backbone.wide_head else hidden.element_size()
        size = torch.bfloat16.itemsize if fused else size
        buffers = 1 if teacher is None else COMPARED
        chunk = max(1, self.logit_bytes // (size * self.backbone.vocabulary * buffers))
        if len(hidden) <= chunk:
            return compute(hidden, targets, places)
        pieces = [
            checkpoint(compute, states, ids, some, use_reentrant=False)
            for states, ids, some in zip(hidden.split(chunk), targets.split(chunk), places.split(chunk), strict=True)
        ]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))


def _widened(input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of one token with a second one of mask 0, so that there is a position whose next token exists."""
    return nn.functional.pad(input_ids, (0, 1)), nn.functional.pad(loss_mask, (0, 1))


def _logprobs_of(
    logits: Tensor, targets: Tensor, temperature: float, details: bool, teacher: Comparison | None, places: Tensor
) -> tuple[Tensor | None, ...]:
    """The fields of `TokenLogprobsOutput` `[n]` for targets `[n]`; overwrites their logits `[n, V]`."""
    divergence = None
    if teacher is not None:
        divergence = DivergenceFunction.apply(logits.clone(), teacher.logits(places), teacher.divergence)
    return (*TokenLogprobsFunction.apply(logits, targets, temperature, details), None, divergence)


def state_values(head: nn.Linear, states: Tensor) -> Tensor:
    """Values `[n]` of hidden states `[n, H]` from a head with one output, in float32 or wider."""
    return run_unsharded(head, _values, head, states)


def _values(head: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        weight, bias = local(head.weight).to(dtype), local(head.bias).to(dtype)
        return nn.functional.linear(states.to(dtype), weight, bias).squeeze(-1)
