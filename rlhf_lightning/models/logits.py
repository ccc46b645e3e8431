"""From logits to log-probabilities and entropies of tokens, in place and a few rows at a time.

Autograd's own path holds the logits, their log-softmax and its gradient, each rows × vocabulary. Here one buffer is
all three: probabilities take the place of the logits, and their gradient that of the probabilities.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
"""Logits that are worked on at once; on a CPU, few enough to stay in its cache."""


class TokenLogprobsFunction(torch.autograd.Function):
    """`apply(logits [n, V], targets [n], temperature, details)` → `(logprobs, entropy, correct)`, each `[n]`.

    In nats, in float32 or wider. Entropy (with gradient) and `correct` (1 where no token is likelier than the target)
    are None without `details`. The logits are overwritten: nothing else may need them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, details: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Without its place in the graph: what a function of autograd's returned as a view may not be overwritten.
        logits = logits.detach()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs = logits.new_empty(len(logits), dtype=dtype)
        entropy, correct = (torch.empty_like(logprobs) if details else None for _ in range(2))
        for part in _parts(logits):
            scaled = logits[part].to(dtype)
            scaled = scaled.div_(temperature) if temperature != 1.0 else scaled
            target, top = scaled.gather(-1, targets[part, None]).squeeze(-1), scaled.amax(-1)
            probabilities = scaled.softmax(-1)
            # From the largest probability, which cannot underflow as that of the target can.
            logprobs[part] = target - top + probabilities.amax(-1).log()
            if entropy is not None and correct is not None:
                normalizer = logprobs[part].neg() + target
                entropy[part] = normalizer - torch.linalg.vecdot(probabilities, scaled)
                correct[part] = (target == top).to(dtype)
            logits[part] = probabilities
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, logprobs, entropy)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> Any:
        """∂ log p(t) / ∂ z = (1 at t) − p and ∂ H / ∂ z = −p · (log p + H), z being the logits over temperature."""
        buffer, targets, logprobs, entropy = ctx.saved_tensors
        grad = logprobs.new_zeros(len(logprobs)) if grad is None else grad / ctx.temperature
        for part in _parts(buffer):
            probabilities = buffer[part]
            bend = None
            if grad_entropy is not None:
                p = probabilities.to(logprobs.dtype)
                bend = torch.xlogy(p, p).addcmul_(p, entropy[part, None])
                bend.mul_(-grad_entropy[part, None] / ctx.temperature)
            probabilities.mul_(-grad[part, None])
            # Not as one minus the probability in the buffer, which a narrow type rounds.
            at_target = grad[part] * -torch.expm1(logprobs[part])
            probabilities.scatter_(-1, targets[part, None], at_target[:, None].to(probabilities.dtype))
            if bend is not None:
                probabilities.add_(bend)
        return buffer, None, None, None


def _parts(logits: Tensor) -> list[slice]:
    rows = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
