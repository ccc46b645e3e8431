"""Standard streams that are closed or whose reader exits, and signals that stop a process, alone and in bursts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.checkpointing.signals import StopSignals, ended_once
from rlhf_lightning.run_folder import MARK
from tests.helpers.cli import stage_config, write_yaml
from tests.helpers.runs import Run, wait_for

RLHF = [sys.executable, "-m", "rlhf_lightning"]


def command(base: str, folder: Path, steps: int = 6) -> list[str]:
    settings = stage_config("sft", base, folder)
    settings["trainer"] |= {"max_steps": steps, "max_epochs": -1, "enable_progress_bar": False}
    root = ["--trainer.default_root_dir", str(folder / "run")]
    return ["sft", "fit", "-c", write_yaml(folder / "sft.yaml", settings), *root, "--checkpoint_every", "2"]


def finished(folder: Path) -> bool:
    return json.loads((folder / "run" / "stage.json").read_text())["steps"] == 6


def test_run_continues_when_the_reader_of_its_output_exits(base: str, tmp_path: Path) -> None:
    """As with `rlhf sft fit … 2>&1 | head -1`."""
    read, write = os.pipe()

    def piped() -> None:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        os.close(read)

    run = Run(command(base, tmp_path), tmp_path / "out.txt", piped)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    assert run.wait() == 0
    assert finished(tmp_path)
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert "has exited; the run continues" in log
    assert "model folder" in log


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_run_without_standard_streams(forked: bool, base: str, tmp_path: Path) -> None:
    def closed() -> None:
        """The streams as Python finds them after `>&- 2>&- <&-`."""
        os.closerange(0, 3)
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, name, None)

    if forked:
        assert Run(command(base, tmp_path), tmp_path / "out.txt", closed).wait() == 0
    else:
        line = " ".join([*RLHF, *command(base, tmp_path), ">&-", "2>&-", "<&-"])
        assert subprocess.run(["bash", "-c", line], timeout=100, check=False).returncode == 0
    assert finished(tmp_path)
    assert "model folder" in (tmp_path / "run" / "logs" / "run.log").read_text()


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["nothing"]])
def test_broken_pipe_is_not_reported(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    out = subprocess.run([*RLHF, *args], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    # argparse hides errors of its own printing.
    assert out.returncode == {"--help": 141, "generate": 0, "nothing": 2}[args[0]]
    assert "Traceback" not in out.stderr
    assert "BrokenPipe" not in out.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_full_disk_of_the_output_is_a_one_line_error() -> None:
    with open("/dev/full", "w") as full:
        out = subprocess.run([*RLHF, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert out.returncode == 2
    assert out.stderr == "error: the output: No space left on device; free disk space, or write to another disk\n"


def steps(folder: Path) -> int:
    file = folder / "run" / "metrics.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_burst_of_signals_stops_a_run_like_one_signal(number: int, base: str, tmp_path: Path) -> None:
    args = command(base, tmp_path, steps=100_000)
    run = Run(args, tmp_path / "out.txt")
    wait_for(lambda: steps(tmp_path) > 3, run)
    code = None
    while code is None:
        run.send(number)
        code = run.poll()
        time.sleep(0.001)
    assert code == 130, run.text
    assert run.text.count("stopping at the next safe point") == 1
    assert "Traceback" not in run.text
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert all(name.startswith("step=") for name in saved)
    assert f"stopped after step {max(int(name[5:-5]) for name in saved)};" in run.text


def test_nohup_keeps_a_run_alive(base: str, tmp_path: Path) -> None:
    run = Run(command(base, tmp_path), tmp_path / "out.txt", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for((tmp_path / "run" / MARK).exists, run)
    while (code := run.poll()) is None:
        run.send(signal.SIGHUP)
        time.sleep(0.01)
    assert code == 0, run.text
    assert finished(tmp_path)


def test_forwarded_signal_is_not_the_first_ctrl_c() -> None:
    stops = StopSignals()
    stops.on()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.heard()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stops.off()


def test_signal_handlers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: Any) -> None:
        raise AssertionError("the user's own handler")

    before = {number: signal.signal(number, own) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        stops = StopSignals()
        stops.on()
        stops.off()
        with ended_once():
            pass
        assert all(signal.getsignal(number) is own for number in before)
        with pytest.raises(KeyboardInterrupt), ended_once():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # on the way out of the process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
