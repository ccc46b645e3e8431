"""What loggers of other tools get of a run, without a network: metrics, samples, and the report."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import rlhf_process, stage_config, write_yaml
from tests.helpers.runs import complete

COLUMNS = ["step", "round", "group", "sample", "prompt", "response", "reward", "advantage", "kl", "stop_reason"]


def fit(base: str, tmp_path: Path, run: Callable[..., Any], name: str, **options: Any) -> list[dict[str, Any]]:
    """Train a policy for three rounds with a logger beside metrics.csv; returns the rows of samples.jsonl."""
    folder = tmp_path / "run"
    config = stage_config("policy", base, tmp_path)
    config["model"]["rewards"] = [{"class_path": "rlhf_lightning.rewards.LengthReward", "init_args": {"target": 4}}]
    csv = {"class_path": "rlhf_lightning.checkpointing.metrics_csv.MetricsCSV", "init_args": {"folder": str(folder)}}
    other = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": options}
    if name == "TrackioLogger":
        other["class_path"] = "rlhf_lightning.callbacks.trackio_logger.TrackioLogger"
    config["trainer"] |= {"default_root_dir": str(folder), "logger": [csv, other], "log_every_n_steps": 1}
    config["trainer"]["callbacks"] = [
        {"class_path": "rlhf_lightning.callbacks.samples.SamplesLog", "init_args": {"table_every": 2}}
    ]
    run("policy", "fit", "-c", write_yaml(tmp_path / "c.yaml", config))
    assert (folder / "report.html").is_file()
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def forked(tmp_path: Path) -> Callable[..., str]:
    return lambda *args: complete(list(args), tmp_path / "out.txt")


def test_tensorboard(base: str, tmp_path: Path, forked: Callable[..., str]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    rows = fit(base, tmp_path, forked, "TensorBoardLogger", save_dir=str(tmp_path / "tb"))
    [file] = (tmp_path / "tb").rglob("events.out.*")
    read = events.EventAccumulator(str(file))
    read.Reload()
    assert len(read.Scalars("train/reward")) == 3
    texts = [one.tensor_proto.string_val[0].decode() for one in read.Tensors("samples/text_summary")]
    assert [text.split(":")[0].strip() for text in texts] == ["round 0 (step 0)", "round 2 (step 2)"]
    best = max(rows[:8], key=lambda row: row["reward"])
    assert f"reward {best['reward']:.3g}" in texts[0]


def test_mlflow_with_local_files(
    base: str, tmp_path: Path, forked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="no mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = fit(base, tmp_path, forked, "MLFlowLogger", save_dir=str(tmp_path / "ml"))
    [metric] = (tmp_path / "ml").rglob("metrics/train/reward")
    assert len(metric.read_text().splitlines()) == 3
    tables = sorted((tmp_path / "ml").rglob("artifacts/samples/*.json"))
    assert [path.name for path in tables] == ["round_000000.json", "round_000002.json"]
    table = json.loads(tables[1].read_text())
    assert table["columns"] == [*COLUMNS, "reward_LengthReward"]
    assert [row[5] for row in table["data"]] == [row["response"] for row in rows[16:24]]
    [report] = (tmp_path / "ml").rglob("artifacts/report.html")
    assert report.read_bytes() == (tmp_path / "run" / "report.html").read_bytes()


def test_wandb_offline(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="no wandb")
    (tmp_path / "wb").mkdir()
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wb"))
    # In a process that ends as a user's does: wandb writes its last rows then.
    rows = fit(base, tmp_path, rlhf_process, "WandbLogger", save_dir=str(tmp_path / "wb"), offline=True)
    [file] = (tmp_path / "wb").rglob("run-*.wandb")
    content = file.read_bytes()
    assert b"train/reward" in content
    tables = [json.loads(path.read_text()) for path in (tmp_path / "wb").rglob("samples_*.table.json")]
    assert len(tables) == 2
    assert all(table["columns"] == [*COLUMNS, "reward_LengthReward"] for table in tables)
    first = next(table for table in tables if table["data"][0][1] == 0)
    assert [row[5] for row in first["data"]] == [row["response"] for row in rows[:8]]
    assert b"report.html" in content


def test_trackio_on_this_machine(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="no trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tk"))
    # In a process that ends as a user's does, because trackio reads its folder when it is imported.
    rows = fit(base, tmp_path, rlhf_process, "TrackioLogger", project="mine")
    read = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
from rlhf_lightning.callbacks.trackio_logger import TrackioLogger

[run] = trackio.Api().runs("mine")
for steps in ([0], [1]):  # the second continues the first
    logger = TrackioLogger("other", "named")
    logger.log_hyperparams({"optimizer": {"lr": 0.5}})
    for step in steps:
        logger.log_metrics({"loss": 1.5}, step)
    logger.finalize("success")
[other] = trackio.Api().runs("other")
logs = [SQLiteStorage.get_logs("mine", run.name), SQLiteStorage.get_logs("other", "named")]
print("FOUND", json.dumps([other.config["optimizer"], *logs]))
"""
    said = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout
    settings, logs, others = json.loads(said.partition("FOUND ")[2].splitlines()[0])
    assert settings == {"lr": 0.5}
    assert [(one["step"], one["loss"]) for one in others] == [(0, 1.5), (1, 1.5)]
    assert [one["step"] for one in logs if "train/reward" in one] == [0, 1, 2]
    tables = [one["samples"]["_value"] for one in logs if "samples" in one]
    assert [[row["response"] for row in table] for table in tables] == [
        [row["response"] for row in rows[first : first + 8]] for first in (0, 16)
    ]
    assert list(tables[0][0]) == [*COLUMNS, "reward_LengthReward"]
    [report] = [path for path in (tmp_path / "tk" / "artifacts").rglob("*") if path.is_file()]
    assert report.read_bytes() == (tmp_path / "run" / "report.html").read_bytes()
