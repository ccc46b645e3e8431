"""The test suite's cases for a CUDA device, as a cell."""

import os
import re
import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu.sides import ROOT, Clock, environment

FILES = [
    "tests/models/test_packed_forward.py",
    "tests/models/test_liger.py",
    "tests/generation/test_sampler.py",
    "tests/objectives/test_worked_examples.py",
    "tests/objectives/test_policy.py",
    "tests/models/test_precision.py",
]
NOTHING_RAN = 5  # pytest's exit code


def run(clock: Clock) -> dict[str, Any]:
    """Run the tests; returns the counts of pytest's last line and the names of failed tests.

    Raises:
        Failed, OutOfTime: If the time was up before the run ended.
    """
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-rf", "-p", "no:cacheprovider", *FILES]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(0.1, clock.cell_end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        raise clock.expired("pytest") from None
    return outcome(output, process.returncode)


def outcome(output: str, code: int) -> dict[str, Any]:
    """The counts and failed tests in pytest's output."""
    if code == NOTHING_RAN:
        return {"skipped": "needs CUDA"}
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output[-400:])}
    failed = re.findall(r"^FAILED (\S+)", output, re.MULTILINE)
    found: dict[str, Any] = {**counts, "passed": code == 0, "cases": counts.get("passed", 0)}
    if code:
        found |= {"failures": failed[:20], "tail": output[-1500:]}
    return found
