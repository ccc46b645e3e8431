"""Packs rows without padding, with shared prefixes computed once, into groups within a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from rlhf_lightning.models.projection import LayerWeights


@dataclass(frozen=True)
class SharedPrefix:
    """A tree of rows that begin with the same tokens: a common prefix, and a branch of further tokens for each row.

    Attributes:
        rows: Indices of the rows in the batch.
        prefix: Number of tokens of the prefix.
        branches: Number of tokens that each row adds; may be 0.

    Example:
        >>> SharedPrefix(rows=(0, 1), prefix=10, branches=(5, 3)).tokens
        18
    """

    rows: tuple[int, ...]
    prefix: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens to compute."""
        return self.prefix + sum(self.branches)


def prefix_lengths(loss_mask: Tensor) -> Tensor:
    """Number of tokens before the first token with mask 1, which rows may share.

    Args:
        loss_mask: `[N, T]`.

    Returns:
        `[N]`.
    """
    return loss_mask.ne(0).int().argmax(1)


def kept_positions(loss_mask: Tensor) -> tuple[Tensor, bool]:
    """Positions whose next token has mask 1, at which the head runs.

    If there is none, the first position is kept, but its result must have weight 0: all ranks must run the model, and
    every weight must get a gradient.

    Args:
        loss_mask: `[N, T]`.

    Returns:
        Bool `[N, T - 1]`, and True if the results count.
    """
    kept = loss_mask[:, 1:] != 0
    counts = bool(kept.any())
    if not counts:
        kept[0, 0] = True
    return kept, counts


def find_shared_prefixes(
    input_ids: Tensor, prefixes: Sequence[int], ends: Sequence[int], share: bool = True
) -> list[SharedPrefix]:
    """Group the rows of a batch into trees, in the order of their first row.

    Args:
        input_ids: `[N, T]`.
        prefixes: Number of leading tokens of each row that may be shared with rows that have the same tokens.
        ends: Number of tokens of each row that are computed; rows with 0 are left out.
        share: If False, each row is a separate tree.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
        >>> find_shared_prefixes(ids, prefixes=[2, 2], ends=[3, 3])
        [SharedPrefix(rows=(0, 1), prefix=2, branches=(1, 1))]
    """
    rows = input_ids.cpu().numpy()
    found: dict[bytes, list[int]] = {}
    for row, (prefix, end) in enumerate(zip(prefixes, ends, strict=True)):
        if end > 0:
            key = rows[row, :prefix].tobytes() if share and 0 < prefix <= end else b"row %d" % row
            found.setdefault(key, []).append(row)
    trees = []
    for members in found.values():
        if len(members) == 1:
            trees.append(SharedPrefix((members[0],), ends[members[0]], (0,)))
        else:
            prefix = prefixes[members[0]]
            trees.append(SharedPrefix(tuple(members), prefix, tuple(ends[row] - prefix for row in members)))
    return trees


def group_by_token_budget(trees: Sequence[SharedPrefix], budget: int) -> list[list[SharedPrefix]]:
    """Group trees of similar size so that a group has at most `budget` tokens; a single row may exceed it.

    Trees above the budget are split, and each part repeats the prefix.
    """
    parts = [part for tree in trees for part in _parted(tree, budget)]
    groups: list[list[SharedPrefix]] = []
    room = 0
    for tree in sorted(parts, key=lambda tree: (tree.tokens, tree.rows)):
        if tree.tokens > room:
            groups.append([])
            room = budget
        groups[-1].append(tree)
        room -= tree.tokens
    return groups


def _parted(tree: SharedPrefix, budget: int) -> list[SharedPrefix]:
    """Split a tree that exceeds the budget into several trees, which repeat the prefix."""
    if tree.tokens <= budget or len(tree.rows) == 1:
        return [tree]
    parts: list[list[int]] = []
    room = -1
    for i in sorted(range(len(tree.rows)), key=lambda i: tree.branches[i]):
        if tree.branches[i] > room:
            parts.append([])
            room = max(budget - tree.prefix, tree.branches[i])
        parts[-1].append(i)
        room -= tree.branches[i]
    return [
        SharedPrefix(tuple(tree.rows[i] for i in part), tree.prefix, tuple(tree.branches[i] for i in part))
        for part in parts
    ]


class PackedLayout:
    """A group of trees as one packed row of n tokens: the origin of each token, and the tokens that it may attend to.

    Args:
        trees: The trees, in their order in the packed row.
        device: Device of the layout's tensors.

    Attributes:
        rows: Row of each token in the batch, `[n]`.
        columns: Column of each token in the batch, which is also its position, `[n]`.
        kept: Increasing indices of the tokens that the last layer computes, `[m]`; None for all. See `last_layer`.
        weights: Weights of fused layers; None if the layers' own modules run. See `fused_layers`.

    Example:
        >>> layout = PackedLayout([SharedPrefix((0, 1), 2, (1, 1))], torch.device("cpu"))
        >>> layout.rows, layout.columns
        (tensor([0, 0, 0, 1]), tensor([0, 1, 2, 2]))
    """

    def __init__(self, trees: Sequence[SharedPrefix], device: torch.device) -> None:
        self.trees, self.device = list(trees), device
        self.kept: Tensor | None = None
        self.weights: LayerWeights | None = None
        rows, columns, tree_ids, branch_ids = [], [], [], []
        for number, tree in enumerate(trees):
            spans = [(tree.rows[0], 0, tree.prefix, 0)]
            for i, (row, length) in enumerate(zip(tree.rows, tree.branches, strict=True)):
                spans.append((row, tree.prefix, tree.prefix + length, i + 1))
            for row, start, end, branch in spans:
                columns.append(torch.arange(start, end))
                rows.append(torch.full((end - start,), row))
                branch_ids.append(torch.full((end - start,), branch))
            tree_ids.append(torch.full((tree.tokens,), number))
        self.rows, self.columns = torch.cat(rows).to(device), torch.cat(columns).to(device)
        self._tree, self._branch = torch.cat(tree_ids).to(device), torch.cat(branch_ids).to(device)
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        self.blocks: dict[int | None, BlockMask] = {}

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row."""
        return max(tree.prefix + max(tree.branches) for tree in self.trees)

    def places(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the wanted tokens of this group.

        Args:
            wanted: Bool `[N, T]`.

        Returns:
            Index in the packed row, and row and column in the batch, of each wanted token, `[m]` each. A token of a
            shared prefix appears once for each row in which it is wanted.
        """
        start, places, rows, columns = 0, [], [], []
        for tree in self.trees:
            branch = start + tree.prefix
            for row, length in zip(tree.rows, tree.branches, strict=True):
                column = wanted[row, : tree.prefix + length].nonzero().squeeze(-1)
                places.append(torch.where(column < tree.prefix, start + column, branch + column - tree.prefix))
                rows.append(torch.full_like(column, row))
                columns.append(column)
                branch += length
            start += tree.tokens
        found = torch.stack([torch.cat(part) for part in (places, rows, columns)]).to(self.device)
        return found[0], found[1], found[2]

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """True where a query may attend to a key: an earlier token of the same branch or of the prefix.

        Args:
            query: Indices in the packed row.
            key: Indices in the packed row, broadcastable to `query`.
            window: Size of the sliding window; None for none.
        """
        same = (self._tree[query] == self._tree[key]) & (
            (self._branch[key] == 0) | (self._branch[key] == self._branch[query])
        )
        return same & within_window(self.columns[query], self.columns[key], window)

    def prefix_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Attention mask of the prefix of a tree, `[prefix, prefix]`, see `_mask`."""
        return self._mask(number, 0, self.trees[number].prefix, window, dtype)

    def branch_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Attention mask of a tree's longest branch, to the prefix and to itself, `[branch, prefix + branch]`."""
        tree = self.trees[number]
        return self._mask(number, tree.prefix, tree.prefix + max(tree.branches), window, dtype)

    def _mask(self, number: int, start: int, end: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Mask of the positions from `start` to `end` of a row, to the keys up to `end`, which all layers share.

        Args:
            number: Number of the tree.
            start: First query.
            end: End of queries and keys.
            window: Size of the sliding window; None for none.
            dtype: `torch.bool`, or the type of an additive bias.
        """
        key = (number, start, window, dtype)
        if key not in self._masks:
            places = torch.arange(end, device=self.device)
            self._masks[key] = as_bias(within_window(places[start:, None], places, window), dtype)
        return self._masks[key]


def within_window(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """True where a query at one position may attend to a key at another; the positions are broadcast."""
    # Positions are compared, not subtracted: a difference of integers takes eight times the memory of the result.
    seen = query >= key
    return seen if window is None else seen.logical_and_(key > query - window)


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an additive bias, 0 where it is True and -inf elsewhere; unchanged if the data type is `torch.bool`.

    Attention would convert it in each layer and keep each result for the backward pass.
    """
    if dtype == torch.bool:
        return seen
    return torch.full(seen.shape, -torch.inf, dtype=dtype, device=seen.device).masked_fill_(seen, 0.0)
