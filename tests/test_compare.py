"""The regression guard of the benchmarks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import compare, main, ratios

ROOT = Path(__file__).parents[1]
STEP = ROOT / "benchmarks" / "results" / "step-5m.json"


def changed(tmp_path: Path, task: str, factor: float | None) -> list[str]:
    """The committed result, and the same with one ratio multiplied or removed."""
    report = json.loads(STEP.read_text())
    if factor is None:
        del report["tasks"][task]["ratio"]
    else:
        report["tasks"][task]["ratio"] *= factor
    (tmp_path / "new.json").write_text(json.dumps(report))
    return [str(STEP), str(tmp_path / "new.json")]


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.86, 0), (0.84, 1), (2.0, 0), (None, 1)])
def test_only_lower_ratios_are_flagged(
    factor: float | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(changed(tmp_path, "dpo", factor)) == code
    out = capsys.readouterr().out
    assert ("FELL" in out or "GONE" in out) == bool(code)
    assert "tasks.dpo.ratio" in out
    assert "tasks.sft.ratio_fastest" in out
    assert "not measured on the same machine" not in out


def test_seconds_are_not_compared_as_ratios() -> None:
    report: dict[str, Any] = {"tasks": {"sft": {"ours": 1.0, "ratio": 2.0, "seconds": {"ours": [1.0, 2.0]}}}}
    assert dict(ratios(report)) == {"tasks.sft.ratio": 2.0}
    slower = {"tasks": {"sft": {"ours": 10.0, "ratio": 2.0}, "new": {"ratio": 0.1}}}
    assert not any(row.fell for row in compare(report, slower))


def test_exit_codes(tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert run(*changed(tmp_path, "sft", 0.5)).returncode == 1
    assert run(str(STEP), str(STEP)).returncode == 0
    (tmp_path / "none.json").write_text("{}")
    missing = run(str(STEP), str(tmp_path / "none.json"))
    assert missing.returncode == 1
    assert "has no ratio" in missing.stderr
    assert "No such file" in run(str(STEP), str(tmp_path / "nowhere.json")).stderr
