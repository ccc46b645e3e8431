"""Progress of a stage and of a pipeline: bars in a terminal, plain lines elsewhere."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.callbacks import progress as progress_module
from rlhf_lightning.callbacks.console import ConsoleLines, headline, remaining
from rlhf_lightning.callbacks.progress import StageProgress, progress_callbacks
from rlhf_lightning.callbacks.samples import SamplesLog
from rlhf_lightning.files import duration
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.objectives.policy import ImportanceSampling
from rlhf_lightning.pipeline.eta import Eta
from rlhf_lightning.pipeline.plan import Plan, Stage
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GroupCentered
from tests.helpers.cli import stage_config, write_yaml
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer


def test_important_metrics_come_first() -> None:
    policy = ["v_num", "val/reward_sampled", "train/truncated", "train/kl", "train/entropy", "train/reward"]
    assert list(headline(dict.fromkeys(policy, 0))) == ["reward", "kl", "entropy", "truncated", "val/reward_sampled"]
    preference = ["val/loss", "train/loss", "val/accuracy", "train/margin", "train/accuracy"]
    assert list(headline(dict.fromkeys(preference, 0))) == ["accuracy", "margin", "loss", "val/accuracy", "val/loss"]
    assert headline({"val/nll": 2, "train/nll": 1, "own": 3}) == {"nll": 1, "own": 3, "val/nll": 2}


def test_times() -> None:
    assert [duration(s) for s in (0.4, 59.6, 75, 3725, None)] == ["0 s", "1 min 0 s", "1 min 15 s", "1 h 2 min", "–"]
    assert remaining(30.0, 10, 20.0) == ", 1 min 0 s left"
    assert remaining(30.0, 0, 20.0) == remaining(30.0, 10, 0.0) == remaining(30.0, 10, float("inf")) == ""


def test_prints_lines_without_a_terminal_and_a_bar_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_callbacks(False, [])[0], ConsoleLines)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert progress_callbacks(True, []) == []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress_callbacks(True, [])[0], StageProgress)
    assert progress_callbacks(True, [TQDMProgressBar]) == []


def test_a_line_for_each_optimizer_step(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With four micro-batches per step and a round per step, each step has one line, with its round's reward."""
    module = PolicyRLModule(base, rewards=[FunctionReward(letters)], sampler=Sampler(6), optimizer=sgd(0.01))
    data = PromptDataModule(prompts(6), prompts_per_round=2, group_size=4, minibatches=4, show_example=False)
    run = trainer(tmp_path, accumulate_grad_batches=4, callbacks=[ConsoleLines(seconds=0.0), SamplesLog(table_every=0)])
    run.fit(module, data)
    lines = re.findall(r"^step (\d)/3 .*?  reward (\S+)", capsys.readouterr().out, re.MULTILINE)
    rewards: dict[int, list[float]] = {}
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        rewards.setdefault(row["step"], []).append(row["reward"])
    assert len({f"{fmean(found):.4g}" for found in rewards.values()}) == 3
    assert lines == [(str(step + 1), f"{fmean(found):.4g}") for step, found in sorted(rewards.items())]


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_long_sampling_has_lines(command: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each token where every token is long; none within the usual ten seconds."""
    shown = {}
    for seconds in (0.0, 10.0):
        module = PolicyRLModule(base, rewards=[FunctionReward(letters)], sampler=Sampler(6))
        rows: dict[str, Any] = {"train": prompts(3), "validation": prompts(5), "predict": prompts(5)}
        data = PromptDataModule(**rows, prompts_per_round=3, group_size=2, show_example=False)
        run = trainer(tmp_path, callbacks=[ConsoleLines(seconds=seconds)], num_sanity_val_steps=0)
        getattr(run, command)(module, data)
        pattern = r"^sampling: (\d) of (\d) responses, (\d+) tokens, \d s$"
        shown[seconds] = [
            tuple(map(int, found)) for found in re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
        ]
    assert shown[10.0] == []
    ends = [line for line in shown[0.0] if line[0] == line[1]]
    # The round of 3 prompts with 2 responses each; 5 held-out prompts at once, greedily and sampled; or 5 answers.
    wanted = {"fit": [6, 5, 5], "validate": [5, 5], "predict": [5]}[command]
    assert [rows for _, rows, _ in ends] == wanted
    assert len(shown[0.0]) == sum(tokens for *_, tokens in ends)


def letters(completions: list[str]) -> list[float]:
    """A reward that differs between random texts."""
    return [len(set(text)) / 10 for text in completions]


def test_rollouts_have_their_own_bar(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal, as the stage command sets it up; the bar counts each rollout to its end."""
    out = io.StringIO()
    bar = StageProgress()
    bar._console_kwargs = {"file": out, "force_terminal": True, "width": 140}
    seen: list[tuple[int, int, int]] = []

    class Spy(progress_module.RolloutProgress):
        def on_token(self, row: int, token: int, ended: bool) -> None:
            super().on_token(row, token, ended)
            self._update(visible=True)

        def end(self) -> None:
            assert self.bar.progress is not None
            task = self.bar.progress.tasks[self.bar.rollout_id]
            seen.append((self.rows, int(task.completed), self.tokens))
            super().end()
            assert not task.visible

    monkeypatch.setattr(progress_module, "RolloutProgress", Spy)
    module = PolicyRLModule(
        base, ImportanceSampling(), [FunctionReward(letters)], GroupCentered(), sampler=Sampler(6), optimizer=sgd(0.01)
    )
    data = PromptDataModule(prompts(4), prompts_per_round=2, group_size=3, show_example=False)
    run = trainer(tmp_path, enable_progress_bar=True, callbacks=[bar])
    run.fit(module, data)
    assert [(rows, done) for rows, done, _ in seen] == [(6, 6), (6, 6)]
    assert all(6 <= tokens <= 36 for *_, tokens in seen)
    assert list(bar.get_metrics(run, module))[:3] == ["reward", "entropy", "truncated"]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "Rollout, " in text
    assert "Epoch 0/0" in text


@pytest.mark.slow
def test_a_stage_on_a_terminal(base: str, tmp_path: Path) -> None:
    """In a pseudo-terminal: the bar, its metrics in order, and no plain lines."""
    config = stage_config("policy", base, tmp_path)
    config["model"]["rewards"] = [{"class_path": "rlhf_lightning.rewards.KeywordReward"}]
    file = write_yaml(tmp_path / "policy.yaml", config)
    command = [sys.executable, "-m", "rlhf_lightning", "policy", "fit", "-c", file]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    with subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(tmp_path / "run")], stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        parts = []
        while True:
            try:
                block = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            parts.append(block)
        assert process.wait(120) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode("utf-8", "replace"))
    assert re.search(r"reward: \S+ +entropy: \S+ +truncated: ", text), text[-3000:]
    assert "step 3/3" not in text


def test_pipeline_reports_the_remaining_time() -> None:
    stages = [Stage(name, "sft", {}) for name in ("a", "b", "c")]
    plan = Plan("p", stages, Path("runs/p"))
    assert Eta(plan, {}).before(stages[0]) == "0 s so far; then b, c"
    clock = Eta(plan, {name: {"seconds": 60.0 * i} for i, name in enumerate("abc", 1)} | {"d": {"status": "failed"}})
    clock.started -= 90
    assert clock.before(stages[1]) == "1 min 30 s so far; took 2 min 0 s last time; then c; about 5 min 0 s left"
    assert clock.before(stages[2]) == "1 min 30 s so far; took 3 min 0 s last time"


def test_watched_engine_samples_the_same_tokens(model: Any, tokenizer: Any) -> None:
    from rlhf_lightning.data.rendering import Renderer
    from rlhf_lightning.generation.local_engine import LocalEngine, Watch

    class Record(Watch):
        def __init__(self) -> None:
            self.told: list[Any] = []

        def begin(self, rows: int) -> None:
            self.told.append(rows)

        def on_token(self, row: int, token: int, ended: bool) -> None:
            self.told.append((row, token, ended))

        def end(self) -> None:
            self.told.append("end")

    sampler = Sampler(5).build(model, Renderer(tokenizer))
    before = sampler.generate([[1, 4, 5], [1, 6]], [1, 2])
    assert isinstance(sampler.engine, LocalEngine)
    sampler.engine.watch = record = Record()
    after = sampler.generate([[1, 4, 5], [1, 6]], [1, 2])
    assert [sample.ids for sample in before] == [sample.ids for sample in after]
    assert (record.told[0], record.told[-1]) == (2, "end")
    for row, sample in enumerate(after):
        assert [t for r, t, _ in record.told[1:-1] if r == row] == sample.ids
        assert [e for r, _, e in record.told[1:-1] if r == row] == [False] * (len(sample.ids) - 1) + [True]
