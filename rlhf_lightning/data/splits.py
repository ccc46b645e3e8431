"""Groups rows by prompt: validation splits, and leakage between sets of rows."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, overload

import torch

from rlhf_lightning.data.batching import ExampleT, MixedOrder
from rlhf_lightning.data.mixing import Mixture
from rlhf_lightning.data.records import LocatedRow, Reading, RowError, rename_columns
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON, Message, Row, ToolSchema

Keyed: TypeAlias = JSON | Message | Sequence["Keyed"]
"""Values by which rows are compared."""
log = logging.getLogger(__name__)


@dataclass
class RowKey:
    """Hashes by which a row is compared with other rows.

    Attributes:
        row: Hash of the whole row.
        prompt: Hash of its prompt.
        where: File and line of the row.

    Example:
        >>> row_key("Hi", "Hello").prompt == row_key("Hi", "Hey").prompt
        True
    """

    row: bytes
    prompt: bytes
    where: str = ""
    earlier: tuple[bytes, ...] = ()
    """Hashes of the earlier prompts of its conversation, which may be separate rows."""


@dataclass
class Leaks:
    """Evaluation rows that also appear in the training data.

    Each row is listed with its location and that of the first such training row.

    Attributes:
        count: Number of evaluation rows.
        rows: Rows that are in the training data.
        prompts: Rows whose prompt is in the training data.

    Example:
        >>> train, test = [row_key("Hi", "Hello")], [row_key("Hi", "Hey")]
        >>> found = leaks(train, test)
        >>> len(found.rows), len(found.prompts)
        (0, 1)
    """

    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[tuple[str, str]] = field(default_factory=list)
    conversations: list[tuple[str, str]] = field(default_factory=list)
    """Rows that are another turn of a conversation in the training data."""

    def message(self, name: str) -> str:
        """The warning about a source."""
        found = [
            f"{len(pairs)} of {self.count} rows {words} (the first: {pairs[0][0]} and {pairs[0][1]})"
            for pairs, words in (
                (self.rows, "are also training rows"),
                (self.prompts, "have the prompt of a training row"),
                (self.conversations, "belong to a conversation of the training data"),
            )
            if pairs
        ]
        return (
            f"leakage between data.train and data.{name}: {', '.join(found)}. Metrics on these rows are too "
            "optimistic: remove them from one side, or use data.validation_split, which keeps the rows of a prompt "
            "together."
        )


class ChosenExamples(Sequence[ExampleT]):
    """Some of the examples of another sequence, by index.

    Example:
        >>> list(ChosenExamples(["a", "b", "c"], [2, 0]))
        ['c', 'a']
    """

    def __init__(self, examples: Sequence[ExampleT], indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> ExampleT: ...
    @overload
    def __getitem__(self, index: slice) -> list[ExampleT]: ...
    def __getitem__(self, index: int | slice) -> ExampleT | list[ExampleT]:
        if isinstance(index, slice):
            return [self.examples[i] for i in self.indices[index]]
        return self.examples[self.indices[index]]


@dataclass
class Prepared(Generic[ExampleT]):
    """Examples that are ready for batching, and counts of reading them.

    Attributes:
        rows: The examples.
        reading: Counts of reading.
        truncated: Number of truncated rows.

    Example:
        ```python
        held_out = prepared.part([0, 3])  # the examples of the first and the fourth row
        ```
    """

    rows: Sequence[ExampleT]
    reading: Reading
    truncated: int = 0
    keys: list[RowKey] = field(default_factory=list)
    """Key of each used row."""
    row_of: list[int] = field(default_factory=list)
    """Index in `keys` of the row of each example."""
    source_of: list[int] = field(default_factory=list)
    """Index of the source of each row of a mixture; empty if there is one source."""
    categories: list[str] | None = None
    """Categories of preference data, if they are known without reading the examples."""
    sizes: tuple[int, int, int] | None = None
    """Result of `totals`, if it is known without reading the examples."""

    def totals(self) -> tuple[int, int, int]:
        """Number of tokens, number of trained tokens, and length of the longest example."""
        if self.sizes is not None:
            return self.sizes
        sizes = [(example.tokens, example.trained) for example in self.rows]
        return sum(tokens for tokens, _ in sizes), sum(trained for _, trained in sizes), max(sizes)[0]

    def part(self, rows: list[int]) -> "Prepared[ExampleT]":
        """The examples of the given rows, in that order."""
        examples: dict[int, list[int]] = {}
        for example, row in enumerate(self.row_of):
            examples.setdefault(row, []).append(example)
        chosen = [examples[row] for row in rows]
        picked = [example for found in chosen for example in found]
        return Prepared(
            [self.rows[i] for i in picked] if isinstance(self.rows, list) else ChosenExamples(self.rows, picked),
            self.reading,
            keys=[self.keys[row] for row in rows],
            row_of=[place for place, found in enumerate(chosen) for _ in found],
            source_of=[self.source_of[row] for row in rows] if self.source_of else [],
        )

    def order(self, mixture: Mixture | None, seed: int) -> MixedOrder | None:
        """The order of the examples of a mixture; None if there is one source."""
        if mixture is None:
            return None
        return MixedOrder(mixture, [self.source_of[row] for row in self.row_of], seed)


def row_key(prompt: Keyed, rest: Keyed, blank: bool = False) -> RowKey:
    """Key of a row.

    Args:
        prompt: Its prompt, as JSON.
        rest: The content after the prompt.
        blank: True if the prompt is blank; rows with blank prompts are not grouped.
    """
    row = _digest([prompt, rest])
    return RowKey(row, row if blank else _digest(prompt))


def conversation_key(prompt: Sequence[Message], tools: list[ToolSchema] | None, rest: Keyed) -> RowKey:
    """Key of a row that answers a prompt, which may be a later turn of a conversation.

    Args:
        prompt: Messages of the prompt.
        tools: Tools of the conversation.
        rest: The content after the prompt.
    """
    key = row_key([said(prompt), tools], rest, is_blank(prompt))
    turns = [i for i in range(opening(prompt), len(prompt)) if prompt[i]["role"] == "assistant"]
    key.earlier = tuple(_digest([said(prompt[:i]), tools]) for i in turns)
    return key


def together(keys: Sequence[RowKey]) -> list[bytes]:
    """The group of each row: its prompt, or an earlier prompt of its conversation that is also a row."""
    parent = {key.prompt: key.prompt for key in keys}

    def root(prompt: bytes) -> bytes:
        while parent[prompt] != prompt:
            parent[prompt] = parent[parent[prompt]]
            prompt = parent[prompt]
        return prompt

    for key in keys:
        for earlier in key.earlier:
            if earlier in parent:
                parent[root(key.prompt)] = root(earlier)
    return [root(key.prompt) for key in keys]


def said(messages: Sequence[Message]) -> Keyed:
    """Roles, texts and calls of messages for comparison, without surrounding white space and training marks."""
    return [
        [
            message["role"],
            str(message.get("content") or "").replace("\r\n", "\n").strip(),
            message.get("tool_calls") or [],
        ]
        for message in messages
    ]


def _digest(value: Keyed) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()


def keys_of(
    rows: Sequence[LocatedRow], key: Callable[[Row], RowKey], columns: Mapping[str, str | None] | None
) -> list[RowKey]:
    """Keys of rows that are not rendered; bad rows are skipped, because `fit` reports them.

    Args:
        rows: The rows.
        key: Returns the key of a row.
        columns: See `rename_columns`.
    """
    keys = []
    for row in rows:
        try:
            found = key(rename_columns(row, columns).data)
        except RowError:
            continue
        found.where = row.where
        keys.append(found)
    return keys


def opening(messages: Sequence[Message]) -> int:
    """Number of messages in the prompt of a conversation: those before the first answer to a user."""
    asked = False
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            return index
        asked = asked or (message["role"] != "assistant" and message["role"] != "system")
    return len(messages)


def is_blank(messages: Sequence[Message]) -> bool:
    """True if a prompt has no content except a system message."""
    return not any(
        str(m.get("content") or "").strip() or m.get("tool_calls") for m in messages if m["role"] != "system"
    )


def held_out(prompts: Sequence[bytes], wanted: int, seed: int | None) -> list[int]:
    """Choose rows to hold out, keeping all rows of a prompt together.

    Args:
        prompts: The group of each row.
        wanted: Number of rows to hold out.
        seed: Seed of the order in which prompts are considered; None for their own order.

    Returns:
        Indices of rows. If the sizes of groups do not add up to `wanted`, as many groups as fit, but at least one;
        empty if all rows have the same prompt.
    """
    groups: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    parts = list(groups.values())
    if len(parts) < 2:
        return []
    order = list(range(len(parts)))
    if seed is not None:
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[int] = []
    for part in (parts[i] for i in order):
        if len(held) + len(part) <= wanted:
            held += part
    return held or min((parts[i] for i in order), key=len)


def hold_out(train: Prepared[ExampleT], split: float, seed: int) -> Prepared[ExampleT]:
    """Move rows from the training data to a validation set.

    Args:
        train: The training data; it is changed in place.
        split: Number of rows, or a fraction below 1.
        seed: See `held_out`.

    Returns:
        The validation data.

    Raises:
        ConfigError: If no training rows would be left, or all rows have the same prompt.
    """
    size = len(train.keys)
    wanted = int(split if split >= 1 else max(1, split * size))
    if wanted >= size:
        raise ConfigError(
            f"data.validation_split is {split}, which leaves none of the {size} rows for training; lower it"
        )
    held = held_out(together(train.keys), wanted, seed)
    if not held:
        raise ConfigError(
            f"data.validation_split is {split}, but all {size} rows have the same prompt, and the rows of a prompt "
            "stay together; give rows with other prompts as data.validation"
        )
    validation, kept = train.part(held), train.part(sorted(set(range(size)) - set(held)))
    validation.reading = Reading(len(held))
    train.rows, train.keys, train.row_of, train.source_of = kept.rows, kept.keys, kept.row_of, kept.source_of
    train.sizes = None
    log.info(
        "validation: %d of %d rows held out of the training data (%d examples, %d prompts)%s",
        len(held),
        size,
        len(validation.rows),
        len({key.prompt for key in validation.keys}),
        "" if len(held) == wanted else f"; {wanted} were requested, but the rows of a prompt stay together",
    )
    return validation


def leaks(train: Sequence[RowKey], other: Sequence[RowKey]) -> Leaks:
    """Find rows of another set that are in the training data, or that have a prompt of the training data."""
    rows = {key.row: key.where for key in reversed(train)}
    prompts = {key.prompt: key.where for key in reversed(train)}
    later = {earlier: key.where for key in reversed(train) for earlier in key.earlier}
    turns = [
        (key.where, next((w for w in (later.get(key.prompt), *map(prompts.get, key.earlier)) if w is not None), None))
        for key in other
        if key.prompt not in prompts
    ]
    return Leaks(
        len(other),
        [(key.where, rows[key.row]) for key in other if key.row in rows],
        [(key.where, prompts[key.prompt]) for key in other if key.prompt in prompts],
        [(where, found) for where, found in turns if found is not None],
    )
