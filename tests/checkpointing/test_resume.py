"""Whatever interrupts a run, the same command ends with the weights, metrics and samples of one that was not."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch.utilities import rank_zero_only

import rlhf_lightning.cli.stage  # before forking: a run then starts at once
from rlhf_lightning.checkpointing.provenance import processor, versions
from rlhf_lightning.files import hash_folder, write_json
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.modules.sft import SFTModule
from tests.cli.test_commands import stage_config, write_yaml
from tests.conftest import chats, pairs, prompts, write_rows
from tests.helpers.runs import Run, complete, fork_stages, members

MODULES = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}
ROWS = {"sft": chats, "preference": pairs, "policy": prompts}
FILES = ("metrics.csv", "samples.jsonl", "warnings.jsonl")
assert rlhf_lightning.cli.stage


class Setting(NamedTuple):
    """What is interrupted; a pipeline has the three modules, one after another."""

    kind: str
    devices: int = 1
    length: str = "max_epochs"
    accumulate: int = 2

    def __str__(self) -> str:
        ranks = "1 device" if self.devices == 1 else f"{self.devices} ranks (DDP, gloo)"
        return f"{self.kind}, {ranks}, {self.length} alone, accumulation {self.accumulate}"

    @property
    def stages(self) -> list[str]:
        """The modules that are trained, in order."""
        return list(MODULES) if self.kind == "pipeline" else [self.kind]

    @property
    def flag(self) -> str:
        """The flag of the command for the folder of the results."""
        return "--root" if self.kind == "pipeline" else "--trainer.default_root_dir"


LIMIT = 600
"""Seconds that one run may take; on a machine that is left alone it is a tenth of a minute."""
STEPS = {1: 20, 2: 10}
"""The optimizer steps of `max_steps` by accumulation: they end within an epoch, most of them within the third."""
ALONE = [Setting(*each) for each in product(MODULES, (1, 2), ("max_epochs", "max_steps"), (1, 2))]
PIPELINES = [
    Setting("pipeline", devices, length, accumulate)
    for devices, length, accumulate in [
        (1, "max_epochs", 2),
        (1, "max_steps", 1),
        (2, "max_epochs", 1),
        (2, "max_steps", 2),
    ]
]


def config(
    kind: str, base: str, folder: Path, devices: int = 1, length: str = "max_epochs", accumulate: int = 2
) -> list[str]:
    """A command with all that a kill may fall into: micro-batches, validations within epochs, rounds, checkpoints."""
    settings = stage_config(kind, base, folder)
    settings["data"]["validation"] = write_rows(folder / f"{kind}-held.jsonl", ROWS[kind](5))
    settings["data"]["train"] = write_rows(folder / f"{kind}-train.jsonl", ROWS[kind](14))
    run = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "val_check_interval": 0.5}
    settings["trainer"] |= {**run, "max_epochs": 3, "enable_progress_bar": False}
    if length == "max_steps":
        del settings["trainer"]["max_epochs"]
        settings["trainer"]["max_steps"] = STEPS[accumulate]

    settings["model"]["lr_scheduler"] = {"class_path": "rlhf_lightning.modules.schedules.Warmup"}
    if kind == "policy":
        settings["data"] |= {"minibatches": 4}
        rule = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
        settings["model"]["rewards"] = [{**rule, "init_args": {"keywords": ["a", "e"], "min_words": 1}}]
        settings["model"]["kl"] = {"coefficient": 0.05}
    else:
        settings["data"]["batch_size"] = 2
    if devices > 1:
        settings["trainer"] |= {"devices": devices, "strategy": "ddp_fork"}
    return [kind, "fit", "-c", write_yaml(folder / f"{kind}.yaml", settings), "--checkpoint_every", "2"]


def command_of(setting: Setting, base: str, folder: Path) -> list[str]:
    """The command of a setting, but for its flag for the folder of the results."""
    if setting.kind != "pipeline":
        return config(setting.kind, base, folder, *setting[1:])
    files = {kind: config(kind, base, folder, *setting[1:])[3] for kind in MODULES}
    often = {"overrides": {"checkpoint_every": 2}}
    stages = [
        {"kind": "sft", "config": files["sft"], **often},
        {"kind": "preference", "config": files["preference"], "start": "sft", **often},
        {"kind": "policy", "config": files["policy"], "start": "sft", "reward": "preference", **often},
    ]
    return ["pipeline", write_yaml(folder / "plan.yaml", {"stages": stages})]


def result(folder: Path) -> dict[str, Any]:
    """What must be equal, byte for byte."""
    facts = json.loads((folder / "stage.json").read_text())
    files = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES}
    return {"model": hash_folder(folder / "model"), "steps": facts["steps"], "metrics": facts["metrics"], **files}


def results(setting: Setting, root: Path) -> dict[str, Any]:
    """`result` of all stages of a setting."""
    if setting.kind != "pipeline":
        return result(root)
    found = {kind: result(root / kind) for kind in MODULES}
    return {f"{name} of {kind}": value for kind, values in found.items() for name, value in values.items()}


# -- moments ----------------------------------------------------------------------------------------------------------


def places(kind: str) -> dict[str, tuple[Any, str]]:
    """Where a run can be interrupted, by name: the functions that it is in."""
    from lightning.pytorch.callbacks import Callback

    from rlhf_lightning.checkpointing import callbacks as checkpoints
    from rlhf_lightning.checkpointing import io as checkpoint_io
    from rlhf_lightning.checkpointing import metrics_csv
    from rlhf_lightning.sampling.local_engine import LocalEngine

    assert Callback
    return {
        "training": (MODULES[kind], "training_step"),
        "validation": (MODULES[kind], "validation_step"),
        "writing a checkpoint": (checkpoint_io._Stream, "write"),
        "a checkpoint's end": (checkpoints.RunCheckpoints, "_save"),
        "logging": (metrics_csv.MetricsCSV, "log_metrics"),
        **({"sampling": (LocalEngine, "generate")} if kind == "policy" else {}),
    }


def at(
    kind: str, place: str, number: int, after: bool, act: Callable[[], Any], rank: int | None = None
) -> Callable[[], None]:
    """For `Run(before=…)`: `act` before or after the `number`th call of a place, in one rank if that is given."""

    def install() -> None:
        owner, name = places(kind)[place]
        original, calls = getattr(owner, name), Counter[str]()

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += 1
            mine = calls["n"] == number and rank in (None, rank_zero_only.rank)
            if mine and not after:
                act()
            value = original(*args, **kwargs)
            if mine and after:
                act()
            return value

        setattr(owner, name, counted)

    return install


def within(setting: Setting, installs: dict[str, Callable[[], None]]) -> Callable[[], None]:
    """For `Run(before=…)`: install something in the process of a stage, by kind; a pipeline's are forked."""

    def install() -> None:
        if sys.argv[1] in installs:
            installs[sys.argv[1]]()

    return (lambda: fork_stages(pytest.MonkeyPatch(), install)) if setting.kind == "pipeline" else install


def counting(kind: str, folder: Path) -> Callable[[], None]:
    """For `Run(before=…)`: writes how often each rank called each place, a file for each rank."""

    def install() -> None:
        calls: Counter[str] = Counter()

        def count(place: str, owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                calls[place] += 1
                (folder / f"{kind}-{rank_zero_only.rank}.json").write_text(json.dumps(calls))
                return original(*args, **kwargs)

            setattr(owner, name, counted)

        for place, (owner, name) in places(kind).items():
            count(place, owner, name)

    return install


def killed() -> None:
    """As by kill -9, with all processes of the run."""
    os.killpg(0, signal.SIGKILL)


def strike(number: int, target: str) -> None:
    """A signal from within a run: to this process, its stage, the first process, or all of the command's."""
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
    """Whom a signal may reach."""
    stage = ["the stage"] if setting.kind == "pipeline" else []
    first = ["the first process"] if setting.kind == "pipeline" or setting.devices > 1 else []
    return ["all", *stage, *first, *(f"rank {rank}" for rank in range(setting.devices) if setting.devices > 1)]


class Moment(NamedTuple):
    """When a run is interrupted: its name, what to install (`Run(before=…)`), and the exit codes that may follow."""

    name: str
    install: Callable[[], None]
    codes: tuple[int, ...]


def moment(setting: Setting, seen: dict[str, Any], draw: random.Random, number: int, resumed: int) -> Moment:
    """A sampled moment of a run that was resumed so many times before, and so has fewer calls left."""
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

        # Before its first line and after its last, a command has no handler for SIGTERM.
        return Moment(f"{name} to {target}: {seconds:.2f} s", start, (*codes, -number))
    kind = draw.choice(setting.stages)
    rank = int(target[-1]) if target.startswith("rank") else 0
    calls = seen["calls"][kind, rank]
    place, after = draw.choice(sorted(calls)), draw.random() < 0.5
    call = draw.randint(1, max(1, calls[place] // (resumed + 1)))
    install = within(setting, {kind: at(kind, place, call, after, act, rank)})
    return Moment(f"{name} to {target}: {kind}, {place} {call} {'after' if after else 'before'}", install, codes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Callable[..., Any]:
    """The command of a setting, its uninterrupted result, and what was called in it; made once."""
    from tests.conftest import build_model

    made: dict[Setting, Any] = {}

    def make(*of: Any) -> Any:
        setting = Setting(*of)
        if setting not in made:
            folder = tmp_path_factory.mktemp(setting.kind)
            build_model(session_tokenizer).save_pretrained(folder / "base")
            session_tokenizer.save_pretrained(folder / "base")
            args = command_of(setting, str(folder / "base"), folder)
            complete(
                [*args, setting.flag, str(folder / "whole")],
                folder / "whole.txt",
                before=within(setting, {}),
                limit=LIMIT,
            )
            count = within(setting, {kind: counting(kind, folder) for kind in setting.stages})
            begun = time.monotonic()
            complete([*args, setting.flag, str(folder / "counted")], folder / "counted.txt", before=count, limit=LIMIT)
            seconds = time.monotonic() - begun
            expected = results(setting, folder / "whole")
            assert results(setting, folder / "counted") == expected
            ranks = product(setting.stages, range(setting.devices))
            calls = {(kind, rank): json.loads((folder / f"{kind}-{rank}.json").read_text()) for kind, rank in ranks}
            made[setting] = args, expected, {"calls": calls, "seconds": seconds}
        return made[setting]

    return make


def record(setting: Setting, seed: str, moments: list[str], equal: bool) -> None:
    """With RLHF_KILLS_REPORT set to a path: note a point there, and count points and interruptions."""
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
    """How many points there are, how many are equal, and the interruptions that fell into a run, by signal."""
    each = [point for some in points for point in some.values()]
    fell = [one for point in each for one in point["interrupted"] if not one.endswith("had ended")]
    struck = {kind: sum(one.startswith(kind) for one in fell) for kind in ("kill -9", "SIGTERM")}
    return {"points": len(each), "equal": sum(point["equal"] for point in each), "interruptions": struck}


def interrupted_as_whole(setting: Setting, number: int, seed: int, whole: Any, folder: Path) -> None:
    """Interrupt a run one to three times, first by the signal `number`, and compare its end with the whole one's."""
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
    ],
    ids=str,
)
def test_an_interrupted_run_ends_as_a_whole_one(
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
def test_killed_after_its_last_checkpoint_it_ends_as_a_whole_one(setting: Setting, whole: Any, tmp_path: Path) -> None:
    """No step is left to take: what the end of the epoch that `max_steps` cuts off logs must be there by then."""
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
def test_killed_after_a_callback_has_stopped_it_it_does_not_go_on(kind: str, base: str, tmp_path: Path) -> None:
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
@pytest.mark.parametrize("setting", [*ALONE, *PIPELINES], ids=str)
def test_interrupted_anywhere_it_ends_as_a_whole_one(setting: Setting, number: int, whole: Any, tmp_path: Path) -> None:
    for seed in range(1, 4 if number == KILL else 2):
        interrupted_as_whole(setting, number, seed, whole, tmp_path)
