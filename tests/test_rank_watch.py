"""Two ranks, one of which is killed, fails, stops or hangs: both end within the stated time and say why.

Ranks are forked, with the environment that `torchrun` sets; with `launch`, the first starts the other, as by default.
"""

import errno
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from rlhf_lightning import rank_watch
from rlhf_lightning.callbacks.memory import MemoryEstimate
from rlhf_lightning.checkpointing.io import AtomicCheckpointIO, damage
from rlhf_lightning.cli.stage import StageCLI
from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.rank_watch import GRACE
from rlhf_lightning.rewards import KeywordReward
from tests.helpers.resume import MODULES, config, result
from tests.helpers.rows import chats, write_rows
from tests.helpers.runs import Forked, Run, _command, free_port, in_ranks
from tests.helpers.training import trainer

Act = Callable[[], Any]
SOON = 8.0
"""Seconds in which ranks hear of another's end and leave, of which most are for a busy machine."""
LIMIT = 3.0
"""Seconds of `--rank_timeout` where one is waited for."""


@dataclass
class Rank:
    """The result of one rank: its exit code (None if it had not ended), its output, seconds since the fault."""

    code: int | None
    text: str
    seconds: float


def this_rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def at(owner: Any, name: str, number: int, rank: int, act: Act, mark: Path) -> Act:
    """Install an action of one rank at the `number`th call of a method, and record the time."""

    def install() -> None:
        original, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if this_rank() == rank and len(calls) == number:
                mark.write_text(str(time.time()))
                act()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return install


class Child(Forked):
    """A forked rank that the first one started, with the used part of the interface of `subprocess.Popen`."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: str | None) -> None:
        def child() -> None:
            os.environ.clear()
            os.environ.update(env)
            _command(sys.argv[1:])

        super().__init__(child, group=lambda: None)

    @property
    def returncode(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 60)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("rank", timeout or 60)
            time.sleep(0.01)
        assert self.code is not None
        return self.code


def in_two(args: list[str], folder: Path, before: Act | None = None, limit: float = 60) -> list[Rank]:
    """Run a command as two ranks; their output and the fault are recorded in files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()

    def prepared(rank: int) -> Act:
        def prepare() -> None:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
            os.environ.update({key: str(value) for key, value in own.items()})
            if before:
                before()

        return prepare

    return ended([Run(args, folder / f"rank{rank}.txt", prepared(rank)) for rank in range(2)], folder, limit)


def launch(args: list[str], folder: Path, before: Act | None = None, limit: float = 60) -> Rank:
    """Run a command whose first rank starts the second; both write their output to one file."""

    def prepare() -> None:
        subprocess_script.subprocess = SimpleNamespace(Popen=Child)
        if before:
            before()

    folder.mkdir(parents=True, exist_ok=True)
    (found,) = ended([Run(args, folder / "ranks.txt", prepare)], folder, limit)
    return found


def ended(runs: list[Run], folder: Path, limit: float) -> list[Rank]:
    begun, ends = time.time(), {}
    mark = folder / "mark"
    while len(ends) < len(runs) and time.time() - begun < limit:
        ends |= {i: time.time() for i, run in enumerate(runs) if i not in ends and run.poll() is not None}
        if (stopped := folder / "stopped").exists() and len(ends) == len(runs) - 1:
            os.kill(int(stopped.read_text()), signal.SIGCONT)
        time.sleep(0.01)
    fault = float(mark.read_text()) if mark.exists() else begun
    for i, run in enumerate(runs):
        if i not in ends:
            run.end()
    return [Rank(run.code if i in ends else None, run.text, ends.get(i, 0) - fault) for i, run in enumerate(runs)]


def whole_files(root: Path) -> None:
    """Check that no checkpoint is damaged and no file is partial."""
    for path in (root / "checkpoints").glob("*"):
        assert not path.name.endswith(".partial")
        assert damage(path) is None
    assert not list(root.glob(".*.partial"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ArithmeticError("seven")


def hang() -> None:
    time.sleep(100)


def hold() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture
def command(base: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The command of two ranks in `run`, for a kind of stage."""

    def make(kind: str = "sft", strategy: str = "ddp", limit: float | None = None) -> list[str]:
        args = [*config(kind, base, tmp_path), "--trainer.devices", "2", "--trainer.strategy", strategy]
        args += ["--trainer.default_root_dir", str(tmp_path / "run"), "--checkpoint_every", "1"]
        return args if limit is None else [*args, "--rank_timeout", str(limit / 60)]

    return make


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_killed_rank_ends_the_other_rank(rank: int, command: Any, tmp_path: Path) -> None:
    args = command()
    before = at(MODULES["sft"], "training_step", 6, rank, die, tmp_path / "mark")
    ranks = in_two(args, tmp_path, before)
    assert ranks[rank].code == -signal.SIGKILL
    other = ranks[1 - rank]
    assert other.code == 2
    assert other.seconds < SOON
    assert f"error: rank {rank} of 2 ({socket.gethostname()}, process " in other.text
    assert "died, or its connection was lost" in other.text
    assert "The same command resumes the run." in other.text
    assert "Traceback" not in other.text
    whole_files(tmp_path / "run")


def test_launcher_reports_the_signal_that_killed_a_rank(command: Any, tmp_path: Path) -> None:
    before = at(MODULES["sft"], "training_step", 6, 1, die, tmp_path / "mark")
    found = launch(command(), tmp_path, before)
    assert found.code == 2, found.text
    assert found.seconds < SOON
    assert "error: rank 1 of 2" in found.text
    assert "was killed by SIGKILL" in found.text
    assert "Traceback" not in found.text


PLACES = {
    "sft": {
        "training": (MODULES["sft"], "training_step", 7),
        "validation": (MODULES["sft"], "validation_step", 2),
        "saving": (AtomicCheckpointIO, "save_checkpoint", 2),
        "exporting": (RLHFModule, "save_pretrained", 1),
    },
    "preference": {"training": (MODULES["preference"], "training_step", 7)},
    "policy": {"training": (MODULES["policy"], "training_step", 7), "reward": (KeywordReward, "score", 2)},
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", list(PLACES))
def test_same_command_resumes_to_the_same_results(
    kind: str, rank: int, strategy: str, command: Any, tmp_path: Path
) -> None:
    args = command(kind, strategy)
    root = tmp_path / "run"
    done = in_two([*args, "--trainer.default_root_dir", str(tmp_path / "whole")], tmp_path)
    assert [found.code for found in done] == [0, 0]
    for number, (place, (owner, name, count)) in enumerate(PLACES[kind].items()):
        if rank == 1 and (place == "saving" or (place == "exporting" and strategy == "ddp")):
            continue  # by rank 0 only
        here = tmp_path / place
        here.mkdir()
        ranks = in_two(args, here, at(owner, name, count, rank, (die, fail)[number % 2], here / "mark"))
        assert ranks[rank].code == ((2 if place == "reward" else 1) if number % 2 else -signal.SIGKILL), ranks
        assert ranks[1 - rank].code == 2, ranks[1 - rank].text
        assert ranks[1 - rank].seconds < SOON
        assert f"error: rank {rank} of 2" in ranks[1 - rank].text
        again = in_two(args, here)
        assert [found.code for found in again] == [0, 0], again
        assert result(root) == result(tmp_path / "whole")
        whole_files(root)
        args = [*args, "--fresh"] if "--fresh" not in args else args


# -- failed -----------------------------------------------------------------------------------------------------------

FAILS = {
    "a reward": ("policy", KeywordReward, "score", 2),
    "the data module": ("sft", SFTDataModule, "read", 1),
    "a batch": ("preference", PreferenceDataModule, "collate", 3),
    "a callback": ("sft", MemoryEstimate, "on_train_batch_end", 4),
    "a metric": ("sft", MeanMetric, "compute", 1),
    "validation": ("preference", MODULES["preference"], "validation_step", 2),
    "the model": ("sft", MODULES["sft"], "configure_model", 1),
    "the optimizer": ("sft", MODULES["sft"], "configure_optimizers", 1),
    "the end": ("sft", MemoryEstimate, "on_train_end", 1),
}


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "where", [name if name == "a reward" else pytest.param(name, marks=pytest.mark.slow) for name in FAILS]
)
def test_both_ranks_report_the_failure_of_one(where: str, rank: int, command: Any, tmp_path: Path) -> None:
    kind, owner, name, number = FAILS[where]
    ranks = in_two(command(kind), tmp_path, at(owner, name, number, rank, fail, tmp_path / "mark"))
    own, other = ranks[rank], ranks[1 - rank]
    assert own.code == (2 if where == "a reward" else 1), own.text
    assert "ArithmeticError: seven" in own.text
    assert other.code == 2
    assert other.seconds < SOON
    said = other.text[other.text.index(f"error: rank {rank} of 2 ({socket.gethostname()}, process ") :]
    assert "ArithmeticError: seven" in said
    assert "Traceback" not in other.text
    assert not list((tmp_path / "run").glob("*.partial"))
    whole_files(tmp_path / "run")


@pytest.mark.slow
def test_both_ranks_report_a_full_disk_on_rank_0(command: Any, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ranks = in_two(command(), tmp_path, at(os, "fsync", 1, 0, full, tmp_path / "mark"))
    for found in ranks:
        assert found.code == 2
        assert "the checkpoint cannot be written (No space left on device). Free disk space" in found.text
        assert "Traceback" not in found.text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert [found.code for found in in_two(command(), tmp_path)] == [0, 0]


@pytest.mark.slow
def test_interrupted_rank_interrupts_the_other(command: Any, tmp_path: Path) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    ranks = in_two(command(), tmp_path, at(MODULES["sft"], "training_step", 6, 1, interrupt, tmp_path / "mark"))
    assert [found.code for found in ranks] == [130, 130], ranks
    assert ranks[0].seconds < SOON


@pytest.mark.slow
def test_busy_rank_is_ended_after_the_grace_period(command: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    both = at(MODULES["sft"], "training_step", 6, 1, die, tmp_path / "mark")

    def before() -> None:
        both()
        at(MODULES["sft"], "training_step", 6, 0, hang, tmp_path / "one" / "mark")()

    busy = in_two(command(), tmp_path, before)[0]
    assert busy.code == 2
    assert busy.seconds < GRACE + SOON
    assert "error: rank 1 of 2" in busy.text


# -- stopped, hanging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_suspended_rank_ends_the_other_within_the_limit(rank: int, command: Any, tmp_path: Path) -> None:
    def stop() -> None:
        (tmp_path / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    before = at(MODULES["sft"], "training_step", 6, rank, stop, tmp_path / "mark")
    ranks = in_two(command(limit=LIMIT), tmp_path, before)
    other = ranks[1 - rank]
    assert other.code == 2
    assert LIMIT - 1 < other.seconds < LIMIT + GRACE + SOON
    said = other.text[other.text.index("error: ") :]
    assert f"rank {rank} of 2 (" in said
    assert "has not responded for" in said
    assert "Traceback" not in other.text
    # Let go on, it finds that the other has ended.
    assert ranks[rank].code == 2
    assert "Traceback" not in ranks[rank].text
    whole_files(tmp_path / "run")


@pytest.mark.slow
def test_ranks_suspended_together_continue(command: Any, tmp_path: Path) -> None:
    def stop() -> None:
        os.system(f"(sleep 5; kill -CONT {os.getpid()}) &")
        os.kill(os.getpid(), signal.SIGSTOP)

    def before() -> None:
        rank_watch.SILENCE = 2.0
        for rank in range(2):
            at(MODULES["sft"], "training_step", 6, rank, stop, tmp_path / f"mark{rank}")()

    ranks = in_two(command(), tmp_path, before)
    assert (tmp_path / "mark0").exists()
    assert [found.code for found in ranks] == [0, 0], ranks


def test_connection_without_the_token_is_closed() -> None:
    watch = rank_watch.RankWatch(None)
    watch._token = "secret"
    watch._server = rank_watch._listen("127.0.0.1")
    watch._selector.register(watch._server, selectors.EVENT_READ, None)
    watch._start()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"secre\n", b"{}\n", bytes(100_000)):
        with socket.create_connection(watch._server.getsockname(), timeout=10) as stranger:
            stranger.sendall(said)
            with suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    with socket.create_connection(watch._server.getsockname(), timeout=10) as rank:
        rank.sendall(b'secret{"rank": 1, "name": "rank 1"}\n{"done": true}\n')
        assert b"told" in rank.recv(1000)
    watch.stop()
    assert watch.end is None


@pytest.mark.slow
def test_launcher_ends_a_suspended_rank(command: Any, tmp_path: Path) -> None:
    def stop() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    found = launch(command(limit=LIMIT), tmp_path, at(MODULES["sft"], "training_step", 6, 1, stop, tmp_path / "mark"))
    assert found.code == 2
    assert found.seconds < LIMIT + 2 * GRACE + SOON
    assert "has not responded for" in found.text
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert launch(command(), tmp_path).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_hanging_reward_on_one_rank_ends_both(rank: int, strategy: str, command: Any, tmp_path: Path) -> None:
    before = at(KeywordReward, "score", 2, rank, hang, tmp_path / "mark")
    ranks = in_two(command("policy", strategy, LIMIT), tmp_path, before)
    for found in ranks:
        assert found.code == 2
        assert found.seconds < LIMIT + GRACE + SOON
        assert f"error: rank {1 - rank} of 2" in found.text
        assert f"timed out after {LIMIT:g} s (--rank_timeout" in found.text
        assert f"rank {rank} of 2 ({socket.gethostname()}" in found.text
        assert "test_rank_watch.py:" in found.text
        assert "in hang" in found.text
        assert "Traceback" not in found.text


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank_is_reported_after_the_limit(rank: int, command: Any, tmp_path: Path) -> None:
    before = at(DDPStrategy, "setup_environment", 1, rank, hang, tmp_path / "mark")
    other = in_two(command(limit=LIMIT), tmp_path, before, limit=LIMIT + 2 * SOON)[1 - rank]
    assert other.code == 2, other.text
    assert ("only 1 of 2 ranks joined" if rank else "rank 0 does not respond at 127.0.0.1, ") in other.text
    assert f"within {LIMIT:g} s (--rank_timeout" in other.text
    assert "Traceback" not in other.text


@pytest.mark.slow
@pytest.mark.parametrize("act", [die, fail])
def test_rank_that_ends_before_all_have_joined_is_reported(act: Act, command: Any, tmp_path: Path) -> None:
    # The second call: it is forked of a process that has come as far.
    found = launch(command(), tmp_path, at(StageCLI, "instantiate_trainer", 2, 1, act, tmp_path / "mark"))
    assert found.code == 2, found.text
    assert found.seconds < SOON
    how = "was killed by SIGKILL" if act is die else "ended with exit code 1"
    assert re.search(rf"error: rank 1 \(process \d+\) {how}", found.text)


@pytest.mark.slow
def test_rank_ends_if_its_parent_dies_before_all_have_joined(command: Any, tmp_path: Path) -> None:
    def late() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(2)

    def before() -> None:
        at(StageCLI, "instantiate_trainer", 2, 1, late, tmp_path / "late")()
        at(DDPStrategy, "setup_environment", 1, 0, die, tmp_path / "mark")()

    assert launch(command(), tmp_path, before).code == -signal.SIGKILL
    until = time.time() + 2 + 2 * SOON
    while "error: the process that started this rank" not in (tmp_path / "ranks.txt").read_text():
        assert time.time() < until
        time.sleep(0.1)
    while Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists():
        assert time.time() < until
        time.sleep(0.1)


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, 1e300])
def test_invalid_rank_timeout_is_rejected(minutes: float) -> None:
    with pytest.raises(ConfigError, match=r"rank_timeout is .* minutes; it must be above 0"):
        rank_watch.watch_ranks(SimpleNamespace(strategy=DDPStrategy()), minutes)


def test_conflicting_timeouts_are_rejected() -> None:
    strategy = DDPStrategy(timeout=timedelta(minutes=3))
    with pytest.raises(ConfigError, match=r"rank_timeout is 2 minutes, but trainer.strategy has a timeout of 0:03:00"):
        rank_watch.watch_ranks(SimpleNamespace(strategy=strategy), 2)


# -- other data on one rank -------------------------------------------------------------------------------------------


def rank_file(tmp_path: Path, of: dict[int, list[Any] | None]) -> Act:
    """Make `rows.jsonl` another file on each rank, as on different machines."""

    def install() -> None:
        place = tmp_path / f"machine{this_rank()}"
        place.mkdir()
        os.chdir(place)
        if (rows := of[this_rank()]) is not None:
            write_rows(place / "rows.jsonl", rows)

    return install


OTHERS: dict[str, tuple[Any, str]] = {
    "none": (None, "rows.jsonl"),
    "fewer": (chats(6), "data.train: rank {rank} of 2 ({host}) has 6 rows"),
    "another order": (chats(8)[::-1], "data.train: rank {rank} of 2 ({host}) has 8 rows"),
    "bad": ([*chats(7), {"messages": 3}], "rows.jsonl:8"),
}


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "other", ["none", "another order", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fewer", "bad"))]
)
def test_different_data_on_one_rank_is_rejected_before_training(
    other: str, rank: int, command: Any, tmp_path: Path
) -> None:
    rows, words = OTHERS[other]
    before = rank_file(tmp_path, {rank: rows, 1 - rank: chats(8)})
    ranks = in_two([*command(), "--data.train", "rows.jsonl"], tmp_path, before)
    for found in ranks:
        assert found.code == 2, found.text
        assert "Traceback" not in found.text
    said = ranks[1 - rank].text
    if other in ("fewer", "another order"):
        said = ranks[0].text
        assert words.format(rank=1, host=socket.gethostname()).replace("6", "6" if rank else "8") in said
    else:
        assert words in said
        assert f"rank {rank} of 2" in said
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.slow
def test_dataloaders_of_different_lengths_are_rejected(base: str, tmp_path: Path) -> None:
    def run() -> None:
        data = SFTDataModule(chats(8), batch_size=2, show_example=False)
        data.train_dataloader = lambda: DataLoader(range(4 + this_rank()), batch_size=1)  # type: ignore[method-assign]
        one = trainer(tmp_path, devices=2, strategy="ddp", use_distributed_sampler=False)
        with pytest.raises(ConfigError, match=r"rank 1 of 2 has 5 training batches and .* rank 0 has 4 "):
            one.fit(MODULES["sft"](base), data)

    in_ranks(2, run, tmp_path / "ranks")
