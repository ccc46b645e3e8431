"""Hooks of mkdocs.yml: files outside docs/ become pages too, and the API reference is generated.

A link between pages is written as it works on the code host, relative to the file. Here it is resolved in the
repository and pointed at the page that shows the target: a Markdown file as it is, any other text file as a block of
code, an image as an image. A link whose target does not exist stays as it is, and `mkdocs build --strict` fails on it.
"""

import ast
import os.path
import posixpath
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
"""Folder of the site with the files from outside docs/."""
IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".jsonl": "json", ".sh": "bash"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")

PACKAGE = "rlhf_lightning"
PARTS = {
    "modules": "Modules",
    "data": "Data",
    "types": "Records",
    "objectives": "Objectives",
    "rollout": "Rollouts, advantages, KL",
    "generation": "Generation",
    "rewards": "Rewards",
    "filtering": "Filter",
    "environments": "Environments",
    "models": "Models",
    "evaluation": "Evaluation",
    "callbacks": "Callbacks",
    "diagnostics": "Diagnostics",
    "checkpointing": "Checkpointing",
    "pipeline": "Pipeline",
}
"""The pages of the API reference and their titles; a subpackage without public names has none."""


def on_config(config: Any) -> Any:
    """Put the pages of the API reference into the navigation."""
    config.nav.append({"API reference": [{PARTS[part]: reference(part)} for part in public_names()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the API reference, and every file outside docs/ that pages link to, directly or through such files."""
    for part, names in public_names().items():
        entries = "\n\n".join(f"::: {path}\n    options:\n      heading: {heading}" for path, heading in names)
        text = f"# {PARTS[part]}\n\nThe public names of this part of the package.\n\n{entries}\n"
        files.append(File.generated(config, reference(part), content=text))
    waiting = [ROOT / "docs" / page.src_uri for page in files.documentation_pages() if page.generated_by is None]
    while waiting:
        page = waiting.pop()
        for target in targets(page):
            uri = place(target)
            if files.get_file_from_path(uri) is None:
                files.append(shown(target, uri, config))
                waiting += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of a page at pages of the site."""
    source = original(page.file.src_uri)
    if source is None:
        return markdown

    def moved(link: str) -> str:
        path, mark, anchor = link.partition("#")
        target = resolved(source, path)
        if target is None:
            return link
        return posixpath.relpath(place(target), posixpath.dirname(page.file.src_uri) or ".") + mark + anchor

    return relinked(markdown, moved)


def reference(part: str) -> str:
    """Path of a page of the API reference."""
    return f"reference/{part}.md"


@cache
def public_names() -> dict[str, list[tuple[str, str]]]:
    """For each subpackage the names that users write, as (path of the definition, shortest path to import it from).

    These are what packages export, what the pages and configs name, and what the examples import. Nothing is imported:
    the sources are parsed.
    """
    written = {f"{module}.{name}" for name, module in constant("_PUBLIC").items()}
    for package in modules():
        if modules()[package].name == "__init__.py":
            written |= {f"{package}.{name}" for name in imported(package)}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    classes = {f".{node.name}": module for module in modules() for node in parsed(module).body if is_class(node)}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        written |= set(re.findall(rf"\b{PACKAGE}(?:\.\w+)+", text))
        if page.suffix == ".md" and page.name != "ARCHITECTURE.md":  # that one names internals
            words = {f".{name}" for name in re.findall(r"`(?:\w+\.)*([A-Z]\w+)(?:\([^`]*\))?`", text)}
            written |= {classes[word] + word for word in words & classes.keys()}
    for example in (ROOT / "examples").glob("*.py"):
        written |= {f"{module}.{name}" for name, module in names_from(ast.parse(example.read_text(encoding="utf-8")))}
    shortest: dict[str, str] = {}
    for path in sorted(written, key=lambda path: (path.count("."), path)):
        if definition := defined(path):
            shortest.setdefault(definition, path)
    shortest |= {f"{module}.{name}": f"{PACKAGE}.{name}" for name, module in constant("_PUBLIC").items()}
    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for path, heading in sorted(shortest.items()):
        parts.get(path.split(".")[1], []).append((path, heading))
    return {part: names for part, names in parts.items() if names}


@cache
def modules() -> dict[str, Path]:
    """The modules of the package by their dotted names."""
    paths = (ROOT / PACKAGE).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def parsed(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def is_class(node: ast.stmt) -> TypeGuard[ast.ClassDef]:
    """Whether a statement defines a class."""
    return isinstance(node, ast.ClassDef)


def constant(name: str) -> dict[str, str]:
    """A dict of strings that the package defines."""
    for node in parsed(PACKAGE).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    return {}


def names_from(tree: ast.Module) -> list[tuple[str, str]]:
    """The names that a module imports from the package, each with the module it comes from."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [
        (alias.name, node.module)
        for node in froms
        if node.module and node.module.split(".")[0] == PACKAGE
        for alias in node.names
    ]


def imported(module: str) -> dict[str, str]:
    """The public names that a module imports from the package, with the module of each."""
    return {name: source for name, source in names_from(parsed(module)) if not name.startswith("_")}


def defined(path: str) -> str | None:
    """The path at which a class or function is defined; None for any other name."""
    module, _, name = path.rpartition(".")
    if module not in modules() or name.startswith("_"):
        return None
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if any(isinstance(node, kinds) and node.name == name for node in parsed(module).body):
        return path
    source = imported(module).get(name)
    return defined(f"{source}.{name}") if source and source != module else None


def place(target: Path) -> str:
    """Path in the site of a file of the repository."""
    path = target.relative_to(ROOT).as_posix()
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" + ("" if target.suffix in (".md", *IMAGES) else ".md")


def original(uri: str) -> Path | None:
    """The Markdown file that a page shows; None for generated ones."""
    path = ROOT / uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else ROOT / "docs" / uri
    return path if path.is_file() else None


def resolved(source: Path, path: str) -> Path | None:
    """The file that a link of `source` names, the README of a folder; None for a web address or no file."""
    if not path or path.startswith(("http://", "https://", "mailto:")):
        return None
    target = Path(os.path.normpath(source.parent / path))
    target = target / "README.md" if target.is_dir() else target
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def targets(page: Path) -> list[Path]:
    """Files outside docs/ that a page links to."""
    found: list[Path] = []

    def seen(link: str) -> str:
        target = resolved(page, link.partition("#")[0])
        if target is not None and not target.is_relative_to(ROOT / "docs"):
            found.append(target)
        return link

    relinked(page.read_text(encoding="utf-8"), seen)
    return found


def relinked(markdown: str, change: Callable[[str], str]) -> str:
    """The text with every link outside of code blocks changed."""
    blocks = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        block if index % 2 else LINK.sub(lambda link: change(link[0]), block) for index, block in enumerate(blocks)
    )


def shown(target: Path, uri: str, config: Any) -> File:
    """A file of the repository as a page or an asset of the site."""
    if target.suffix in (".md", *IMAGES):
        return File.generated(config, uri, abs_src_path=str(target))
    language = LANGUAGES.get(target.suffix, "text")
    text = target.read_text(encoding="utf-8")
    name = target.relative_to(ROOT).as_posix()
    return File.generated(config, uri, content=f"# `{name}`\n\n``````{language}\n{text}\n``````\n")
