"""`report.html`: one self-contained page about a run."""

import logging
from collections.abc import Callable
from pathlib import Path

from rlhf_lightning.files import replace_text
from rlhf_lightning.report import sections
from rlhf_lightning.report.html import Html, el, text
from rlhf_lightning.report.read import Run, read_run

log = logging.getLogger(__name__)
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
# The page loads nothing and runs no script, regardless of what a model's answers contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(root: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a pipeline or a stage.

    Args:
        root: The folder of the pipeline or stage.
        output: Path of the report; by default `report.html` in the folder.

    Returns:
        The path that was written.

    Raises:
        UserError: If the folder contains no run.
    """
    path = Path(output) if output else Path(root) / "report.html"
    page = render(read_run(Path(root)))
    replace_text(path, page)
    return path


def report_after_stage(root: Path, publish: Callable[[Path], None] = lambda path: None) -> None:
    """Write the report after a stage of a run. An error is logged with its traceback, and not raised.

    Args:
        root: The folder of the stage or pipeline.
        publish: Called with the path of the report.
    """
    try:
        path = write_report(root)
        log.info("report: %s", path)
        publish(path)
    except Exception:
        # The stage is finished and its model is saved, so a failure here must not affect the exit code or the pipeline.
        log.exception("%s: the report could not be written; `rlhf report %s` tries again", root, root)


def render(run: Run) -> str:
    """The whole page as HTML."""
    single = len(run.stages) == 1
    body = [
        el("h1", run.name),
        el("p", "a stage" if single else f"a run of {len(run.stages)} stages", f" in {run.root}", class_="lead"),
        sections.overview(run),
        sections.warnings(run),
        sections.held_out(run),
        *(sections.stage_section(stage) for stage in reversed(run.stages)),
        sections.lineage(run),
        sections.what_was_run(run),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(run.name)}: report</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{el("body", el("main", *body))}</html>\n'


__all__ = ["Html", "render", "report_after_stage", "write_report"]
