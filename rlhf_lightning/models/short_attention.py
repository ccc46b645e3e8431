"""Attention over short packed rows in bfloat16 on a CPU, faster than PyTorch's kernel for long ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.models.packing import PackedLayout, SharedPrefix, within_window
from rlhf_lightning.models.precision import rounded_factors

SHORT = 512
"""Number of keys up to which this is used: forward and backward are 2.6 times as fast at 170 tokens, 1.6 times at 512
(`benchmarks/cpu.py` on an AMD EPYC with AVX512-BF16)."""
SCORES = 2**18
"""Number of scores that are computed at once, so that they stay in the cache of a core."""
PADDING = 1.25
"""Largest ratio of computed to needed scores when rows of different lengths are padded to one batch."""


class ShortAttentionFunction(torch.autograd.Function):
    """Autograd function: `apply(query, key, value, plan, scale)` → `[1, m, heads, size]`.

    Rows of similar length are padded to one batch by one gather, whose transpose is the inverse gather. Query heads
    that share keys (grouped-query attention) are arranged along the query dimension, so that keys are not copied for
    each head. Scores, softmax and its gradient are in float32; all other products are in bfloat16, as in PyTorch's own
    kernel. Backward computes the weights again, so that memory does not grow with the square of the length. Shapes:
    `query` `[1, heads, m, size]`, `key` and `value` `[1, key heads, n, size]`, all bfloat16.

    Example:
        >>> states = torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)
        >>> layout = PackedLayout([SharedPrefix((0,), 3, (0,))], torch.device("cpu"))
        >>> plan = ShortAttentionPlan(layout, heads=2, key_heads=2)
        >>> ShortAttentionFunction.apply(states, states, states, plan, 0.5).shape
        torch.Size([1, 3, 2, 4])
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: "ShortAttentionPlan", scale: float
    ) -> Tensor:
        """Compute the output."""
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(query, key, value)
        out: list[Tensor] = []
        with torch.autocast("cpu", enabled=False), rounded_factors():
            for batch, q, k, v in plan.batches_of(query, key, value):
                found = q.new_empty(*q.shape[:2], v.shape[2])
                for part, weights in batch.weights(q, k, scale):
                    torch.bmm(weights.to(v.dtype), v[part], out=found[part])
                out.append(found.flatten(0, 1))
        return torch.cat(out).index_select(0, plan.query_places).view(1, query.shape[2], query.shape[1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value.

        With P the weights and O the output: ∂S = P · (∂P − Σ P · ∂P), where ∂P = ∂O Vᵀ.
        """
        query, key, value = ctx.saved_tensors
        plan: ShortAttentionPlan = ctx.plan
        grads = grad.reshape(-1, grad.shape[-1]).index_select(0, plan.queries).index_fill_(0, plan.padding, 0.0)
        by_query: list[Tensor] = []
        by_key: list[Tensor] = []
        by_value: list[Tensor] = []
        with torch.autocast("cpu", enabled=False), rounded_factors():
            for (batch, q, k, v), out in zip(
                plan.batches_of(query, key, value), grads.split(plan.query_sizes), strict=True
            ):
                out = out.view(*q.shape[:2], v.shape[2])
                found_q, found_k, found_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
                for part, weights in batch.weights(q, k, ctx.scale):
                    torch.bmm(weights.to(v.dtype).transpose(1, 2), out[part], out=found_v[part])
                    by_weights = torch.bmm(out[part], v[part].transpose(1, 2)).float()
                    by_scores = torch._softmax_backward_data(by_weights, weights, -1, torch.float32).to(q.dtype)
                    torch.bmm(by_scores, k[part], out=found_q[part])
                    torch.bmm(by_scores.transpose(1, 2), q[part], out=found_k[part])
                by_query.append(found_q.mul_(ctx.scale).flatten(0, 1))
                batch.add_gradients(found_k.mul_(ctx.scale), by_key)
                batch.add_gradients(found_v, by_value)
        found = [
            torch.cat(rows).index_select(0, places).view(1, states.shape[2], states.shape[1], -1).transpose(1, 2)
            for rows, places, states in (
                (by_query, plan.query_places, query),
                (by_key, plan.key_places, key),
                (by_value, plan.key_places, value),
            )
        ]
        return found[0], found[1], found[2], None, None


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None = None,
    window: int | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Attend within each tree of a packed row, in bfloat16.

    Args:
        query: `[1, heads, m, size]`.
        key: `[1, key heads, n, size]`.
        value: `[1, key heads, n, size]`.
        layout: The packed row of n tokens.
        scaling: Factor on the scores; 1/√size by default.
        window: Number of most recent keys that are visible; None for all.
        kept: Increasing indices of the tokens that have queries, `[m]`; None for all.

    Returns:
        `[1, m, heads, size]`.
    """
    arguments = query.shape[1], key.shape[1], window
    plans = _PLANS.setdefault(layout, {})
    plan = ShortAttentionPlan(layout, *arguments, kept) if kept is not None else plans.get(arguments)
    if plan is None:
        plan = plans[arguments] = ShortAttentionPlan(layout, *arguments)
    states = [part.to(torch.bfloat16) for part in (query, key, value)]
    return ShortAttentionFunction.apply(*states, plan, query.shape[3] ** -0.5 if scaling is None else scaling)


@dataclass(frozen=True)
class Batch:
    """Rows of attention that are computed together: prefixes, or branches that also attend to their prefix.

    Attributes:
        bias: 0 where a query may attend to a key, -inf elsewhere, `[rows, T, S]`, float32.
        key_heads: Number of key heads.
        groups: Number of heads of a key head.
        prefixes: Number of prefixes.
        prefix: Number of tokens of a padded prefix.
        branches: Number of branches of a prefix; 0 if the rows are the prefixes.
    """

    bias: Tensor
    key_heads: int
    groups: int
    prefixes: int
    prefix: int
    branches: int

    def keys(self, prefix: Tensor, own: Tensor) -> Tensor:
        """Keys or values of the rows, `[rows · key heads, S, size]`, from those of prefixes and of branches."""
        size = prefix.shape[-1]
        prefix = prefix.view(self.prefixes, 1, self.key_heads, self.prefix, size)
        if not self.branches:
            return prefix.flatten(0, 2)
        own = own.view(self.prefixes, self.branches, self.key_heads, -1, size)
        return torch.cat([prefix.expand(-1, self.branches, -1, -1, -1), own], 3).flatten(0, 2)

    def add_gradients(self, grad: Tensor, found: list[Tensor]) -> None:
        """Add the gradient of `keys` to a list that has an entry for each prefix part and each part of branches."""
        if not self.branches:
            found.append(grad.flatten(0, 1))
            return
        parted = grad.view(self.prefixes, self.branches, self.key_heads, -1, grad.shape[-1])
        shared = parted[..., : self.prefix, :].sum(1, dtype=torch.float32).view_as(found[-1])
        found[-1] = shared.add_(found[-1]).to(grad.dtype)
        found.append(parted[..., self.prefix :, :].reshape(-1, grad.shape[-1]))

    def weights(self, query: Tensor, key: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
        """Attention weights in float32, `[c, heads / key heads · T, S]`, for one slice of the batch after another."""
        rows, queries, keys = self.bias.shape
        at_once = max(1, SCORES // max(1, self.key_heads * query.shape[1] * keys))
        for start in range(0, rows, at_once):
            seen = self.bias[start : start + at_once, None, None]
            part = slice(start * self.key_heads, (start + len(seen)) * self.key_heads)
            scores = torch.bmm(query[part].float().mul_(scale), key[part].float().transpose(1, 2))
            scores.view(len(seen), self.key_heads, self.groups, queries, keys).add_(seen)
            yield part, scores.softmax(-1)


class ShortAttentionPlan:
    """How the tokens of a packed row are gathered into batches of padded rows.

    Args:
        layout: The packed row.
        heads: Number of heads.
        key_heads: Number of key heads.
        window: Number of most recent keys that are visible; None for all.
        kept: Increasing indices of the tokens that have queries, `[m]`; None for all.

    Attributes:
        queries: Rows of `[m · heads, size]` in the order of the batches.
        keys: Rows of `[n · key heads, size]` in the order of the batches.
        query_places: Place of each query in that order, `[m · heads]`.
        key_places: Place of each key in that order, `[n · key heads]`.
        padding: Places of queries that are padding.
        query_sizes: Number of queries of each batch.

    Example:
        >>> layout = PackedLayout([SharedPrefix((0, 1), 2, (1, 1))], torch.device("cpu"))
        >>> [batch.bias.shape for batch in ShortAttentionPlan(layout, heads=1, key_heads=1).batches]
        [torch.Size([1, 2, 2]), torch.Size([2, 1, 3])]
    """

    def __init__(
        self, layout: PackedLayout, heads: int, key_heads: int, window: int | None = None, kept: Tensor | None = None
    ) -> None:
        self.batches: list[Batch] = []
        queries: list[_HeadRows] = []
        keys: list[_HeadRows] = []
        starts = torch.tensor([0, *(tree.tokens for tree in layout.trees)]).cumsum(0)
        columns = layout.columns if kept is None else layout.columns[kept]
        for numbers in _similar(layout.trees):
            trees = [layout.trees[number] for number in numbers]
            branches = len(trees[0].branches) if any(trees[0].branches) else 0
            sizes = torch.tensor([[tree.prefix, *tree.branches[:branches]] for tree in trees])
            ends = starts[numbers][:, None] + sizes.cumsum(1)
            spans = torch.stack([ends - sizes, ends])
            query_spans = spans if kept is None else torch.searchsorted(kept, spans)
            prefix = _Rows.of(spans[:, :, :1], layout.columns)
            for part in (slice(0, 1), slice(1, None)) if branches else (slice(0, 1),):
                asking, own = _Rows.of(query_spans[:, :, part], columns), _Rows.of(spans[:, :, part], layout.columns)
                queries.append(asking.by_head(heads, key_heads))
                keys.append(own.by_head(key_heads, key_heads))
                of_branches = branches if part.start else 0
                bias = asking.bias(prefix.before(own, branches) if of_branches else own, window)
                self.batches.append(
                    Batch(bias, key_heads, heads // key_heads, len(trees), prefix.tokens.shape[1], of_branches)
                )
        self.query_sizes, self._key_sizes = ([len(part.rows) for part in parts] for parts in (queries, keys))
        self.queries, self.query_places, self.padding = _joined(queries, len(columns) * heads)
        self.keys, self.key_places, _ = _joined(keys, len(layout.columns) * key_heads)

    def batches_of(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Each batch with its queries `[B, heads / key heads · T, size]`, and its keys and values `[B, S, size]`."""
        queries = _by_token(query).index_select(0, self.queries).split(self.query_sizes)
        keys, values = (_by_token(states).index_select(0, self.keys).split(self._key_sizes) for states in (key, value))
        for i, (batch, asking) in enumerate(zip(self.batches, queries, strict=True)):
            prefix = i - 1 if batch.branches else i
            asking = asking.view(len(batch.bias) * batch.key_heads, -1, asking.shape[-1])
            yield batch, asking, batch.keys(keys[prefix], keys[i]), batch.keys(values[prefix], values[i])


_PLANS: WeakKeyDictionary[PackedLayout, dict[tuple[int, int, int | None], ShortAttentionPlan]] = WeakKeyDictionary()
"""Plans of each layout, by heads, key heads and window; all layers use the same."""


class _HeadRows(NamedTuple):
    """Rows of `[n · heads, size]` in the order of a batch, and whether each is a token or padding, `[r]` each."""

    rows: Tensor
    real: Tensor


class _Rows(NamedTuple):
    """Padded rows of tokens: indices of the tokens, their positions, and False where padding is, `[rows, T]` each."""

    tokens: Tensor
    positions: Tensor
    real: Tensor

    @classmethod
    def of(cls, spans: Tensor, columns: Tensor) -> "_Rows":
        """Rows from the first indices and the ends of their tokens, `[2, …]`."""
        start, end = spans.flatten(1)[..., None]
        index = start + torch.arange(int((end - start).max()))
        real = index < end
        index = index.clamp(max=len(columns) - 1)
        # Padding has the position of the first key, which it sees: a softmax over nothing would be NaN.
        return cls(index, columns[index].masked_fill(~real, 0), real)

    def before(self, own: "_Rows", branches: int) -> "_Rows":
        """Rows of branches, each preceded by the row of its prefix."""
        mine = [part.repeat_interleave(branches, 0) for part in self]
        return _Rows(*(torch.cat(parts, 1) for parts in zip(mine, own, strict=True)))

    def bias(self, keys: "_Rows", window: int | None) -> Tensor:
        """The bias of these queries, see `Batch`."""
        seen = within_window(self.positions[:, :, None], keys.positions[:, None], window) & keys.real[:, None]
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def by_head(self, heads: int, key_heads: int) -> _HeadRows:
        """The rows of each head, in the order rows, key heads, heads of a key head, tokens."""
        numbers = torch.arange(heads).view(1, key_heads, -1, 1)
        index = self.tokens[:, None, None] * heads + numbers
        return _HeadRows(index.flatten(), self.real[:, None, None].expand_as(index).flatten())


def _joined(parts: Sequence[_HeadRows], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """All rows in the order of the batches, the place of each of `count` rows in it, and the places of padding."""
    index, real = (torch.cat(columns) for columns in zip(*parts, strict=True))
    places = torch.empty(count, dtype=torch.long)
    places[index[real]] = real.nonzero().squeeze(1)
    return index, places, (~real).nonzero().squeeze(1)


def _by_token(states: Tensor) -> Tensor:
    """`[1, heads, n, size]` as `[n · heads, size]`."""
    return states[0].transpose(0, 1).reshape(-1, states.shape[-1])


def _similar(trees: Sequence[SharedPrefix]) -> list[list[int]]:
    """Numbers of trees that are padded to one batch: as many branches, and not much more to compute than needed."""

    def shape(number: int) -> tuple[int, int, int]:
        tree = trees[number]
        return len(tree.branches) if any(tree.branches) else 0, tree.prefix, max(tree.branches)

    groups: list[list[int]] = []
    needed, branches, prefix, branch = 0, -1, 0, 0
    for number in sorted(range(len(trees)), key=shape):
        count, *sizes = shape(number)
        work = _work(count, *sizes)
        prefix, branch = max(prefix, sizes[0]), max(branch, sizes[1])
        if count == branches and (len(groups[-1]) + 1) * _work(count, prefix, branch) <= PADDING * (needed + work):
            groups[-1].append(number)
            needed += work
        else:
            groups.append([number])
            needed, branches, (prefix, branch) = work, count, sizes
    return groups


def _work(branches: int, prefix: int, branch: int) -> int:
    """Number of scores of a tree."""
    return prefix**2 + branches * branch * (prefix + branch)
