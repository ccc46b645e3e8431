"""Runs the tests of DeepSpeed on two CPU processes, and writes their report.

    python -m tests.zero [--report FILE] [--python FILE] [pytest arguments]

Makes an environment in .venv-deepspeed (2 GB) with the versions of constraints.txt; --python takes another environment
as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.reports import outcomes, write_report
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write what ran and how it ended to this file")
    parser.add_argument("--python", type=Path, help="interpreter of an environment to use instead of .venv-deepspeed")
    options, arguments = parser.parse_known_args()
    python = options.python or PYTHON
    if options.python is None:
        install()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={result}", *(arguments or [FILE])]
        ended = subprocess.run(command, cwd=ROOT, env=environment)
        found = outcomes(result)
    if options.report:
        write_report(options.report, found, python, NAMES)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
