"""Reports of tests that run in an environment of their own."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from rlhf_lightning.checkpointing.provenance import processor


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
