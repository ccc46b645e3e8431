"""`rlhf quickstart`: generates data and model, runs the three stages through the pipeline, and measures the results."""

import itertools
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_lightning.data.names import check_there
from rlhf_lightning.data.records import fingerprint
from rlhf_lightning.files import FORMAT, is_file, read_record, write_json
from rlhf_lightning.pipeline.plan import Plan, read_plan, section
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.quickstart.data import Sizes, write_data
from rlhf_lightning.quickstart.rubric import rubric
from rlhf_lightning.report import records, write_report
from rlhf_lightning.report.records import AnswerPair, Manifest, Summary
from rlhf_lightning.types import JSON, Row

CONFIGS = Path(__file__).parent / "configs"
# Settings for a pretrained model; the shipped learning rates are for a model with random weights.
OWN_MODEL: dict[str, dict[str, JSON]] = {
    "sft": {"model.lora": {"rank": 16, "target": ["all"]}, "model.optimizer.init_args.lr": 1e-4},
    "preference": {"model.lora": {"rank": 16, "target": ["attention", "mlp"]}, "model.optimizer.init_args.lr": 1e-4},
    "policy": {"model.lora": {"rank": 16, "target": ["all"]}, "model.optimizer.init_args.lr": 2e-5},
}


@dataclass
class QuickstartSettings:
    """Settings of the quickstart. The model and each data file are generated unless given.

    Attributes:
        root: Folder of the run.
        seed: Seed of data, model and training.
        model: Folder or Hub id to start from.
        sft: File of conversations.
        preferences: File of preference pairs.
        prompts: File of prompts for RL.
        sizes: Number of generated rows.

    Example:
        >>> QuickstartSettings(seed=1).root.as_posix()
        'runs/quickstart'
    """

    root: Path = Path("runs/quickstart")
    seed: int = 0
    model: str | None = None
    sft: str | None = None
    preferences: str | None = None
    prompts: str | None = None
    overrides: dict[str, dict[str, JSON]] | None = None
    """Settings by stage that override all others; tests use them for small runs."""
    sizes: Sizes = field(default_factory=Sizes)


def quickstart(settings: QuickstartSettings) -> Summary:
    """Run the quickstart.

    Args:
        settings: Its settings.

    Returns:
        The content of `summary.json`.
    """
    started = time.time()
    for file in (settings.sft, settings.preferences, settings.prompts):
        if file:
            check_there(file)  # before an earlier run is moved aside
    _move_other_aside(settings)
    inputs = _inputs(settings)
    plan = read_plan(_plan(settings, inputs), settings.root)
    manifest = run_pipeline(plan)
    # This process loads models only after the stages have ended, so the two memory peaks do not add up.
    stages = _kibibytes(resource.RUSAGE_SELF) + _kibibytes(resource.RUSAGE_CHILDREN)
    print("measuring base, SFT and policy on held-out prompts …", flush=True)
    figures, samples = _measure(settings, inputs, plan, manifest)
    summary = Summary(
        base=figures["base"],
        sft=figures["sft"],
        policy=figures["policy"],
        preference={"pair_accuracy": manifest["stages"]["preference"]["metrics"].get("val/accuracy")},
        seconds=max(round(time.time() - started, 1), _earlier(settings.root)),
        peak_memory_gb=round(max(stages, _kibibytes(resource.RUSAGE_SELF)) * 1024 / 1e9, 2),
        samples=samples,
    )
    write_json(settings.root / "summary.json", {"format": FORMAT, "seed": settings.seed, **summary})
    write_report(settings.root)
    return summary


def _earlier(root: Path) -> float:
    """Seconds of the first complete run. A second run in the same folder finds its stages finished."""
    path = root / "summary.json"
    return records.read_record(path, Summary).get("seconds", 0.0)


def _move_other_aside(settings: QuickstartSettings) -> None:
    """Rename the folder of a run with another seed, model or files; it is never deleted."""
    files = {name: getattr(settings, name) for name in ("sft", "preferences", "prompts")}
    asked = {
        "format": FORMAT,
        "seed": settings.seed,
        "model": settings.model,
        "overrides": settings.overrides,
        **{name: fingerprint(file) for name, file in files.items()},
        **{path.name: fingerprint(path) for path in sorted(CONFIGS.glob("*.yaml"))},
    }
    path = settings.root / "quickstart.json"
    if is_file(path) and {"format": FORMAT, **read_record(path)} != asked:
        free = next(n for n in itertools.count(1) if not settings.root.with_name(f"{settings.root.name}.{n}").exists())
        aside = settings.root.with_name(f"{settings.root.name}.{free}")
        settings.root.rename(aside)
        print(f"{settings.root} contained a quickstart with other settings, which was moved to {aside}", flush=True)
    write_json(path, asked)


def _inputs(settings: QuickstartSettings) -> dict[str, str]:
    """Paths of all files, and the base model. Files that the user does not give are generated, always identically."""
    paths = write_data(settings.root / "data", settings.seed, settings.sizes)
    for name, file in (("sft", settings.sft), ("preference", settings.preferences), ("prompts", settings.prompts)):
        if file:
            paths |= _split(settings, name, file)
    base = settings.root / "base"
    if not settings.model and not (base / "config.json").exists():
        maker = [sys.executable, "-m", "rlhf_lightning.quickstart.model"]
        subprocess.run([*maker, str(base), paths["sft_train"], str(settings.seed)], check=True)
    return {**paths, "base": settings.model or str(base)}


def _split(settings: QuickstartSettings, name: str, file: str) -> dict[str, str]:
    """Split a user's file into training rows and a held-out tenth of at most 240 rows.

    Rows of one prompt stay together.
    """
    from rlhf_lightning.data.check import MODULES
    from rlhf_lightning.data.records import RowError, read_rows, rename_columns
    from rlhf_lightning.data.splits import held_out, row_key, together

    module, keyed = MODULES[name](), []
    for row in read_rows(file, module.text_key, split="train"):
        try:
            data = rename_columns(row, None).data
            keyed.append((data, module.key(data)))
        except RowError:  # the stage reports bad rows
            keyed.append((row.data, row_key(row.data, None)))
    random.Random(settings.seed).shuffle(keyed)
    wanted = min(240, max(1, len(keyed) // 10))
    held = set(held_out(together([key for _, key in keyed]), wanted, None) or range(wanted))
    rows = {"validation": [data for i, (data, _) in enumerate(keyed) if i in held]}
    rows["train"] = [data for i, (data, _) in enumerate(keyed) if i not in held] or rows["validation"]
    paths = {}
    for part, items in rows.items():
        path = settings.root / "data" / f"{name}_{part}.jsonl"
        text = "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
        path.write_text(text, encoding="utf-8")
        paths[f"{name}_{part}"] = str(path)
    return paths


def _plan(settings: QuickstartSettings, inputs: dict[str, str]) -> dict[str, JSON]:
    files = {"sft": "sft", "preference": "preference", "policy": "prompts"}
    stages: list[JSON] = []
    for kind in ("sft", "preference", "policy"):
        overrides: dict[str, JSON] = {
            "data.train": inputs[f"{files[kind]}_train"],
            "data.validation": inputs[f"{files[kind]}_validation"],
            **(OWN_MODEL[kind] if settings.model else {}),
            **(settings.overrides or {}).get(kind, {}),
        }
        start = inputs["base"] if kind == "sft" else "sft"
        stage = {"kind": kind, "config": str(CONFIGS / f"{kind}.yaml"), "overrides": overrides, "start": start}
        stages.append({**stage, **({"reward": "preference"} if kind == "policy" else {})})
    return {"name": "quickstart", "seed": settings.seed, "stages": stages}


def _measure(
    settings: QuickstartSettings, inputs: dict[str, str], plan: Plan, manifest: Manifest
) -> tuple[dict[str, dict[str, float | None]], list[AnswerPair]]:
    """Figures of the base, SFT and RL models by name, and some answers."""
    from rlhf_lightning.inference.policy import Policy
    from rlhf_lightning.models.reward_model import RewardModel
    from rlhf_lightning.quickstart.evaluate import figures

    folders = {"base": inputs["base"]}
    folders |= {name: manifest["stages"][name]["model"] for name in ("sft", "policy")}
    judge = RewardModel(manifest["stages"]["preference"]["model"])
    gold = None if settings.prompts else _gold
    limit, sampler = settings.sizes.held_out, section(section(plan.stages[-1].settings, "model"), "sampler")
    max_tokens = sampler["max_tokens"]
    assert isinstance(max_tokens, int)
    found: dict[str, dict[str, float | None]] = {}
    answers: dict[str, list[str]] = {}
    start: Policy | None = None
    for name, folder in folders.items():
        policy = Policy(folder)
        prompts = policy.prompts(inputs["prompts_validation"], limit)
        episodes = policy.answer(prompts, max_tokens, settings.seed)
        kl = None
        if name != "base":
            start = start or policy
            kl = policy.kl(start, episodes)
        found[name] = figures(episodes, judge, kl, gold)
        answers[name] = [episode.response for episode in episodes]
        if name != "policy":
            nll = policy.nll(policy.conversations(inputs["sft_validation"], limit))
            found["sft" if name == "sft" else "base"]["val_nll"] = nll
    found["sft"]["val_nll_start"] = found["base"].pop("val_nll")
    shown: list[AnswerPair] = [
        {"prompt": prompts[i].messages[-1]["content"] or "", "sft": answers["sft"][i], "policy": answers["policy"][i]}
        for i in range(min(3, len(prompts)))
    ]
    return found, shown


def _gold(answer: str, row: Row) -> float:
    return rubric(answer, str(row["subject"]), str(row["material"]))


def _kibibytes(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
