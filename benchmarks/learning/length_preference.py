"""A preference for shorter answers through all stages: do answers become shorter within 20 rounds?

    python -m benchmarks.learning.length_preference [--seeds 0 1 2 3 4] [--fresh]

The task, model and settings are the quickstart's, with answers of two to six sentences. SFT on 1,500 conversations;
a reward model from 800 pairs in which the shorter answer (in tokens) is chosen; 20 rounds of policy RL, 16 prompts × 8
answers, rewarded only by that model. Measured on sampled answers to 120 prompts about subjects that no stage has seen.
Each seed has its own data, tokenizer, weights and samples. Writes `benchmarks/results/length_preference.json` and
`plots/length_preference.svg` and prints the tables. Finished seeds are kept and skipped.
"""

import argparse
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks import plots
from benchmarks.learning.evidence import PLOTS, RESULTS, interval, kept, over_seeds, shown, table
from benchmarks.learning.graph_walk import Curve, trainer
from benchmarks.quickstart import machine
from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.data.prompts import prompt_example
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.quickstart.data import answer, question, subjects
from rlhf_lightning.quickstart.model import make_model, make_tokenizer
from rlhf_lightning.rewards import ModelReward
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.runner import EpisodeRunner

COLUMNS = {"tokens": "response_tokens", "score": "reward", "kl": "kl"}


@dataclass(frozen=True)
class Sizes:
    """Number of rows of each stage, and of rounds of RL."""

    conversations: int = 1500
    sft_epochs: int = 3
    pairs: int = 800
    held_out: int = 120
    rounds: int = 20
    prompts: int = 16
    group: int = 8


class Task:
    """Questions and answers of a seed, about training subjects and held-out ones."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self.draw, self.seen, self.held_out = random.Random(seed), *subjects(seed)
        conversations = [self.exchange(self.seen) for _ in range(sizes.conversations)]
        self.tokenizer = make_tokenizer([*(text for row in conversations for text in row), "user\n", "assistant\n"])
        self.conversations = [{"prompt": prompt, "completion": text} for prompt, text in conversations]
        self.pairs = [self.pair(self.seen) for _ in range(sizes.pairs)]
        self.held_out_pairs = [self.pair(self.held_out) for _ in range(sizes.held_out)]
        self.prompts = [self.prompt(self.seen) for _ in range(sizes.rounds * sizes.prompts)]
        self.held_out_prompts = [self.prompt(self.held_out) for _ in range(sizes.held_out)]

    def exchange(self, about: list[tuple[str, str]]) -> tuple[str, str]:
        """A question and an answer of any length."""
        subject, material = self.draw.choice(about)
        return question(self.draw, subject), answer(self.draw, subject, material)

    def pair(self, about: list[tuple[str, str]]) -> dict[str, str]:
        """Two answers to one question; the one with fewer tokens is chosen."""
        subject, material = self.draw.choice(about)
        while True:
            texts = sorted((answer(self.draw, subject, material) for _ in range(2)), key=self.tokens)
            if self.tokens(texts[0]) < self.tokens(texts[1]):
                return {"prompt": question(self.draw, subject), "chosen": texts[0], "rejected": texts[1]}

    def prompt(self, about: list[tuple[str, str]]) -> dict[str, str]:
        """A question without an answer."""
        return {"prompt": question(self.draw, self.draw.choice(about)[0])}

    def tokens(self, text: str) -> int:
        """Length of an answer in tokens."""
        return len(self.tokenizer(text)["input_ids"])


def options(rate: float, decay: float = 0.01) -> dict[str, Any]:
    """The quickstart's optimizer and schedule."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=decay),
        "lr_scheduler": lambda optimizer: Warmup(optimizer, shape="cosine", warmup_steps=0.05),
    }


def supervised(task: Task, seed: int, sizes: Sizes, folder: str) -> str:
    """Train the SFT model that RL starts from."""
    pl.seed_everything(seed, verbose=False)
    module = SFTModule(make_model(task.tokenizer, seed), tokenizer=task.tokenizer, **options(4e-3))
    data = SFTDataModule(task.conversations, batch_size=16, seed=seed)
    trainer(folder, max_epochs=sizes.sft_epochs, gradient_clip_val=1.0).fit(module, data)
    module.save_pretrained(f"{folder}/sft")
    return f"{folder}/sft"


def rewarding(task: Task, model: str, seed: int, folder: str) -> str:
    """Train a reward model on the pairs; it learns about length only from the choices."""
    pl.seed_everything(seed, verbose=False)
    module = PreferenceModule(model, **options(1e-3))
    trainer(folder, max_epochs=1, gradient_clip_val=1.0).fit(
        module, PreferenceDataModule(task.pairs, batch_size=16, seed=seed)
    )
    module.save_pretrained(f"{folder}/reward")
    return f"{folder}/reward"


def accuracy(folder: str, pairs: list[dict[str, str]]) -> float:
    """Fraction of pairs whose shorter answer scores higher."""
    judge, prompts = RewardModel(folder), [pair["prompt"] for pair in pairs]
    chosen, rejected = (judge.score(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    return float((chosen > rejected).float().mean())


def reinforced(
    task: Task, model: str, reward: str, seed: int, sizes: Sizes, folder: str, max_staleness: int = 0
) -> tuple[Any, Curve]:
    """The trained policy, and the statistics of the rounds."""
    pl.seed_everything(seed, verbose=False)
    module = PolicyRLModule(
        model,
        rewards=[ModelReward(reward)],
        sampler=Sampler(max_tokens=96),
        kl=KLPenalty(0.1),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        max_staleness=max_staleness,
    )
    data = PromptDataModule(task.prompts, prompts_per_round=sizes.prompts, group_size=sizes.group, seed=seed)
    curve = Curve()
    trainer(folder, max_epochs=1, gradient_clip_val=1.0, callbacks=[curve]).fit(module, data)
    return module, curve


def measured(module: Any, task: Task) -> dict[str, float]:
    """Sampled answers to held-out questions: mean length, and the fractions that were truncated or are empty."""
    tasks = [(prompt_example(module.renderer, row, i), 0) for i, row in enumerate(task.held_out_prompts)]
    with torch.no_grad():
        episodes = EpisodeRunner(module.model_sampler, module.renderer, (12345,), temperature=1.0).run(tasks)
    return {
        "tokens": statistics.fmean(episode.response_tokens for episode in episodes),
        "truncated": statistics.fmean(episode.truncated for episode in episodes),
        "empty": statistics.fmean(not episode.response.strip() for episode in episodes),
    }


def run(seed: int, sizes: Sizes, max_staleness: int = 0) -> dict[str, Any]:
    """Run the three stages of a seed; `max_staleness` is that of RL."""
    task = Task(seed, sizes)
    with tempfile.TemporaryDirectory() as folder:
        model = supervised(task, seed, sizes, folder)
        reward = rewarding(task, model, seed, folder)
        start = PolicyRLModule(model, sampler=Sampler(max_tokens=96))
        start.configure_model()
        module, curve = reinforced(task, model, reward, seed, sizes, folder, max_staleness)
        return {
            "pair_accuracy": accuracy(reward, task.held_out_pairs),
            "start": measured(start, task),
            "end": measured(module, task),
            "curves": {name: curve.of(column) for name, column in COLUMNS.items()},
        }


def falls(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether tokens per answer fall: on each seed, and in the mean by more than its 95% interval."""
    change = [one["end"]["tokens"] - one["start"]["tokens"] for one in runs]
    mean, half = interval(change)
    return {"mean": mean, "half": half, "on_every_seed": max(change) < 0, "beyond_interval": mean + half < 0}


def report(runs: dict[str, Any], sizes: Sizes) -> str:
    """The tables."""
    several = list(runs.values())
    head = ["seed", "pairs right", "tokens per answer: start → end", "empty", "cut off", "KL (nats), last round"]
    rows = [
        [
            seed,
            f"{one['pair_accuracy']:.3f}",
            f"{one['start']['tokens']:.1f} → {one['end']['tokens']:.1f}",
            *(f"{one['end'][part]:.3f}" for part in ("empty", "truncated")),
            f"{one['curves']['kl'][-1]:.2f}",
        ]
        for seed, one in runs.items()
    ]
    ends = [shown([one[end]["tokens"] for one in several], 1) for end in ("start", "end")]
    accuracies = shown([one["pair_accuracy"] for one in several])
    kls = shown([one["curves"]["kl"][-1] for one in several], 2)
    empty, cut = (shown([one["end"][part] for one in several]) for part in ("empty", "truncated"))
    found = falls(several)
    verdict = (
        f"Change of tokens per answer in {sizes.rounds} rounds: {found['mean']:.1f} ± {found['half']:.1f} "
        f"(95% interval by Student's t over {len(several)} seeds). Falls on every seed: {found['on_every_seed']}; "
        f"in the mean beyond the interval: {found['beyond_interval']}."
    )
    return table(head, [*rows, ["mean", accuracies, " → ".join(ends), empty, cut, kls]]) + "\n\n" + verdict


def draw(runs: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation over seeds, by round."""
    titles = {"tokens": "tokens per answer", "score": "reward model's score", "kl": "KL to the start (nats per answer)"}
    panels = []
    for name, title in titles.items():
        found = over_seeds([one["curves"][name] for one in runs.values()])
        series = plots.Series(list(enumerate(found["mean"], 1)), found["deviation"])
        panels.append(plots.Panel(title, {f"mean of {len(runs)} seeds ± deviation": series}, x="round"))
    plots.save(path, panels)


def main() -> None:
    """Run the missing seeds, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fresh", action="store_true", help="discard the seeds of earlier runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "length_preference.json")
    given, sizes = parser.parse_args(), Sizes()
    settings = asdict(sizes)
    results: dict[str, Any] = {"machine": machine(), "settings": settings}
    results["runs"] = kept(given.results, settings, given.fresh)
    for seed in given.seeds:
        if str(seed) not in results["runs"]:
            results["runs"][str(seed)] = run(seed, sizes)
            write_json(given.results, results)
    runs = {str(seed): results["runs"][str(seed)] for seed in given.seeds}
    write_json(given.results, results | {"change": falls(list(runs.values()))})
    print(report(runs, sizes))
    draw(runs, PLOTS / "length_preference.svg")


if __name__ == "__main__":
    main()
