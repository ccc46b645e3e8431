"""Over-optimization of a reward model from 64 noisy pairs, with five times the quickstart's rounds.

The task and models are the quickstart's; a round is 8 prompts with 4 answers each, a quarter of the quickstart's.

    python -m benchmarks.learning.over_optimization [--seeds 0 1 2 3 4] [--fresh]

Each seed has its own data, tokenizer, weights and samples. One SFT and one reward model per seed; then RL from the
same start without KL, with a fixed and with an adaptive coefficient. Writes
`benchmarks/results/over_optimization.json` and `plots/over_optimization.svg`, and prints the table. Finished seeds are
kept and skipped.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.learning.evidence import kept, over_seeds
from benchmarks.quickstart import machine
from rlhf_lightning.files import write_json
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.quickstart.data import LABEL_NOISE, Sizes, write_data
from rlhf_lightning.quickstart.rubric import rubric
from rlhf_lightning.quickstart.run import CONFIGS

RESULTS = Path(__file__).parents[1] / "results" / "over_optimization.json"
PAIRS, ROUNDS, PROMPTS, GROUP = 64, 200, 8, 4
KL = {
    "no KL": {"coefficient": 0.0},
    "fixed 0.1": {"coefficient": 0.1, "place": "reward"},
    "adaptive to 4 nats": {"coefficient": 0.1, "place": "reward", "target": 4.0, "horizon": 500},
}
COLUMNS = {"score": "train/reward_reward_model", "gold": "train/reward_gold", "kl": "train/kl"}
SHOWN = (1, 20, 40, 80, 120, 160, 200)


def gold(completions: list[str], subject: list[str], material: list[str]) -> list[float]:
    """The gold reward, which no stage is trained on."""
    return [rubric(*row) for row in zip(completions, subject, material, strict=True)]


def plan(root: Path, seed: int, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """The pipeline: SFT, a reward model, and a policy stage for each kind of KL control."""
    files = write_data(root / "data", seed, sizes)
    base = root / "base"
    maker = [sys.executable, "-m", "rlhf_lightning.quickstart.model", str(base), files["sft_train"], str(seed)]
    subprocess.run(maker, check=True)

    def data(name: str) -> dict[str, Any]:
        return {"data.train": files[f"{name}_train"], "data.validation": files[f"{name}_validation"]}

    judge = {"class_path": "rlhf_lightning.rewards.FunctionReward"}
    judge |= {"init_args": {"function": "benchmarks.learning.over_optimization.gold", "weight": 0.0, "name": "gold"}}
    policy = {**data("prompts"), "trainer.max_steps": rounds, "trainer.max_epochs": -1, "model.rewards": [judge]}
    policy |= {"data.prompts_per_round": PROMPTS, "data.group_size": GROUP}
    stages: list[dict[str, Any]] = [
        {"kind": "sft", "config": str(CONFIGS / "sft.yaml"), "overrides": data("sft"), "start": str(base)},
        {
            "kind": "preference",
            "config": str(CONFIGS / "preference.yaml"),
            # Enough steps to fit its few pairs, including wrong labels.
            "overrides": {**data("preference"), "trainer.max_epochs": 20, "trainer.check_val_every_n_epoch": 20},
            "start": "sft",
        },
    ]
    for name, kl in KL.items():
        overrides = {**policy, "model.kl": kl}
        stage = {"kind": "policy", "name": name.replace(" ", "-"), "config": str(CONFIGS / "policy.yaml")}
        stages.append({**stage, "overrides": overrides, "start": "sft", "reward": "preference"})
    return {"name": "over-optimization", "seed": seed, "stages": stages}


def run(seed: int, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """The curves of a seed, by kind of KL control."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        manifest = run_pipeline(plan(root, seed, rounds, sizes), root)
        curves = {name: _curves(root / name.replace(" ", "-") / "metrics.csv") for name in KL}
    return {"pair_accuracy": manifest["stages"]["preference"]["metrics"]["val/accuracy"], "curves": curves}


def _curves(path: Path) -> dict[str, list[float]]:
    with open(path, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(COLUMNS["kl"])]
    return {name: [round(float(row[column]), 4) for row in rows] for name, column in COLUMNS.items()}


def table(runs: dict[str, Any]) -> str:
    """Means over the ten rounds up to the given one, with the deviation between seeds."""
    lines = ["| round | KL control | reward model's score | gold reward | KL (nats) |", "|---" * 5 + "|"]
    for name in KL:
        for last in SHOWN:
            cells = []
            for column in COLUMNS:
                values = [
                    statistics.mean(run["curves"][name][column][max(0, last - 10) : last])
                    for run in runs.values()
                    if len(run["curves"][name][column]) >= last
                ]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}" if values else "–")
            lines.append(f"| {last} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, Any], path: Path, window: int = 10) -> None:
    """Plots of score and gold reward by round, and of gold reward by √KL, as means over ten rounds and seeds."""
    means: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in KL:
        curves = [one["curves"][name] for one in runs.values()]
        means[name] = {}
        for column in COLUMNS:
            last = range(window, min(len(curve[column]) for curve in curves) + 1, window)
            several = [[statistics.fmean(curve[column][i - window : i]) for i in last] for curve in curves]
            means[name][column] = {"round": list(last), **over_seeds(several)}
    panels = []
    for column, title in (("score", "reward model's score"), ("gold", "gold reward")):
        series = {
            name: plots.Series(
                list(zip(part[column]["round"], part[column]["mean"], strict=True)), part[column]["deviation"]
            )
            for name, part in means.items()
        }
        panels.append(plots.Panel(f"{title}, {len(runs)} seeds", series, x="round"))
    series = {}
    for name, part in means.items():
        far = [math.sqrt(max(0.0, kl)) for kl in part["kl"]["mean"]]
        series[name] = plots.Series(list(zip(far, part["gold"]["mean"], strict=True)))
    # The square root, as in Gao et al. (arXiv 2210.10760).
    panels.append(plots.Panel("gold reward by distance", series, x="√KL to SFT (KL in nats per answer)"))
    plots.save(path, panels)


def main() -> None:
    """Run the missing seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--fresh", action="store_true", help="discard the seeds of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sizes = Sizes(pairs=PAIRS)
    settings = {
        "pairs": PAIRS,
        "label_noise": LABEL_NOISE,
        "rounds": arguments.rounds,
        "prompts": PROMPTS,
        "group": GROUP,
        "kl": KL,
    }
    results = {"machine": machine(), "settings": settings, "runs": kept(arguments.results, settings, arguments.fresh)}
    for seed in arguments.seeds:
        if str(seed) not in results["runs"]:
            results["runs"][str(seed)] = run(seed, arguments.rounds, sizes)
            write_json(arguments.results, results)
    print(table(results["runs"]))
    draw(results["runs"], arguments.results.with_name("plots") / "over_optimization.svg")


if __name__ == "__main__":
    main()
