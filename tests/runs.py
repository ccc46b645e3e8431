"""Runs of the command in forked processes: `rlhf` as a user starts it, without the seconds that imports take."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Run:
    """A command under way in a process of its own, at the head of a group of its own."""

    def __init__(self, args: list[str], output: Path, before: Callable[[], Any] | None = None) -> None:
        self.output, self.started = output, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._child(args, before)

    def _child(self, args: list[str], before: Callable[[], Any] | None) -> None:
        def command() -> None:
            # What pytest does to signals and logs is not what a user has.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if before:
                before()
            from rlhf_lightning.cli.main import main

            main(args)

        os.setsid()
        _run(command, self.output)

    def send(self, number: int) -> None:
        """A signal to the process and what it started."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            if number != signal.SIGKILL:
                os.kill(self.pid, number)

    def wait(self, limit: float = 120) -> int:
        """Its exit code (negative: by a signal); killed where it takes longer than `limit` seconds."""
        while time.monotonic() - self.started < limit:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"no end after {limit} s: {self.text}")

    @property
    def text(self) -> str:
        """What it wrote."""
        return self.output.read_text() if self.output.exists() else ""


def complete(args: list[str], output: Path, code: int = 0, before: Callable[[], Any] | None = None) -> str:
    """Run a command to its end; what it wrote."""
    run = Run(args, output, before)
    found = run.wait()
    assert found == code, run.text
    return run.text


def in_ranks(world: int, function: Callable[[], Any], folder: Path, limit: float = 100, code: int = 0) -> None:
    """Run a function in forked processes that find what `torchrun` gives; all must end with `code`, within `limit` s.

    Where one has ended otherwise than well, the others are ended as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_PORT": port}
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


def _run(function: Callable[[], Any], output: Path) -> None:
    """In a forked process: run to its end as the interpreter does, with what is printed in a file."""
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
