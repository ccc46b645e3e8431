"""External faults: signals, damaged files, full disks, NaN, rewards that raise, processes that die."""

import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.checkpointing.io import AtomicCheckpointIO, DamagedCheckpoint, damage, newest_whole
from rlhf_lightning.checkpointing.nonfinite import NonFiniteError, NonFiniteGuard
from rlhf_lightning.checkpointing.provenance import environment
from rlhf_lightning.data.batching import RowLoader, ShardSpec
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.modules.sft import SFTModule
from tests.helpers.resume import at, config, killed, result
from tests.helpers.rows import chats, write_rows
from tests.helpers.runs import Run, complete
from tests.helpers.training import sgd, trainer

pytestmark = pytest.mark.usefixtures("every_comparison")

# -- checkpoint files -------------------------------------------------------------------------------------------------


def test_damage_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    io = AtomicCheckpointIO()
    state = {"state_dict": {"weights": torch.arange(3000.0)}, "pytorch-lightning_version": "2.6.6"}
    io.save_checkpoint(state, path)
    assert damage(path) is None
    assert torch.equal(
        io.load_checkpoint(path, weights_only=True)["state_dict"]["weights"], state["state_dict"]["weights"]
    )
    assert list(tmp_path.iterdir()) == [path]
    good = path.read_bytes()
    middle = good.index(state["state_dict"]["weights"].numpy().tobytes()) + 5000
    for bad in (
        b"",
        good[:10],
        good[: len(good) // 2],
        good[:-1],
        good[:-300] + bytes(300),
        good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        good[:middle] + bytes(4096) + good[middle + 4096 :],
    ):
        path.write_bytes(bad)
        assert damage(path), len(bad)
        with pytest.raises(DamagedCheckpoint, match=r"step=1\.ckpt: the checkpoint is damaged"):
            io.load_checkpoint(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(kind: str, tmp_path: Path) -> None:
    """Resuming from an earlier one would remove it."""
    path = tmp_path / "step=1.ckpt"
    if kind == "file":
        torch.save({"step": 1}, path)
    else:
        path.mkdir()
        (path / "shard.distcp").write_bytes(b"weights")
        (path / "checksums.json").write_text("{}")
    assert damage(path) is None
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as free:
        lowest = free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))  # no further file can be opened
    try:
        with pytest.raises(UserError, match=r"step=1\.ckpt.* cannot be read .*\(Too many open files\)"):
            damage(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    assert damage(path) is None


def test_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        torch.save({"step": step}, tmp_path / f"step={step}.ckpt")
    assert newest_whole(tmp_path) == (tmp_path / "step=10.ckpt", [])
    (tmp_path / "step=10.ckpt").write_bytes(b"half")
    path, wrong = newest_whole(tmp_path)
    assert path == tmp_path / "step=9.ckpt"
    assert len(wrong) == 1
    assert "step=10.ckpt is damaged" in wrong[0]
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_number_of_kept_checkpoints_and_interval(base: str, tmp_path: Path) -> None:
    def run(**options: Any) -> list[str]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        data = SFTDataModule(chats(12), batch_size=2, show_example=False)
        saver = RunCheckpoints(**options)
        trainer(tmp_path / "run", callbacks=[saver], enable_checkpointing=True).fit(SFTModule(base), data)
        return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())

    assert run(every=2) == ["step=4.ckpt", "step=6.ckpt"]
    assert run(every=4, keep=5) == ["step=4.ckpt", "step=6.ckpt"]  # the last step is always saved
    assert run(every=0) == ["step=6.ckpt"]
    assert len(run(every=0, minutes=1e-9, keep=9)) == 6
    with pytest.raises(ConfigError, match="keep is 0"):
        RunCheckpoints(keep=0)


@pytest.mark.parametrize("left", [1, 0])
def test_damaged_checkpoint_falls_back_to_the_previous_one(left: int, whole: Any, tmp_path: Path) -> None:
    args, expected, _ = whole("sft", 1)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]
    run = Run(command, tmp_path / "out.txt", at("sft", "training", 16, False, killed))
    assert run.wait() == -signal.SIGKILL
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert len(saved) == 2
    for path in saved[left:]:
        os.truncate(path, path.stat().st_size - 100)
    text = complete(command, tmp_path / "again.txt")
    assert f"{saved[-1]} is damaged" in text
    assert (f"resuming {tmp_path / 'run'} from {saved[0]}" in text) == bool(left)
    assert ("is usable; starting over" in text) == (not left)
    assert result(tmp_path / "run") == expected


def test_resume_in_another_environment_warns(base: str, tmp_path: Path, caplog: Any) -> None:
    def run(epochs: int, resume: Path | None = None) -> None:
        data = SFTDataModule(chats(4), batch_size=2, show_example=False)
        engine = trainer(
            tmp_path, callbacks=[ExportModel(), RunCheckpoints()], enable_checkpointing=True, max_epochs=epochs
        )
        engine.fit(SFTModule(base), data, ckpt_path=resume, weights_only=True)
        facts = json.loads((tmp_path / "stage.json").read_text())
        assert facts["environment"] == environment(engine)
        assert len(facts.get("inexact_resumes", [])) == caplog.text.count("will not be bit-exact")

    caplog.set_level(logging.WARNING, "rlhf_lightning")
    run(1)
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    run(2, path)
    assert "will not be bit-exact" not in caplog.text
    state = torch.load(path, weights_only=True)
    state["environment"] |= {"torch": "1.13.0", "threads": 64, "ranks": 2, "machine": "abacus"}
    torch.save(state, path)
    run(2, path)
    assert f"torch 1.13.0 → {version('torch')}, threads 64 → 1, ranks 2 → 1, machine abacus → " in caplog.text


def test_resume_within_an_epoch_with_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    def loader(world: int) -> RowLoader:
        return RowLoader([], lambda rows, weights: {}, 2, shard_spec=lambda: ShardSpec(world=world))

    loader(2).load_state_dict({"position": 0, "world": 1})
    loader(1).load_state_dict({"position": 3, "world": 1})
    with pytest.raises(ConfigError, match="by 1 ranks in the middle of an epoch, but this run has 2"):
        loader(2).load_state_dict({"position": 3, "world": 1})


# -- signals ----------------------------------------------------------------------------------------------------------


def interrupt(number: int, times: int = 1) -> Callable[[], None]:
    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize(
    ("kind", "place", "call", "number"),
    [
        ("sft", "training", 3, signal.SIGINT),
        ("sft", "writing a checkpoint", 30, signal.SIGTERM),
        ("sft", "validation", 5, signal.SIGINT),
        ("policy", "sampling", 6, signal.SIGTERM),
    ],
)
def test_signal_stops_the_run_at_a_resumable_point(
    kind: str, place: str, call: int, number: int, whole: Any, tmp_path: Path
) -> None:
    """It writes a checkpoint of the last optimizer step, although no checkpoint is due."""
    args, expected, _ = whole(kind, 1)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]
    far = [] if place == "writing a checkpoint" else ["--checkpoint_every", "1000"]
    run = Run([*command, *far], tmp_path / "out.txt", at(kind, place, call, False, interrupt(number)))
    assert run.wait() == 130, run.text
    assert "with a checkpoint" in run.text
    assert "Traceback" not in run.text
    steps = int(run.text.partition("stopped after step ")[2].partition(";")[0])
    (saved, *_), wrong = sorted((tmp_path / "run" / "checkpoints").glob("*"), reverse=True), []
    assert (saved.name, wrong) == (f"step={steps}.ckpt", [])
    assert not (tmp_path / "run" / "stage.json").exists()
    assert f"from {saved}" in complete(command, tmp_path / "again.txt")
    assert result(tmp_path / "run") == expected


def test_second_ctrl_c_stops_at_once(whole: Any, tmp_path: Path) -> None:
    args, expected, _ = whole("sft", 1)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]
    run = Run(command, tmp_path / "out.txt", at("sft", "training", 6, False, interrupt(signal.SIGINT, 2)))
    assert run.wait() == 130, run.text
    assert "stopped after step" not in run.text
    complete(command, tmp_path / "again.txt")
    assert result(tmp_path / "run") == expected


# -- values that are not finite ---------------------------------------------------------------------------------------


class Spoilt(SFTModule):
    """A module whose loss or gradient is not finite in some micro-batches of some rank."""

    def __init__(self, *args: Any, batches: tuple[int, ...], rank: int = 0, by: str = "loss", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches, self.rank, self.by = batches, rank, by

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.batches and self.trainer.global_rank == self.rank:
            if self.by == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss * 1
        return loss


def spoilt(base: str, folder: Path, guard: NonFiniteGuard, batches: tuple[int, ...], **options: Any) -> Any:
    keys = ("rank", "by")
    module = Spoilt(base, optimizer=sgd(0.1), batches=batches, **{k: options.pop(k) for k in keys if k in options})
    folder.mkdir(exist_ok=True)
    source = write_rows(folder / "rows.jsonl", chats(8))
    data = SFTDataModule(source, batch_size=1, show_example=False, seed=3)
    engine = trainer(folder, callbacks=[guard, ExportModel()], **options)
    engine.fit(module, data)
    return module


@pytest.mark.parametrize(("by", "precision"), [("loss", "32-true"), ("gradient", "32-true"), ("loss", "bf16-mixed")])
def test_nonfinite_loss_or_gradient_stops_the_run(by: str, precision: Any, base: str, tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    options = {"accumulate_grad_batches": 2, "precision": precision, "gradient_clip_val": 1.0}
    with pytest.raises(NonFiniteError) as caught:
        spoilt(base, tmp_path, guard, (5,), by=by, **options)
    text = str(caught.value)
    assert text.startswith("step 3: the loss is nan." if by == "loss" else "step 3: the gradient is not finite")
    # For a loss, the rows of its micro-batch are named; for a gradient, all rows of the step.
    assert text.count("rows.jsonl:") == (1 if by == "loss" else 2)
    assert "trainer.gradient_clip_val" in text or "overflow" in text
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nonfinite_steps_are_skipped_on_request(accumulate: int, base: str, tmp_path: Path) -> None:
    guard = NonFiniteGuard("skip")
    module = spoilt(base, tmp_path, guard, (2, 3), accumulate_grad_batches=accumulate)
    assert guard.skipped == 2 // accumulate
    assert json.loads((tmp_path / "stage.json").read_text())["skipped_steps"] == 2 // accumulate
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    # A skipped step changes no weights, and the other steps are taken.
    none = spoilt(base, tmp_path / "none", NonFiniteGuard("skip"), tuple(range(8)), accumulate_grad_batches=accumulate)
    start = SFTModule(base)
    start.configure_model()
    pairs = list(zip(start.parameters(), none.parameters(), module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_too_many_consecutive_skipped_steps_stop_the_run(base: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 4: .*3 steps before it were skipped"):
        spoilt(base, tmp_path, NonFiniteGuard("skip", limit=3), tuple(range(8)))
    with pytest.raises(ConfigError, match="'ignore'"):
        NonFiniteGuard("ignore")


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_all_ranks_make_the_same_decision(action: str, base: str, tmp_path: Path) -> None:
    guard = NonFiniteGuard(action)
    two = {"devices": 2, "strategy": "ddp_fork", "rank": 1}
    if action == "skip":
        spoilt(base, tmp_path, guard, (2,), **two)
        assert json.loads((tmp_path / "stage.json").read_text())["skipped_steps"] == 1
        return
    with pytest.raises(Exception, match=r"NonFiniteError: step 3: the loss is nan. Rows: .*rows.jsonl:\d"):
        spoilt(base, tmp_path, guard, (2,), **two)


def test_nonfinite_weights_are_neither_saved_nor_exported(base: str, tmp_path: Path) -> None:
    class Overflow(SFTModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                next(self.parameters()).data[0, 0] = math.inf

    def run(callback: Any) -> None:
        data = SFTDataModule(chats(8), batch_size=2, show_example=False)
        saves = isinstance(callback, RunCheckpoints)
        trainer(tmp_path, callbacks=[callback], enable_checkpointing=saves, limit_train_batches=3).fit(
            Overflow(base), data
        )

    with pytest.raises(NonFiniteError, match="not saved as a model"):
        run(ExportModel())
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "stage.json").exists()
    with pytest.raises(NonFiniteError, match=r"after step 3, 1 weights .*no checkpoint"):
        run(RunCheckpoints(every=1))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=1.ckpt", "step=2.ckpt"}


# -- files and disks --------------------------------------------------------------------------------------------------


def test_full_disk_is_reported_and_the_run_can_be_repeated(whole: Any, tmp_path: Path) -> None:
    args, expected, _ = whole("sft", 1)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]
    full = 20_000  # largest size of a file in bytes: later writes fail as on a full disk

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))

    text = complete(command, tmp_path / "out.txt", code=2, before=limit)
    assert "the checkpoint cannot be written" in text
    assert "Free disk space" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    complete(command, tmp_path / "again.txt")
    assert result(tmp_path / "run") == expected


@pytest.mark.parametrize("what", ["folder", "data"])
def test_files_that_cannot_be_opened_are_reported(what: str, whole: Any, tmp_path: Path) -> None:
    args, _, _ = whole("sft", 1)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]
    data = tmp_path / "secret.jsonl"
    write_rows(data, chats(2))
    if what == "folder":
        (tmp_path / "run").write_text("a file where a folder should be")
    else:
        data.chmod(0)
        command += ["--data.train", str(data)]
        if os.access(data, os.R_OK):
            data.unlink()  # root can read any file, but nobody can read a circular link
            data.symlink_to(data)
    text = complete(command, tmp_path / "out.txt", code=2)
    assert "Traceback" not in text
    assert ("cannot be created" if what == "folder" else "secret.jsonl") in text


# -- rewards and processes --------------------------------------------------------------------------------------------


def fussy(completions: list[str], wanted: list[int]) -> list[float]:
    return [10 / (number - 3) for number in wanted]


def test_failing_reward_is_reported_with_its_row(whole: Any, tmp_path: Path) -> None:
    args, _, _ = whole("policy", 1)
    rewards = [{"class_path": "rlhf_lightning.rewards.FunctionReward", "init_args": {"function": f"{__name__}.fussy"}}]
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run"), "--model.rewards", json.dumps(rewards)]
    text = complete(command, tmp_path / "out.txt", code=2)
    assert "the reward fussy failed with ZeroDivisionError: division by zero" in text
    assert "test_faults.py:" in text
    assert "in fussy" in text or "in <listcomp>" in text
    said = text.partition("the reward fussy failed")[2]  # the text before lists the files of held-out and trained rows
    found = [int(line) for line in re.findall(r"policy-(?:train|held)\.jsonl:(\d+)", said)]
    assert found
    assert all((line - 1) % 5 == 3 for line in found)


def test_other_ranks_end_when_a_forked_rank_dies(whole: Any, tmp_path: Path) -> None:
    args, _, _ = whole("sft", 2)
    command = [*args, "--trainer.default_root_dir", str(tmp_path / "run")]

    def die() -> None:
        if os.environ.get("LOCAL_RANK", "0") == "1" or torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    begun = time.monotonic()
    text = complete(command, tmp_path / "out.txt", code=2, before=at("sft", "training", 5, False, die))
    assert "a process of the run died" in text
    assert "SIGKILL" in text
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_other_ranks_end_when_a_launched_rank_dies(rank: int, base: str, tmp_path: Path) -> None:
    """With the command line's launcher (`strategy: ddp`), the others end within a bounded time, with the reason."""
    command = [sys.executable, "-m", "rlhf_lightning", *config("sft", base, tmp_path), "--trainer.devices", "2"]
    command += ["--trainer.strategy", "ddp", "--trainer.max_epochs", "1000", "--checkpoint_every", "100000"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    logged, text = tmp_path / "run" / "metrics.csv", tmp_path / "out.txt"
    with open(text, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    begun = time.monotonic()
    while not logged.exists() and time.monotonic() - begun < 150:
        time.sleep(0.1)
    others = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    worker = next(pid for pid in others if b"rlhf_lightning" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker if rank else process.pid, signal.SIGKILL)
    died = time.monotonic()
    code = process.wait(60)
    while Path(f"/proc/{worker}").exists() and time.monotonic() - died < 60:
        time.sleep(0.1)
    took = time.monotonic() - died
    left = [pid for pid in [worker] if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, text.read_text()
    assert took < 60
    reasons = (f"error: rank {rank} of 2 ", "error: the process that started this rank ")
    assert any(reason in text.read_text() for reason in reasons), text.read_text()
    assert "Traceback" not in text.read_text(), text.read_text()
    assert code == (2 if rank else -signal.SIGKILL)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("ddp", marks=pytest.mark.slow), "ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("number", "all_of_them"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_all_launched_ranks_stop_on_a_signal(
    number: int, all_of_them: bool, strategy: str, base: str, tmp_path: Path
) -> None:
    """With the command line's launcher: Ctrl-C to all processes as from a terminal, and SIGTERM to the first."""
    args = [*config("sft", base, tmp_path), "--trainer.devices", "2", "--trainer.strategy", strategy]
    args += ["--trainer.max_epochs", "1000", "--checkpoint_every", "100000"]
    args += ["--trainer.default_root_dir", str(tmp_path / "run")]
    logged = tmp_path / "run" / "metrics.csv"
    if strategy == "ddp_fork":
        process: Run | subprocess.Popen[bytes] = Run(args, tmp_path / "out.txt")
    else:  # these launchers start this interpreter again, which must be that of the command
        with open(tmp_path / "out.txt", "wb") as out:
            command = [sys.executable, "-m", "rlhf_lightning", *args]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    begun = time.monotonic()
    while not logged.exists() and process.poll() is None and time.monotonic() - begun < 150:
        time.sleep(0.05)
    (os.killpg if all_of_them else os.kill)(process.pid, number)
    assert process.wait(60) == 130, (tmp_path / "out.txt").read_text()
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped after {saved.stem.replace('=', ' ')}" in (tmp_path / "out.txt").read_text()
