"""Reads the files in a run's folder for the report."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import read_table, real_path
from rlhf_lightning.report.records import (
    PreferenceReport,
    SampleRow,
    StageEntry,
    StageFacts,
    Summary,
    check_shape,
    is_there,
    read_manifest,
    read_record,
)
from rlhf_lightning.types import JSON, Row
from rlhf_lightning.yaml_files import read_mapping

T = TypeVar("T")
Points = list[tuple[float, float]]
COMPARED = 6


@dataclass
class Samples:
    """Samples of a run from `samples.jsonl`.

    Attributes:
        first: Rows of the first round.
        last: Rows of the last round.

    Example:
        >>> Samples().repeated
        []
    """

    first: list[SampleRow] = field(default_factory=list)
    last: list[SampleRow] = field(default_factory=list)
    repeated: list[tuple[SampleRow, SampleRow]] = field(default_factory=list)
    """Earliest and latest answer to each prompt that appears in several rounds, furthest apart first."""


@dataclass
class StageRun:
    """The contents of a stage's folder. Fields whose files do not exist (yet) are empty.

    Example:
        ```python
        stage = read_stage_run(Path("runs/quickstart/sft"), "sft")
        step, nll = stage.metrics["train/nll"][-1]
        ```
    """

    name: str
    folder: Path
    entry: StageEntry = field(default_factory=lambda: StageEntry(status="", inputs={}))
    """Entry in the manifest; its status is empty if the stage was not run by a pipeline."""
    facts: StageFacts = field(default_factory=StageFacts)
    config: str = ""
    metrics: dict[str, Points] = field(default_factory=dict)
    """Points `(step, value)` of each metric."""
    warnings: list[Row] = field(default_factory=list)
    preference: PreferenceReport = field(default_factory=PreferenceReport)
    samples: Samples = field(default_factory=Samples)
    held_out: list[tuple[SampleRow, SampleRow]] = field(default_factory=list)
    """Earliest and latest answer to each held-out prompt that was answered at several steps."""

    @property
    def kind(self) -> str:
        """`sft`, `preference` or `policy`."""
        return str(self.entry.get("kind") or self.facts.get("kind") or _kind(self.metrics))

    @property
    def status(self) -> str:
        """Status in the manifest; for a single stage, whether it is finished."""
        return str(self.entry.get("status") or ("finished" if self.facts else "not finished"))

    @property
    def settings(self) -> dict[str, JSON]:
        """Contents of its `config.yaml`."""
        return yaml.safe_load(self.config) or {}


@dataclass
class Run:
    """The contents of a pipeline's folder, or of a single stage's.

    Example:
        ```python
        run = read_run(Path("runs/quickstart"))
        print([(stage.name, stage.status) for stage in run.stages])
        ```
    """

    name: str
    root: Path
    stages: list[StageRun]
    plan: str = ""
    summary: Summary = field(default_factory=Summary)
    """For a quickstart: metrics and answers of the base, SFT and RL models."""


def read_run(root: Path) -> Run:
    """Read a folder; raises `UserError` if it contains no run."""
    manifest = read_manifest(root / "manifest.json")
    if manifest:
        stages = [read_stage_run(root / name, name, entry) for name, entry in (manifest.get("stages") or {}).items()]
        name = str(manifest.get("name") or root.name)
        return Run(name, root, stages, _text(root / "pipeline.yaml"), read_record(root / "summary.json", Summary))
    if any((root / name).exists() for name in ("stage.json", "metrics.csv", "config.yaml")):
        return Run(real_path(root).name, root, [read_stage_run(root, real_path(root).name)])
    what = "contains no run (no manifest.json, stage.json or metrics.csv)" if root.is_dir() else "no such folder"
    raise UserError(f"{root}: {what}. Give the folder of a pipeline or of a stage, for example runs/quickstart")


def read_stage_run(folder: Path, name: str, entry: StageEntry | None = None) -> StageRun:
    """Read a stage's folder.

    Args:
        folder: The folder.
        name: Name of the stage.
        entry: Its entry of the manifest, if any.
    """
    return StageRun(
        name,
        folder,
        entry or StageEntry(status="", inputs={}),
        read_record(folder / "stage.json", StageFacts),
        _config(folder / "config.yaml"),
        read_metrics(folder / "metrics.csv"),
        [row for _, row in _located(folder / "warnings.jsonl", Row)],
        read_record(folder / "preference_report.json", PreferenceReport),
        read_samples(folder / "samples.jsonl"),
        read_held_out(folder / "heldout.jsonl"),
    )


def read_metrics(path: Path) -> dict[str, Points]:
    """Columns of `metrics.csv`, each as points `(step, value)`."""
    found: dict[str, Points] = {}
    if not is_there(path):
        return found
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            for row in read_table(stream):
                step = row.get("step") or ""
                if not step.isdecimal():
                    continue  # an incomplete line, written when the run was stopped
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        found.setdefault(name, []).append((float(step), float(value)))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: not a valid table of metrics ({error}); restore the file") from None
    return found


def read_samples(path: Path) -> Samples:
    """Read samples in one pass, keeping only the first and last round and the file offsets of each prompt's answers."""
    samples = Samples()
    offsets: dict[int, list[tuple[int, int]]] = {}
    for offset, row in _located(path, SampleRow):
        step = row["step"]  # identifies the round
        if not samples.first or samples.first[0]["step"] == step:
            samples.first.append(row)
        if samples.last and samples.last[0]["step"] != step:
            samples.last = []
        samples.last.append(row)
        answers = offsets.setdefault(hash(json.dumps(row["prompt"], sort_keys=True)), [])
        if not answers or answers[-1][0] != step:
            # Keep the prompt's first answer in its first round and in its latest round.
            answers[1:] = [(step, offset)]
    if samples.first and samples.first[0]["step"] == samples.last[0]["step"]:
        samples.last = []
    repeated = [answers for answers in offsets.values() if len(answers) > 1]
    furthest = sorted(repeated, key=lambda a: (a[0][0] - a[1][0], a[0][1]))[:COMPARED]
    samples.repeated = [(_at(path, before[1]), _at(path, after[1])) for before, after in furthest]
    return samples


def read_held_out(path: Path) -> list[tuple[SampleRow, SampleRow]]:
    """Read answers to held-out prompts: the earliest and the latest to each prompt, in the order of the prompts."""
    answers: dict[int, list[SampleRow]] = {}
    for _, row in _located(path, SampleRow):
        answers.setdefault(row.get("group", 0), []).append(row)
    pairs = [(rows[0], rows[-1]) for _, rows in sorted(answers.items())]
    return [(before, after) for before, after in pairs if before["step"] != after["step"]]


def _located(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Complete lines with their offsets; an incomplete last line, written when the run was stopped, is left out."""
    if not is_there(path):
        return
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.endswith(b"\n") and line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}:{number}: not valid JSON ({error}); restore the file") from None
                check_shape(row, kind, f"{path}:{number}")
                yield offset, row
            offset += len(line)


def _at(path: Path, offset: int) -> SampleRow:
    with open(path, "rb") as stream:
        stream.seek(offset)
        row: SampleRow = json.loads(stream.readline())
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if is_there(path) else ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore the file") from None


def _config(path: Path) -> str:
    text = _text(path)
    settings = read_mapping(path) if text.strip() else {}
    if not isinstance(settings.get("data") or {}, dict):
        raise ConfigError(f"{path}: does not contain the settings of a stage; restore the file")
    return text


def _kind(metrics: dict[str, Points]) -> str:
    """Kind of a stage, inferred from the metrics that it logged."""
    marks = {"train/nll": "sft", "train/accuracy": "preference", "train/margin": "preference", "train/reward": "policy"}
    return next((kind for name, kind in marks.items() if name in metrics), "stage")
