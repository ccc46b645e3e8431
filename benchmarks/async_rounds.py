"""Seconds per round with rounds sampled ahead (`max_staleness`), for responses whose lengths have a long tail.

    python -m benchmarks.async_rounds [--rounds 24] [--repeats 3]

The engine of the first table simulates a server in another process: it waits for as long as the longest response of a
round takes, at a fixed time per token, and computes nothing. Lengths are log-normal (median 60 tokens, σ 0.8, at most
512), drawn from the seed of each response, so that every setting has the same lengths. Training is real: a model of
0.2M parameters, 4 prompts × 4 responses per round, importance weights on in every setting. The time per token is
chosen such that sampling takes half as long as training, equally long, or twice as long, measured in a first run.

The second table has the built-in engine in the training process, both on one core: a device that is full already.
Settings run in turns. Writes `benchmarks/results/async_rounds.json`, and prints the tables.
"""

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.learning.evidence import RESULTS as FOLDER
from benchmarks.learning.evidence import table
from benchmarks.learning.graph_walk import adam, trainer, word_tokenizer
from benchmarks.quickstart import machine
from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Engine, Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.objectives.policy import ClippedSurrogate, ImportanceWeights
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.types import Completion

RESULTS = FOLDER / "async_rounds.json"
MEDIAN, SIGMA, MOST, PROMPTS, GROUP, WORDS = 60, 0.8, 512, 4, 4, 510
STALENESS, RATIOS = (0, 1, 2, 4), (0.5, 1.0, 2.0)


def response_length(seed: int) -> int:
    """Number of tokens of the response with this seed."""
    return min(MOST, max(1, round(MEDIAN * math.exp(random.Random(seed).gauss(0.0, SIGMA)))))


SERVER = """
import sys, time
for line in sys.stdin:
    time.sleep(float(line))
    print("done", flush=True)
"""


class SimulatedServer:
    """An engine that waits for a server in another process.

    Args:
        seconds: Time per token; all responses of a call decode side by side.
    """

    def __init__(self, seconds: float) -> None:
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds = seconds
        self.sampled: list[float] = []
        """Seconds of each round."""
        self._wait(0.0)  # until it has started

    def _wait(self, seconds: float) -> None:
        """Wait for an answer that takes the server so long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(seconds, file=self.process.stdin, flush=True)
        self.process.stdout.readline()

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Pass over all weights, as for a server."""
        for _ in named_tensors:
            pass

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Responses of random tokens, after the time of the longest."""
        lengths = [response_length(seed) for seed in seeds]
        start = time.perf_counter()
        self._wait(max(lengths) * self.seconds)
        self.sampled.append(time.perf_counter() - start)
        tokens = [random.Random(seed + 1) for seed in seeds]
        return [
            Completion([2 + one.randrange(WORDS) for _ in range(n)], [-math.log(WORDS)] * n)
            for one, n in zip(tokens, lengths, strict=True)
        ]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def length_of(completions: list[str]) -> list[float]:
    """A reward that differs between the responses of a group."""
    return [float(len(text)) for text in completions]


class Clock(pl.Callback):
    """The time at the start of training and after each round, and the staleness of each round."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ages: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        """Before the first round is sampled."""
        self.times.append(time.perf_counter())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the staleness."""
        self.ages.append(batch["statistics"].get("staleness", 0.0))

    def on_train_batch_end(self, *_: Any) -> None:
        """A round has one batch."""
        self.times.append(time.perf_counter())


def run(max_staleness: int, rounds: int, engine: Engine | None, max_tokens: int = MOST) -> Clock:
    """Train, and return the times."""
    pl.seed_everything(0, verbose=False)
    tokenizer = word_tokenizer(["<pad>", "<end>", *(f"w{i}" for i in range(WORDS))])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    )
    module = PolicyRLModule(
        Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        rewards=[FunctionReward(length_of)],
        objective=ClippedSurrogate(),
        importance_weights=ImportanceWeights(),
        sampler=Sampler(max_tokens=max_tokens, engine=engine),
        optimizer=adam(1e-4),
        max_staleness=max_staleness,
    )
    rows = [{"prompt": f"w{i % WORDS} w{i // WORDS}"} for i in range(rounds * PROMPTS)]
    data = PromptDataModule(rows, prompts_per_round=PROMPTS, group_size=GROUP, minibatches=1, show_example=False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, max_epochs=1, callbacks=[clock]).fit(module, data)
    return clock


def simulated(max_staleness: int, rounds: int, seconds: float) -> dict[str, float]:
    """A run with a simulated server that needs `seconds` per token."""
    server = SimulatedServer(seconds)
    try:
        clock = run(max_staleness, rounds, server)
    finally:
        server.close()
    return {
        "per_round": per_round(clock),
        "sampling": statistics.fmean(server.sampled),
        "staleness": statistics.fmean(clock.ages),
    }


def per_round(clock: Clock) -> float:
    """Seconds per round, from before the first is sampled until after the last is trained."""
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number over repeats."""
    return {name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}


def with_server(rounds: int, repeats: int) -> list[dict[str, Any]]:
    """The first table: a row for each ratio of sampling and training."""
    longest = statistics.fmean(
        max(response_length(random.Random(i).getrandbits(60)) for i in range(start, start + PROMPTS * GROUP))
        for start in range(0, 100 * PROMPTS * GROUP, PROMPTS * GROUP)
    )
    rows = []
    for ratio in RATIOS:
        # Beside other processes the speed of training changes, so it is measured for each ratio.
        server = SimulatedServer(0.0)
        times = run(0, max(3, rounds // 3), server).times
        server.close()
        training = statistics.median(after - before for before, after in pairwise(times[1:]))
        found: dict[int, list[dict[str, float]]] = {k: [] for k in STALENESS}
        for _ in range(repeats):
            for k in STALENESS:
                found[k].append(simulated(k, rounds, ratio * training / longest))
        runs = {str(k): medians(found[k]) for k in found}
        rows.append({"ratio": ratio, "training": round(training, 4), "runs": runs})
    return rows


def on_one_core(rounds: int, repeats: int) -> dict[str, float]:
    """The second table: seconds per round with the built-in engine, for 0 and 1 rounds ahead."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        found: dict[int, list[float]] = {k: [] for k in STALENESS[:2]}
        for _ in range(repeats):
            for k, seconds in found.items():
                seconds.append(per_round(run(k, rounds, None, max_tokens=64)))
    finally:
        os.sched_setaffinity(0, cores)
    return {str(k): round(statistics.median(seconds), 4) for k, seconds in found.items()}


def report(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = []
    for row in result["server"]:
        base = row["runs"]["0"]
        for k, one in row["runs"].items():
            # What the round without a thread needs beside sampling: the step, rewards, log-probabilities.
            bound = max(one["sampling"], base["per_round"] - base["sampling"])
            lines.append(
                [
                    f"{row['ratio']:g}",
                    k,
                    f"{one['per_round']:.2f} s",
                    f"{base['per_round'] / one['per_round']:.2f}",
                    f"{bound:.2f} s",
                    f"{one['staleness']:.2f}",
                ]
            )
    head = ["sampling / training", "`max_staleness`", "per round", "speedup", "slower of the two", "mean staleness"]
    core = [[k, f"{seconds:.2f} s"] for k, seconds in result["one_core"].items()]
    return "\n\n".join([table(head, lines), table(["`max_staleness`, built-in engine on one core", "per round"], core)])


def main() -> None:
    """Run everything, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": given.rounds, "repeats": given.repeats, "prompts": PROMPTS, "group": GROUP, "threads": 1}
    lengths = {"median": MEDIAN, "sigma": SIGMA, "most": MOST}
    result: dict[str, Any] = {"machine": machine(), "settings": {**settings, "lengths": lengths}}
    result["server"] = with_server(given.rounds, given.repeats)
    result["one_core"] = on_one_core(max(3, given.rounds // 3), given.repeats)
    write_json(RESULTS, result)
    print(report(result))


if __name__ == "__main__":
    main()
