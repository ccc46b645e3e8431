"""Attention over short rows in bfloat16 on a CPU, faster than PyTorch's kernel for long ones."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.models.precision import rounded_factors

SHORT = 512
"""Number of keys up to which this is used: forward and backward are 2.6 times as fast at 170 tokens, 1.6 times at 512
(`benchmarks/cpu.py` on an AMD EPYC with AVX512-BF16)."""


class ShortAttentionFunction(torch.autograd.Function):
    """Autograd function: `apply(query, key, value, bias, scale)` → `[B, heads, T, size]`.

    Query heads that share keys (grouped-query attention) are arranged along the query dimension, so that keys are not
    copied for each head. Scores, softmax and its gradient are in float32; all other products are in bfloat16, as in
    PyTorch's own kernel. Backward computes the weights again, so that memory does not grow with the square of the
    length. Shapes: `query` `[B, heads, T, size]`, `key` and `value` `[B, key heads, S, size]`, all bfloat16; `bias` is
    added to the scores, float32, `[1 or B · key heads, heads / key heads · T, S]`.

    Example:
        >>> states = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
        >>> bias = attention_bias(causal(3, 3), states, states)
        >>> ShortAttentionFunction.apply(states, states, states, bias, 0.5).shape
        torch.Size([1, 2, 3, 4])
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """Compute the output."""
        with torch.autocast("cpu", enabled=False):
            weights = _weights(query, key, bias, scale)
            out = torch.bmm(weights.to(value.dtype), value.flatten(0, 1)).view(*query.shape[:3], -1)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, bias, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value.

        With P the weights and O the output: ∂S = P · (∂P − Σ ∂O · O), where ∂P = ∂O Vᵀ (FlashAttention, arXiv
        2205.14135, appendix B).
        """
        query, key, value, bias, out = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            weights = _weights(query, key, bias, ctx.scale)
            grads, queries, keys = _by_key_head(grad, key), _by_key_head(query, key), key.flatten(0, 1)
            by_value = torch.bmm(weights.to(value.dtype).transpose(1, 2), grads)
            total = (grads.float() * _by_key_head(out, key)).sum(-1, keepdim=True)
            by_weights = torch.bmm(grads, value.flatten(0, 1).transpose(1, 2)).float()
            by_scores = by_weights.sub_(total).mul_(weights).mul_(ctx.scale).to(query.dtype)
            by_query = torch.bmm(by_scores, keys)
            by_key = torch.bmm(by_scores.transpose(1, 2), queries)
        return by_query.view(query.shape), by_key.view(key.shape), by_value.view(value.shape), None, None


def attention_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias of `ShortAttentionFunction`: 0 where a query may attend to a key, -inf elsewhere.

    Args:
        mask: True where a query may attend, `[T, S]` or `[B, 1, T, S]`.
        query: `[B, heads, T, size]`.
        key: `[B, key heads, S, size]`.
    """
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    if mask.dim() == 2:
        return bias.repeat(groups, 1)[None]
    return bias[:, :, None].expand(-1, key.shape[1], groups, -1, -1).reshape(-1, groups * mask.shape[2], mask.shape[3])


def causal(queries: int, keys: int) -> Tensor:
    """Mask under which a query attends to the keys up to its own position, `[queries, keys]`."""
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def _weights(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention weights in float32, `[B · key heads, heads / key heads · T, S]`."""
    with rounded_factors():
        queries, keys = _by_key_head(query, key).float(), key.flatten(0, 1).float()
        return torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale).softmax(-1)


def _by_key_head(states: Tensor, key: Tensor) -> Tensor:
    """States of query heads, arranged by the key head that they use: `[B · key heads, heads / key heads · T, size]`."""
    return states.reshape(len(key) * key.shape[1], -1, states.shape[-1])
