"""Runs the fast tests with the oldest libraries that pyproject.toml allows, and with newer Pythons.

    python -m tests.lowest [--lowest PYTHON ...] [--newest PYTHON ...] [--report FILE] [pytest arguments]

Each Python (a name or a path) gets an environment in .venv-lowest: `--lowest` with the lowest version of every
requirement, `--newest` with those of constraints.txt. What fails with the lowest raises the bound. Needs `uv`.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from rlhf_lightning.checkpointing.provenance import processor
from tests.processors import ROOT, run

UV = [sys.executable, "-m", "uv"]
# The oldest torch on PyPI is built for CUDA, which a process cannot use after a fork if it only asked for a device.
WITHOUT_CUDA = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
CHOICES = {"lowest": ["--resolution", "lowest-direct"], "newest": ["--constraint", "constraints.txt"]}


def requirements() -> list[str]:
    """Names of the requirements in pyproject.toml, including those of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [re.split(r"[^\w.-]", requirement)[0].lower() for requirement in given]


def install(python: str, choice: str) -> Path:
    """Create an environment with this project; returns its interpreter."""
    folder = ROOT / ".venv-lowest" / f"{Path(python).name}-{choice}"
    subprocess.run(
        [*UV, "venv", "--quiet", "--clear", "--seed", "--no-python-downloads", "--python", python, folder], check=True
    )
    interpreter = folder / "bin" / "python"
    project = ["--python", interpreter, *CHOICES[choice], "--editable", ".[dev]"]
    subprocess.run([*UV, "pip", "install", "--quiet", *project], cwd=ROOT, check=True)
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """Versions of Python and of the requirements."""
    listing = [*UV, "pip", "list", "--quiet", "--format", "json", "--python", interpreter]
    there = {one["name"].lower(): one["version"] for one in json.loads(subprocess.check_output(listing))}
    said = subprocess.check_output([interpreter, "--version"], text=True)
    return {"python": said.split()[1], **{name: there[name] for name in requirements()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for choice in CHOICES:
        parser.add_argument(f"--{choice}", nargs="+", default=[], metavar="PYTHON")
    parser.add_argument("--report", type=Path, help="write what ran and how it ended to this file")
    options, arguments = parser.parse_known_args()
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    lines, failed = [f"{machine}; {datetime.now(UTC):%Y-%m-%d}", ""], False
    for choice in CHOICES:
        for python in getattr(options, choice):
            interpreter = install(python, choice)
            libraries = ", ".join(f"{name} {version}" for name, version in versions(interpreter).items())
            print(f"== {choice}: {libraries}", flush=True)
            counts, bad, seconds = run(WITHOUT_CUDA, arguments, python=str(interpreter))
            failed = failed or bool(bad)
            ended = f"{choice}: {', '.join(f'{value} {key}' for key, value in counts.items())}; {seconds / 60:.0f} min"
            lines += [ended, f"    {libraries}", *(f"    failed: {test}" for test in bad)]
            print(ended, flush=True)
            if options.report:
                options.report.write_text("\n".join(lines) + "\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
