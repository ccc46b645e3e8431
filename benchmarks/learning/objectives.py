"""Sample efficiency of the policy objectives on the graph walk, with the same start and number of rollouts for each.

    python -m benchmarks.learning.objectives [--choose] [--seeds 0 1 2 3 4] [--fresh]

Every objective first tries four learning rates on seeds 10 to 14, and takes the one whose mean score over all its
rollouts is the highest; nothing else is tuned. With these it then runs seeds 0 to 4, each with its own graph, SFT
model and samples. `--choose` only chooses the rates. Writes `benchmarks/results/objectives.json` and
`plots/objectives.svg` and prints the tables. Finished cells are kept and skipped.

All have 16 rounds of 128 rollouts, 32 prompts × 4 answers (with a critic 128 × 1), a KL term of 0.005 in the loss and
8 optimizer steps per round, 2 epochs of 4 mini-batches. Importance sampling, whose ratio is not clipped, is run a
second time with 1 step per round, where its ratio is 1.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.learning import graph_walk
from benchmarks.learning.evidence import PLOTS, RESULTS, kept, over_seeds, shown, table
from benchmarks.learning.graph_walk import Graph, Method, measured, reinforced, supervised
from benchmarks.quickstart import machine
from rlhf_lightning import PolicyRLModule
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.objectives.policy import (
    CISPO,
    ClippedSurrogate,
    ImportanceSampling,
    PolicyObjective,
    SequenceClippedSurrogate,
)
from rlhf_lightning.rollout.advantages import GroupCentered

ROUNDS, ROLLOUTS, GOAL = 16, 128, 0.9
RATES, CHOOSING = (2e-4, 4e-4, 8e-4, 1.6e-3), (10, 11, 12, 13, 14)


def grouped(objective: Callable[[], PolicyObjective], scale: str) -> Method:
    """An objective with its defaults, and the advantage that goes with it (docs/policy.md)."""
    return Method(lambda: {"objective": objective(), "advantage": GroupCentered(scale)})


METHODS = {
    "importance sampling": grouped(ImportanceSampling, "none"),
    # As intended: every step uses the policy that sampled.
    "importance sampling, 1 step per round": replace(grouped(ImportanceSampling, "none"), epochs=1, minibatches=1),
    "PPO": grouped(ClippedSurrogate, "none"),
    "GRPO": grouped(partial(ClippedSurrogate, aggregation="sequence_mean"), "std"),
    "CISPO": grouped(CISPO, "std"),
    "GSPO": grouped(SequenceClippedSurrogate, "std"),
    # The critic as in graph_walk.py; its learning rate is not tuned again.
    "PPO and critic": graph_walk.METHODS["PPO and critic"],
}
# With an eighth of the steps, each must be larger.
FACTOR = {"importance sampling, 1 step per round": 2.5}


def rates(name: str) -> list[float]:
    """The learning rates that an objective tries."""
    return [rate * FACTOR.get(name, 1.0) for rate in RATES]


def key(name: str, rate: float, seed: int) -> str:
    """Name of a cell."""
    return f"{name} | {rate:g} | seed {seed}"


def run(seed: int, wanted: Mapping[str, list[float]], cells: dict[str, Any], keep: Any, rounds: int = ROUNDS) -> None:
    """Measure the missing cells of a seed, all from one SFT model; `keep` is called after each."""
    missing = [
        (name, rate) for name, several in wanted.items() for rate in several if key(name, rate, seed) not in cells
    ]
    if not missing:
        return
    graph, tokenizer = Graph(seed), graph_walk.make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model = supervised(graph, tokenizer, seed, folder)
        start = PolicyRLModule(model, sampler=Sampler(max_tokens=graph_walk.STEPS + 2))
        start.configure_model()
        cells[f"SFT | seed {seed}"] = measured(start, graph)
        for name, rate in missing:
            module, curve = reinforced(replace(METHODS[name], rate=rate), graph, model, seed, folder, rounds, ROLLOUTS)
            cells[key(name, rate, seed)] = {**measured(module, graph), "curve": curve}
            keep()


def chosen(cells: Mapping[str, Any], name: str, seeds: tuple[int, ...] = CHOOSING) -> tuple[float, dict[str, float]]:
    """The rate whose mean score over all rollouts of the choosing seeds is the highest, and that score of each rate."""
    tried = {
        rate: statistics.fmean(on_the_way([cells[key(name, rate, seed)] for seed in seeds])) for rate in rates(name)
    }
    return max(tried, key=lambda rate: tried[rate]), {f"{rate:g}": round(score, 4) for rate, score in tried.items()}


def rollouts_to(curve: list[float], goal: float = GOAL) -> int | None:
    """Number of rollouts before the first round whose mean score is at least `goal`; None if there is no such round."""
    return next((i * ROLLOUTS for i, score in enumerate(curve) if score >= goal), None)


def ends(several: list[dict[str, Any]]) -> list[float]:
    """Score of sampled answers after the budget, for each seed."""
    return [cell["drawn"] for cell in several]


def on_the_way(several: list[dict[str, Any]]) -> list[float]:
    """Mean score of all rollouts of the budget, for each seed: the area under the curve."""
    return [statistics.fmean(cell["curve"]) for cell in several]


PARTS = (ends, on_the_way)


def summary(name: str, several: list[dict[str, Any]]) -> list[str]:
    """A row of the table: means over seeds with 95% intervals."""
    reached = [rollouts_to(cell["curve"]) for cell in several]
    there = [float(count) for count in reached if count is not None]
    needed = shown(there, 0) if there else "–"
    if len(there) < len(reached):
        needed += f" ({len(there)} of {len(reached)} reach it)"
    greedy = shown([cell["greedy"] for cell in several])
    return [name, shown(ends(several)), greedy, shown(on_the_way(several)), needed]


def tables(cells: Mapping[str, Any], choice: Mapping[str, Any], seeds: list[int]) -> str:
    """The chosen rates and the results."""
    head = ["objective", "score, sampled", "score, greedy", "mean over all rollouts", f"rollouts to {GOAL}"]
    picked = {name: [cells[key(name, choice[name]["rate"], seed)] for seed in seeds] for name in METHODS}
    start = [cells[f"SFT | seed {seed}"] for seed in seeds]
    sft = ["SFT, the start", *(shown([one[part] for one in start]) for part in ("drawn", "greedy")), "–", "–"]
    tried = [
        [name, ", ".join(f"{rate}: {score:.3f}" for rate, score in one["tried"].items()), f"{one['rate']:g}"]
        for name, one in choice.items()
    ]
    # Seeds have their own graphs, some harder than others: between objectives, the difference within seeds says more.
    apart = [
        [name, *(shown([a - b for a, b in zip(part(several), part(picked["PPO"]), strict=True)]) for part in PARTS)]
        for name, several in picked.items()
        if name != "PPO"
    ]
    return "\n\n".join(
        [
            table(head, [sft, *(summary(name, several) for name, several in picked.items())]),
            table(["objective less PPO, within seeds", "score, sampled", "mean over all rollouts"], apart),
            table(["objective", "mean over all rollouts by rate, seeds 10 to 14", "taken"], tried),
        ]
    )


def draw(cells: Mapping[str, Any], choice: Mapping[str, Any], seeds: list[int], path: Path) -> None:
    """Mean curves over seeds."""
    series = {}
    for name in METHODS:
        curve = over_seeds([cells[key(name, choice[name]["rate"], seed)]["curve"] for seed in seeds])["mean"]
        series[name.replace("importance sampling, ", "IS, ")] = plots.Series(
            [(i * ROLLOUTS, score) for i, score in enumerate(curve)]
        )
    plots.save(path, [plots.Panel(f"mean score of a round, {len(seeds)} seeds", series, x="rollouts before it")])


def main() -> None:
    """Choose the rates, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="only choose the learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fresh", action="store_true", help="discard the cells of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives.json")
    given = parser.parse_args()
    settings = {"rounds": ROUNDS, "rollouts": ROLLOUTS}
    grid = {name: rates(name) for name in METHODS}
    results: dict[str, Any] = {"machine": machine(), "settings": settings}
    results |= {"choice": {}, "runs": kept(given.results, settings, given.fresh)}
    for seed in CHOOSING:
        run(seed, grid, results["runs"], lambda: write_json(given.results, results))
    for name in METHODS:
        rate, tried = chosen(results["runs"], name)
        results["choice"][name] = {
            "seeds": CHOOSING,
            "by": "mean score over all rollouts",
            "tried": tried,
            "rate": rate,
        }
    write_json(given.results, results)
    if given.choose:
        return
    taken = {name: [one["rate"]] for name, one in results["choice"].items()}
    for seed in given.seeds:
        run(seed, taken, results["runs"], lambda: write_json(given.results, results))
    print(tables(results["runs"], results["choice"], given.seeds))
    draw(results["runs"], results["choice"], given.seeds, PLOTS / "objectives.svg")


if __name__ == "__main__":
    main()
