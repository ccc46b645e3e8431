"""Control characters in rows, models and answers are escaped, so that terminals do not interpret them."""

import csv
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.callbacks.table import plain, rich
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.cli import main as entry
from rlhf_lightning.cli import quickstart
from rlhf_lightning.cli.logs import setup_logging
from rlhf_lightning.files import as_json, read_table, table_cell, table_value, visible
from rlhf_lightning.report.read import read_metrics
from rlhf_lightning.report.records import QUICKSTART
from tests.helpers.cli import stage_config, write_yaml
from tests.helpers.rows import write_rows
from tests.helpers.runs import complete

HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \x08\x7f \u202egnp.exe\u2066 \r"
FORBIDDEN = set("\x1b\x07\x9b\x08\x7f\u202e\u2066\r")


def test_control_characters_in_texts_are_escaped() -> None:
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


def test_logs_contain_no_escape_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", tmp_path / "run.log")
    logging.getLogger("rlhf_lightning.anything").warning("a row: %s", HOSTILE)
    found = capsys.readouterr().err + (tmp_path / "run.log").read_text()
    assert found.count("\\x1b[2J") == 2
    assert not set(found) & FORBIDDEN


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A good row, and bad ones whose contents appear in the messages."""
    said = [{"role": "user", "content": f"Hi {HOSTILE}"}, {"role": "assistant", "content": f"Yo {HOSTILE}"}]
    return write_rows(tmp_path / "rows.jsonl", [{"messages": said, HOSTILE: 1}, {HOSTILE: 1}, {"messages": HOSTILE}])


def test_stage_and_data_check_print_no_control_characters(
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


def test_parser_error_escapes_the_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main(["score", f"./no such {HOSTILE}", "rows.jsonl"])
    err = capsys.readouterr().err
    assert "\\x1b[2J" in err
    assert not set(err) & FORBIDDEN


NAMED = "x\x1b[2J\u202egnp\x9b"
"""Names of folders and files that file systems allow."""


@pytest.mark.parametrize(
    "args",
    [
        ["init", "{new}"],
        ["report", "{run}"],
        ["export", "{model}", "{new}"],
        ["pipeline", "--verify", "{run}"],
        ["pipeline", "{new}.yaml"],
        ["generate", "{model}", "--prompt", HOSTILE, "--prompt", "b", "--max_tokens", "4", "--system", HOSTILE],
        ["chat", "{model}", "--and", "{model}/../model", "--max_tokens", "4"],
        ["data", "check", "{data}", "--kind", "prompts", "--model", "{model}"],
        ["score", "{model}", "{data}"],
        ["evaluate", "{model}", "{data}", "--limit", "1", "--max_tokens", "2"],
        ["sft", "fit", "--model.model", "{model}", "--data.train", "{data}", f"--data.{NAMED}", "1"],
        ["chat", "{model}", f"--{NAMED}"],
        [NAMED],
    ],
    ids=lambda args: args[0][:8],
)
def test_control_characters_in_file_names_are_escaped(
    args: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / NAMED
    shutil.copytree(base, place / "model")
    (place / "run").mkdir()
    stage = {"status": "finished", "inputs": {"settings": "", "data": {}}, "model_hash": ""}
    stage |= {"configs": [{"path": NAMED, "hash": ""}], "handed": {}}
    (place / "run" / "manifest.json").write_text(json.dumps({"name": NAMED, "stages": {NAMED: stage}}))
    write_rows(place / "data.jsonl", [{"prompt": f"Count {HOSTILE}"}] * 2)
    names = {"new": "new", "run": "run", "model": "model", "data": "data.jsonl"}
    lines = iter([f"Hi {HOSTILE}", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    with pytest.raises(SystemExit):
        entry.main([arg.format(**{name: place / file for name, file in names.items()}) for arg in args])
    found = capsys.readouterr()
    assert "\\x1b[2J" in found.out + found.err or args[0] in ("generate", "evaluate")
    assert not set(found.out + found.err) & FORBIDDEN


def test_control_characters_in_sample_tables_are_escaped() -> None:
    row = {
        "prompt": [{"content": HOSTILE}],
        "response": HOSTILE,
        "stop_reason": HOSTILE,
        "terms": {HOSTILE: 1.0, "b": 2},
    }
    rows = {"best": {**row, "reward": 1.0, "advantage": 1.0, "kl": None}}
    assert not set(plain("title", rows)) & FORBIDDEN
    assert not set(rich("title", rows, 100)) & (FORBIDDEN - {"\x1b"})
    assert "\x1b[2J" not in rich("title", rows, 100)


def test_control_characters_in_quickstart_answers_are_escaped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keys = dict.fromkeys(QUICKSTART, 1.0)
    sample = {"prompt": f"[blink]{HOSTILE}", "sft": HOSTILE, "policy": HOSTILE}
    models = {"base": keys, "sft": {**keys, "val_nll_start": 1.0, "val_nll": 1.0}, "policy": keys}
    facts = {"preference": {"pair_accuracy": None}, "samples": [sample], "seconds": 1.0, "peak_memory_gb": 1.0}
    quickstart.show({**models, **facts}, tmp_path / f"[x]{NAMED}")
    out = capsys.readouterr().out
    assert "[blink]\\x1b[2J" in out
    assert not set(out) & FORBIDDEN


def test_control_characters_in_library_messages_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("info", None)
    stream = logging.StreamHandler(sys.stderr)
    library = logging.getLogger("transformers.other")
    library.addHandler(stream)
    try:
        library.error("\x1b[31mlacks\x1b[0m %s", HOSTILE)
    finally:
        library.removeHandler(stream)
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError as error:
        entry._traceback(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "lacks \\x1b[2J" in err
    assert "RuntimeError: \\x1b[2J" in err
    assert not set(err) & FORBIDDEN


FORMULAS = ["=1+1", "@SUM(A1)", "+cmd", "-cmd|' /C calc'!A0", "\t=1", "\r=1", "'=1", "''=1", "＝1"]
PLAIN = ["", "a=b", "-0.5", "+3", "1e-5", "-inf", "nan", "'tis", "it's", "train/reward", -0.5, 3]


def test_csv_cells_are_not_formulas() -> None:
    for value in FORMULAS:
        assert table_cell(value) == f"'{value}"
        assert table_value(table_cell(value)) == value
    for value in PLAIN:
        assert table_cell(value) == value
        assert isinstance(value, float | int) or table_value(value) == value


def test_metric_names_are_not_formulas(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/a": -0.5, **dict.fromkeys(FORMULAS, -1.5)}, 0)
    resumed = MetricsCSV(tmp_path, resume=True)
    resumed.log_metrics({"=later": 1e-9}, 1)
    with open(tmp_path / "metrics.csv", newline="") as stream:
        cells = [cell for line in csv.reader(stream) for cell in line]
    assert not [cell for cell in cells if cell[:1] in set("=@+-\t\r") and not cell.lstrip("-").startswith(("0", "1"))]
    with open(tmp_path / "metrics.csv", newline="") as stream:
        assert next(read_table(stream)).keys() == {"step", "train/a", "=later", *FORMULAS}
    found = read_metrics(tmp_path / "metrics.csv")
    assert found == {"train/a": [(0, -0.5)], **{name: [(0, -1.5)] for name in FORMULAS}, "=later": [(1, 1e-9)]}
