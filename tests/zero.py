"""Runs the tests of DeepSpeed on two CPU processes, and writes their report.

    python -m tests.zero [--report FILE] [--python FILE] [pytest arguments]

Makes an environment in .venv-deepspeed (2 GB) with the versions of constraints.txt; --python takes another environment
as it is.
"""

import os
import subprocess
import sys

from tests.helpers.reports import run_tests
from tests.processors import ROOT

PYTHON = ROOT / ".venv-deepspeed" / "bin" / "python"
NAMES = ("deepspeed", "torch", "transformers", "peft", "lightning")
FILE = "tests/models/test_deepspeed.py"


def install() -> None:
    """Create the environment, or complete it."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", PYTHON.parents[1]], check=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    # torch first, so that no other package pulls another build of it.
    for packages in (["torch"], ["--editable", ".[dev]"]):
        subprocess.run([*pip, *packages], cwd=ROOT, check=True)
    # Its setup imports the installed torch; its kernels, which need a compiler, are left out.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    subprocess.run([*pip, "--no-build-isolation", "--editable", ".[deepspeed]"], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    environment = {"DS_ACCELERATOR": "cpu"}
    sys.exit(run_tests(__doc__, PYTHON, install, environment, [], [FILE], NAMES)[0])
