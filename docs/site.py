"""Hooks of mkdocs.yml: files outside docs/ become pages too, and the API reference is generated.

A link between pages is written as it works on the code host, relative to the file. Here it is resolved in the
repository and pointed at the page that shows the target: a Markdown file as it is, any other text file as a block of
code, an image as an image. A link whose target does not exist stays as it is, and `mkdocs build --strict` fails on it.
"""

import os.path
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
"""Folder of the site with the files from outside docs/."""
IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".jsonl": "json", ".sh": "bash"}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")

REFERENCE: dict[str, tuple[str, ...]] = {
    "Modules": ("modules.base", "modules.sft", "modules.preference", "modules.policy_rl", "modules.schedules"),
    "Data modules": ("data.base", "data.sft", "data.preference", "data.prompts", "data.rendering", "data.batching"),
    "Records": ("types",),
    "Policy objectives": ("objectives.policy.classes", "objectives.policy.losses", "objectives.policy.importance"),
    "Preference losses": (
        "objectives.preference.base",
        "objectives.preference.pairs",
        "objectives.preference.combined",
        "objectives.preference.pair_losses",
        "objectives.preference.label_losses",
    ),
    "Functions": (
        "objectives.supervised",
        "objectives.advantage",
        "objectives.aggregate",
        "objectives.kl",
        "objectives.value",
        "objectives.calibration",
    ),
    "Advantages and KL": ("rollout.advantages", "rollout.kl"),
    "Rewards": (
        "rewards.base",
        "rewards.function",
        "rewards.model",
        "rewards.verifiers",
        "rewards.length",
        "rewards.keywords",
        "rewards.pairwise",
        "rewards.normalization",
    ),
    "Environments": ("environments.base", "environments.tools"),
    "Sampling": ("sampling.sampler", "sampling.local_engine", "sampling.token_sampling", "sampling.vllm_engine"),
    "Models": (
        "models.lora",
        "models.scorers",
        "models.reward_model",
        "models.token_logprobs",
        "models.critic",
        "models.reference",
    ),
    "Inference": ("inference.policy", "inference.compare", "inference.text_metrics"),
    "Callbacks": ("callbacks.export", "callbacks.samples", "callbacks.memory", "callbacks.progress"),
    "Diagnostics": (
        "diagnostics.callback",
        "diagnostics.checks",
        "diagnostics.trends",
        "diagnostics.collapse",
        "diagnostics.invariants",
        "diagnostics.preference",
    ),
    "Checkpointing": (
        "checkpointing.callbacks",
        "checkpointing.nonfinite",
        "checkpointing.best",
        "checkpointing.metrics_csv",
        "checkpointing.strategies",
        "checkpointing.io",
    ),
    "Pipeline": ("pipeline.run",),
}
"""The modules of the API reference, page by page."""


def on_files(files: Files, config: Any) -> Files:
    """Add the API reference, and every file outside docs/ that pages link to, directly or through such files."""
    for title, modules in REFERENCE.items():
        entries = "\n\n".join(f"::: rlhf_lightning.{module}" for module in modules)
        files.append(File.generated(config, reference(title), content=f"# {title}\n\n{entries}\n"))
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


def reference(title: str) -> str:
    """Path of a page of the API reference."""
    return f"reference/{title.lower().replace(' ', '-')}.md"


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
