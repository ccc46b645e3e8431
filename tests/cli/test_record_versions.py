"""Records of another format, and invalid records, are refused with a clear message wherever they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.checkpointing.io import damage
from rlhf_lightning.data.rendering_settings import recorded
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import FORMAT, check_format
from tests.helpers.cli import mistake, rlhf, stage_config, write_yaml
from tests.helpers.rows import write_rows


def test_check_format_accepts_only_this_version() -> None:
    check_format(None, "it")  # before there was one
    check_format(FORMAT, "it")
    for found in (FORMAT + 1, FORMAT - 1, -1, 1.5, True, "1", [FORMAT], {}):
        with pytest.raises(ConfigError, match=r"it has format .*, but this version reads format"):
            check_format(found, "it")


def changed(path: Path, **values: Any) -> None:
    """Change values in a JSON object, as another version or another program would."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_stage_with_records_of_another_format_is_refused(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data record, result and checkpoint are each refused by name, and left unchanged."""
    config, run = write_yaml(tmp_path / "sft.yaml", stage_config("sft", base, tmp_path)), tmp_path / "run"
    args = ["sft", "fit", "-c", config, "--trainer.default_root_dir", str(run), "--checkpoint_every", "1"]
    rlhf(*args)
    kept = {name: (run / name).read_text() for name in ("sources.json", "stage.json")}
    for name, whole in kept.items():
        assert json.loads(whole)["format"] == FORMAT
        changed(run / name, format=2)
        for command in (args, [*args, "--trainer.max_epochs", "2"]):
            said = mistake(command, capsys)
            assert f"{run / name} has format 2, but this version reads format {FORMAT}: update rlhf-lightning" in said
        (run / name).write_text(whole)
    changed(run / "sources.json", train=["x"])
    assert "sources.json: train is not a valid data record (['x'])" in mistake(args, capsys)
    changed(run / "sources.json", train=None)
    assert "sources.json: train is not a valid data record (None)" in mistake(args, capsys)
    changed(run / "stage.json", format=0)
    for command in (["report", str(run)], ["pipeline", "--verify", str(run)]):
        assert f"{run / 'stage.json'} has format 0, but this version reads format" in mistake(command, capsys)
    for name, whole in kept.items():
        (run / name).write_text(whole)

    checkpoint = sorted((run / "checkpoints").glob("*.ckpt"))[-1]
    torch.save({**torch.load(checkpoint, weights_only=True), "format": 2}, checkpoint)
    before = checkpoint.read_bytes()
    said = rlhf(*args, "--trainer.max_epochs", "2", code=2)
    assert f"the checkpoint {checkpoint} has format 2, but this version reads format {FORMAT}: update" in said
    assert "Traceback" not in said
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"format": 2, "stages": {}}, "has format 2, but this version reads format 1: update rlhf-lightning"),
        ({"format": 0, "stages": {"sft": {}}}, "has format 0, but this version reads format 1: use the version"),
        ({"stages": []}, "restore the file"),
        ([], "contains a list, not an object"),
    ],
)
def test_pipeline_with_a_record_of_another_format_is_refused(
    manifest: Any, words: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "run.lock").write_text("")
    rows = write_rows(tmp_path / "sft.jsonl", [{"prompt": "a", "response": "b"}] * 2)
    stage = {"name": "sft", "kind": "sft", "overrides": {"model": {"model": base}, "data": {"train": rows}}}
    plan = write_yaml(tmp_path / "plan.yaml", {"name": "mine", "stages": [stage]})
    commands = [["pipeline", plan, "--root", str(run)], ["pipeline", "--verify", str(run)], ["report", str(run)]]
    for command in commands:
        said = mistake(command, capsys)
        assert f"{run / 'manifest.json'}" in said
        assert words in said


@pytest.mark.parametrize("name", ["quickstart.json", "summary.json"])
@pytest.mark.parametrize(("text", "words"), [('{"format": 2}', "has format 2, but"), ("[", "cannot be read as JSON")])
def test_quickstart_with_records_of_another_format_is_refused(
    name: str, text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_lightning.quickstart import run

    (tmp_path / name).write_text(text)
    read: dict[str, Callable[[], Any]] = {
        "quickstart.json": lambda: run._move_other_aside(run.QuickstartSettings(root=tmp_path)),
        "summary.json": lambda: run._earlier(tmp_path),
    }
    with pytest.raises(ConfigError, match=rf"{name}:? {words}"):
        read[name]()


def test_hub_model_with_a_record_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stage.json").write_text(json.dumps({"format": 9, "rendering": {}}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "stage.json"))
    with pytest.raises(ConfigError, match=r"stage\.json has format 9, but this version reads format"):
        recorded("owner/model")


@pytest.mark.parametrize("text", ["[", "[1]", "7"])
def test_invalid_checksums_are_reported_as_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text(text)
    assert damage(tmp_path) == "checksums.json cannot be read"
