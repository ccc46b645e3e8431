"""Learning from rounds sampled ahead: the graph walk with `max_staleness` 0, 1 and 2.

    python -m benchmarks.learning.staleness [--seeds 0 1 2 3 4] [--shorter 0 1 2] [--fresh]

The task and the rollouts are those of `graph_walk.py`. Two methods with the settings that were chosen for rounds
without delay: group advantages of `graph_walk.py`, with 8 optimizer steps per round, and importance sampling of
`objectives.py` with 1 step per round. `max_staleness` also turns on importance weights (TIS). All runs of a seed start
from one SFT model. With 2, the weights that sample a round depend on the speed of the machine, so the mean staleness is
recorded. The second table has the answers of `length_preference.py` with `max_staleness` 1, beside those without delay
of the same seeds in `results/length_preference.json`. Writes `benchmarks/results/staleness.json` and
`plots/staleness.svg`, and prints the tables. Finished seeds are kept and skipped.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.learning import graph_walk, length_preference, objectives
from benchmarks.learning.evidence import PLOTS, kept, over_seeds, shown, table
from benchmarks.learning.evidence import RESULTS as FOLDER
from benchmarks.learning.graph_walk import ROLLOUTS, ROUNDS, Graph, Method, measured, reinforced, supervised
from benchmarks.quickstart import machine
from rlhf_lightning import PolicyRLModule
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Sampler

RESULTS = FOLDER / "staleness.json"
STALENESS = (0, 1, 2)
METHODS = {
    "PPO, 8 steps": graph_walk.METHODS["group advantages"],
    # The rate that objectives.py has chosen.
    "importance sampling, 1 step": replace(objectives.METHODS["importance sampling, 1 step per round"], rate=2e-3),
}


def ahead(method: Method, max_staleness: int) -> Method:
    """The method with rounds sampled ahead."""
    return replace(method, make=lambda: {**method.make(), "max_staleness": max_staleness})


def key(name: str, max_staleness: int) -> str:
    """Name of a run."""
    return f"{name}, max_staleness {max_staleness}"


def run(seed: int, rounds: int = ROUNDS, rollouts: int = ROLLOUTS, epochs: int = 12) -> dict[str, Any]:
    """Run SFT, and RL from its result with each setting."""
    graph, tokenizer = Graph(seed), graph_walk.make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model = supervised(graph, tokenizer, seed, folder, epochs)
        start = PolicyRLModule(model, sampler=Sampler(max_tokens=graph_walk.STEPS + 2))
        start.configure_model()
        result: dict[str, Any] = {"sft": measured(start, graph)}
        for name, method in METHODS.items():
            for k in STALENESS:
                curve = graph_walk.Curve()
                module, scores = reinforced(ahead(method, k), graph, model, seed, folder, rounds, rollouts, curve)
                age = statistics.fmean(curve.of("staleness")) if k else 0.0
                result[key(name, k)] = {**measured(module, graph), "curve": scores, "staleness": age}
    return result


def report(runs: dict[str, Any]) -> str:
    """A line for each setting, with means over seeds and their 95% intervals, and differences within seeds."""
    lines = []
    for name in METHODS:
        for k in STALENESS:
            found, base = ([one[key(name, each)] for one in runs.values()] for each in (k, 0))
            age = statistics.fmean(one["staleness"] for one in found)
            differences = [one["drawn"] - other["drawn"] for one, other in zip(found, base, strict=True)]
            means = [statistics.fmean(one["curve"]) for one in found]
            lines.append(
                [
                    name,
                    k,
                    f"{age:.2f}",
                    shown([one["drawn"] for one in found]),
                    shown(differences) if k else "–",
                    f"{min(one['drawn'] for one in found):.3f} to {max(one['drawn'] for one in found):.3f}",
                    shown([one["greedy"] for one in found]),
                    shown(means),
                ]
            )
    head = ["method", "`max_staleness`", "mean staleness", "score, sampled", "less that of 0", "range of seeds"]
    return table([*head, "score, greedy", "mean over all rollouts"], lines)


def report_shorter(runs: dict[str, Any], base: dict[str, Any]) -> str:
    """Tokens per answer without delay and with rounds sampled one ahead.

    Args:
        runs: Runs of `length_preference.py` with `max_staleness` 1, by seed.
        base: Those without delay.
    """
    lines = []
    for seed, one in runs.items():
        pair = base[seed], one
        curves = [each["curves"] for each in pair]
        lines.append(
            [
                seed,
                f"{one['start']['tokens']:.1f}",
                *(f"{each['end']['tokens']:.1f}" for each in pair),
                *(f"{curve['tokens'][9]:.1f}" for curve in curves),
                *(f"{curve['kl'][-1]:.2f}" for curve in curves),
            ]
        )
    ends = [one["end"]["tokens"] for one in base.values()]
    names = ("held out after 20 rounds", "in round 10", "KL, last round")
    head = ["seed", "tokens at the start", *(f"{name}: {k}" for name in names for k in (0, 1))]
    spread = f"Without delay, {len(base)} seeds end at {min(ends):.1f} to {max(ends):.1f} tokens."
    return f"{table(head, lines)}\n\n{spread}"


def tables(cells: dict[str, Any]) -> str:
    """Both tables, of all cells."""
    shorter = {name.rpartition(" ")[2]: one for name, one in cells.items() if name.startswith("shorter")}
    base = json.loads((FOLDER / "length_preference.json").read_text(encoding="utf-8"))["runs"]
    walks = {name: one for name, one in cells.items() if not name.startswith("shorter")}
    return "\n\n".join([report(walks), *([report_shorter(shorter, base)] if shorter else [])])


def draw(runs: dict[str, Any], path: Path) -> None:
    """The mean score of each round, with its deviation between seeds."""
    panels = []
    for name in METHODS:
        series = {}
        for k in STALENESS:
            found = over_seeds([one[key(name, k)]["curve"] for one in runs.values()])
            points = [(i * ROLLOUTS, score) for i, score in enumerate(found["mean"])]
            series[f"max_staleness {k}"] = plots.Series(points, found["deviation"])
        panels.append(plots.Panel(f"{name} per round, {len(runs)} seeds", series, x="rollouts before it"))
    plots.save(path, panels)


def main() -> None:
    """Run the missing seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shorter", type=int, nargs="*", default=[0, 1, 2], help="seeds of the second table")
    parser.add_argument("--fresh", action="store_true", help="discard the seeds of earlier runs")
    given = parser.parse_args()
    settings = {"rounds": ROUNDS, "rollouts": ROLLOUTS, "max_staleness": STALENESS, "methods": list(METHODS)}
    results: dict[str, Any] = {"machine": machine(), "settings": settings}
    results["runs"] = kept(RESULTS, settings, given.fresh)
    for seed in given.seeds:
        if str(seed) not in results["runs"]:
            results["runs"][str(seed)] = run(seed)
            write_json(RESULTS, results)
    for seed in given.shorter:
        if (name := f"shorter answers, seed {seed}") not in results["runs"]:
            results["runs"][name] = length_preference.run(seed, length_preference.Sizes(), 1)
            write_json(RESULTS, results)
    runs = {str(seed): results["runs"][str(seed)] for seed in given.seeds}
    print(tables(results["runs"]))
    draw(runs, PLOTS / "staleness.svg")


if __name__ == "__main__":
    main()
