"""Runs commands in forked processes: `rlhf` as a user starts it, without the seconds that imports take.

What only a process of its own can show (`python -m rlhf_lightning` starts, prints and ends) is in the tests that call
`subprocess`.
"""

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

STACKS = signal.SIGUSR2
"""On this signal, a forked process writes where its threads are."""


class Forked:
    """A forked process with the used part of the interface of `subprocess.Popen`."""

    def __init__(self, child: Callable[[], Any], output: Path | None = None, group: Callable[[], Any] = os.setsid):
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            group()
            _run(child, output)

    def poll(self) -> int | None:
        """Its exit code (negative: by a signal), once it has ended."""
        return self._ended(os.WNOHANG)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, flags: int) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, flags)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


class Run(Forked):
    """A running command in its own process, at the head of its own process group."""

    def __init__(self, args: list[str], output: Path, before: Callable[[], Any] | None = None) -> None:
        super().__init__(lambda: _command(args, before), output)
        self.output = output

    def send(self, number: int) -> None:
        """Send a signal to the process and its children."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            if number != signal.SIGKILL:
                os.kill(self.pid, number)

    def wait(self, limit: float = 120) -> int:
        """Its exit code; killed where it takes longer than `limit` seconds from here."""
        begun = time.monotonic()
        while time.monotonic() - begun < limit:
            if (code := self.poll()) is not None:
                return code
            time.sleep(0.005)
        self.end()
        raise AssertionError(f"no end after {limit} s: {self.text}")

    def end(self) -> None:
        """Kill it, and what it started, after it has written where it is."""
        self.send(STACKS)
        time.sleep(1)
        self.send(signal.SIGKILL)
        self._ended(0)

    def gone(self, limit: float = 60) -> None:
        """Wait until nothing that it started runs; after `limit` seconds that is killed, and an error."""
        begun = time.monotonic()
        while left := members(self.pid):
            if time.monotonic() - begun > limit:
                for pid, _ in left:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{left} run {limit} s after the end of the first process: {self.text}")
            time.sleep(0.01)

    @property
    def text(self) -> str:
        """What it wrote."""
        return self.output.read_text() if self.output.exists() else ""


class Stage(Forked):
    """A stage that a pipeline started, forked."""

    def __init__(
        self,
        command: list[str],
        process_group: int,
        pass_fds: list[int],
        env: dict[str, str],
        before: Callable[[], Any] | None = None,
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "rlhf_lightning"]

        def begin() -> None:
            os.setpgid(0, process_group)
            os.environ.update(env)
            # The other end of the pipe that tells the stage of its pipeline's end, which a new program would not have.
            passed = {os.fstat(number).st_ino for number in pass_fds}
            for number in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError):  # that of the list itself
                    if number not in pass_fds and os.fstat(number).st_ino in passed:
                        os.close(number)

        super().__init__(lambda: _command(command[3:], before), group=begin)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: Any) -> None:
        self.wait()

    def wait(self) -> int:
        """Its exit code."""
        while (code := self._ended(0)) is None:
            pass
        return code


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a pipeline that runs in this process are forked."""
    fork_stages(monkeypatch)


def fork_stages(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any] | None = None) -> None:
    """The stages of pipelines, from here on, are forked; `before` is called in each, with its `sys.argv`."""
    popen = partial(Stage, before=before)
    monkeypatch.setattr("rlhf_lightning.pipeline.stage_process.subprocess", SimpleNamespace(Popen=popen))


def members(session: int) -> list[tuple[int, int]]:
    """The running processes of a session with their process groups: all that a `Run` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, group, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state not in "ZX":
                found.append((int(path.parent.name), int(group)))
    return found


def complete(
    args: list[str], output: Path, code: int = 0, before: Callable[[], Any] | None = None, limit: float = 120
) -> str:
    """Run a command to its end; returns its output."""
    run = Run(args, output, before)
    found = run.wait(limit)
    assert found == code, run.text
    return run.text


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def in_ranks(world: int, function: Callable[[], Any], folder: Path, limit: float = 100, code: int = 0) -> None:
    """Run a function in forked processes that find what `torchrun` gives; all must end with `code`, within `limit` s.

    Where one has ended otherwise than well, the others are ended as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_PORT": free_port()}
    outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
    sys.stdout.flush()
    sys.stderr.flush()
    running = {}
    for rank, output in enumerate(outputs):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests"}
        pid = os.fork()
        if not pid:
            os.environ.update({key: str(value) for key, value in {**common, **own}.items()})
            _run(function, output)
        running[pid] = rank
    started, codes = time.monotonic(), {}
    while running and time.monotonic() - started < limit and not any(codes.values()):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    texts = "\n".join(f"--- {output.name}\n{output.read_text()[-4000:]}" for output in outputs)
    fine = set(codes.values()) == {code} and (code or len(codes) == world)
    assert fine, f"{codes}, the others were ended\n{texts}"


def _command(args: list[str], before: Callable[[], Any] | None = None) -> None:
    # What pytest does to signals and logs is not what a user has.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGTSTP, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["rlhf", *args]
    if before:
        before()
    from rlhf_lightning.cli.main import main

    main(args)


def _run(function: Callable[[], Any], output: Path | None = None) -> None:
    """In a forked process: run to its end as the interpreter does, with what is printed in a file if one is given."""
    gc.freeze()  # the destructors of what earlier tests left may wait for threads that a forked process has not
    code = 1
    try:
        if output:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        faulthandler.register(STACKS, sys.stderr)
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # in no case back into the tests
            os._exit(code)


def wait_for(condition: Any, run: Run | None = None, limit: float = 90) -> None:
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, run.text if run else "it took too long"
        time.sleep(0.05)
