"""The folder of a run: one writer at a time, and only results of runs are replaced."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning import SFTModule
from rlhf_lightning.cli import main as entry
from rlhf_lightning.cli.data_record import check_data_record
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.run_folder import MARK, STAGE_RESULTS, claim, claims, refuse_inputs_in
from tests.helpers.cli import mistake, rlhf_in_process, stage_config, write_yaml
from tests.helpers.models import build_model
from tests.helpers.rows import chats, write_rows
from tests.helpers.runs import Run, complete, wait_for


def fit(base: str, folder: Path, *further: str) -> list[str]:
    """A short SFT run."""
    settings = stage_config("sft", base, folder)
    settings["trainer"] |= {"max_steps": 2, "enable_progress_bar": False}
    return ["sft", "fit", "-c", write_yaml(folder / "own.yaml", settings), *further]


def tree(folder: Path) -> dict[str, bytes]:
    """The contents of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("further", [[], ["--fresh"]])
@pytest.mark.parametrize("name", ["model", "config.yaml", "checkpoints", "metrics.csv", "samples.jsonl"])
def test_files_of_the_user_are_not_overwritten(
    name: str, further: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    if "." in name:
        project.mkdir()
        (project / name).write_text("mine")
    else:
        shutil.copytree(base, project / name)
    before = tree(project)
    args = fit(base, tmp_path, "--trainer.default_root_dir", str(project), *further)
    assert f"{project / name} exists, was not written by rlhf" in mistake(args, capsys)
    assert tree(project) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Path:
    """The folder of a run, `run`, and its base, `base`."""
    folder = tmp_path_factory.mktemp("finished")
    build_model(session_tokenizer).save_pretrained(folder / "base")
    session_tokenizer.save_pretrained(folder / "base")
    args = fit(str(folder / "base"), folder, "--trainer.default_root_dir", str(folder / "run"))
    complete(args, folder / "first.txt")
    write_rows(folder / "run" / "samples.jsonl", chats(4))
    return folder


@pytest.mark.parametrize("further", [[], ["--fresh"]])
@pytest.mark.parametrize("key", ["model.model", "data.train", "data.validation", "model.tokenizer"])
def test_start_model_inside_the_results_is_rejected(
    key: str, further: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, project = str(finished / "base"), finished / "run"
    before = tree(project)
    value = project / ("samples.jsonl" if key.startswith("data") else "model")
    args = fit(base, tmp_path, f"--{key}", str(value), "--trainer.default_root_dir", str(project), *further)
    message = mistake(args, capsys)
    assert f"{key} is {value}, which is inside {value.resolve()}, where this run writes" in message
    assert tree(project) == before


def test_results_of_a_run_are_replaced_on_request(base: str, tmp_path: Path) -> None:
    args = fit(base, tmp_path, "--trainer.default_root_dir", str(tmp_path / "run"))
    complete(args, tmp_path / "1.txt")
    first = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert "is already finished" in complete(args, tmp_path / "2.txt")
    complete([*args, "--fresh"], tmp_path / "3.txt")
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns > first


def test_continued_run_that_fails_is_not_finished(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is continued with more steps and fails; the same command then does the rest."""
    run = tmp_path / "run"
    args = fit(base, tmp_path, "--trainer.default_root_dir", str(run))
    rlhf_in_process(*args)
    with monkeypatch.context() as patched:
        patched.setattr(SFTModule, "training_step", broken)
        with pytest.raises(ZeroDivisionError):
            rlhf_in_process(*args, "--trainer.max_steps", "3")
    rlhf_in_process(*args, "--trainer.max_steps", "3")
    assert (run / "checkpoints" / "step=3.ckpt").exists()
    assert (run / "stage.json").exists()


def broken(self: Any, *args: Any) -> None:
    raise ZeroDivisionError


def test_pipeline_file_is_not_overwritten_by_its_own_run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = stage_config("sft", base, tmp_path)
    write_yaml(tmp_path / "sft.yaml", settings)
    text = "# with a comment\n" + yaml.safe_dump({"stages": [{"kind": "sft", "config": "sft.yaml"}]})
    (tmp_path / "pipeline.yaml").write_text(text)
    assert "pipeline.yaml exists" in mistake(["pipeline", "pipeline.yaml", "--root", "."], capsys)
    assert (tmp_path / "pipeline.yaml").read_text() == text


# -- one writer -------------------------------------------------------------------------------------------------------


def holding(root: Path) -> int:
    """The id of a process that locks a folder until it is killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        claim(root, STAGE_RESULTS)
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return pid


def test_second_writer_is_rejected_and_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "run"
    pid = holding(root)
    with pytest.raises(ConfigError, match=f"process {pid} is writing to it"):
        claim(root, STAGE_RESULTS)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with claims():
        claim(root, STAGE_RESULTS)
        claim(root / ".." / "run", STAGE_RESULTS)  # by the same process, under another name
        assert (root / MARK).read_text().strip() == str(os.getpid())
    other = holding(root)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)


def test_second_run_names_the_process_that_uses_the_folder(base: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    pid = holding(root)
    text = complete(fit(base, tmp_path, "--trainer.default_root_dir", str(root)), tmp_path / "out.txt", code=2)
    assert f"error: {root}: process {pid} is writing to it. Wait until it ends" in text
    assert "Traceback" not in text
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_stage_ends_when_its_pipeline_is_killed(base: str, tmp_path: Path) -> None:
    """With kill -9 the parent sends nothing: the stage sees a pipe close and stops, and the same command resumes."""
    settings = stage_config("sft", base, tmp_path)
    settings["trainer"] |= {"max_steps": 200_000, "max_epochs": -1, "enable_progress_bar": False}
    write_yaml(tmp_path / "sft.yaml", settings)
    plan = write_yaml(tmp_path / "plan.yaml", {"stages": [{"kind": "sft", "config": "sft.yaml"}]})
    args = ["pipeline", plan, "--root", str(tmp_path / "run")]
    mark = tmp_path / "run" / "sft" / MARK
    run = Run(args, tmp_path / "out.txt")
    metrics = tmp_path / "run" / "sft" / "metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, run)
    stage = int(mark.read_text())
    os.kill(run.pid, signal.SIGKILL)
    os.waitpid(run.pid, 0)
    wait_for(lambda: not alive(stage))
    assert list((tmp_path / "run" / "sft" / "checkpoints").glob("step=*.ckpt")), run.text
    with claims():
        claim(tmp_path / "run" / "sft", STAGE_RESULTS)


def alive(pid: int) -> bool:
    """True if a process runs; a zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_are_found_in_nested_settings(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root / "model")
    good = {"model": str(tmp_path), "rewards": [{"init_args": {"model": "owner/name", "n": 3}}], "text": "x" * 5000}
    refuse_inputs_in(root, STAGE_RESULTS, {**good, "root": str(root), "null": "a\0b", "empty": ""})
    for bad in (str(tmp_path / "link"), str(root / "model" / ".." / "model"), os.path.relpath(root / "model")):
        with pytest.raises(ConfigError, match=r"rewards\.init_args\.model is .*, which is inside"):
            refuse_inputs_in(root, STAGE_RESULTS, {"rewards": [{"init_args": {"model": bad}}]})


def test_lock_file_names_the_writer(base: str, tmp_path: Path) -> None:
    entry_args = fit(base, tmp_path, "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.fast_dev_run", "1")
    with pytest.raises(SystemExit) as stop:
        entry.main(entry_args)
    assert stop.value.code == 0
    assert not (tmp_path / "run" / MARK).exists()  # a trial run writes no results
    assert json.loads((Path(base) / "config.json").read_text())


# -- the data of a run ------------------------------------------------------------------------------------------------


def interrupted(base: str, folder: Path) -> tuple[list[str], Path, Path]:
    """The command of a run that was stopped after one step, its folder, and its data."""
    settings = stage_config("sft", base, folder)
    settings["trainer"] |= {"max_epochs": 2, "enable_progress_bar": False}
    root = folder / "run"
    args = ["sft", "fit", "-c", write_yaml(folder / "own.yaml", settings), "--trainer.default_root_dir", str(root)]
    complete([*args, "--trainer.max_steps", "1", "--checkpoint_every", "1"], folder / "first.txt")
    (root / "stage.json").unlink()
    return args, root, Path(settings["data"]["train"])


def test_run_is_not_resumed_with_different_rows(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, root, data = interrupted(base, tmp_path)
    lines = data.read_text().splitlines(keepends=True)
    for text in ("".join(reversed(lines)), "".join(lines[1:]), "".join(lines).replace("Count 3", "Count 33")):
        data.write_text(text)
        assert f"data.train {data} has changed since the run in {root} began" in mistake(args, capsys)
    data.write_text("".join(lines))  # the rows as they were, at another time
    assert "resuming" in complete(args, tmp_path / "second.txt")
    data.write_text("".join(lines[1:]))
    assert "has changed since the run" in mistake(args, capsys)  # of a finished run, too
    complete([*args, "--fresh"], tmp_path / "third.txt")
    assert "is already finished" in complete(args, tmp_path / "fourth.txt")


def test_large_file_is_read_once(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, chats(3))
    check_data_record(tmp_path, {"train": str(data), "validation": [str(data)], "test": None})
    monkeypatch.setattr("rlhf_lightning.cli.data_record.fingerprint", lambda source: pytest.fail("it was read again"))
    check_data_record(tmp_path, {"train": str(data), "validation": [str(data)]})


def test_warns_that_hub_files_are_not_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        check_data_record(tmp_path, {"train": "owner/name:split"})
    assert caplog.text.count("data.train owner/name:split is not a local file") == 1
