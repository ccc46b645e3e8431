"""Attention over packed rows, registered with transformers next to its own implementations.

All layers except attention treat tokens independently. Therefore, replacing this one function is enough to run rows
without padding and to compute shared prefixes once. The function follows the given `PackedLayout`; without a layout, it
calls the model's own attention.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.models.last_layer import KeptLayout, KeysAndValues, KeyValueRequest
from rlhf_lightning.models.packing import PackedLayout, as_bias, within_window
from rlhf_lightning.models.short_attention import SHORT, short_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "packed_over_"


class AttentionOptions(TypedDict, total=False):
    """The options of transformers' attention functions that are used here.

    Attributes:
        scaling: Factor on the scores.
        dropout: Probability on the attention weights.
        sliding_window: Number of most recent keys that are visible.
        softcap: Soft cap on the scores.
    """

    scaling: float | None
    dropout: float
    sliding_window: int | None
    softcap: float | None


def install(config: "PretrainedConfig") -> bool:
    """Make a model's attention accept layouts.

    Args:
        config: The model's text config; its `_attn_implementation` is changed.

    Returns:
        False if the attention is neither `sdpa` nor `eager`; other kinds have no packed counterpart.
    """
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


def uninstall(config: "PretrainedConfig") -> None:
    """Restore the model's own attention."""
    config._attn_implementation = str(config._attn_implementation).removeprefix(PREFIX)


def installed(config: "PretrainedConfig") -> bool:
    """True if the model's attention accepts layouts."""
    return str(config._attn_implementation).startswith(PREFIX)


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: "PackedLayout | KeptLayout | KeyValueRequest | Decoding | None" = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor | None]:
    """Entry point for transformers; dispatches on the kind of layout."""
    if layout is None:
        return _model_attention(own, module)(module, query, key, value, attention_mask, **options)
    if isinstance(layout, KeyValueRequest):
        raise KeysAndValues(key, value)
    if isinstance(layout, KeptLayout):
        return kept_attention(query, layout, *_scores(options), options.get("dropout", 0.0)), None
    if isinstance(layout, Decoding):
        return decoding_attention(query, key, value, layout, *_scores(options)), None
    return packed_attention(query, key, value, layout, *_scores(options), options.get("dropout", 0.0)), None


def _scores(options: AttentionOptions) -> tuple[float | None, int | None, float | None]:
    """`scaling`, `sliding_window` and `softcap`."""
    return options.get("scaling"), options.get("sliding_window"), options.get("softcap")


class Decoding:
    """Layout of a decoding step: one new token for each of several rows.

    Args:
        positions: Position of each new token in its row, `[B]`.
        width: Number of key slots per row; the row's own keys come first.

    Example:
        >>> decoding = Decoding(torch.tensor([0, 2]), width=3)
        >>> decoding.mask(window=None)[:, 0, 0]
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """

    def __init__(self, positions: Tensor, width: int) -> None:
        self.positions, self.width = positions, width
        self._masks: dict[int | None, Tensor] = {}
        self._biases: dict[tuple[int | None, int, int], Tensor] = {}

    def bias(self, window: int | None, heads: int, queries: int, dtype: torch.dtype) -> Tensor:
        """The mask as an additive bias: 0 where attention is allowed, -inf elsewhere.

        Args:
            window: Number of most recent keys that are visible; None for all.
            heads: Number of key heads.
            queries: Number of queries per key head.
            dtype: Data type of the bias.

        Returns:
            `[B · heads, queries, width]`.
        """
        key = (window, heads, queries)
        if key not in self._biases:
            mask = as_bias(self.mask(window), dtype)
            self._biases[key] = mask.expand(-1, heads, queries, -1).flatten(0, 1)
        return self._biases[key]

    def mask(self, window: int | None) -> Tensor:
        """True for keys up to the row's position and within the window, `[B, 1, 1, width]`."""
        if window not in self._masks:
            keys = torch.arange(self.width, device=self.positions.device)
            self._masks[window] = within_window(self.positions[:, None], keys, window)[:, None, None]
        return self._masks[window]


def decoding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decoding: Decoding,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from one token of each row to the keys of the row.

    Query heads that share keys (grouped-query attention) are arranged along the query dimension, so that keys are not
    copied for each head.

    Args:
        query: `[B, heads, 1, size]`.
        key: `[B, key heads, width, size]`.
        value: `[B, key heads, width, size]`.
        decoding: Positions of the new tokens.
        scaling: Factor on the scores; 1/√size by default.
        sliding_window: Number of most recent keys that are visible; None for all.
        softcap: Soft cap on the scores; None for none.

    Returns:
        `[B, 1, heads, size]`.
    """
    rows, heads, _one, size = query.shape
    query = query.reshape(rows, key.shape[1], heads // key.shape[1], size).to(key.dtype)
    if softcap:
        out = _by_scores(query, key, value, decoding.mask(sliding_window), scaling, softcap)
    elif query.device.type == "cpu" and key.dtype in (torch.float32, torch.float64):
        # For one or two queries, two matrix products are faster on a CPU than the fused kernel.
        bias = decoding.bias(sliding_window, key.shape[1], query.shape[2], key.dtype)
        scale = size**-0.5 if scaling is None else scaling
        scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    else:
        out = _fused(query, key, value, decoding.mask(sliding_window), scaling)
    return out.reshape(rows, 1, heads, value.shape[-1])


def _model_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The model's own attention function."""
    if name == "eager":  # each model's file defines its own eager attention
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
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend within each tree of a layout.

    Args:
        query: `[1, heads, n, size]`.
        key: `[1, key heads, n, size]`.
        value: `[1, key heads, n, size]`.
        layout: Layout of the packed row.
        scaling: Factor on the scores; 1/√size by default.
        sliding_window: Number of most recent keys that are visible; None for all.
        softcap: Soft cap on the scores; None for none.
        dropout: Probability on the attention weights.

    Returns:
        `[1, n, heads, size]`.
    """
    if _use_flex(query) and not dropout:
        return _flex(query, key, value, layout, scaling, sliding_window, softcap).transpose(1, 2).contiguous()
    if _is_short(query, layout, softcap, dropout):
        return short_attention(query, key, value, layout, scaling, sliding_window)
    attend, key, value = _prepared(query, key, value, scaling, softcap, dropout)
    limit = sys.maxsize if sliding_window is None else sliding_window
    kind = torch.bool if softcap else _computed_in(query)
    sizes = [size for tree in layout.trees for size in (tree.prefix, *tree.branches)]
    # One split, because the backward of separate slices would add a gradient of the full length for every piece.
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out: list[Tensor] = []
    for number, tree in enumerate(layout.trees):
        prefix, *branches = islice(pieces, len(tree.rows) + 1)
        causal = None if tree.prefix <= limit else layout.prefix_mask(number, sliding_window, kind)
        out.append(attend(*prefix, causal))
        if any(tree.branches):
            mask = layout.branch_mask(number, sliding_window, kind)
            out += _branches(prefix, branches, tree.branches, mask, attend)
        else:
            out += [branch[0] for branch in branches]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def kept_attention(
    query: Tensor,
    layout: KeptLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from the kept positions of a packed row to the keys of all.

    Args:
        query: `[1, heads, m, size]`.
        layout: The kept positions, and keys and values.
        scaling: Factor on the scores; 1/√size by default.
        sliding_window: Number of most recent keys that are visible; None for all.
        softcap: Soft cap on the scores; None for none.
        dropout: Probability on the attention weights.

    Returns:
        `[1, m, heads, size]`.
    """
    full, (key, value) = layout.full, (layout.key, layout.value)
    if _is_short(query, full, softcap, dropout):
        return short_attention(query, key, value, full, scaling, sliding_window, layout.kept)
    attend, key, value = _prepared(query, key, value, scaling, softcap, dropout)
    sizes = [size for tree in full.trees for size in (tree.prefix, *tree.branches)]
    ends = torch.searchsorted(layout.kept.cpu(), torch.tensor(sizes).cumsum(0)).tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    positions = full.columns[layout.kept].split(counts)
    pieces = zip(query.split(counts, 2), positions, key.split(sizes, 2), value.split(sizes, 2), strict=True)
    out: list[Tensor] = []
    for tree in full.trees:
        (q, position, *prefix), *branches = islice(pieces, len(tree.rows) + 1)
        if len(position):
            if softcap or (sliding_window or tree.prefix) < tree.prefix or 2 * len(position) <= tree.prefix:
                out.append(attend(q, *prefix, _visible(position, tree.prefix, sliding_window)))
            else:
                out.append(_spread(attend, q, position, *prefix))
        if most := max(len(position) for _, position, *_ in branches):
            # All branches in one batch, as in `_branches`; a key's index in its row is its position.
            q, k, v = _batch_of_branches([(q, k, v) for q, _, k, v in branches], prefix, most, max(tree.branches))
            rows = torch.stack([F.pad(position, (0, most - len(position))) for _, position, *_ in branches])
            found = attend(q, k, v, _visible(rows, k.shape[2], sliding_window)[:, None])
            out += [found[i : i + 1, :, : len(position)] for i, (_, position, *_) in enumerate(branches)]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _spread(attend: Callable[..., Tensor], query: Tensor, position: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from some positions of a row by causal attention from all, which takes no memory for a mask.

    It computes as many scores as attention from half of the positions under a mask.
    """
    every = query.new_zeros(*query.shape[:2], *key.shape[2:]).index_copy(2, position, query)
    return attend(every, key, value, None)[:, :, position]


def _visible(positions: Tensor, keys: int, window: int | None) -> Tensor:
    """True where a query at one of `positions` `[…]` may attend to one of the first keys of its row, `[…, keys]`."""
    return within_window(positions[..., None], torch.arange(keys, device=positions.device), window)


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """The function that attends from queries to keys and values under a mask, and keys and values for each head."""
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return partial(_attend, scaling=scaling, dropout=dropout, softcap=softcap), key, value


def _branches(
    prefix: Sequence[Tensor],
    branches: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
    mask: Tensor,
    attend: Callable[..., Tensor],
) -> list[Tensor]:
    """Attend from all branches in one batch, each to the keys of the prefix and to its own.

    One row with a mask over the whole tree would compute every branch against every other branch. That is milliseconds
    faster for trees of a hundred tokens, but takes three times as long for 32 branches (benchmarks/sharing.py).
    """
    out = attend(*_batch_of_branches(branches, prefix[1:], max(lengths), max(lengths)), mask)
    return [out[i : i + 1, :, :length] for i, length in enumerate(lengths)]


def _batch_of_branches(
    branches: Sequence[Sequence[Tensor]], prefix: Sequence[Tensor], queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all branches as a batch of padded rows; keys and values begin with those of the prefix.

    Args:
        branches: Query, key and value of each branch.
        prefix: Key and value of the prefix.
        queries: Largest number of queries of a branch.
        keys: Largest number of keys of a branch.
    """
    q, k, v = (
        torch.cat([F.pad(branch[i], (0, 0, 0, width - branch[i].shape[2])) for branch in branches])
        for i, width in enumerate((queries, keys, keys))
    )
    k, v = (
        torch.cat([shared.expand(len(branches), -1, -1, -1), own], 2)
        for shared, own in zip(prefix, (k, v), strict=True)
    )
    return q, k, v


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


def _is_short(query: Tensor, layout: PackedLayout, softcap: float | None, dropout: float) -> bool:
    """True if `short_attention` is used: for short rows in bfloat16 on a CPU, without soft cap and dropout."""
    if query.device.type != "cpu" or softcap or dropout or layout.longest > SHORT:
        return False
    return _computed_in(query) == torch.bfloat16


def _computed_in(query: Tensor) -> torch.dtype:
    """The data type that attention computes in, under autocast as well, which leaves float64 as it is."""
    kind = query.device.type
    mixed = torch.is_autocast_enabled(kind) and query.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if mixed else query.dtype


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
    # Softmax in float32 whatever the model's dtype, as in transformers' eager attention, the only one with a soft cap.
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout, training=bool(dropout)) @ value


def _use_flex(query: Tensor) -> bool:
    """True if FlexAttention should run: on CUDA, except in float64."""
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
    """Attend with one FlexAttention kernel for all trees on CUDA; empty blocks of the mask are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in layout.blocks:
        layout.blocks[window] = create_block_mask(
            lambda b, h, q, k: layout.allowed(q, k, window), None, None, query.shape[2], query.shape[2], query.device
        )

    # A tensor, because a captured Python number breaks the compiled graph in backward.
    cap = torch.full((), softcap, device=query.device) if softcap else None

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert cap is not None
        return torch.tanh(score / cap) * cap

    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Norms leave queries and keys in float32, but values are bfloat16; only newer versions of PyTorch cast them.
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    # Sampling and checks disable compilation. It must stay on here: uncompiled, FlexAttention materializes all scores.
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
"""Largest number of compiled variants: windows, gradients on or off, inference mode, autocast, short rows."""


def _compiled_flex() -> Callable[..., Tensor]:
    """Compile `flex_attention` once; raises if it cannot be compiled, because uncompiled it materializes all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _FLEX:
        # Sampling and training together exceed the default limit of 8; beyond the limit, it would run uncompiled.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        _FLEX.append(torch.compile(flex_attention, dynamic=True, fullgraph=True))
    return _FLEX[0]
