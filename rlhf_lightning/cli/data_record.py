"""Records the data of a run, so that it is not resumed with changed files of the same name."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from rlhf_lightning.data.mixing import inner_sources
from rlhf_lightning.data.names import check_there
from rlhf_lightning.data.records import Source, fingerprint, hashed_files
from rlhf_lightning.data.row_filter import RowFilter
from rlhf_lightning.data.task_sources import is_task
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import FORMAT, is_file, read_record, write_json
from rlhf_lightning.types import JSON

log = logging.getLogger(__name__)
SOURCES = ("train", "validation", "test", "predict", "episodes")
RECORD = "sources.json"
"""File with the hash of each data source, and size and modification time of its files, to detect changes quickly."""


class SourceRecord(TypedDict):
    """Identifies the rows of a data source.

    Attributes:
        hash: Hash of the rows; None for a stream, which cannot be read twice.
        files: Size in bytes and time of modification in nanoseconds of each file, by path.
    """

    hash: str | None
    files: dict[str, JSON]


def check_data_record(root: Path, sources: Mapping[str, Source | None], row_filter: RowFilter | None = None) -> None:
    """Compare the data with the record in the run's folder; write the record if there is none.

    Args:
        root: Folder of the run.
        sources: Data sources by the name of their setting.
        row_filter: The filter of the rows, which is part of the record.

    Raises:
        ConfigError: If the rows of a source, or the rules of the filter, have changed.
    """
    for name in ("test", "predict"):  # not read by fit
        if isinstance(source := sources.get(name), str):
            check_there(source)
    path = root / RECORD
    record = read_record(path) if is_file(path) else {}
    before: dict[str, SourceRecord] = {}
    for name in record.keys() & {*SOURCES, "filter"}:
        known = record[name]
        digest, files = (known.get("hash"), known.get("files")) if isinstance(known, dict) else (None, None)
        hashed = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        if not (isinstance(files, dict) and isinstance(digest, str | None) and (hashed or not (digest or files))):
            raise ConfigError(
                f"{path}: {name} is not a valid data record ({known!r:.100}); restore the file, or use --fresh"
            )
        before[name] = {"hash": digest, "files": files}
    now = {
        name: _facts(source, before.get(name), f"data.{name}")
        for name in SOURCES
        if (source := sources.get(name)) is not None
    }
    if row_filter is not None:
        now["filter"] = {"hash": row_filter.fingerprint(), "files": {}}
        if "filter" in before and before["filter"]["hash"] != now["filter"]["hash"]:
            raise ConfigError(
                f"the rules of data.filter ({row_filter}) have changed since the run in {root} began. Restore them, "
                "choose another --trainer.default_root_dir, or start over with --fresh."
            )
    for name, facts in now.items():
        if name == "filter":
            continue
        if facts["files"] or not isinstance(source := sources[name], str) or is_task(source):
            if name in before and before[name]["hash"] is not None and before[name]["hash"] != facts["hash"]:
                raise ConfigError(
                    f"data.{name} {sources[name]} has changed since the run in {root} began. Restore it, choose "
                    "another --trainer.default_root_dir, or start over with --fresh."
                )
        elif name in before:
            log.warning(
                "data.%s %s is not a local file; it is not checked for changes since the run began",
                name,
                sources[name],
            )
    write_json(path, {"format": FORMAT, **now})


def _facts(source: Source, before: SourceRecord | None, name: str) -> SourceRecord:
    items = [item for inner in inner_sources(source) for item in (inner if isinstance(inner, list) else [inner])]
    files = [file for item in items if isinstance(item, str | os.PathLike) for file in hashed_files(item)]
    stats: dict[str, JSON] = {str(file): [(facts := file.stat()).st_size, facts.st_mtime_ns] for file in files}
    known = before is not None and bool(stats) and before["files"] == stats
    return {"hash": before["hash"] if known and before else fingerprint(source, name=name), "files": stats}
