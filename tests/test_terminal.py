"""What comes with rows, models and answers is shown, and never obeyed, by terminals."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main as entry
from rlhf_lightning.cli.logs import setup_logging
from rlhf_lightning.files import as_json, visible
from tests.conftest import write_rows
from tests.runs import complete
from tests.test_cli import stage_config, write_yaml

HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \x08\x7f \u202egnp.exe\u2066 \r"
FORBIDDEN = set("\x1b\x07\x9b\x08\x7f\u202e\u2066\r")


def test_texts_are_made_visible() -> None:
    shown = visible(HOSTILE)
    assert not set(shown) & FORBIDDEN
    assert "\\x1b[2J" in shown
    assert "\\u202egnp.exe" in shown
    plain = "Zürich\t東京\n👩\u200d🔬 עברית"
    assert visible(plain) == plain
    for indent in (None, 2):
        text = as_json({"a": [HOSTILE, plain]}, indent)
        assert not set(text) & FORBIDDEN
        assert json.loads(text) == {"a": [HOSTILE, plain]}
    assert "東京" in as_json(plain)


def test_logs_hold_no_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", tmp_path / "run.log")
    logging.getLogger("rlhf_lightning.anything").warning("a row: %s", HOSTILE)
    found = capsys.readouterr().err + (tmp_path / "run.log").read_text()
    assert found.count("\\x1b[2J") == 2
    assert not set(found) & FORBIDDEN


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A good row, and bad ones that are named with what they hold."""
    said = [{"role": "user", "content": f"Hi {HOSTILE}"}, {"role": "assistant", "content": f"Yo {HOSTILE}"}]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": said, HOSTILE: 1}, {HOSTILE: 1}, {"messages": HOSTILE}])


def test_a_stage_and_the_check_of_its_data(
    rows: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = stage_config("sft", base, tmp_path)
    settings["data"] |= {"train": rows, "on_bad_row": "skip"}
    settings["trainer"] |= {"max_steps": 1, "default_root_dir": str(tmp_path / "run"), "enable_progress_bar": False}
    text = complete(["sft", "fit", "-c", write_yaml(tmp_path / "sft.yaml", settings)], tmp_path / "out.txt")
    text += (tmp_path / "run" / "logs" / "run.log").read_text()
    assert text.count("Hi \\x1b[2J") >= 2
    assert not set(text) & FORBIDDEN
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            entry.main(["data", "check", rows, "--kind", "sft", "--model", base, *more])
        assert stop.value.code == 1
        out = capsys.readouterr()
        assert not set(out.out + out.err) & FORBIDDEN


def test_an_error_names_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main(["score", f"./no such {HOSTILE}", "rows.jsonl"])
    err = capsys.readouterr().err
    assert "\\x1b[2J" in err
    assert not set(err) & FORBIDDEN
