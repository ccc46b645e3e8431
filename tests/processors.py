"""Runs the numerical fast tests with the kernels and thread counts of other processors.

    python -m tests.processors [--report FILE] [--only NAME ...] [pytest arguments]

Which kernels torch, oneDNN and MKL choose depends on the processor, and with them the last bits of every float and
whether a row's numbers depend on the batch around it. A test that passes here must not rest on that. `make test-slow`
ends with this; a name is one of `sse`, `avx2`, `avx512`, `own`, followed by `-1` or `-2` threads.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

import torch

from rlhf_lightning.checkpointing.provenance import processor, versions

ROOT = Path(__file__).resolve().parents[1]
# As far as this processor goes; on AMD, MKL takes a level of its own for those that it does not offer there.
LEVELS = {
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
    "own": {},
}
# Threads that spin between the small operations of small models take the cores from whatever else runs.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Files without floats that a processor could round otherwise: texts, messages, documents, packages, drawing.
WITHOUT_NUMBERS = {
    "checkpointing/test_faults",
    "cli/test_configs",
    "cli/test_mistakes",
    "data/test_rendering",
    "report/test_html",
    "rollout/test_soak",
    "test_docs",
    "test_examples",
    "test_fuzz",
    "test_metrics_page",
    "test_packaging",
    "test_parity",
    "test_sizes",
    "test_summary",
}


def configurations() -> dict[str, dict[str, str]]:
    """The environment of each configuration; `own-1` is what `make test` uses."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    own = torch.backends.cpu.get_cpu_capability()
    there = ["sse", "avx2", "avx512"][: order.index(own) + 1 if own in order else 1]
    return {
        f"{level}-{threads}": {**LEVELS[level], **WAITING, "RLHF_TEST_THREADS": str(threads)}
        for level in [*there, "own"]
        for threads in (1, 2)
        if (level, threads) != ("own", 1)
    }


def run(
    environment: dict[str, str],
    arguments: list[str],
    ignored_files: Collection[str] = (),
    python: str = sys.executable,
) -> tuple[dict[str, int], list[str], float]:
    """Counts of the fast tests by outcome, the names of failed tests, and the seconds."""
    started = time.monotonic()
    ignored = [f"--ignore=tests/{name}.py" for name in sorted(ignored_files)]
    # As many processes as there are cores for their threads.
    processes = max(1, (os.cpu_count() or 1) // int(environment.get("RLHF_TEST_THREADS", 1)))
    common = ["-p", "no:cacheprovider", "-m", "not slow", "--dist", "worksteal", "--durations=4", *ignored]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [python, "-m", "pytest", *common, f"--junitxml={result}", "-n", str(min(processes, 4))]
        subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=False)
        suite = ElementTree.parse(result).getroot()[0]
    bad = [
        f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if any(child.tag in ("failure", "error") for child in case)
    ]
    skipped = int(suite.get("skipped", 0))
    counts = {"passed": int(suite.get("tests", 0)) - skipped - len(bad), "failed": len(bad), "skipped": skipped}
    return counts, bad, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write what ran and how it ended to this file")
    parser.add_argument("--only", nargs="+", default=list(configurations()), choices=list(configurations()))
    options, arguments = parser.parse_known_args()
    failed = False
    if options.report and not options.report.exists():
        libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
        cores = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        options.report.write_text(f"{processor()}, {cores}; {libraries}\n\n")
    for name in options.only:
        environment = configurations()[name]
        print(f"== {name}: {' '.join(f'{key}={value}' for key, value in environment.items())}", flush=True)
        counts, bad, seconds = run(environment, arguments, WITHOUT_NUMBERS)
        failed = failed or bool(bad)
        line = f"{name}: {', '.join(f'{value} {key}' for key, value in counts.items())}; {seconds / 60:.0f} min"
        print(line, flush=True)
        if options.report:
            with options.report.open("a") as file:
                settings = " ".join(f"{key}={value}" for key, value in environment.items())
                file.write("\n".join([line, f"    {settings}", *(f"    failed: {test}" for test in bad)]) + "\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
