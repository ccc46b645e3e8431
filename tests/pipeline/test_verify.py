"""Verification of a pipeline's run by hashes, and forwarding of signals to its stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli.pipeline import run as command
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.pipeline.verify import verify_run
from tests.helpers.cli import rlhf, stage_config, three_stages, write_yaml
from tests.helpers.runs import Run, fork_stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Path:
    from tests.helpers.models import build_model

    folder = tmp_path_factory.mktemp("verified")
    build_model(session_tokenizer).save_pretrained(folder / "base")
    session_tokenizer.save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        fork_stages(patch)
        run_pipeline(three_stages(str(folder / "base"), folder))
    return folder


def wrong(folder: Path) -> dict[str, str]:
    return {f"{c.stage} {c.what}": c.status for c in verify_run(folder) if c.status != "same"}


def test_unchanged_run_is_verified(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["pipeline", "--verify", str(finished / "run")]) == 0
    out = capsys.readouterr().out
    assert "all unchanged" in out
    assert command(["pipeline", "--verify", str(finished / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    seen = {f"{check['stage']} {check['what']}" for check in found["checks"]}
    assert seen >= {f"{stage} {what}" for stage in ("sft", "preference", "policy") for what in ("config", "settings")}
    assert seen >= {"policy data.train", "policy start", "policy reward", "policy model", "policy stage.json"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("sft.jsonl", {"sft data.train": "differs"}),
        ("policy.yaml", {"policy config": "differs"}),
        ("run/policy/input.yaml", {"policy settings": "differs"}),
        ("run/preference/model/model.safetensors", {"preference model": "differs", "policy reward": "differs"}),
        (
            "run/sft/model/tokenizer.json",
            {"sft model": "differs", "preference start": "differs", "policy start": "differs"},
        ),
    ],
)
def test_changed_byte_is_detected(path: str, expected: dict[str, str], finished: Path, capsys: Any) -> None:
    file = finished / path
    before = file.read_bytes()
    # Replaces a letter, so that the files stay valid: another value of a weight, or of a key in YAML.
    place = before.rindex(b"e") if path.endswith(("json", "yaml", "jsonl")) else len(before) - 1
    try:
        file.write_bytes(before[:place] + b"f" + before[place + 1 :])
        assert wrong(finished / "run") == expected
        assert command(["pipeline", "--verify", str(finished / "run")]) == 1
        assert "differ from the record" in capsys.readouterr().out
        file.unlink()
        assert set(wrong(finished / "run")) >= set(expected)
        if "model/" not in path:
            assert wrong(finished / "run")[next(iter(expected))] == "missing"
    finally:
        file.write_bytes(before)
    assert wrong(finished / "run") == {}


def test_moved_run_and_single_stage_are_verified(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    (finished / "run").rename(moved)
    try:
        assert wrong(moved) == {}
        assert wrong(moved / "policy") == {}
        (moved / "policy" / "config.yaml").rename(tmp_path / "config.yaml")
        assert wrong(moved / "policy")["policy config"] == "missing"
        (tmp_path / "config.yaml").rename(moved / "policy" / "config.yaml")
    finally:
        moved.rename(finished / "run")


def test_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="neither a pipeline's manifest"):
        verify_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{half")
    with pytest.raises(ConfigError, match="cannot be read"):
        verify_run(tmp_path)
    for args in ([], ["plan.yaml", "--verify", "x"], ["plan.yaml", "--json"]):
        with pytest.raises(SystemExit) as stop:
            command(["pipeline", *args])
        assert stop.value.code == 2


def test_command_versions_and_environment_are_recorded(finished: Path) -> None:
    facts = json.loads((finished / "run" / "policy" / "stage.json").read_text())
    assert facts["command"][1:3] == ["policy", "fit"]
    assert facts["seed"] == 0
    assert set(facts["data"]) == {"train"}
    assert {"torch", "lightning", "threads", "ranks", "device", "machine", "precision"} <= set(facts["environment"])
    assert {"python", "transformers", "peft"} <= set(facts["versions"])
    assert "git" in facts
    assert len(facts["config_hash"]) == 64


# -- signals ----------------------------------------------------------------------------------------------------------

SLOW = """
import time


def slow(completions):
    time.sleep(0.05)
    return [float(len(text)) for text in completions]


def stuck(completions):
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass
"""


class Started:
    """A running pipeline with one policy stage, in its own session as from a terminal, or forked."""

    def __init__(self, base: str, folder: Path, function: str = "slow", forked: bool = False) -> None:
        (folder / "mine.py").write_text(SLOW)
        settings = stage_config("policy", base, folder)
        settings["trainer"] |= {"max_epochs": 100_000}
        reward = {"class_path": "rlhf_lightning.rewards.FunctionReward"}
        settings["model"]["rewards"] = [{**reward, "init_args": {"function": f"mine.{function}"}}]
        write_yaml(folder / "policy.yaml", settings)
        plan = {"name": "long", "root": str(folder / "run"), "stages": [{"kind": "policy", "config": "policy.yaml"}]}
        self.args = ["pipeline", write_yaml(folder / "plan.yaml", plan)]
        self.folder, self.out, self.forked = folder, folder / "out.txt", forked
        self.process = self.start()

    def start(self) -> Any:
        self.out.touch()
        if self.forked:
            return Run(self.args, self.out, self.prepare)
        with open(self.out, "ab") as out:
            command = [sys.executable, "-m", "rlhf_lightning", *self.args]
            return subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True
            )

    def prepare(self) -> None:
        os.chdir(self.folder)
        fork_stages(patch := pytest.MonkeyPatch())
        patch.setattr("rlhf_lightning.pipeline.stage_process.PATIENCE", 1.0)

    def wait_for(self, text: str, limit: float = 120) -> None:
        begun = time.monotonic()
        while text not in self.out.read_text():
            assert time.monotonic() - begun < limit, self.out.read_text()
            assert self.process.poll() is None, self.out.read_text()
            time.sleep(0.05)

    def gone(self) -> bool:
        """True if no process is left in its folder."""
        return not [process for process in Path("/proc").glob("[0-9]*") if folder_of(process) == self.folder]


def folder_of(process: Path) -> Path | None:
    try:
        return (process / "cwd").readlink()
    except OSError:  # it has ended, or belongs to somebody else
        return None


@pytest.fixture
def started() -> Any:
    """Ends the processes that a failing test leaves running."""
    runs: list[Started] = []
    yield lambda run: runs.append(run) or run
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            run.process.send_signal(signal.SIGINT)
            run.process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_forwarded_and_the_stage_writes_a_checkpoint(
    number: int, base: str, tmp_path: Path, started: Any
) -> None:
    run = started(Started(base, tmp_path, forked=number == signal.SIGTERM))
    run.wait_for("round 0")
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # a terminal sends it to all processes in the foreground
    else:
        run.process.send_signal(number)
    assert run.process.wait(60) == 130, run.out.read_text()
    assert run.gone()
    text = run.out.read_text()
    (saved,) = (tmp_path / "run" / "policy" / "checkpoints").glob("step=*.ckpt")
    assert f"stopped after {saved.stem.replace('=', ' ')}" in text
    assert "Traceback" not in text
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["policy"]["status"] == "running"
    run.forked = True
    run.process = run.start()
    run.wait_for(f"resuming {tmp_path / 'run' / 'policy'} from {saved}")
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(60)


def test_second_ctrl_c_kills_the_stage(base: str, tmp_path: Path, started: Any) -> None:
    run = started(Started(base, tmp_path, "stuck", forked=True))
    run.wait_for("policy: policy in")
    log = tmp_path / "run" / "logs" / "run.log"
    while not log.exists() or "rows read" not in log.read_text():
        assert run.process.poll() is None, run.out.read_text()
        time.sleep(0.05)
    time.sleep(2)
    begun = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130, run.out.read_text()
    assert time.monotonic() - begun < 20  # the reward ignores KeyboardInterrupt, so its process is killed
    assert run.gone()


SLEEPER = """
import sys
from rlhf_lightning.pipeline.stage_process import StageProcess

with StageProcess() as signals:
    print(signals.run([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(3)"]))
"""


def test_ctrl_z_suspends_the_stage(tmp_path: Path) -> None:
    def states() -> set[str]:
        ids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(ids) == 1
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in (process.pid, *ids)]
        return {stat.rpartition(")")[2].split()[0] for stat in stats}

    def wait_for(wanted: set[str]) -> None:
        begun = time.monotonic()
        while states() != wanted:
            assert time.monotonic() - begun < 20, states()
            time.sleep(0.02)

    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTSTP)
        wait_for({"T"})
        process.send_signal(signal.SIGCONT)
        wait_for({"S"})
        assert process.wait(60) == 0
        assert process.stdout.read() == "0\n"


def test_same_seed_gives_same_weights(base: str, tmp_path: Path) -> None:
    for kind in ("sft", "preference", "policy"):
        settings = stage_config(kind, base, tmp_path)
        if kind == "policy":
            settings["model"]["rewards"] = [{"class_path": "rlhf_lightning.rewards.KeywordReward"}]
            settings["model"]["rewards"][0]["init_args"] = {"keywords": ["a", "e"], "min_words": 1}
        config = write_yaml(tmp_path / f"{kind}.yaml", settings)
        hashes = {}
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            args = ["--trainer.default_root_dir", str(tmp_path / kind / name), "--seed_everything", str(seed)]
            rlhf(kind, "fit", "-c", config, *args)
            hashes[name] = json.loads((tmp_path / kind / name / "stage.json").read_text())["model_hash"]
        assert hashes["a"] == hashes["b"]
        assert hashes["a"] != hashes["c"]
