"""Reports of tests that run in an environment of their own."""

import os
import platform
import subprocess
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from rlhf_lightning.checkpointing.provenance import processor
from tests.processors import ROOT


def outcomes(result: Path) -> dict[str, str]:
    """Outcome of each test, by its name, from pytest's XML report."""
    found = {}
    for case in ElementTree.parse(result).getroot()[0]:
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def write_report(path: Path, found: Mapping[str, str], python: Path, libraries: Sequence[str]) -> None:
    """Write the machine, the versions and the outcome of each test to a file.

    Args:
        path: The file.
        found: Result of `outcomes`.
        python: Interpreter of the environment that the tests ran in.
        libraries: Names of the libraries in it whose versions are written.
    """
    code = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
    versions = subprocess.check_output([python, "-c", code, *libraries], text=True).split()
    used = ", ".join(f"{name} {version}" for name, version in zip(("python", *libraries), versions, strict=True))
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    lines = [f"{machine}; {datetime.now(UTC):%Y-%m-%d}", used, "", *(f"{found[name]}: {name}" for name in found)]
    path.write_text("\n".join(lines) + "\n")


def run_tests(
    description: str | None,
    python: Path,
    install: Callable[[], None],
    environment: Mapping[str, str],
    command: Sequence[str],
    files: Sequence[str],
    libraries: Sequence[str],
) -> tuple[int, dict[str, str], bool]:
    """Run tests in another environment, as the command line wants it, and write their report if it names one.

    Args:
        description: Help of the command line.
        python: Interpreter of the environment.
        install: Creates the environment or completes it; called unless the command line names an interpreter.
        environment: Environment variables to add.
        command: Arguments of pytest.
        files: What is tested unless the command line has arguments of pytest.
        libraries: Names of the libraries whose versions are written.

    Returns:
        The exit status, the outcome of each test, and whether the command line had no arguments of pytest.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write what ran and how it ended to this file")
    parser.add_argument("--python", type=Path, help=f"interpreter to use instead of that of {python.parents[1].name}")
    options, arguments = parser.parse_known_args()
    if options.python is None:
        install()
    used = options.python or python
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        tests = [used, "-m", "pytest", "-p", "no:cacheprovider", *command, f"--junitxml={result}"]
        ended = subprocess.run([*tests, *(arguments or files)], cwd=ROOT, env=variables)
        found = outcomes(result)
    if options.report:
        write_report(options.report, found, used, libraries)
    return ended.returncode, found, not arguments
