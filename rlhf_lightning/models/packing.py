"""Which tokens a forward computes: rows without padding, what rows share once, in groups under a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrefix:
    """Rows that begin with the same tokens: the prefix once, then what each row adds (a branch, perhaps empty)."""

    rows: tuple[int, ...]
    prefix: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return self.prefix + sum(self.branches)


def prefix_lengths(loss_mask: Tensor) -> Tensor:
    """`[N]`, the tokens before the first that is not masked out: what rows may share. `loss_mask` is `[N, T]`."""
    return loss_mask.ne(0).int().argmax(1)


def find_shared_prefixes(
    input_ids: Tensor, prefixes: Sequence[int], ends: Sequence[int], share: bool = True
) -> list[SharedPrefix]:
    """Trees of the rows of `input_ids` `[N, T]`, in the order of their first row.

    Args:
        prefixes: tokens of each row that may be shared with rows that have the same. ends: tokens of each row that
            are computed at all; a row that ends at 0 is left out.
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
    """Groups of trees of like size, at most `budget` tokens each; one row may be over it. Large trees are parted."""
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
    """A tree over the budget as several, each with the prefix again."""
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
    """A group of trees as one packed row: where each token is, and what it may attend to.

    `rows` and `columns`, `[n]`, say which token of the batch stands at each place; `columns` are its positions too.
    """

    def __init__(self, trees: Sequence[SharedPrefix], device: torch.device) -> None:
        self.trees, self.device = list(trees), device
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
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self.blocks: dict[int | None, object] = {}

    def places(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the tokens set in `wanted` `[N, T]` that this group holds: their place here, their row and column."""
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
        return tuple(torch.cat(part).to(self.device) for part in (places, rows, columns))  # type: ignore[return-value]

    def allowed(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Whether the token at place `query` may attend to that at `key`: earlier on its own branch or its prefix."""
        same = (self._tree[query] == self._tree[key]) & (
            (self._branch[key] == 0) | (self._branch[key] == self._branch[query])
        )
        return same & within_window(self.columns[query] - self.columns[key], window)

    def row_mask(self, number: int, window: int | None) -> Tensor:
        """`[prefix + longest, prefix + longest]` for the prefix of a tree with any one branch after it."""
        if (number, window) not in self._masks:
            tree = self.trees[number]
            places = torch.arange(tree.prefix + max(tree.branches), device=self.device)
            self._masks[number, window] = within_window(places[:, None] - places[None], window)
        return self._masks[number, window]


def within_window(distance: Tensor, window: int | None) -> Tensor:
    """Whether a token so many places before another is seen by it."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
