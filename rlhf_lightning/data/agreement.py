"""Whether all ranks have the same rows: each reads its own files, and takes its share by their numbers."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from rlhf_lightning.data.records import fingerprint, is_stream, library
from rlhf_lightning.distributed import gather, rank_count
from rlhf_lightning.errors import DataError


def require_agreement(error: Exception | None, facts: Callable[[], dict[str, Any]]) -> None:
    """Raise on all ranks what one of them has found wrong with its data, or what it has differently from rank 0.

    Args:
        error: what this rank has found. facts: by name, what must be equal; called where there are several ranks.

    Raises:
        DataError: names the rank and its machine.
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
                        f"{name}: rank {rank} of {len(ranks)} ({other}) has {_shown(found[name], value)}, rank 0 "
                        f"({host}) {_shown(value, found[name])}. All ranks must have the same: use files that all "
                        "machines see, or copy them anew."
                    )
    if error:
        raise error


def rows_facts(source: Any, name: str, rows: Iterable[Any], read: int) -> tuple[str, str]:
    """What rows are known by: their numbers, and a hash of their lengths and, where that is quick, of the source."""
    digest = hashlib.sha256()
    examples = tokens = trained = 0
    for row in rows:
        own = row.tokens, row.trained
        digest.update(b"%d %d " % own)
        examples, tokens, trained = examples + 1, tokens + own[0], trained + own[1]
    if isinstance(source, str | os.PathLike) or not (is_stream(source) or library(source)):
        digest.update(str(fingerprint(source, name)).encode())
    return f"{read} rows ({examples} examples, {tokens} tokens, {trained} trained)", digest.hexdigest()


def _shown(value: Any, other: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return value[0] if value[0] != other[0] else f"{value[0]} that are others (hash {value[1][:12]})"
