"""The quickstart over several seeds: how much each stage improves, and along which curve.

    python -m benchmarks.learning.quickstart_curves [--seeds 0 1 2 3 4] [--fresh]

Each seed is `rlhf quickstart --seed N` in its own process, with its own data, tokenizer, weights and samples;
none is selected. Curves are the logged values: `metrics.csv` of each stage, and for the gold reward, which RL never
sees, the rubric's score of every answer in `samples.jsonl`. Writes `benchmarks/results/quickstart_curves.json` and
`plots/quickstart_curves.svg`, prints the tables and the requirements that were missed. Finished seeds are kept.
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.learning.evidence import PLOTS, RESULTS, interval, kept, over_seeds, table
from benchmarks.quickstart import HEAD, checks, machine, row, run
from rlhf_lightning.files import write_json
from rlhf_lightning.quickstart.rubric import rubric

Curve = list[tuple[int, float]]
WINDOW = 16
"""Number of training steps that are averaged to one point, since one step has only 16 rows."""
RL = {"reward": "train/reward", "kl": "train/kl", "tokens": "train/response_tokens"}
TITLES = {
    "nll": "SFT: NLL (nats per token)",
    "accuracy": "preference: accuracy of pairs",
    "reward": "RL: reward model's score",
    "gold": "RL: gold reward",
    "kl": "RL: KL to SFT (nats per answer)",
    "tokens": "RL: tokens per answer",
}
NOTES = {"held_out": "held out", "train": "training", "": "training prompts"}


def column(path: Path, name: str) -> Curve:
    """A logged value by optimizer step; the last one if a step was logged twice."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list({int(one["step"]) + 1: float(one[name]) for one in csv.DictReader(stream) if one.get(name)}.items())


def windowed(curve: Curve, size: int = WINDOW) -> Curve:
    """Means over consecutive points, placed at the last of them; an incomplete rest is left out."""
    groups = [curve[i : i + size] for i in range(0, len(curve) - size + 1, size)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]


def gold(root: Path) -> Curve:
    """Mean gold reward of the answers of each round."""
    lines = (root / "data" / "prompts_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {one["prompt"]: one for one in map(json.loads, lines)}
    scores = defaultdict(list)
    with open(root / "policy" / "samples.jsonl", encoding="utf-8") as stream:
        for one in map(json.loads, stream):
            asked = rows[one["prompt"][-1]["content"]]
            scores[one["round"]].append(rubric(one["response"], asked["subject"], asked["material"]))
    return [(number + 1, statistics.fmean(several)) for number, several in sorted(scores.items())]


def curves(root: Path, summary: dict[str, Any]) -> dict[str, Curve]:
    """All curves of a finished run. Rounds count from 1; the SFT model answers in round 1."""
    sft, preference, policy = (root / stage / "metrics.csv" for stage in ("sft", "preference", "policy"))
    return {
        "nll held_out": [(0, summary["sft"]["val_nll_start"]), *column(sft, "val/nll")],
        "nll train": windowed(column(sft, "train/nll")),
        "accuracy held_out": column(preference, "val/accuracy"),
        "accuracy train": windowed(column(preference, "train/accuracy")),
        **{name: column(policy, logged) for name, logged in RL.items()},
        "gold": gold(root),
    }


def measured(seed: int) -> dict[str, Any]:
    """Run a seed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        summary = run(seed, root)
        found = {name: [(step, round(value, 5)) for step, value in c] for name, c in curves(root, summary).items()}
    return {**summary, "checks": checks(summary), "curves": found}


def combined(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation over seeds, by name of the curve; all seeds must have logged at the same steps."""
    result = {}
    for name in next(iter(runs.values()))["curves"]:
        several = [one["curves"][name] for one in runs.values()]
        steps = [step for step, _ in several[0]]
        if any([step for step, _ in curve] != steps for curve in several):
            raise ValueError(f"{name}: the seeds have logged at different steps; run them again with --fresh")
        result[name] = {"steps": steps, **over_seeds([[value for _, value in curve] for curve in several])}
    return result


def points(found: dict[str, Any]) -> str:
    """A table of some points of the curves."""
    lines = []
    for name, curve in found.items():
        count = len(curve["steps"])
        places = sorted({round(i * (count - 1) / 4) for i in range(5)})
        cells = [f"{curve['steps'][i]}: {curve['mean'][i]:.3f} ± {curve['deviation'][i]:.3f}" for i in places]
        title, _, kind = name.partition(" ")
        lines.append([f"{TITLES[title]}, {NOTES[kind]}", "step" if kind else "round", "; ".join(cells)])
    return table(["curve", "by", "mean ± deviation between seeds"], lines)


def mean_row(summaries: list[dict[str, Any]]) -> list[str]:
    """The last row of the table of seeds: means, with 95% intervals of each stage's gain by Student's t."""
    gain = interval([one["policy"]["gold_reward"] - one["sft"]["gold_reward"] for one in summaries])
    mean: dict[str, Any] = {
        stage: {name: statistics.fmean(one[stage][name] for one in summaries) for name in names}
        for stage, names in {
            "base": ("gold_reward",),
            "sft": ("gold_reward", "val_nll_start", "val_nll", "response_tokens"),
            "policy": ("gold_reward", "kl", "response_tokens"),
            "preference": ("pair_accuracy",),
        }.items()
    }
    mean |= {name: statistics.fmean(one[name] for one in summaries) for name in ("seconds", "peak_memory_gb")}
    cells = row("mean", mean)
    return [cells[0], f"{cells[1]} (RL: {gain[0]:+.2f} ± {gain[1]:.2f})", *cells[2:]]


def report(runs: dict[str, Any]) -> str:
    """Both tables, and the requirements that were missed."""
    seeds = table(HEAD, [*(row(seed, one) for seed, one in runs.items()), mean_row(list(runs.values()))])
    broken = [f"seed {seed}: {name}" for seed, one in runs.items() for name, held in one["checks"].items() if not held]
    promises = f"Missed requirements: {'; '.join(broken) or 'none'}."
    return "\n\n".join([seeds, promises, points(combined(runs))])


def draw(found: dict[str, Any], seeds: int, path: Path) -> None:
    """One panel per quantity."""
    panels = []
    for title, text in TITLES.items():
        series = {}
        for name, curve in found.items():
            if name.partition(" ")[0] == title:
                pairs = list(zip(curve["steps"], curve["mean"], strict=True))
                series[NOTES[name.partition(" ")[2]]] = plots.Series(pairs, curve["deviation"])
        panels.append(
            plots.Panel(text, series, x="round" if text.startswith("RL") else f"step (mean of {seeds} seeds)")
        )
    plots.save(path, panels)


def main() -> None:
    """Run the missing seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fresh", action="store_true", help="discard the seeds of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "quickstart_curves.json")
    given = parser.parse_args()
    settings = {"threads": os.environ.get("OMP_NUM_THREADS", "one for each core"), "window": WINDOW}
    results: dict[str, Any] = {"machine": machine(), "settings": settings}
    results["runs"] = kept(given.results, settings, given.fresh)
    for seed in given.seeds:
        if str(seed) not in results["runs"]:
            results["runs"][str(seed)] = measured(seed)
            write_json(given.results, results)
    runs = {str(seed): results["runs"][str(seed)] for seed in given.seeds}
    found = combined(runs)
    write_json(given.results, {**results, "curves": found})
    print(report(runs))
    draw(found, len(runs), PLOTS / "quickstart_curves.svg")


if __name__ == "__main__":
    main()
