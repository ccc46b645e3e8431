"""Parses the pages for tests/test_docs.py: their blocks, tables, links and the names they use.

A comment on the line before a fenced block says how the block is tested:

- `<!-- test: slow -->`: it runs among the slow tests;
- `<!-- test: skip REASON -->`: it does not run;
- `<!-- file: PATH -->`: it stands so in that file, whose own test runs it.

Without one, ```bash and ```python blocks are run in a folder with small files and tiny models. A Hub id in them stands
for a tiny model on disk, and a `fit` is given `SHORT` beside its own flags.
"""

import inspect
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.runs import complete

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
HUB_IDS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "DIR_OR_HUB_ID")
SHORT = {
    "sft": "--fresh --trainer.max_steps 2 --trainer.limit_val_batches 1",
    "preference": "--fresh --trainer.max_steps 2 --trainer.limit_val_batches 1",
    "policy": "--fresh --trainer.max_steps 4 --data.prompts_per_round 2 --data.group_size 2 "
    "--model.sampler.max_tokens 4",
}


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    """What its comment says, `slow`, `skip …`, `file …` or nothing."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start, indent = None, ""
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if start is None:
            start, indent = number, line[: len(line) - len(line.lstrip())]
            continue
        before = lines[start - 1].strip() if start else ""
        comment = re.fullmatch(r"<!-- (?:test: )?(.*) -->", before)
        text = "\n".join(part.removeprefix(indent) for part in lines[start + 1 : number])
        found.append(Block(page, start + 1, lines[start].strip()[3:], text, comment[1] if comment else ""))
        start = None
    assert start is None, f"{page}:{start} is not closed"
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def quoted(text: str) -> list[str]:
    """The texts between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def tables(page: Path) -> dict[str, list[list[str]]]:
    """Cells of the tables under each heading, without header and rule."""
    found: dict[str, list[list[str]]] = {}
    heading, header = "", True
    for line in prose(page).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            header = True
        elif header:
            header = False
        elif not set(line) <= set("|-: "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


# -- running ----------------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    """The commands of a block; lines that end with a backslash are joined."""
    joined = block.text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def run_commands(lines: list[str], folder: Path, model: str, output: Path) -> None:
    """Run commands one after the other as a shell would; each must exit with 0."""
    where = folder
    for line in lines:
        for name in HUB_IDS:
            line = line.replace(name, model)
        words = shlex.split(line, comments=True)
        if words[0] == "cd":
            where = where / words[1]
            assert where.is_dir(), line
        elif words[0] == "rlhf" and "|" not in words:
            if words[2:3] == ["fit"]:
                words += SHORT[words[1]].split()
            complete(words[1:], output, before=lambda folder=where: _enter(folder))  # type: ignore[misc]
        else:
            # A pipe, say: by a shell, which may not have the command on its path.
            line = re.sub(r"(?<![\w/])rlhf (?=[a-z])", f"{sys.executable} -m rlhf_lightning ", line)
            done = subprocess.run(["bash", "-ec", line], cwd=where, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def _enter(folder: Path) -> None:
    import os

    os.chdir(folder)


# -- names ------------------------------------------------------------------------------------------------------------


def setting_exists(name: str) -> bool:
    """True if `model.kl.coefficient`, `data.train`, `trainer.precision` … is an argument of some constructor."""
    import lightning.pytorch as pl

    import rlhf_lightning as package

    root, *parts = name.split(".")
    classes: list[Any] = {
        "model": [package.SFTModule, package.PreferenceModule, package.PolicyRLModule],
        "data": [package.SFTDataModule, package.PreferenceDataModule, package.PromptDataModule],
        "trainer": [pl.Trainer],
    }[root]
    for part in parts:
        if part in ("init_args", "class_path"):
            continue
        hints = [hint for one in classes for hint in _hints(one, part)]
        if not hints:
            return False
        classes = [kind for hint in hints for kind in _classes(hint)]
    return True


def _hints(kind: Any, name: str) -> Iterator[Any]:
    """The annotations of an argument in the constructors of a class and its bases."""
    for base in inspect.getmro(kind):
        if "__init__" in vars(base) and name in inspect.signature(base.__init__).parameters:
            made = inspect.unwrap(base.__init__)
            # Of this argument alone: others may name what only type checkers import.
            one = SimpleNamespace(__annotations__={name: made.__annotations__.get(name, Any)})
            yield typing.get_type_hints(one, globalns=made.__globals__)[name]


def _classes(hint: Any) -> Iterator[Any]:
    """The classes that an annotation names, and their subclasses."""
    for part in typing.get_args(hint):
        yield from _classes(part)
        if isinstance(part, list):
            yield from (kind for one in part for kind in _classes(one))
    if inspect.isclass(hint):
        yield hint
        if hint is not object:
            for kind in hint.__subclasses__():
                yield from _classes(kind)


@cache
def defined_names() -> set[str]:
    """Classes and functions of the package and the examples."""
    found: set[str] = set()
    for folder in ("rlhf_lightning", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", path.read_text(), re.MULTILINE))
    return found


@cache
def words() -> set[str]:
    """All words in the sources."""
    found: set[str] = set()
    for folder in ("rlhf_lightning", "examples", "configs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".css") and path.name not in ("docs.py", "test_docs.py"):
                found |= set(re.findall(r"\w+", path.read_text()))
    return found
