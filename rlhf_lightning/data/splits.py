"""Which rows belong together: what is held out of the training data, and what stands in two sets of rows."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.records import Reading, Row, RowError, rename_columns
from rlhf_lightning.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class RowKey:
    """A row as it is compared with others: by all that it says, and by its prompt."""

    row: bytes
    prompt: bytes
    where: str = ""
    earlier: tuple[bytes, ...] = ()
    """The prompts that a conversation had before this one, where they may be rows of their own."""


@dataclass
class Leaks:
    """Rows that stand in the training data too: those that are the same, and those that have the same prompt.

    Each is given with where it is, and where the first one like it is in the training data.
    """

    count: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[tuple[str, str]] = field(default_factory=list)
    conversations: list[tuple[str, str]] = field(default_factory=list)
    """Rows of another turn of a conversation in the training data."""

    def message(self, name: str) -> str:
        """What there is to say of them."""
        found = [
            f"{len(pairs)} of {self.count} rows {words} (the first: {pairs[0][0]} and {pairs[0][1]})"
            for pairs, words in (
                (self.rows, "are trained on"),
                (self.prompts, "have a prompt that is trained on"),
                (self.conversations, "are of a conversation that is trained on"),
            )
            if pairs
        ]
        return (
            f"leakage between data.train and data.{name}: {', '.join(found)}. Figures measured on them are too good: "
            "leave them out of one side, or hold rows out by data.validation_split, which keeps a prompt on one side."
        )


@dataclass
class Prepared:
    """Rows ready for batches and what became of the file they came from."""

    rows: list[Any]
    reading: Reading
    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    truncated: int = 0
    keys: list[RowKey] = field(default_factory=list)
    """Of each row that was read and used."""
    row_of: list[int] = field(default_factory=list)
    """For each example the place of its row in `keys`."""

    def part(self, rows: list[int]) -> "Prepared":
        """The examples of some rows, in their order."""
        examples: dict[int, list[Any]] = {}
        for example, row in zip(self.rows, self.row_of, strict=True):
            examples.setdefault(row, []).append(example)
        chosen = [examples[row] for row in rows]
        return Prepared(
            [example for found in chosen for example in found],
            self.reading,
            keys=[self.keys[row] for row in rows],
            row_of=[place for place, found in enumerate(chosen) for _ in found],
        )


def row_key(prompt: Any, rest: Any, blank: bool = False) -> RowKey:
    """The key of a row by its prompt and what follows; a blank prompt is no reason to keep two rows together."""
    row = _digest([prompt, rest])
    return RowKey(row, row if blank else _digest(prompt))


def conversation_key(prompt: Sequence[Message], tools: Any, rest: Any) -> RowKey:
    """The key of a row that answers a prompt, which may be a later turn of a conversation."""
    key = row_key([said(prompt), tools], rest, is_blank(prompt))
    turns = [i for i in range(opening(prompt), len(prompt)) if prompt[i]["role"] == "assistant"]
    key.earlier = tuple(_digest([said(prompt[:i]), tools]) for i in turns)
    return key


def together(keys: Sequence[RowKey]) -> list[bytes]:
    """For each row what it is kept together by: its prompt, or that of an earlier turn which is a row too."""
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


def said(messages: Sequence[Message]) -> list[Any]:
    """Who says what in messages, to be compared: without blanks around it and without marks for training."""
    return [
        [
            message["role"],
            str(message.get("content") or "").replace("\r\n", "\n").strip(),
            message.get("tool_calls") or [],
        ]
        for message in messages
    ]


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).digest()


def keys_of(
    rows: Sequence[Row], key: Callable[[dict[str, Any]], RowKey], columns: Mapping[str, str | None] | None
) -> list[RowKey]:
    """The keys of rows that are not rendered; bad rows are left out, of which `fit` speaks."""
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
    """How many messages of a conversation are its prompt: those before the first answer to a user."""
    asked = False
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and asked:
            return index
        asked = asked or (message["role"] != "assistant" and message["role"] != "system")
    return len(messages)


def is_blank(messages: Sequence[Message]) -> bool:
    """Whether a prompt says nothing, but for a system message."""
    return not any(
        str(m.get("content") or "").strip() or m.get("tool_calls") for m in messages if m["role"] != "system"
    )


def held_out(prompts: Sequence[bytes], wanted: int, seed: int | None) -> list[int]:
    """The rows to hold out, in an order sampled from the seed (or the first ones): all rows of a prompt or none.

    As many as wanted, where whole prompts make up that number; else as many as fit, and at least one prompt. Empty
    where all rows have one prompt.
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


def hold_out(train: Prepared, split: float, seed: int) -> Prepared:
    """Take rows out of the training data: a number of them, or a fraction below 1.

    Raises:
        ConfigError: nothing would be left, or all rows have one prompt.
    """
    size = len(train.keys)
    wanted = int(split if split >= 1 else max(1, split * size))
    if wanted >= size:
        raise ConfigError(f"data.validation_split {split} leaves nothing to train on ({size} rows)")
    held = held_out(together(train.keys), wanted, seed)
    if not held:
        raise ConfigError(
            f"data.validation_split {split}: all {size} rows have the same prompt, of which all are held out or none; "
            "name rows with other prompts in data.validation"
        )
    validation, kept = train.part(held), train.part(sorted(set(range(size)) - set(held)))
    validation.reading = Reading(len(held))
    train.rows, train.keys, train.row_of = kept.rows, kept.keys, kept.row_of
    log.info(
        "validation: %d of %d rows held out of the training data (%d examples, %d prompts)%s",
        len(held),
        size,
        len(validation.rows),
        len({key.prompt for key in validation.keys}),
        "" if len(held) == wanted else f"; {wanted} were asked for, and the rows of a prompt stay together",
    )
    return validation


def leaks(train: Sequence[RowKey], other: Sequence[RowKey]) -> Leaks:
    """Rows of another set that stand in the training data, or whose prompt does."""
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
