"""Pipes, sockets, devices and folders are refused immediately where a file is expected."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file, is_open_stream
from tests.helpers.cli import stage_config
from tests.helpers.fuzzing import refused, rlhf
from tests.helpers.rows import chats, prompts, write_rows


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # its name may not be long


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


KINDS: dict[str, Callable[[Path], None]] = {
    "named pipe": pipe,
    "socket": unix_socket,
    "device": device,
    "folder": folder,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_is_file_refuses_special_files(kind: str, here: Path) -> None:
    place = here / "thing"
    assert not is_file(place)
    KINDS[kind](place)
    with pytest.raises(ConfigError, match=f"thing: this is a {kind}; it must be a file"):
        is_file(place)
    place.rmdir() if kind == "folder" else place.unlink()
    place.write_text("")
    assert is_file(place)
    assert not is_open_stream(place)


@pytest.fixture
def stage(base: str, here: Path) -> Any:
    """Run an SFT stage with changed settings and flags."""

    def run(*flags: Any, **data: Any) -> Any:
        config = stage_config("sft", base, here, **data)
        config["trainer"]["max_steps"] = 1
        (here / "sft.yaml").write_text(yaml.safe_dump(config))
        return rlhf("sft", "fit", "-c", "sft.yaml", "--trainer.default_root_dir", "run", *flags)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_special_file_as_data_is_refused(kind: str, base: str, here: Path) -> None:
    for name in ("rows.jsonl", "rows", "rows.csv.gz"):
        KINDS[kind](here / name)
        refused(rlhf("data", "check", name, "--kind", "sft", "--model", base), f"{name}: this is a {kind}")
    for command in ("generate", "evaluate"):
        refused(rlhf(command, base, "rows.jsonl"), f"rows.jsonl: this is a {kind}")


@pytest.mark.parametrize("source", ["part-*.jsonl", "parts"])
def test_special_file_among_data_files_is_refused(source: str, base: str, here: Path) -> None:
    place = here / "parts" if source == "parts" else here
    place.mkdir(exist_ok=True)
    write_rows(place / "part-1.jsonl", chats(3))
    pipe(place / "part-2.jsonl")
    refused(rlhf("data", "check", source, "--kind", "sft", "--model", base), "part-2.jsonl: this is a named pipe")


@pytest.mark.parametrize("name", ["train", "validation"])
def test_special_file_as_data_of_a_stage_is_refused(name: str, stage: Any, here: Path) -> None:
    pipe(here / "waits.jsonl")
    refused(stage(**{name: "waits.jsonl"}), "waits.jsonl: this is a named pipe")


@pytest.mark.parametrize("kind", ["named pipe", pytest.param("folder", marks=pytest.mark.slow)])
def test_special_file_as_settings_is_refused(kind: str, stage: Any, base: str, here: Path) -> None:
    KINDS[kind](here / "thing")
    said = f"thing: this is a {kind}"
    refused(rlhf("sft", "fit", "-c", "thing"), said)
    refused(rlhf("pipeline", "thing"), said)
    (here / "plan.yaml").write_text("stages: [{kind: sft, config: thing}]")
    refused(rlhf("pipeline", "plan.yaml"), said)
    refused(stage("--ckpt_path", "thing"), said if kind != "folder" else "this folder is not a checkpoint")
    refused(stage("--log_file", "thing", "--fresh"), said)
    refused(stage("--model.chat_template", "thing", "--fresh"), said)
    refused(stage("--data.tools", "thing", "--fresh"), said)
    refused(rlhf("generate", base, "--prompt", "a", "--tools", "thing"), said)


@pytest.mark.parametrize("name", ["config.json", "stage.json", "model.safetensors", "tokenizer.json", "more.txt"])
def test_special_file_in_a_model_folder_is_refused(name: str, base: str, here: Path) -> None:
    for kind in ("named pipe", "socket", "device"):
        (Path(base) / name).unlink(missing_ok=True)
        KINDS[kind](Path(base) / name)
        refused(rlhf("generate", base, "--prompt", "a", "--max_tokens", "2"), f"{name}: this is a {kind}")
        refused(rlhf("export", base, "out"), f"{name}: this is a {kind}")


def test_pipe_as_model_is_refused(base: str, here: Path) -> None:
    pipe(here / "model")
    for args in (("generate", "model", "--prompt", "a"), ("init", "project", "--model", "./model")):
        refused(rlhf(*args), "model")


def test_special_file_in_the_folder_of_a_run_is_refused(stage: Any, here: Path) -> None:
    assert stage().code == 0
    for name in ("stage.json", "metrics.csv", "samples.jsonl", "config.yaml", "run.lock"):
        place, aside = here / "run" / name, here / "aside"
        kept = place.exists()
        if kept:
            place.rename(aside)
        pipe(place)
        if name != "run.lock":
            refused(rlhf("report", "run", "--overwrite"), f"{name}: this is a named pipe")
        if name not in ("metrics.csv", "samples.jsonl"):
            refused(stage(), f"{name}: this is a named pipe")
        place.unlink()
        if kept:
            aside.rename(place)
    assert stage().code == 0


def test_pipe_as_checkpoint_is_refused(stage: Any, here: Path) -> None:
    assert stage("--checkpoint_every", "1").code == 0
    (here / "run" / "stage.json").unlink()
    shutil.rmtree(here / "run" / "model")
    (checkpoint,) = (here / "run" / "checkpoints").glob("step=*.ckpt")
    checkpoint.unlink()
    pipe(checkpoint)
    result = stage("--checkpoint_every", "1")
    assert "is damaged" in result.err or result.code == 2, result.err


def test_process_substitution_is_read_once(base: str, here: Path) -> None:
    """`<(…)` is the name of an open pipe; its rows are read like those of a file."""
    text = Path(write_rows(here / "rows.jsonl", prompts(2))).read_bytes()
    asked = ("--max_tokens", "2", "--temperature", "0", "--json")
    found = {}
    for name in ("rows.jsonl", ""):
        ends = os.pipe()
        os.write(ends[1], text)
        os.close(ends[1])
        found[name] = rlhf("generate", base, name or f"/dev/fd/{ends[0]}", *asked)
        os.close(ends[0])
    assert found[""].code == 0, found[""].err
    assert found[""].out == found["rows.jsonl"].out
    ends = os.pipe()
    os.write(ends[1], b"model: {model: x}")
    os.close(ends[1])
    refused(rlhf("sft", "fit", "-c", f"/dev/fd/{ends[0]}"), "a stream, which can be read only once; it must be a file")
    os.close(ends[0])
