"""Attention over packed rows, registered with transformers beside its own.

Everything but attention treats each token by itself, so rows without padding and prefixes that are computed once need
nothing from a model but this function. It goes by the layout it is given; without one it is the model's own.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.models.packing import PackedLayout, within_window

PREFIX = "packed_over_"


def install(config: Any) -> bool:
    """Let a model's attention take layouts; False where its attention is of a kind that has no such counterpart."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    own = str(config._attn_implementation)
    if installed(config):
        return True
    if own not in ("sdpa", "eager"):
        return False
    AttentionInterface.register(PREFIX + own, partial(_attention, own))
    AttentionMaskInterface.register(PREFIX + own, ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = PREFIX + own
    return True


def uninstall(config: Any) -> None:
    """The model's own attention again."""
    config._attn_implementation = str(config._attn_implementation).removeprefix(PREFIX)


def installed(config: Any) -> bool:
    """Whether the model's attention takes layouts."""
    return str(config._attn_implementation).startswith(PREFIX)


def _attention(
    own: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: "PackedLayout | Decoding | None" = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if layout is None:
        return _own(own, module)(module, query, key, value, attention_mask, **options)
    if isinstance(layout, Decoding):
        return decoding_attention(query, key, value, layout, **options), None
    return packed_attention(query, key, value, layout, **options), None


class Decoding:
    """One new token for each of several rows: `positions` `[B]` of the tokens, `width` keys, the row's own first."""

    def __init__(self, positions: Tensor, width: int) -> None:
        self.positions, self.width = positions, width
        self._masks: dict[int | None, Tensor] = {}
        self._biases: dict[tuple[int | None, int, int], Tensor] = {}

    def bias(self, window: int | None, heads: int, queries: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, `[B · heads, queries, width]`."""
        key = (window, heads, queries)
        if key not in self._biases:
            mask = self.mask(window)
            zeros = torch.zeros(len(mask), heads, queries, self.width, dtype=dtype, device=mask.device)
            self._biases[key] = zeros.masked_fill_(~mask, -torch.inf).flatten(0, 1)
        return self._biases[key]

    def mask(self, window: int | None) -> Tensor:
        """`[B, 1, 1, width]`, keys up to the row's position, and within the window."""
        if window not in self._masks:
            distance = self.positions[:, None] - torch.arange(self.width, device=self.positions.device)
            self._masks[window] = within_window(distance, window)[:, None, None]
        return self._masks[window]


def decoding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decoding: Decoding,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention of one token of each row to the row's keys: `[B, 1, heads, size]`.

    Args:
        query: `[B, heads, 1, size]`. key, value: `[B, key heads, width, size]`. The rest as in the model.

    Heads that share keys are put where several queries would be, so that the keys are not copied for each.
    """
    rows, heads, _one, size = query.shape
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size).to(key.dtype)
    if softcap:
        out = _by_scores(query, key, value, decoding.mask(sliding_window), scaling, softcap)
    elif query.device.type == "cpu" and key.dtype in (torch.float32, torch.float64):
        # For a query or two the fused kernel takes longer on a CPU than two products.
        bias = decoding.bias(sliding_window, key.shape[1], query.shape[2], key.dtype)
        scale = size**-0.5 if scaling is None else scaling
        scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    else:
        out = _fused(query, key, value, decoding.mask(sliding_window), scaling)
    return out.reshape(rows, 1, heads, value.shape[-1])


def _own(name: str, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # written anew in each model's file
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers import AttentionInterface

    return AttentionInterface()[name]


@torch.compiler.disable
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention within each tree of a layout.

    Args:
        query: `[1, heads, n, size]`. key, value: `[1, key heads, n, size]`. scaling: of the scores, 1/√size by default.
        dropout, sliding_window, softcap: as in the model.

    Returns:
        `[1, n, heads, size]`.
    """
    if _by_flex(query) and not dropout:
        return _flex(query, key, value, layout, scaling, sliding_window, softcap).transpose(1, 2).contiguous()
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    limit = sys.maxsize if sliding_window is None else sliding_window
    attend = partial(_attend, scaling=scaling, dropout=dropout, softcap=softcap)
    sizes = [size for tree in layout.trees for size in (tree.prefix, *tree.branches)]
    # Split once: a slice of its own for each piece would add up gradients of the whole length, piece by piece.
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out: list[Tensor] = []
    for number, tree in enumerate(layout.trees):
        prefix, *branches = islice(pieces, len(tree.rows) + 1)
        causal = None if tree.prefix <= limit else layout.row_mask(number, sliding_window)[: tree.prefix, : tree.prefix]
        out.append(attend(*prefix, causal))
        if any(tree.branches):
            mask = layout.row_mask(number, sliding_window)[tree.prefix :]
            out += _branches(prefix, branches, tree.branches, mask, attend)
        else:
            out += [branch[0] for branch in branches]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _branches(
    prefix: Sequence[Tensor],
    branches: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
    mask: Tensor,
    attend: Callable[..., Tensor],
) -> list[Tensor]:
    """All branches side by side, each against the prefix's keys and its own.

    One row with a mask over the whole tree would compute every branch against every other: it gains milliseconds on
    trees of a hundred tokens, and takes three times as long for 32 branches (benchmarks/sharing.py).
    """
    longest = max(lengths)
    q, k, v = (
        torch.cat([F.pad(branch[i], (0, 0, 0, longest - branch[i].shape[2])) for branch in branches]) for i in range(3)
    )
    k, v = (
        torch.cat([shared.expand(len(branches), -1, -1, -1), own], 2)
        for shared, own in zip(prefix[1:], (k, v), strict=True)
    )
    out = attend(q, k, v, mask)
    return [out[i : i + 1, :, :length] for i, length in enumerate(lengths)]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    if not softcap:
        return _fused(query, key, value, mask, scaling, dropout)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return _by_scores(query, key, value, mask, scaling, softcap, dropout)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
    )


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    # In float32 whatever the model's type, as transformers' eager attention, the only one with a cap, has it.
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout, training=bool(dropout)) @ value


def _by_flex(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float64


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One kernel for all trees, on CUDA: blocks of the mask that are empty are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in layout.blocks:
        layout.blocks[window] = create_block_mask(
            lambda b, h, q, k: layout.allowed(q, k, window), None, None, query.shape[2], query.shape[2], query.device
        )

    # A tensor: a number that scores depend on breaks the graph where it is differentiated.
    cap = torch.full((), softcap, device=query.device) if softcap else None

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert cap is not None
        return torch.tanh(score / cap) * cap

    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Norms leave queries and keys in float32 beside values in bfloat16, which PyTorch casts in later versions only.
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    # Sampling and checks run layers uncompiled; this must not be: uncompiled it holds all scores.
    with torch.compiler.set_stance("default"):
        return _compiled_flex()(
            query,
            key,
            value,
            score_mod=capped if softcap else None,
            block_mask=layout.blocks[window],
            scale=scaling,
            enable_gqa=True,
        )


_FLEX: list[Callable[..., Tensor]] = []
GRAPHS = 64
"""Variants of the kernel: windows, with and without gradients, in inference mode, under autocast, short rows."""


def _compiled_flex() -> Callable[..., Tensor]:
    """flex_attention compiled, once; an error where it cannot be, since uncompiled it holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _FLEX:
        # Beyond the default of 8, which sampling and training together pass, it would run uncompiled.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        _FLEX.append(torch.compile(flex_attention, dynamic=True, fullgraph=True))
    return _FLEX[0]
