"""The house: imports run one way, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_lightning"
# Each may import itself and what stands before it.
ORDER = [
    "objectives",
    "data",
    "models",
    "rollout",
    "modules",
    "callbacks",
    "strategies",
    "pipeline",
    "quickstart",
    "cli",
]
ANYONE = {"errors", "files", "run_folder", "untrusted"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rlhf_lightning.")}
    return found


@pytest.mark.parametrize("floor", ORDER)
def test_imports_run_one_way(floor: str) -> None:
    allowed = ANYONE | ({"objectives"} if floor == "objectives" else set(ORDER[: ORDER.index(floor) + 1]))
    for path in [PACKAGE / f"{floor}.py"] if floor == "strategies" else (PACKAGE / floor).rglob("*.py"):
        assert imported(path) <= allowed, f"{path.name} imports {imported(path) - allowed}"


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf_lightning", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert out.returncode == 0
    assert "rlhf pipeline" in out.stdout
    assert not any(name in out.stderr for name in ("torch", "lightning.pytorch", "transformers", "yaml"))
    assert time.perf_counter() - started < 3  # 0.05 s on an idle machine; this only catches a heavy import


def test_a_stage_imports_only_what_it_uses() -> None:
    code = (
        "import sys, rlhf_lightning as r; r.SFTModule; r.SFTDataModule; "
        "heavy = ['peft', 'datasets', 'pyarrow']; "
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_public_names() -> None:
    import rlhf_lightning

    for name in rlhf_lightning.__all__:
        assert getattr(rlhf_lightning, name)
    with pytest.raises(AttributeError):
        rlhf_lightning.nothing  # noqa: B018


def test_modules_stay_small() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): size for path, size in sizes.items() if size > 450} == {}
