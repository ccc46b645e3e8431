"""The order of the subpackages: imports go one way, and heavy packages are imported only when needed."""

import ast
import subprocess
import sys
import time
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_lightning"
TESTS = ROOT / "tests"
LAYERS = [
    {"cli", "quickstart"},
    {"tinker"},
    {"callbacks", "labeling", "serving"},
    {"diagnostics"},
    {"checkpointing"},
    {"modules", "evaluation"},
    {"rollout", "filtering"},
    {"rewards"},
    {"generation"},
    {"models"},
    {"pipeline", "environments"},
    {"report", "data"},
    {"distributed", "gguf", "untrusted", "rank_watch", "run_folder", "yaml_files", "web", "text_search"},
    {"files", "imports", "objectives", "sys_exit"},
    {"errors", "settings", "types"},
]
"""A subpackage imports itself and the lines below its own; on one line, only `cli` imports `quickstart`."""
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports, including imports within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
    return frozenset(found & MODULES.keys())


def subpackage(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(module for module in MODULES if subpackage(module) not in ("", "__main__")))
def test_subpackage_imports_only_lower_layers(module: str) -> None:
    level = {name: number for number, line in enumerate(LAYERS) for name in line}
    for other in imports(MODULES[module]) - {"rlhf_lightning"}:
        here, there = subpackage(module), subpackage(other)
        allowed = here == there or level[there] > level[here] or (here, there) == ("cli", "quickstart")
        assert allowed, f"{module} imports {other}"


def test_no_circular_imports() -> None:
    graph = {module: imports(path) - {module, "rlhf_lightning"} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_module_is_imported() -> None:
    """Imported, or named as a class path in the table of commands, a config, a page or an example."""
    named = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml")]
    named += [path for folder in ("docs", "configs", "examples") for path in (ROOT / folder).rglob("*")]
    text = "".join(path.read_text() for path in named if path.suffix in (".py", ".md", ".yaml"))
    used = set().union(*(imports(path) for path in MODULES.values()))
    for module, path in MODULES.items():
        assert module in used or module in text or path.name in ("__init__.py", "__main__.py"), f"{module} is not used"


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


def test_stage_imports_only_what_it_uses() -> None:
    code = (
        "import sys, rlhf_lightning as r, rlhf_lightning.rewards; r.SFTModule; r.SFTDataModule; "
        "heavy = ['peft', 'datasets', 'pyarrow', 'openai']; "
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


def test_test_files_import_only_helpers() -> None:
    """Code that two test files share is in tests/helpers, or is a fixture of a conftest.py."""
    for path in TESTS.rglob("*.py"):
        package = ["tests", *path.relative_to(TESTS).parent.parts]
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) + 1 - node.level] if node.level else []
                names = [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
            for name in names:
                first, *rest = name.split(".")
                alien = first == "tests" and any(part == "conftest" or part.startswith("test_") for part in rest)
                assert not alien, f"{path.relative_to(ROOT)} imports {name}"


def test_test_folders_mirror_the_package() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("*.py") if path.parent != TESTS}
    assert folders - set().union(*LAYERS) == {"helpers"}
