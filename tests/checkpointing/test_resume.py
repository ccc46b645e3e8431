"""A run that is interrupted and resumed has the same weights, metrics and samples as an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_lightning.checkpointing.provenance import processor, versions
from rlhf_lightning.files import write_json
from tests.helpers.cli import write_yaml
from tests.helpers.resume import (
    LIMIT,
    MODULES,
    Setting,
    at,
    config,
    counting,
    killed,
    result,
    results,
    within,
)
from tests.helpers.runs import Run, complete, members

pytestmark = pytest.mark.usefixtures("every_comparison")

ALONE = [Setting(*each) for each in product(MODULES, (1, 2), ("max_epochs", "max_steps"), (1, 2))]
STREAMED = [
    Setting(kind, devices, length, 2, streamed=True)
    for kind, (devices, length) in product(MODULES, [(1, "max_epochs"), (2, "max_steps")])
]
PIPELINES = [
    Setting("pipeline", devices, length, accumulate)
    for devices, length, accumulate in [
        (1, "max_epochs", 2),
        (1, "max_steps", 1),
        (2, "max_epochs", 1),
        (2, "max_steps", 2),
    ]
]


# -- moments ----------------------------------------------------------------------------------------------------------


def strike(number: int, target: str) -> None:
    """Send a signal from within a run to this process, its stage, the first process, or all of the command's."""
    if target == "the first process":
        os.kill(os.getsid(0), number)
    elif target == "the stage":
        os.killpg(0, number)
    elif target == "all":
        own = os.getpgrp()
        for group in sorted({group for _, group in members(os.getsid(0))}, key=lambda group: group == own):
            os.killpg(group, number)
    else:
        os.kill(os.getpid(), number)


def targets(setting: Setting) -> list[str]:
    """The processes that a signal may reach."""
    stage = ["the stage"] if setting.kind == "pipeline" else []
    first = ["the first process"] if setting.kind == "pipeline" or setting.devices > 1 else []
    return ["all", *stage, *first, *(f"rank {rank}" for rank in range(setting.devices) if setting.devices > 1)]


class Moment(NamedTuple):
    """When a run is interrupted: its name, what to install (`Run(before=…)`), and the possible exit codes."""

    name: str
    install: Callable[[], None]
    codes: tuple[int, ...]


def moment(setting: Setting, seen: dict[str, Any], draw: random.Random, number: int, resumed: int) -> Moment:
    """A random moment of a run that was resumed several times before, and so has fewer calls left."""
    target = draw.choice(targets(setting))
    name = "kill -9" if number == signal.SIGKILL else "SIGTERM"
    alone = target in ("all", "the first process")
    codes = (0, 130 if number == signal.SIGTERM else -signal.SIGKILL if alone else 2)
    act = partial(strike, number, target)
    if alone and draw.random() < 0.3:
        seconds = draw.uniform(0, seen["seconds"])

        def start() -> None:
            within(setting, {})()
            timer = threading.Timer(seconds, act)
            timer.daemon = True
            timer.start()

        # At its very beginning and end, a command has no handler for SIGTERM.
        return Moment(f"{name} to {target}: {seconds:.2f} s", start, (*codes, -number))
    kind = draw.choice(setting.stages)
    rank = int(target[-1]) if target.startswith("rank") else 0
    calls = seen["calls"][kind, rank]
    place, after = draw.choice(sorted(calls)), draw.random() < 0.5
    call = draw.randint(1, max(1, calls[place] // (resumed + 1)))
    install = within(setting, {kind: at(kind, place, call, after, act, rank)})
    return Moment(f"{name} to {target}: {kind}, {place} {call} {'after' if after else 'before'}", install, codes)


def record(setting: Setting, seed: str, moments: list[str], equal: bool) -> None:
    """If RLHF_KILLS_REPORT is set to a path, record a point there, and count points and interruptions."""
    if not (path := os.environ.get("RLHF_KILLS_REPORT")):
        return
    file = Path(path)
    report = json.loads(file.read_text()) if file.exists() else {"settings": {}}
    points = report["settings"].setdefault(str(setting), {}).setdefault("where", {})
    points[seed] = {"interrupted": moments, "equal": equal}
    every = [entry["where"] for entry in report["settings"].values()]
    for entry in report["settings"].values():
        entry |= {**counted([entry["where"]]), "where": entry.pop("where")}
    machine = {"processor": processor(), "cores": os.cpu_count(), "versions": versions()}
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    write_json(file, {"date": date, **machine, "total": counted(every), "settings": report["settings"]})


def counted(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of points, how many are equal, and the interruptions that hit a run, by signal."""
    each = [point for some in points for point in some.values()]
    fell = [one for point in each for one in point["interrupted"] if not one.endswith("had ended")]
    struck = {kind: sum(one.startswith(kind) for one in fell) for kind in ("kill -9", "SIGTERM")}
    return {"points": len(each), "equal": sum(point["equal"] for point in each), "interruptions": struck}


def interrupted_as_whole(setting: Setting, number: int, seed: int, whole: Any, folder: Path) -> None:
    """Interrupt a run one to three times, first by the signal `number`, and compare its result with the whole run's."""
    args, expected, seen = whole(*setting)
    name = "kill -9" if number == signal.SIGKILL else "SIGTERM"
    draw = random.Random(f"{setting} {name} {seed}")
    root, output = folder / f"run{seed}", folder / f"{seed}.txt"
    command = [*args, setting.flag, str(root)]
    moments = []
    for resumed in range(draw.choice([1, 2, 3])):
        by = draw.choice([number, signal.SIGKILL]) if resumed else number
        one = moment(setting, seen, draw, by, resumed)
        run = Run(command, output, one.install)
        code = run.wait(LIMIT)
        run.gone()
        assert code in one.codes, f"{setting} {name} {seed} ({one.name}): {code}\n{run.text}"
        moments.append(f"{one.name}: {f'exit code {code}' if code else 'had ended'}")
    complete(command, output, before=within(setting, {}), limit=LIMIT)
    found = results(setting, root)
    record(setting, f"{name} {seed}", moments, found == expected)
    differing = [key for key in found if found[key] != expected[key]]
    assert not differing, f"{setting} {name} {seed} {moments}: {differing}"
    shutil.rmtree(root)


KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize(
    ("setting", "number", "seed"),
    [
        (Setting("sft"), KILL, 0),
        (Setting("preference", 1, "max_steps", 1), KILL, 0),
        (Setting("policy", 1, "max_steps", 2), KILL, 0),
        (Setting("sft", 2, "max_steps", 2), KILL, 0),
        (Setting("sft", 2, "max_steps", 2, streamed=True), KILL, 0),
    ],
    ids=str,
)
def test_interrupted_run_equals_uninterrupted_run(
    setting: Setting, number: int, seed: int, whole: Any, tmp_path: Path
) -> None:
    interrupted_as_whole(setting, number, seed, whole, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        Setting("sft", 1, "max_steps", 1),
        *(pytest.param(Setting(kind, 1, "max_steps", 2), marks=pytest.mark.slow) for kind in MODULES),
    ],
    ids=str,
)
def test_run_killed_after_its_last_checkpoint_equals_uninterrupted_run(
    setting: Setting, whole: Any, tmp_path: Path
) -> None:
    """No step is left, so the checkpoint must contain the values that are logged at the end of the epoch."""
    args, expected, seen = whole(*setting)
    command = [*args, setting.flag, str(tmp_path / "run")]
    last = seen["calls"][setting.kind, 0]["a checkpoint's end"]
    run = Run(command, tmp_path / "out.txt", at(setting.kind, "a checkpoint's end", last, True, killed))
    assert run.wait() == -signal.SIGKILL, run.text
    complete(command, tmp_path / "out.txt")
    assert results(setting, tmp_path / "run") == expected


STOPS = {
    "sft": {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/nll", "stopping_threshold": 100.0},
    },
    "policy": {
        "class_path": "rlhf_lightning.diagnostics.collapse.StopOnCollapse",
        "init_args": {"kl_limit": 1e-4, "patience": 1},
    },
}


@pytest.mark.parametrize("kind", ["sft", pytest.param("policy", marks=pytest.mark.slow)])
def test_run_killed_after_early_stopping_does_not_continue(kind: str, base: str, tmp_path: Path) -> None:
    further = write_yaml(tmp_path / "further.yaml", {"trainer": {"callbacks": [STOPS[kind]]}})
    args = [*config(kind, base, tmp_path, accumulate=1), "-c", further, "--checkpoint_every", "1"]
    args += ["--trainer.default_root_dir"]
    complete([*args, str(tmp_path / "whole")], tmp_path / "whole.txt", before=counting(kind, tmp_path))
    calls = json.loads((tmp_path / f"{kind}-0.json").read_text())
    command = [*args, str(tmp_path / "run")]
    install = at(kind, "a checkpoint's end", calls["a checkpoint's end"], True, killed)
    run = Run(command, tmp_path / "out.txt", install)
    assert run.wait() == -signal.SIGKILL, run.text
    complete(command, tmp_path / "out.txt")
    whole = result(tmp_path / "whole")
    assert 0 < whole["steps"] < {"sft": 21, "policy": 48}[kind], "it was to stop early"
    assert result(tmp_path / "run") == whole
    facts = [json.loads((tmp_path / name / "stage.json").read_text()).get("stopped") for name in ("run", "whole")]
    assert facts[0] == facts[1]
    assert (kind == "policy") == bool(facts[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [KILL, TERM], ids=["kill -9", "SIGTERM"])
@pytest.mark.parametrize("setting", [*ALONE, *STREAMED, *PIPELINES], ids=str)
def test_run_interrupted_at_random_equals_uninterrupted_run(
    setting: Setting, number: int, whole: Any, tmp_path: Path
) -> None:
    for seed in range(1, 4 if number == KILL else 2):
        interrupted_as_whole(setting, number, seed, whole, tmp_path)
