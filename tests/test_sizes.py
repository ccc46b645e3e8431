"""Steps over sizes: cells, turns, and running out of memory."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sizes
from benchmarks.steps import sides
from benchmarks.steps.sides import OutOfMemory, Side, compare
from benchmarks.steps.workload import Workload


class FakeSide:
    """Steps with given seconds, by micro-batch; None runs out of memory."""

    asked: list[tuple[str, Any]] = []  # noqa: RUF012 - of all sides, in order

    def __init__(self, name: str, *_: Any, seconds: dict[int | None, float | None] | None = None, **__: Any) -> None:
        self.name, self.seconds = name, seconds or {None: 1.0 if name == "ours" else 3.0, 2: 2.0, 1: 2.5}

    def ask(self, task: str, steps: int = 0, micro: int | None = None, **_: Any) -> Any:
        if task in ("matmul", "rows"):
            return {"matmul": 4e9, "rows": 2e9}[task]
        self.asked.append((self.name, micro))
        if (value := self.seconds.get(micro)) is None:
            raise OutOfMemory
        return [100.0] + [value] * (steps - 1)  # the first step warms up

    def close(self) -> None:
        pass


def test_ratios_use_the_whole_batch_and_the_fastest_micro_batch() -> None:
    found = compare("sft", FakeSide("ours"), FakeSide("trl"), repeats=2, steps=3, batch=8)  # type: ignore[arg-type]
    assert found["ratio"] == 3.0
    assert found["ratio_fastest"] == 2.0
    assert found["trl_fastest_micro_batch"] == 2
    assert found["of_matmul_rate"] == 2e9 / 1.0 / 4e9
    assert found["seconds"] == {"ours": [1.0] * 6, "trl whole": [3.0] * 6, "trl 2": [2.0] * 6}


@pytest.mark.parametrize(
    ("trl", "whole", "fastest", "micro"),
    [
        ({None: None, 2: 2.0, 1: 2.5}, None, 2.0, 2),
        ({None: 3.0, 2: None, 1: None}, 3.0, 3.0, 8),
        ({None: None, 2: None, 1: None}, None, None, 8),
    ],
)
def test_out_of_memory_is_recorded_as_a_result(trl: Any, whole: Any, fastest: Any, micro: int) -> None:
    FakeSide.asked = []
    theirs = FakeSide("trl", seconds=trl)
    found = compare("dpo", FakeSide("ours"), theirs, repeats=2, steps=1, batch=8)  # type: ignore[arg-type]
    assert (found["ratio"], found["ratio_fastest"]) == (whole, fastest)
    assert found["trl_fastest_micro_batch"] == micro
    if trl[None] is None:
        assert found["seconds"]["trl whole"] is None
        assert FakeSide.asked.count(("trl", None)) == 1  # not asked again
    ours = compare("rl", FakeSide("ours", seconds={None: None}), theirs, 1, 1, 8)  # type: ignore[arg-type]
    assert ours["ours"] is ours["ratio"] is ours["of_matmul_rate"] is None


def test_out_of_memory_process_reports_it_and_continues(tmp_path: Path) -> None:
    """A real worker with a memory limit."""
    work = Workload(vocab=64, hidden=8, heads=1, kv_heads=1, layers=1, intermediate=8)
    (tmp_path / "model").mkdir()
    side = Side("trl", tmp_path / "model", work, threads=1, gib=1.5)  # of which a torch for CUDA takes a part
    with pytest.raises(OutOfMemory):
        side.ask(task="hold", gib=3.0)
    assert side.ask(task="hold", gib=0.01) == pytest.approx(0.01)
    side.close()
    assert side.process.returncode == 0


def test_axes_share_their_base_and_cells_are_distinct() -> None:
    cells = {
        (axis, name): {sizes.key(task, sizes.workload(changes)) for task in tasks}
        for axis, (tasks, along) in sizes.AXES.items()
        for name, changes in along.items()
    }
    base = cells["parameters", "11M"]
    assert base > cells["prompt share", "50%"] == cells["length", "128"] == cells["vocabulary", "16,384"]
    assert cells["group size", "4"] < base
    different = set().union(*cells.values())
    assert len(different) == 4 + 3 * 3 + 2 * 4 + 2 * 3 + 3 * 1 + 4 * 3


@pytest.mark.parametrize(("name", "millions"), [("3M", 3), ("11M", 11), ("40M", 40)])
def test_models_have_the_stated_size(name: str, millions: int) -> None:
    shape = Workload(**{**sizes.BASE, **sizes.AXES["parameters"][1][name]})
    width = shape.heads * shape.hidden // shape.heads + shape.kv_heads * shape.hidden // shape.heads
    weights = shape.layers * (2 * shape.hidden * width + 3 * shape.hidden * shape.intermediate)
    assert weights / 1e6 == pytest.approx(millions, rel=0.06)  # 3.1, 10.6, 39.3
    assert shape.hidden == 64 * shape.heads == 128 * shape.kv_heads


def test_finished_cells_are_skipped(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sizes, "Side", FakeSide)
    monkeypatch.setattr(Workload, "build", lambda self, folder: None)
    out = tmp_path / "sizes.json"
    run = ["--axes", "group size", "--out", str(out)]
    FakeSide.asked = []
    sizes.main([*run, "--hours", "0"])
    assert FakeSide.asked == []
    assert "the same command continues" in capsys.readouterr().out
    sizes.main(run)
    first = json.loads(out.read_text())
    assert len(first["cells"]) == 4
    # Two turns of a warm-up and a step, on both sides.
    assert len(FakeSide.asked) == 4 * 2 * 2
    assert statistics.median(next(iter(first["cells"].values()))["seconds"]["ours"]) == 1.0
    printed = capsys.readouterr().out
    assert "| 16 | rl | 1.00 s | 3.00 s | 3.0 | – | – | 50% |" in printed
    sizes.main(run)
    assert len(FakeSide.asked) == 16
    assert json.loads(out.read_text()) == first
    picture = (tmp_path / "plots" / "sizes.svg").read_text()
    assert picture.count("<circle") == 4 + 4  # the base stands on every axis
    assert "group size" in picture
    assert sides.ROWWISE == ("sft", "reward", "dpo")
    assert "not measured" in sizes.table("length", first)
