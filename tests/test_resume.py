"""Whatever interrupts a run, the same command ends with the weights, metrics and samples of one that was not."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlhf_lightning.cli.stage  # before forking: a run then starts at once
from rlhf_lightning.callbacks.environment import versions
from rlhf_lightning.files import write_json
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.modules.sft import SFTModule
from tests.conftest import chats, pairs, prompts, write_rows
from tests.runs import Run, complete
from tests.test_cli import stage_config, write_yaml

MODULES = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}
ROWS = {"sft": chats, "preference": pairs, "policy": prompts}
FILES = ("metrics.csv", "samples.jsonl", "warnings.jsonl")
assert rlhf_lightning.cli.stage


def config(kind: str, base: str, folder: Path, devices: int = 1) -> list[str]:
    """A command with all that a kill may fall into: micro-batches, validations within epochs, rounds, checkpoints."""
    settings = stage_config(kind, base, folder)
    settings["data"]["validation"] = write_rows(folder / f"{kind}-held.jsonl", ROWS[kind](5))
    settings["data"]["train"] = write_rows(folder / f"{kind}-train.jsonl", ROWS[kind](14))
    run = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "val_check_interval": 0.5}
    settings["trainer"] |= {**run, "enable_progress_bar": False}

    settings["model"]["lr_scheduler"] = {"class_path": "rlhf_lightning.modules.schedules.Warmup"}
    if kind == "policy":
        settings["data"] |= {"minibatches": 4}
        rule = {"class_path": "rlhf_lightning.rollout.rewards.KeywordReward"}
        settings["model"]["rewards"] = [{**rule, "init_args": {"keywords": ["a", "e"], "min_words": 1}}]
        settings["model"]["kl"] = {"coefficient": 0.05}
    else:
        settings["data"]["batch_size"] = 2
    if devices > 1:
        settings["trainer"] |= {"devices": devices, "strategy": "ddp_fork"}
    return [kind, "fit", "-c", write_yaml(folder / f"{kind}.yaml", settings), "--checkpoint_every", "2"]


def result(folder: Path) -> dict[str, Any]:
    """What must be equal, byte for byte."""
    facts = json.loads((folder / "stage.json").read_text())
    files = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES}
    return {"model": facts["model_hash"], "steps": facts["steps"], "metrics": facts["metrics"], **files}


# -- moments ----------------------------------------------------------------------------------------------------------


def places(kind: str) -> dict[str, tuple[Any, str]]:
    """Where a run can be interrupted, by name: the functions that it is in."""
    from lightning.pytorch.callbacks import Callback

    from rlhf_lightning.callbacks import checkpoint_io, checkpoints, metrics_csv
    from rlhf_lightning.rollout.engine import LocalEngine

    assert Callback
    return {
        "training": (MODULES[kind], "training_step"),
        "validation": (MODULES[kind], "validation_step"),
        "writing a checkpoint": (checkpoint_io._Stream, "write"),
        "a checkpoint's end": (checkpoints.RunCheckpoints, "_save"),
        "logging": (metrics_csv.MetricsCSV, "log_metrics"),
        **({"sampling": (LocalEngine, "generate")} if kind == "policy" else {}),
    }


def at(kind: str, place: str, number: int, after: bool, act: Callable[[], Any]) -> Callable[[], None]:
    """For `Run(before=…)`: `act` before or after the `number`th call of a place."""

    def install() -> None:
        owner, name = places(kind)[place]
        original, calls = getattr(owner, name), Counter[str]()

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += 1
            mine = calls["n"] == number
            if mine and not after:
                act()
            value = original(*args, **kwargs)
            if mine and after:
                act()
            return value

        setattr(owner, name, counted)

    return install


def counting(kind: str, file: Path) -> Callable[[], None]:
    """For `Run(before=…)`: writes how often each place was called, and how long training took."""

    def install() -> None:
        calls: Counter[str] = Counter()
        begun: list[float] = []

        def count(place: str, owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                calls[place] += 1
                begun.append(begun[0] if begun else time.monotonic())
                value = original(*args, **kwargs)
                file.write_text(json.dumps({"calls": calls, "seconds": time.monotonic() - begun[0]}))
                return value

            setattr(owner, name, counted)

        for place, (owner, name) in places(kind).items():
            count(place, owner, name)

    return install


def killed() -> None:
    """As by kill -9, with all processes of the run."""
    os.killpg(0, signal.SIGKILL)


def later(kind: str, seconds: float) -> Callable[[], None]:
    """For `Run(before=…)`: killed so many seconds after training began."""
    return at(kind, "training", 1, False, lambda: threading.Timer(seconds, killed).start())


def moments(kind: str, seen: dict[str, Any], seed: int) -> list[tuple[str, Callable[[], None]]]:
    """One or two seeded moments at which a run is killed, the second in the run that resumes it."""
    draw = random.Random(f"{kind} {seed}")
    found = []
    for _ in range(draw.choice([1, 2])):
        if draw.random() < 0.3:
            seconds = draw.uniform(0, seen["seconds"])
            found.append((f"{seconds:.2f} s", later(kind, seconds)))
        else:
            place = draw.choice(sorted(seen["calls"]))
            number, after = draw.randint(1, seen["calls"][place]), draw.random() < 0.5
            found.append((f"{place} {number} {'after' if after else 'before'}", at(kind, place, number, after, killed)))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Callable[[str, int], Any]:
    """The command of a kind, its uninterrupted result, and what was called in it; made once."""
    from tests.conftest import build_model

    made: dict[Any, Any] = {}

    def make(kind: str, devices: int = 1) -> Any:
        if (kind, devices) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}{devices}")
            build_model(session_tokenizer).save_pretrained(folder / "base")
            session_tokenizer.save_pretrained(folder / "base")
            args = config(kind, str(folder / "base"), folder, devices)
            root = folder / "whole"
            complete([*args, "--trainer.default_root_dir", str(root)], folder / "whole.txt")
            count = [*args, "--trainer.default_root_dir", str(folder / "counted")]
            complete(count, folder / "counted.txt", before=counting(kind, folder / "calls.json"))
            assert result(folder / "counted") == result(root)
            made[kind, devices] = args, result(root), json.loads((folder / "calls.json").read_text())
        return made[kind, devices]

    return make


def record(kind: str, devices: int, seed: int, moments: list[str], equal: bool) -> None:
    """With RLHF_KILLS_REPORT set to a path: note a point there, and count the points of each module."""
    if not (path := os.environ.get("RLHF_KILLS_REPORT")):
        return
    file = Path(path)
    report = json.loads(file.read_text()) if file.exists() else {"cores": os.cpu_count(), "versions": versions()}
    entry = report.setdefault(f"{kind}, {'single device' if devices == 1 else f'DDP, {devices} processes'}", {})
    points = {**entry.get("where", {}), str(seed): {"killed": moments, "equal": equal}}
    points = dict(sorted(points.items(), key=lambda item: int(item[0])))
    equals = sum(point["equal"] for point in points.values())
    killed = sum(any(moment.endswith(": killed") for moment in point["killed"]) for point in points.values())
    entry |= {"points": len(points), "killed": killed, "equal": equals, "where": points}
    write_json(file, report)


def interrupted_as_whole(kind: str, seed: int, whole: Any, folder: Path, devices: int = 1) -> None:
    args, expected, seen = whole(kind, devices)
    root = folder / f"run{seed}"
    command = [*args, "--trainer.default_root_dir", str(root)]
    names = []
    for name, install in moments(kind, seen, seed):
        run = Run(command, folder / f"{seed}.txt", install)
        code = run.wait()
        assert code in (0, -signal.SIGKILL), run.text
        names.append(f"{name}: {'killed' if code else 'had ended'}")
    complete(command, folder / f"{seed}.txt")
    found = result(root)
    record(kind, devices, seed, names, found == expected)
    assert found == expected, f"{kind} {seed} ({names}): {[key for key in found if found[key] != expected[key]]}"
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize("seed", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_a_whole_one(kind: str, seed: int, whole: Any, tmp_path: Path) -> None:
    interrupted_as_whole(kind, seed, whole, tmp_path)


@pytest.mark.parametrize(("kind", "seed"), [("sft", 203), ("policy", 205)])
def test_two_killed_processes_end_as_whole_ones(kind: str, seed: int, whole: Any, tmp_path: Path) -> None:
    interrupted_as_whole(kind, seed, whole, tmp_path, devices=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", list(MODULES))
def test_a_run_killed_anywhere_ends_as_a_whole_one(kind: str, whole: Any, tmp_path: Path) -> None:
    for seed in range(100, 120):
        interrupted_as_whole(kind, seed, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", list(MODULES))
def test_two_processes_killed_anywhere_end_as_whole_ones(kind: str, whole: Any, tmp_path: Path) -> None:
    for seed in range(200, 210):
        interrupted_as_whole(kind, seed, whole, tmp_path, devices=2)
