"""Computes log-probabilities, entropies and divergences from logits, in place and a few rows at a time.

Plain autograd keeps the logits, their log-softmax and its gradient, each of size rows × vocabulary. Here, a single
buffer is used for all three: probabilities overwrite the logits, and the gradient overwrites the probabilities.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.models.precision import rounded_factors

CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
"""Number of logits processed at once; on a CPU, small enough for its cache."""
HEAD_ROWS = 128
"""Smallest number of rows whose logits are computed at once on a CPU."""


class TokenLogprobsFunction(torch.autograd.Function):
    """Autograd function: `apply(logits, targets, temperature, details)` → `(logprobs, entropy, correct)`.

    `logits` `[n, V]` are overwritten, so nothing else may need them. `targets` are the token ids, `[n]`. All three
    results are `[n]`, in float32 or wider:

    - `logprobs`: log-probability of each target, in nats.
    - `entropy`: entropy of the distribution in nats, with gradient; None without `details`.
    - `correct`: 1 where no token is more likely than the target; None without `details`.

    Example:
        >>> logits = torch.zeros(1, 4, requires_grad=True)
        >>> logprobs, entropy, correct = TokenLogprobsFunction.apply(logits * 1, torch.tensor([2]), 1.0, True)
        >>> round(logprobs.item(), 4), round(entropy.item(), 4)
        (-1.3863, 1.3863)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Detached, because autograd forbids in-place writes to views that a custom function returned.
        """Compute the results and keep the probabilities in the buffer of the logits."""
        logits = logits.detach()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs = logits.new_empty(len(logits), dtype=dtype)
        entropy, correct = (torch.empty_like(logprobs) if details else None for _ in range(2))
        for part in _parts(logits):
            scaled = logits[part].to(dtype)
            scaled = scaled.div_(temperature) if temperature != 1.0 else scaled
            logits[part] = _write(scaled, targets, part, logprobs, entropy, correct)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, logprobs, entropy)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Overwrite the buffer with the gradient of the logits.

        With z the logits over the temperature: ∂ log p(t) / ∂z = (1 at t) − p, and ∂H / ∂z = −p · (log p + H).
        """
        buffer, targets, logprobs, entropy = ctx.saved_tensors
        grad = logprobs.new_zeros(len(logprobs)) if grad is None else grad / ctx.temperature
        for part in _parts(buffer):
            probabilities = buffer[part]
            bend = None
            if grad_entropy is not None:
                p = probabilities.to(logprobs.dtype)
                bend = _entropy_slope(p, entropy[part, None]).mul_(grad_entropy[part, None] / ctx.temperature)
            probabilities.mul_(-grad[part, None])
            # Computed from log p, because 1 − p from the buffer would be rounded in a narrow type.
            at_target = grad[part] * -torch.expm1(logprobs[part])
            probabilities.scatter_(-1, targets[part, None], at_target[:, None].to(probabilities.dtype))
            if bend is not None:
                probabilities.add_(bend)
        return buffer, None, None, None


class RoundedLogitsFunction(torch.autograd.Function):
    """Autograd function: `apply(states, weight)` → logits `[n, V]` in float32, for training in bfloat16 on a CPU.

    `states` are `[n, H]` and `weight` `[V, H]`, both float32. Logits are sums in float32 of factors that may be rounded
    to bfloat16 (`rounded_factors`). The gradients are products in bfloat16, like those of all other layers.

    Example:
        >>> RoundedLogitsFunction.apply(torch.ones(2, 4), torch.ones(3, 4))
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        """Compute the logits."""
        ctx.save_for_backward(states, weight)
        with rounded_factors():
            return states @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the states and the weight."""
        states, weight = ctx.saved_tensors
        narrow = grad.to(torch.bfloat16)
        by_states = (narrow @ weight.to(torch.bfloat16)).to(states.dtype) if ctx.needs_input_grad[0] else None
        by_weight = (narrow.t() @ states.to(torch.bfloat16)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return by_states, by_weight


class HeadLogprobsFunction(torch.autograd.Function):
    """Autograd function: `apply(states, weight, targets, temperature, details)` → `(logprobs, entropy, correct)`.

    `RoundedLogitsFunction` and `TokenLogprobsFunction` in one pass over blocks of rows: logits and probabilities exist
    in float32 for one block only. Backward needs p − (1 at the target), which is kept in bfloat16, `[n, V]`. The factor
    of each token is multiplied into hidden states and their gradients, not into that matrix.

    Example:
        >>> states, weight = torch.zeros(1, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> logprobs, entropy, correct = HeadLogprobsFunction.apply(states, weight, torch.tensor([2]), 1.0, True)
        >>> round(logprobs.item(), 4), round(entropy.item(), 4)
        (-1.3863, 1.3863)
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the results, and the gradient of each log-probability by its logits."""
        slopes = states.new_empty(len(states), len(weight), dtype=torch.bfloat16)
        logprobs, entropy, correct = head_logprobs(states, weight, targets, temperature, details, slopes)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, targets, slopes, logprobs, entropy)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the states and the weight; formulas as in `TokenLogprobsFunction`."""
        states, weight, targets, slopes, logprobs, entropy = ctx.saved_tensors
        factor = (logprobs.new_zeros(len(logprobs)) if grad is None else grad / -ctx.temperature)[:, None]
        if grad_entropy is not None:
            bent = grad_entropy[:, None] / ctx.temperature
            for part in _blocks(*slopes.shape):
                slope = slopes[part].float()
                p = slope.scatter(-1, targets[part, None], logprobs[part, None].exp())
                bend = _entropy_slope(p, entropy[part, None]).mul_(bent[part])
                slopes[part] = bend.addcmul_(slope, factor[part])
            factor = torch.ones_like(factor)
        by_states = by_weight = None
        if ctx.needs_input_grad[0]:
            by_states = (slopes @ weight.to(torch.bfloat16)).to(states.dtype).mul_(factor)
        if ctx.needs_input_grad[1]:
            by_weight = (slopes.t() @ (states * factor).to(torch.bfloat16)).to(weight.dtype)
        return by_states, by_weight, None, None, None


def head_logprobs(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    details: bool,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The results of `HeadLogprobsFunction` without gradients.

    Args:
        states: `[n, H]`, float32.
        weight: `[V, H]`, float32.
        targets: Token ids, `[n]`.
        temperature: Temperature of the softmax.
        details: Also compute entropy and correctness.
        slopes: Filled with p − (1 at the target), the negative gradient of each log-probability by its scaled logits,
            `[n, V]`; None if no gradient is needed.

    Example:
        >>> head_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([2]), 1.0, False)[0]
        tensor([-1.3863])
    """
    logprobs = states.new_empty(len(states))
    entropy, correct = (torch.empty_like(logprobs) if details else None for _ in range(2))
    with rounded_factors():
        for part in _blocks(len(states), len(weight)):
            scaled = states[part] @ weight.t()
            scaled = scaled.div_(temperature) if temperature != 1.0 else scaled
            probabilities = _write(scaled, targets, part, logprobs, entropy, correct)
            if slopes is not None:
                # Computed from log p, because p − 1 would lose the digits of a p near 1.
                slopes[part] = probabilities.scatter_(-1, targets[part, None], torch.expm1(logprobs[part])[:, None])
    return logprobs, entropy, correct


class DivergenceFunction(torch.autograd.Function):
    """Autograd function: `apply(logits, teacher_logits, divergence)` → the divergence of each row, `[n]`.

    `logits` `[n, V]` of the student are overwritten with their gradient, so nothing else may need them. Further tensors
    of that width exist for a few rows at a time only. `divergence` maps logits of student and teacher to one number per
    row; see `objectives.distillation.divergence`.

    Example:
        >>> logits, teacher_logits = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.0, 1.0]])
        >>> squares = lambda student, teacher: (student - teacher).square().sum(-1)
        >>> DivergenceFunction.apply(logits * 1, teacher_logits, squares).sum().backward()
        >>> logits.grad
        tensor([[ 0., -2.]])
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher_logits: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Compute the divergences, and the gradient of each by its row of logits."""
        logits = logits.detach()
        found = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for part in _parts(logits, gpu_chunk=GPU_CHUNK // 8):  # autograd keeps several tensors of this size
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                rows = logits[part].clone().requires_grad_(ctx.needs_input_grad[0])
                values = divergence(rows, teacher_logits[part])
                if ctx.needs_input_grad[0]:
                    (logits[part],) = torch.autograd.grad(values.sum(), rows)
            found[part] = values.detach()
        ctx.save_for_backward(logits)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient in the buffer."""
        (buffer,) = ctx.saved_tensors
        for part in _parts(buffer):
            buffer[part] *= grad[part, None]
        return buffer, None, None


def _write(
    scaled: Tensor, targets: Tensor, part: slice, logprobs: Tensor, entropy: Tensor | None, correct: Tensor | None
) -> Tensor:
    """Write the results of some rows to their places, and return their probabilities.

    Args:
        scaled: Logits of these rows over the temperature, `[m, V]`.
        targets: Token ids of all rows, `[n]`.
        part: These rows.
        logprobs: Log-probabilities of all rows, `[n]`.
        entropy: Entropies, `[n]`, or None.
        correct: 1 where no token is more likely than the target, `[n]`, or None.
    """
    target, top = scaled.gather(-1, targets[part, None]).squeeze(-1), scaled.amax(-1)
    probabilities = scaled.softmax(-1)
    # Computed from the largest probability, because that of the target may underflow.
    logprobs[part] = target - top + probabilities.amax(-1).log()
    if entropy is not None and correct is not None:
        normalizer = logprobs[part].neg() + target
        entropy[part] = normalizer - torch.linalg.vecdot(probabilities, scaled)
        correct[part] = (target == top).to(scaled.dtype)
    return probabilities


def _entropy_slope(p: Tensor, entropy: Tensor) -> Tensor:
    """Gradient of the entropy by the scaled logits, −p · (log p + H), from probabilities `[m, V]` and H `[m, 1]`."""
    return torch.xlogy(p, p).addcmul_(p, entropy).neg_()


def block_rows(vocabulary: int) -> int:
    """Number of rows whose logits `HeadLogprobsFunction` computes at once: enough that the weight is read rarely."""
    return max(HEAD_ROWS, CPU_CHUNK // vocabulary)


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of that many rows."""
    size = block_rows(vocabulary)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _parts(logits: Tensor, gpu_chunk: int = GPU_CHUNK) -> list[slice]:
    """Slices of rows that are processed at once."""
    rows = max(1, (CPU_CHUNK if logits.device.type == "cpu" else gpu_chunk) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
