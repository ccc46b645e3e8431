"""Worker processes of a cell, which receive JSON lines and are ended when the time is up."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A cell, or a side of it, failed; the message is recorded as its result."""


class OutOfTime(Exception):
    """The time budget of the run is used up; the cell is left for the next run."""


class Clock:
    """The remaining time of a run and of its current cell."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.cell_end = self.end

    @property
    def left(self) -> float:
        """Seconds left for the run."""
        return self.end - time.monotonic()

    def begin(self, most: float) -> None:
        """Start a cell that may take this number of seconds."""
        self.cell_end = min(self.end, time.monotonic() + most)

    def expired(self, doing: str) -> Exception:
        """The exception to raise when no time is left."""
        if self.left <= 0:
            return OutOfTime(doing)
        return Failed(f"{doing} had not ended when the time of its cell was up")


def environment() -> dict[str, str]:
    """Environment of the started processes: no network, and this source tree first on the path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


class Side:
    """A worker process, see `worker`: `ours`, `trl` or `generate`."""

    def __init__(self, name: str, folder: Path, work: dict[str, Any], clock: Clock) -> None:
        self.name, self.clock, self.log = name, clock, folder.parent / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", name, str(folder), json.dumps(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment(),
                start_new_session=True,  # so that compilers which it starts end with it
            )

    def ask(self, do: str, **options: Any) -> Any:
        """Send a command and return the answer.

        Raises:
            Failed: If the worker reports a failure (out of memory, an error), died, or exceeded the time of its cell.
            OutOfTime: If the run's time budget is used up.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._end()) from None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, self.clock.cell_end - time.monotonic()))
        if not ready:
            self.close()
            raise self.clock.expired(f"{self.name}: {do}")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self._end())
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["value"]

    def _end(self) -> str:
        code = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the process ended with {code}: {' / '.join(lines[-3:])[-500:] or 'no message'}"

    def close(self) -> None:
        """End the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # unsent data for a process that has ended
                    pipe.close()


Start = Callable[[str, Path, dict[str, Any], Clock], Any]
"""How a side is started: `Side`, or in a test an object in this process."""
