"""Commands replace an existing output file only on request."""

import os
from pathlib import Path

import pytest

from rlhf_lightning.cli.options import check_writable
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import write_text


def test_existing_file_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("rows of the user\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(mine)
    for path, words in (
        (mine, "the file exists; give another file, or replace it with --overwrite"),
        (tmp_path / "link", "the file exists"),
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a device or pipe"),
        (Path("/dev/null"), "a device or pipe"),
        (mine / "under", "is not a writable folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_writable("--output", path)
    check_writable("--output", mine, overwrite=True)
    (tmp_path / "empty").touch()
    check_writable("--output", tmp_path / "empty")
    check_writable("--output", tmp_path / "a" / "b" / "new.jsonl")


def test_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "rows.jsonl"
    write_text(path, "one\n")
    assert path.read_text() == "one\n"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)"):
        write_text(path, "two\n")
    assert path.read_text() == "one\n"
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
