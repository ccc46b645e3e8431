"""The learning benchmarks at their smallest size, and checks that would catch a wrong one."""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.learning import (
    evidence,
    graph_walk,
    length_preference,
    objectives,
    over_optimization,
    quickstart_curves,
    staleness,
)
from rlhf_lightning import PolicyRLModule
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Sampler

SVG = "{http://www.w3.org/2000/svg}"
SMALL = length_preference.Sizes(
    conversations=96, sft_epochs=1, pairs=192, held_out=40, rounds=2, prompts=1, group=2
)  # fmt: skip


def test_intervals_are_students_t_intervals() -> None:
    """Quantiles from printed tables of the t distribution; the half width by hand."""
    for freedom, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert evidence.t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)
    mean, half = evidence.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.7764 * math.sqrt(2.5 / 5), abs=1e-3))
    assert evidence.interval([0.5]) == (0.5, math.inf)
    assert evidence.shown([0.5]) == "0.500"


def test_spread_is_over_seeds() -> None:
    found = evidence.over_seeds([[1.0, 5.0], [3.0, 5.0]])
    assert found == {"mean": [2.0, 5.0], "deviation": [pytest.approx(math.sqrt(2)), 0.0]}
    with pytest.raises(ValueError):
        evidence.over_seeds([[1.0, 2.0], [1.0]])


def test_cells_with_other_settings_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert evidence.kept(path, {"rounds": 2}) == {}
    write_json(path, {"settings": {"rounds": 2, "rates": (1, 2)}, "runs": {"0": "cell"}})
    assert evidence.kept(path, {"rounds": 2, "rates": (1, 2)}) == {"0": "cell"}
    assert evidence.kept(path, {"rounds": 2, "rates": (1, 2)}, fresh=True) == {}
    assert evidence.kept(path, {"rounds": 3, "rates": (1, 2)}) == {}


def committed(name: str) -> dict[str, Any]:
    return json.loads((evidence.RESULTS / f"{name}.json").read_text())


REPORTS = {
    "quickstart_curves": lambda results: quickstart_curves.report(results["runs"]),
    "graph_walk": lambda results: graph_walk.report(results["runs"]),
    "objectives": lambda results: objectives.tables(results["runs"], results["choice"], [0, 1, 2, 3, 4]),
    "length_preference": lambda results: length_preference.report(results["runs"], length_preference.Sizes()),
    "over_optimization": lambda results: over_optimization.table(results["runs"]),
    "staleness": lambda results: staleness.tables(results["runs"]),
}


@pytest.mark.parametrize("name", REPORTS)
def test_page_has_the_tables_of_the_committed_results(name: str) -> None:
    page = (Path(evidence.__file__).parent / "README.md").read_text()
    for part in REPORTS[name](committed(name)).split("\n\n"):
        assert part in page, f"{name}: the README has another table; copy what the script prints"
    assert f"(../results/plots/{name}.svg)" in page
    assert (evidence.PLOTS / f"{name}.svg").exists()


# -- rerun ------------------------------------------------------------------------------------------------------------


def length_run(tokens: float) -> dict[str, Any]:
    part = {"tokens": tokens, "empty": 0.0, "truncated": 0.0}
    curves = {"tokens": [30.0, tokens], "score": [0.0, 1.0], "kl": [0.0, 0.5]}
    return {"pair_accuracy": 1.0, "start": {**part, "tokens": 30.0}, "end": part, "curves": curves}


def quickstart_run(seed: int) -> dict[str, Any]:
    stage = {"gold_reward": 0.4 + seed / 100, "response_tokens": 32.0, "kl": 1.0, "val_nll": 0.2, "val_nll_start": 6.8}
    policy = {**stage, "gold_reward": 0.9}
    summary = {"base": stage, "sft": stage, "policy": policy, "preference": {"pair_accuracy": 0.93}}
    summary |= {"seconds": 100.0, "peak_memory_gb": 1.0}
    names = ("nll held_out", "nll train", "accuracy held_out", "accuracy train", "reward", "kl", "tokens", "gold")
    checks = quickstart_curves.checks(summary)
    return {**summary, "checks": checks, "curves": {name: [(1, 0.5), (2, 0.6 + seed)] for name in names}}


CASES = {
    "length_preference": (length_preference, "run", lambda seed, sizes: length_run(20.0 + seed)),
    "quickstart_curves": (quickstart_curves, "measured", quickstart_run),
}


@pytest.mark.parametrize("name", CASES)
def test_finished_seed_is_skipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, function, stand_in = CASES[name]
    ran: list[int] = []

    def counted(seed: int, *rest: Any) -> Any:
        ran.append(seed)
        return stand_in(seed, *rest)

    monkeypatch.setattr(script, function, counted)
    monkeypatch.setattr(script, "PLOTS", tmp_path)

    def again(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["x", "--results", str(tmp_path / "r.json"), *options])
        script.main()

    again("--seeds", "0", "1")
    again("--seeds", "0", "1", "2")
    assert ran == [0, 1, 2]
    again("--seeds", "0", "--fresh")
    assert ran == [0, 1, 2, 0]
    assert "| mean |" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag == f"{SVG}svg"


def test_finished_cell_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(objectives, "supervised", refused)
    cells = {objectives.key("PPO", 2e-4, 10): {}}
    objectives.run(10, {"PPO": [2e-4]}, cells, None)
    with pytest.raises(AssertionError, match="again"):
        objectives.run(10, {"PPO": [2e-4, 4e-4]}, cells, None)


# -- quickstart -------------------------------------------------------------------------------------------------------


def test_curves_equal_the_logged_metrics(tmp_path: Path) -> None:
    """Files written by the package's own logger, with a validation that is logged twice."""
    for stage, rows in {
        "sft": [*((step, {"train/nll": 1.0 + step % 2}) for step in range(32)), (31, {"val/nll": 0.5})],
        "preference": [(step, {"train/accuracy": step / 16}) for step in range(16)] + [(15, {"val/accuracy": 0.9})],
        "policy": [
            (step, {"train/reward": -step, "train/kl": step / 2, "train/response_tokens": 30 + step})
            for step in range(2)
        ],
    }.items():
        log = MetricsCSV(tmp_path / stage)
        for step, row in rows:
            log.log_metrics(row, step)
        if stage == "sft":
            log.log_metrics({"val/nll": 0.25, "epoch": 3}, 31)
    (tmp_path / "data").mkdir()
    asked = {"prompt": "How do I fix my old tent?", "subject": "old tent", "material": "cloth"}
    (tmp_path / "data" / "prompts_train.jsonl").write_text(json.dumps(asked) + "\n")
    answers = [(0, "Buy one."), (0, "Save the old tent."), (1, "Wash the old tent because it is old.")]
    samples = [
        {"round": n, "prompt": [{"role": "user", "content": asked["prompt"]}], "response": a} for n, a in answers
    ]
    (tmp_path / "policy" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    found = quickstart_curves.curves(tmp_path, {"sft": {"val_nll_start": 6.8}})
    assert found["nll held_out"] == [(0, 6.8), (32, 0.25)]
    assert found["nll train"] == [(16, 1.5), (32, 1.5)]
    assert found["accuracy held_out"] == [(16, 0.9)]
    assert found["accuracy train"] == [(16, 7.5 / 16)]
    assert found["reward"] == [(1, 0.0), (2, -1.0)]
    assert found["kl"] == [(1, 0.0), (2, 0.5)]
    assert found["tokens"] == [(1, 30.0), (2, 31.0)]
    # The rubric: 0.10 for a short answer, and 0.30 for the subject; then 0.20 for a reason.
    assert found["gold"] == [(1, pytest.approx((0.1 + 0.4) / 2)), (2, pytest.approx(0.6))]


def test_seeds_with_different_steps_are_not_averaged() -> None:
    runs = {str(seed): quickstart_run(seed) for seed in range(2)}
    assert quickstart_curves.combined(runs)["kl"]["mean"] == [0.5, pytest.approx(1.1)]
    runs["1"]["curves"]["kl"] = [(1, 0.5), (3, 0.6)]
    with pytest.raises(ValueError, match="kl"):
        quickstart_curves.combined(runs)


def test_failed_expectation_is_detected() -> None:
    run = quickstart_run(0)
    assert all(run["checks"].values())
    run["policy"]["gold_reward"] = 0.6
    assert not quickstart_curves.checks(run)["half of the remaining distance"]


# -- graph walk and objectives ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[graph_walk.Graph, str, dict[str, float]]:
    """A graph, an SFT model that has seen its walks a few times, and its score."""
    graph, folder = graph_walk.Graph(20), str(tmp_path_factory.mktemp("walk"))
    model = graph_walk.supervised(graph, graph_walk.make_tokenizer(), 20, folder, epochs=4)
    start = PolicyRLModule(model, sampler=Sampler(max_tokens=graph_walk.STEPS + 2))
    start.configure_model()
    return graph, model, graph_walk.measured(start, graph)


def test_graph_task_is_scored_relative_to_its_optimum() -> None:
    graph = graph_walk.Graph(0)
    graph.edges = {0: [1], 1: [2, 0], 2: [1, 0]}
    graph.distance = {0: 0, 1: 1, 2: 1}
    assert graph.score(1, "n0") == 1.0
    assert graph.score(1, "n2 n0") == pytest.approx(8 / 9)
    assert graph.score(2, "n1 n2 n1 n2 n1 n2 n1 n2 n1 n0") == 0.0  # ten steps, and nothing is left
    assert graph.score(1, "n2 n1") == 0.0  # does not arrive
    assert graph.score(1, "n0 n1 n0") == 0.0  # goes on
    assert graph.score(2, "n2 n0") == 0.0  # no such edge


@pytest.mark.parametrize("name", objectives.METHODS)
def test_every_objective_improves_the_score(
    name: str, walked: tuple[graph_walk.Graph, str, dict[str, float]], tmp_path: Path
) -> None:
    graph, model, start = walked
    method = replace(objectives.METHODS[name], rate=5e-4 * objectives.FACTOR.get(name, 1.0))
    module, curve = graph_walk.reinforced(method, graph, model, 20, str(tmp_path), rounds=4, rollouts=128)
    assert len(curve) == 4
    # Each score is the mean of 1,280 draws: its standard error is about 0.01.
    assert graph_walk.measured(module, graph)["drawn"] > start["drawn"] + 0.05


def test_method_of_the_staleness_benchmark_samples_ahead(
    walked: tuple[graph_walk.Graph, str, dict[str, float]], tmp_path: Path
) -> None:
    graph, model, _ = walked
    for max_staleness, ages in ((0, None), (1, [0.0, 1.0, 1.0])):
        curve = graph_walk.Curve()
        method = staleness.ahead(staleness.METHODS["PPO, 8 steps"], max_staleness)
        _, scores = graph_walk.reinforced(method, graph, model, 20, str(tmp_path), rounds=3, rollouts=32, curve=curve)
        assert len(scores) == 3
        assert ages is None or curve.of("staleness") == ages


def test_learning_rate_with_the_best_mean_over_tuning_seeds() -> None:
    scores = dict(zip(objectives.rates("PPO"), ([0.5, 0.9], [0.8, 0.8], [0.9, 0.3], [0.1, 0.1]), strict=True))
    cells = {
        objectives.key("PPO", rate, seed): {"curve": [score, score]}
        for rate, several in scores.items()
        for seed, score in zip((10, 11), several, strict=True)
    }
    rate, tried = objectives.chosen(cells, "PPO", (10, 11))
    assert rate == objectives.rates("PPO")[1]
    assert list(tried.values()) == [0.7, 0.8, 0.6, 0.1]
    assert not set(objectives.CHOOSING) & {0, 1, 2, 3, 4}
    assert len({len(objectives.rates(name)) for name in objectives.METHODS}) == 1


def test_committed_choice_follows_from_the_committed_cells() -> None:
    results = committed("objectives")
    for name, recorded in results["choice"].items():
        rate, tried = objectives.chosen(results["runs"], name)
        assert (recorded["rate"], recorded["tried"]) == (rate, tried)


def test_rollouts_are_counted_until_the_goal_is_reached() -> None:
    assert objectives.rollouts_to([0.5, 0.89, 0.9, 0.7]) == 2 * objectives.ROLLOUTS
    assert objectives.rollouts_to([0.95]) == 0
    assert objectives.rollouts_to([0.5]) is None
    line = objectives.summary(
        "x", [{"curve": [0.5, 0.95], "drawn": 1, "greedy": 1}, {"curve": [0.5], "drawn": 0, "greedy": 0}]
    )
    assert line[-1] == "128 (1 of 2 reach it)"


# -- length -----------------------------------------------------------------------------------------------------------


def test_reward_prefers_short_answers(tmp_path: Path) -> None:
    task = length_preference.Task(0, SMALL)
    assert all(task.tokens(pair["chosen"]) < task.tokens(pair["rejected"]) for pair in task.pairs)
    assert not {pair["prompt"] for pair in task.pairs} & {row["prompt"] for row in task.held_out_prompts}
    model = length_preference.supervised(task, 0, SMALL, str(tmp_path))
    reward = length_preference.rewarding(task, model, 0, str(tmp_path))
    assert length_preference.accuracy(reward, task.held_out_pairs) > 0.75
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in task.held_out_pairs]
    assert length_preference.accuracy(reward, swapped) < 0.25
    _, curve = length_preference.reinforced(task, model, reward, 0, SMALL, str(tmp_path))
    assert [len(curve.of(column)) for column in length_preference.COLUMNS.values()] == [2, 2, 2]


def test_length_falls_only_if_it_falls_on_every_seed() -> None:
    found = length_preference.falls([length_run(tokens) for tokens in (20.0, 21.0, 19.0)])
    assert found == {
        "mean": -10.0,
        "half": pytest.approx(4.3027 / math.sqrt(3), abs=1e-3),
        "on_every_seed": True,
        "beyond_interval": True,
    }
    found = length_preference.falls([length_run(tokens) for tokens in (5.0, 31.0, 19.0)])
    assert (found["on_every_seed"], found["beyond_interval"]) == (False, False)


# -- over-optimization, plots -----------------------------------------------------------------------------------------


def test_over_optimization_table_has_ten_rounds(tmp_path: Path) -> None:
    rounds = [float(number) for number in range(20)]
    runs = {
        str(seed): {"curves": {name: dict.fromkeys(("score", "gold", "kl"), rounds) for name in over_optimization.KL}}
        for seed in range(2)
    }
    assert "| 20 | no KL | 14.50 ± 0.00 | 14.50 ± 0.00 | 14.50 ± 0.00 |" in over_optimization.table(runs)
    over_optimization.draw(runs, tmp_path / "o.svg")
    texts = [one.text for one in ElementTree.parse(tmp_path / "o.svg").iter(f"{SVG}text")]
    assert texts.count("adaptive to 4 nats") == 3


def test_plot_labels_every_curve_and_stays_in_its_frame(tmp_path: Path) -> None:
    series = {
        "a & b": plots.Series([(0, 1.0), (10, 2.0)], [0.5, 5.0]),
        **{f"method {i}": plots.Series([(x, float(i)) for x in range(20)]) for i in range(6)},
    }
    plots.save(tmp_path / "p" / "x.svg", [plots.Panel("title", series, x="round")] * 4)
    root = ElementTree.parse(tmp_path / "p" / "x.svg").getroot()
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert all(texts.count(name) == 4 for name in (*series, "title", "round"))
    colors = [one.get("stroke") for one in root.iter(f"{SVG}path") if one.get("class") == "line"]
    assert len(colors) == 4 * len(series)
    assert len(set(colors)) == len(series)
    for one in root.iter(f"{SVG}path"):
        if one.get("class") in ("line", "band"):
            for point in one.get("d", "").strip("MZ").split("L"):
                across, down = map(float, point.split())
                assert 0 <= across <= plots.WIDTH
                assert 0 <= down <= plots.HEIGHT
