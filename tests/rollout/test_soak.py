"""An hour of policy RL: after 500 rounds of real rollouts the process uses no more memory than before.

`python -m tests.rollout.test_soak FOLDER [ROUNDS]` runs them and writes `FOLDER/soak.json`, which the test reads.
With RLHF_SOAK_REPORT set to a path the report is copied there; RLHF_SOAK_PROMPTS sets the prompts of a round (16, with
12 answers to each, take about an hour on one core).

The memory of a process depends on the lengths of the last answers and on what the allocator keeps for
later. Free memory is therefore returned first (`malloc_trim`), and the trend of the rest is measured.
"""

import ctypes
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest

ROUNDS, EVERY, WARM = 500, 10, 100
"""Rounds in all, from one measurement to the next, and until caches and the allocator's arenas are filled."""
GROWTH = 20.0
"""MB that the process may grow in 500 rounds by the trend: 40 kB a round, a fraction of what one round's episodes take
(several MB at 16 prompts), so that keeping a part of them is found."""


# -- the run ----------------------------------------------------------------------------------------------------------


class Guessing:
    """Episodes of one, two and three turns; every third turn's answer takes some time, in a thread."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row, self.turn = row, 0

    def reset(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.row["prompt"]}]

    def step(self, message: dict[str, Any]) -> Any:
        from rlhf_lightning.environments.base import StepResult

        self.turn += 1
        if self.turn == 3:
            time.sleep(0.002)
        near = 1 - abs(len(message["content"]) - self.row["wanted"]) / 60
        done = self.turn >= self.row["turns"]
        more = [] if done else [{"role": "user", "content": f"Again, {self.row['wanted']} letters"}]
        return StepResult(near, done, more, {"letters": float(len(message["content"]))})


def spread(completions: list[str]) -> list[float]:
    """Rewards many different letters."""
    return [len(set(text)) / 30 for text in completions]


def rows(count: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 40 words that ask for answers of different lengths."""
    draw = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {"prompt": " ".join(draw.choices(words, k=draw.randint(1, 40))), "wanted": 4 + 3 * (i % 20), "turns": 1 + i % 3}
        for i in range(count)
    ]


def resident() -> float:
    """Resident memory of the process in MB, including shared libraries."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def play(folder: Path, rounds: int) -> None:
    """Run the rounds in an ordinary Trainer with what `rlhf policy fit` adds; one optimizer step each."""
    import lightning.pytorch as pl
    import torch

    from rlhf_lightning import PolicyRLModule, PromptDataModule
    from rlhf_lightning.callbacks.export import ExportModel
    from rlhf_lightning.callbacks.samples import SamplesLog
    from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
    from rlhf_lightning.checkpointing.io import AtomicCheckpointIO
    from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
    from rlhf_lightning.checkpointing.nonfinite import NonFiniteGuard
    from rlhf_lightning.checkpointing.provenance import versions
    from rlhf_lightning.diagnostics.callback import Diagnostics
    from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
    from rlhf_lightning.environments.base import Limits
    from rlhf_lightning.generation.sampler import Sampler
    from rlhf_lightning.models.critic import Critic
    from rlhf_lightning.quickstart.model import make_model, make_tokenizer
    from rlhf_lightning.rewards import FunctionReward
    from rlhf_lightning.rollout.advantages import GAE
    from rlhf_lightning.rollout.kl import KLPenalty

    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    tokenizer = make_tokenizer([row["prompt"] for row in rows(128)] * 3 + ["Again, 12 letters", "user\nassistant\n"])
    model = make_model(tokenizer, 0)
    width = int(os.environ.get("RLHF_SOAK_PROMPTS", "16"))
    report: dict[str, Any] = {"cores": os.cpu_count(), "versions": versions(), "prompts_per_round": width, "rows": []}
    begun = time.monotonic()

    class Memory(pl.Callback):
        rounds = 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.rounds += 1
            tokens = [episode.response_tokens for episode in module.last_episodes]
            if self.rounds % EVERY and self.rounds != 1:
                return
            held = resident()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            report["rows"].append(
                {
                    "round": self.rounds,
                    "before_trim_mb": round(held, 2),
                    "rss_mb": round(resident(), 2),
                    "objects": len(gc.get_objects()),
                    "threads": threading.active_count(),
                    "files": len(os.listdir("/proc/self/fd")),
                    "tokens": [min(tokens), max(tokens)],
                    "minutes": round((time.monotonic() - begun) / 60, 2),
                }
            )
            (folder / "soak.json").write_text(json.dumps(report))

    module = PolicyRLModule(
        model,
        tokenizer=tokenizer,
        environment=Guessing,
        limits=Limits(step_timeout=20, max_turns=3),
        rewards=[FunctionReward(spread, timeout=20)],
        advantage=GAE(),
        critic=Critic(),
        kl=KLPenalty(0.05),
        sampler=Sampler(max_tokens=48, stop=["q", "z"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    watch = [SamplesLog(), FirstStepInvariants(), Diagnostics(), ExportModel(), NonFiniteGuard(), Memory()]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=rounds,
        max_epochs=-1,
        accumulate_grad_batches=1,
        gradient_clip_val=1.0,
        check_val_every_n_epoch=5,
        log_every_n_steps=1,
        default_root_dir=folder,
        logger=MetricsCSV(folder),
        plugins=[AtomicCheckpointIO()],
        callbacks=[*watch, RunCheckpoints(every=10)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    source = PromptDataModule(rows(128), rows(8), prompts_per_round=width, group_size=12, seed=0, show_example=False)
    trainer.fit(module, source)
    trend = summary(report["rows"]) if rounds > 2 * WARM else {}
    (folder / "soak.json").write_text(json.dumps({**report, **trend}, indent=1))


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The trend after warm-up (Theil-Sen: the median of the slopes between all pairs), as MB per 500 rounds."""
    late = [row for row in measured if row["round"] >= WARM]
    slopes = [
        (b["rss_mb"] - a["rss_mb"]) / (b["round"] - a["round"]) for i, a in enumerate(late) for b in late[i + 1 :]
    ]
    first = [row["rss_mb"] for row in late if row["round"] < 2 * WARM]
    last = [row["rss_mb"] for row in late[-len(first) :]]
    return {
        "rounds": measured[-1]["round"],
        "growth_mb_in_500_rounds": round(500 * median(slopes), 2),
        "mean_mb_rounds_100_to_200": round(fmean(first), 1),
        "mean_mb_last_100_rounds": round(fmean(last), 1),
        "minutes": measured[-1].get("minutes"),
    }


# -- the test ---------------------------------------------------------------------------------------------------------


def test_trend_detects_a_leak_but_not_noise() -> None:
    draw = random.Random(3)

    def found(leak: float) -> float:
        measured = [{"round": n, "rss_mb": 700 + leak * n + draw.uniform(-6, 6)} for n in range(10, 501, 10)]
        return summary(measured)["growth_mb_in_500_rounds"]

    assert abs(found(0.0)) < GROWTH / 2
    assert found(0.1) > GROWTH


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_memory_is_flat_over_500_rounds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.rollout.test_soak", str(tmp_path), str(ROUNDS)]
    with open(tmp_path / "out.txt", "wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2]).returncode
    assert code == 0, (tmp_path / "out.txt").read_text()[-3000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    if wanted := os.environ.get("RLHF_SOAK_REPORT"):
        shutil.copy(tmp_path / "soak.json", wanted)
    assert report["rounds"] == ROUNDS
    lengths = [row["tokens"] for row in report["rows"]]
    assert all(short < long for short, long in lengths), "answers of unlike length"
    assert report["growth_mb_in_500_rounds"] < GROWTH, report
    assert report["mean_mb_last_100_rounds"] < 1.02 * report["mean_mb_rounds_100_to_200"], report
    late = [row for row in report["rows"] if row["round"] >= WARM]
    for what in ("threads", "files"):
        assert max(row[what] for row in late) <= late[0][what] + 2, what
    steps = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(steps) > ROUNDS
    assert len(list((tmp_path / "checkpoints").glob("*.ckpt"))) == 2


if __name__ == "__main__":
    play(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS)
