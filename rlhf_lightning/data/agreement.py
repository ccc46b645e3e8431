"""Checks that all ranks have read the same rows: each rank reads the files itself, and selects its rows by index."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable
from typing import TypeAlias

from rlhf_lightning.data.batching import Example
from rlhf_lightning.data.records import Source, fingerprint, is_stream, library
from rlhf_lightning.distributed import gather, rank_count
from rlhf_lightning.errors import DataError

Fact: TypeAlias = int | tuple[str, str]
"""A number, or a text with a hash."""


def require_agreement(error: Exception | None, facts: Callable[[], dict[str, Fact]]) -> None:
    """Raise the same error on all ranks if the data of one rank are bad, or differ from those of rank 0.

    Args:
        error: The error that this rank found, if any.
        facts: Returns the values that must be equal on all ranks, by name; called only if there are several ranks.

    Raises:
        DataError: If a rank found an error, or the data differ. The message names the rank and its machine.
    """
    if rank_count() > 1:
        ranks = gather((socket.gethostname(), error and str(error), {} if error else facts()), every=True)
        for rank, (host, text, _) in enumerate(ranks):
            if text and not error:
                raise DataError(f"rank {rank} of {len(ranks)} ({host}): {text}")
        host, _, first = ranks[0]
        for rank, (other, _, found) in enumerate(ranks if not error else []):
            for name, value in first.items():
                if found[name] != value:
                    raise DataError(
                        f"{name}: rank {rank} of {len(ranks)} ({other}) has {_shown(found[name], value)}, but rank 0 "
                        f"({host}) has {_shown(value, found[name])}. All ranks must read the same rows: use a file "
                        "system that all machines share, or copy the files again."
                    )
    if error:
        raise error


def rows_facts(source: Source | None, name: str, rows: Iterable[Example], read: int) -> tuple[str, str]:
    """Identify rows by a text with their counts, and a hash of their lengths and, if that is fast, of their source.

    Args:
        source: Source of the rows.
        name: Name of the split.
        rows: The examples.
        read: Number of rows that were read.
    """
    digest = hashlib.sha256()
    examples = tokens = trained = 0
    for row in rows:
        own = row.tokens, row.trained
        digest.update(b"%d %d " % own)
        examples, tokens, trained = examples + 1, tokens + own[0], trained + own[1]
    if isinstance(source, str | os.PathLike) or not (is_stream(source) or library(source)):
        digest.update(str(fingerprint(source, name)).encode())
    return f"{read} rows ({examples} examples, {tokens} tokens, {trained} trained)", digest.hexdigest()


def _shown(value: Fact, other: Fact) -> str:
    if isinstance(value, int) or isinstance(other, int):
        return str(value)
    return value[0] if value[0] != other[0] else f"{value[0]} that differ (hash {value[1][:12]})"
