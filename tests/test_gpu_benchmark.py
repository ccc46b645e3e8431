"""`python -m benchmarks.gpu` without a GPU: its small mode, its handling of failures, and its table."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import checks, measure, plan, profiling, suite, table
from benchmarks.gpu.sides import Clock, Failed, OutOfTime, Side
from benchmarks.gpu.worker import Worker
from tests.helpers.liger import Stand, stand_in

SETTINGS = {"device": "cpu", "precision": "32-true", "small": True}
NO_TRL = "TRL not installed"


class Here:
    """A side in this process."""

    started: ClassVar[list[str]] = []

    def __init__(self, name: str, folder: Path, work: dict[str, Any], clock: Clock) -> None:
        self.started.append(name)
        self.worker = Worker(name, folder, work)

    def ask(self, do: str, **options: Any) -> Any:
        answer = json.loads(json.dumps(self.worker.answer({"do": do, **options})))
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["value"]

    def close(self) -> None:
        pass


class Scripted:
    """A side that answers with invented steps; `failures` by side, each used once."""

    failures: ClassVar[dict[str, list[str]]] = {}
    asked: ClassVar[list[tuple[str, str, Any]]] = []

    def __init__(self, name: str, folder: Path, work: dict[str, Any], clock: Clock) -> None:
        self.name = name

    def ask(self, do: str, **options: Any) -> Any:
        self.asked.append((self.name, do, options.get("micro")))
        if do == "device":
            return {"name": "NVIDIA H200", "memory_gib": 139.0, "machine": {"versions": {"torch": "2"}}}
        if do == "steps":
            if waiting := self.failures.get(self.name, []):
                raise Failed(waiting.pop(0))
            step = {"ours": 0.02, "generate": 0.3, "trl": 0.05}[self.name] / (2 if options.get("graphs") else 1)
            return {"seconds": [9.0, *[step] * (options["steps"] - 1)], "peak_gib": 10.0, "packs": True}
        answers = {"matmul": 7e14, "needed": {"operations": 9.89e12, "tokens": 2000}, "build": None}
        return answers.get(do, {"step": 2.0, "sampling": 0.5})

    def close(self) -> None:
        pass


@pytest.fixture
def scripted() -> type[Scripted]:
    Scripted.failures, Scripted.asked = {}, []
    return Scripted


def cell(name: str) -> plan.Cell:
    return next(cell for cell in plan.CELLS if cell.name == name)


def filled(names: list[str], root: Path, start: Any, settings: dict[str, Any], **cells: Any) -> dict[str, Any]:
    report = {"settings": settings, "cells": dict(cells)}
    main.run(report, [cell(name) for name in names], Clock(500), root, lambda report: None, start)
    return report


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.steps.worker.matmul_rate", lambda work: 1e9)
    monkeypatch.setattr(measure, "trl_missing", lambda: NO_TRL)


def test_small_cells_are_measured_and_stored(quick: None, tmp_path: Path) -> None:
    Here.started = []
    names = ("sft-2k", "rollouts-64", "check-sampler-graphs", "tests")
    cells = [c for c in plan.cells(plan.PIECES, small=True) if c.name in names]
    report: dict[str, Any] = {"settings": SETTINGS, "cells": {}}
    out = tmp_path / "gpu.json"
    main.run(report, cells, Clock(500), tmp_path, lambda r: out.write_text(json.dumps(r)), Here)
    report = json.loads(out.read_text())
    assert report["left"] == []
    sft, rollouts = report["cells"]["sft-2k"], report["cells"]["rollouts-64"]
    assert sft["theirs"] == {"failed": NO_TRL}
    assert sft["ours"]["packs"] is True
    assert sft["ours"]["tokens_per_second"] == pytest.approx(sft["tokens"] / sft["ours"]["seconds"])
    assert sft["ours"]["mfu"] == pytest.approx(sft["operations"] / sft["ours"]["seconds"] / 1e9)
    assert sft["peak_from"] == "a large product, measured"
    assert rollouts["graphs"] == {"failed": "needs CUDA"}
    assert rollouts["ratio"] == pytest.approx(rollouts["theirs"]["seconds"] / rollouts["ours"]["seconds"])
    assert rollouts["tokens"] == rollouts["work"]["generate_batch"] * rollouts["work"]["new_tokens"]
    for missed in (found for found in (sft, rollouts) if not found["target_met"]):
        assert 0 < sum(missed["profile"]["shares"].values()) <= 1.01
        assert missed["profile"]["top"][0]["calls"] > 0
    assert report["cells"]["check-sampler-graphs"] == {"skipped": "needs CUDA"}
    assert report["cells"]["tests"] == {"skipped": "needs CUDA"}
    before = list(Here.started)
    main.run(report, cells, Clock(500), tmp_path, lambda r: None, Here)
    assert Here.started == [*before, "ours"], "only what the device is was asked for"
    assert "40% MFU" in table.render(report)


def test_dpo_cell_has_a_reference(quick: None, tmp_path: Path) -> None:
    (dpo,) = plan.cells(("dpo",), small=True)
    found = measure.measure(
        dpo, SETTINGS, measure.Sides(tmp_path / "model", plan.workload(dpo, SETTINGS), Clock(500), Here)
    )
    assert found["ours"]["seconds"] > 0


def test_rl_step_is_timed_by_phase(quick: None, tmp_path: Path) -> None:
    (rl,) = (c for c in plan.cells(("rl",), small=True))
    sides = measure.Sides(tmp_path / "model", plan.workload(rl, SETTINGS), Clock(500), Here)
    found = measure.measure(rl, SETTINGS, sides)
    assert 0 < found["split"]["ours"]["sampling"] < found["split"]["ours"]["step"]
    assert found["split"].keys() == {"ours"}
    assert found["target_met"] is None, "without TRL nothing can be said of a ratio to it"


def test_figures_and_targets(scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "trl_missing", lambda: None)
    cuda = {"device": "cuda", "precision": "bf16-true", "small": False}
    report = filled(["sft-2k", "rollouts-64", "rl"], tmp_path, scripted, cuda)
    sft, rollouts, rl = (report["cells"][name] for name in ("sft-2k", "rollouts-64", "rl"))
    assert sft["ours"]["seconds"] == 0.02, "the first step of a turn is not timed"
    assert sft["ours"]["mfu"] == pytest.approx(9.89e12 / 0.02 / 989e12)
    assert sft["ratio"] == pytest.approx(2.5)
    assert sft["target_met"] is True
    assert rollouts["best"] == rl["best"] == "graphs"
    assert rollouts["ratio"] == pytest.approx(30)
    assert "profile" not in rollouts
    assert rl["split"].keys() == {"ours", "graphs", "theirs"}
    page = table.render(report)
    assert "40% MFU: reached" in page
    assert "25% of 2.00 s is sampling" in page
    turns = [name for name, do, _ in scripted.asked if do == "steps"][:8]
    assert turns == ["ours", "trl"] * 4, "sides take turns"


def test_failure_is_recorded_and_the_benchmark_continues(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "trl_missing", lambda: None)
    cuda = {"device": "cuda", "precision": "bf16-true", "small": False}
    scripted.failures = {"trl": ["out of memory: 9 GiB"], "ours": ["ValueError: bad"]}
    report = filled(["sft-8k", "dpo"], tmp_path, scripted, cuda)
    sft, dpo = report["cells"]["sft-8k"], report["cells"]["dpo"]
    assert sft["ours"] == {"failed": "ValueError: bad"}
    assert sft["theirs"]["micro"] == 4
    assert "ratio" not in sft
    assert dpo["ratio"] == pytest.approx(2.5)
    page = table.render(report)
    assert "ValueError: bad" in page
    assert "micro-batches of 4: all at once is out of memory" in page


def test_worker_reports_a_failure_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("ours", tmp_path, {"device": "cpu"})

    def full(work: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("benchmarks.steps.worker.matmul_rate", full)
    assert worker.answer({"do": "matmul"}) == {"failed": "out of memory: CUDA out of memory."}
    assert worker.answer({"do": "steps", "task": "sft", "steps": 1})["failed"].startswith("ConfigError")
    assert worker.answer({"do": "device"})["value"]["name"] == "CPU"


def test_timeout_ends_a_process(tmp_path: Path) -> None:
    clock = Clock(100)
    side = Side("ours", tmp_path / "model", {"device": "cpu"}, clock)
    clock.begin(0.0)
    with pytest.raises(Failed, match="the time of its cell was up"):
        side.ask("device")
    assert side.process.returncode is not None
    over = Clock(0)
    side = Side("ours", tmp_path / "model", {"device": "cpu"}, over)
    with pytest.raises(OutOfTime):
        side.ask("device")
    side.close()


def test_dead_process_is_reported_with_its_last_output(tmp_path: Path) -> None:
    side = Side("ours", tmp_path / "model", {}, Clock(100))
    side.process.kill()
    with pytest.raises(Failed, match="the process ended with -9"):
        side.ask("device")


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    cells = {"dpo": {"failed": "x"}, "reward": {"ours": {"seconds": 1.0}}, "tests": {"passed": False}}
    out.write_text(json.dumps({"settings": SETTINGS, "cells": cells}))
    with pytest.raises(SystemExit, match="name another file with --out"):
        main.opened(out, {**SETTINGS, "precision": "bf16-true"}, False)
    assert main.opened(out, SETTINGS, False)["cells"].keys() == cells.keys()
    assert main.opened(out, SETTINGS, True)["cells"].keys() == {"reward"}


def test_nothing_is_started_with_too_little_time(tmp_path: Path, scripted: Any) -> None:
    report: dict[str, Any] = {"settings": SETTINGS, "cells": {}}
    main.run(report, [cell("rl")], Clock(50), tmp_path, lambda r: None, scripted)
    assert report["cells"] == {}
    assert report["left"] == ["rl"]


def test_kernels_are_grouped_by_kind_and_gaps_count_as_idle() -> None:
    kinds = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "products",
        "triton_tem_fused_flex_attention_0": "attention",
        "void at::native::elementwise_kernel<128, 4>": "elementwise and other",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "Memcpy HtoD (Pageable -> Device)": "copies between host and device",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>": "products",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    }
    assert {name: profiling.kind_of(name) for name in kinds} == kinds
    assert profiling.busy([("b", 2.0, 3.0), ("a", 0.0, 1.0), ("c", 0.5, 1.5)]) == pytest.approx(2.5)
    found = profiling.summary([("gemm", 1.0, 2), ("add", 0.5, 1), ("gemm", 1.0, 1)], 4.0, 2.5, "kernels")
    assert found["shares"] == {"products": 0.5, "elementwise and other": 0.125}
    assert found["idle"] == pytest.approx(0.375)
    assert found["top"][0] == {"name": "gemm", "calls": 3, "share": 0.5, "microseconds": pytest.approx(2e6 / 3)}


def test_peak_flops_of_known_devices() -> None:
    assert plan.data_sheet("NVIDIA H200") == 989e12
    assert plan.data_sheet("NVIDIA H100 PCIe") == 756e12
    assert plan.data_sheet("NVIDIA A100-SXM4-80GB") == 312e12
    assert plan.data_sheet("NVIDIA Unheard Of") is None


def test_model_has_the_stated_size() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    from benchmarks.steps.workload import Workload

    work = Workload(**plan.workload(cell("sft-2k"), {**SETTINGS, "small": False, "precision": "bf16-true"}))
    assert (work.precision, work.dtype, work.autocast) == ("bf16-true", "bfloat16", False)
    assert work.batch * (work.prompt_tokens + work.response_tokens) == 2048
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**work.sizes, tie_word_embeddings=True))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(0.6, abs=0.01)


def test_outcome_of_the_test_suite() -> None:
    output = "FAILED tests/test_a.py::test_b[cuda] - AssertionError\n1 failed, 12 passed, 3 skipped in 9.1s\n"
    found = suite.outcome(output, 1)
    assert (found["passed"], found["failed"], found["cases"]) == (False, 1, 12)
    assert found["failures"] == ["tests/test_a.py::test_b[cuda]"]
    assert suite.outcome("5 passed in 1s", 0)["passed"] is True
    assert suite.outcome("no tests ran in 1s", 5) == {"skipped": "needs CUDA"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SIZES", checks.SIZES | {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16})


@pytest.mark.usefixtures("every_comparison")
def test_check_of_kernels(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inexact(Stand):
        def liger_swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return super().liger_swiglu(gate, up) * 1.01

    assert checks.run("liger-Llama", "cpu", tmp_path) == {"skipped": "needs CUDA"}
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert checks.kernels("Llama", "cpu") == {"skipped": "liger-kernel not installed"}
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    stand_in(monkeypatch, Stand())
    assert checks.kernels("Llama", "cpu")["passed"]
    stand_in(monkeypatch, Inexact())
    monkeypatch.setattr("rlhf_lightning.models.packed_forward.tolerance", lambda model, gradients: 1.0)
    assert not checks.kernels("Llama", "cpu")["passed"]


def test_check_detects_wrong_attention(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.run("forward-Qwen3", "cpu", tmp_path)["passed"]
    assert checks.run("forward-bf16", "cpu", tmp_path)["passed"]
    dense = checks.dense
    monkeypatch.setattr(checks, "dense", lambda model, batch: dense(model, batch) * 1.01)
    assert not checks.run("forward-Qwen3", "cpu", tmp_path)["passed"]


def test_a_step_is_compared_with_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU against CPU here: nothing differs, unless the learning rate does."""
    found = checks.step("sft", "cpu", tmp_path)
    assert (found["passed"], found["relative_difference"]) == (True, 0.0)
    rates = iter((0.1, 0.11))
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: sgd(parameters, lr=next(rates)))
    found = checks.step("sft", "cpu", tmp_path)
    assert not found["passed"]
    assert found["relative_difference"] == pytest.approx(1 / 11, rel=1e-3)


def test_table_in_the_readme_equals_the_results() -> None:
    report = json.loads(main.RESULTS.read_text()) if main.RESULTS.exists() else {}
    page = main.README.read_text()
    assert table.placed(page, report) == page


def test_table_without_results() -> None:
    rows = [line for line in table.render({}).splitlines() if line.startswith("|")]
    assert len(rows) == len(plan.CELLS) + 4
    for row in (row for row in rows if row.count("---") == 0 and "MFU | peak" not in row and "numbers" not in row):
        assert {cell.split(": ")[-1] for cell in row.strip("| ").split(" | ")[1:]} <= {table.NOT, "–"}
