"""Shortest paths in a random graph: SFT on random walks, then RL, against the known optimum.

    python -m benchmarks.learning.graph_walk [--seeds 0 1 2 3 4] [--fresh]

The graph has 21 nodes, and each edge exists with probability 0.1. A prompt is a node, an answer a walk to node 0
in at most 10 steps. A walk of n steps from a node at distance d scores (10 - n) / (10 - d), so 1 is the optimum; one
that leaves the graph, does not arrive or goes on scores 0. SFT learns random walks that arrive, equally many from each
node; RL has 20 rounds of 128 rollouts. Writes `benchmarks/results/graph_walk.json` and
`plots/graph_walk.svg`, and prints the table. Finished seeds are kept and skipped.

The task is that of the random walks of Decision Transformer and trlx.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks import plots
from benchmarks.learning.evidence import PLOTS, kept, over_seeds, shown, table
from benchmarks.learning.evidence import RESULTS as FOLDER
from benchmarks.quickstart import machine
from rlhf_lightning import PolicyRLModule, PromptDataModule, SFTDataModule, SFTModule
from rlhf_lightning.files import write_json
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE, GroupCentered
from rlhf_lightning.rollout.kl import KLPenalty

RESULTS = FOLDER / "graph_walk.json"
NODES, EDGE, STEPS, WALKS, ROUNDS, ROLLOUTS = 21, 0.1, 10, 1000, 20, 128


class Graph:
    """A random graph in which node 0 can be reached from every node, with the distances to it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.distance: dict[int, int] = {}
        while len(self.distance) < NODES or max(self.distance.values()) > STEPS:
            self.edges = {a: [b for b in range(NODES) if b != a and self.draw.random() < EDGE] for a in range(NODES)}
            self.distance = self._distances()

    def _distances(self) -> dict[int, int]:
        found, steps, new = {0: 0}, 0, {0}
        while new:
            steps += 1
            new = {a for a in range(NODES) if a not in found and any(b in found for b in self.edges[a])}
            found |= dict.fromkeys(new, steps)
        return found

    def walk(self, start: int) -> list[int]:
        """A random walk that arrives in time."""
        while True:
            nodes = [start]
            while nodes[-1] and len(nodes) <= STEPS and self.edges[nodes[-1]]:
                nodes.append(self.draw.choice(self.edges[nodes[-1]]))
            if not nodes[-1]:
                return nodes

    def score(self, start: int, answer: str) -> float:
        """Score of an answer, as a fraction of the optimum."""
        nodes = [start, *(int(word[1:]) for word in answer.split())]
        valid = all(b in self.edges[a] for a, b in pairwise(nodes))
        if not valid or nodes[-1] or 0 in nodes[:-1] or len(nodes) - 1 > STEPS:
            return 0.0
        return (STEPS - (len(nodes) - 1)) / (STEPS - self.distance[start])


def make_tokenizer() -> Any:
    """A tokenizer with a token per node."""
    return word_tokenizer(["<pad>", "<end>", *(f"n{i}" for i in range(NODES))])


def word_tokenizer(words: list[str]) -> Any:
    """A tokenizer with these tokens, `<pad>` and `<end>` among them; every turn of the assistant ends with `<end>`."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '<end>' }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def make_model(size: int) -> Any:
    """A model with random weights, 2 layers of width 64."""
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def adam(rate: float) -> Any:
    """An optimizer for the modules."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def trainer(folder: str, **options: Any) -> pl.Trainer:
    """A Trainer without output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **quiet, **options)


def supervised(graph: Graph, tokenizer: Any, seed: int, folder: str, epochs: int = 12) -> str:
    """Train a model to imitate the walks."""
    walks = [graph.walk(1 + i % (NODES - 1)) for i in range(WALKS)]
    rows = [{"prompt": f"n{w[0]}", "completion": " ".join(f"n{a}" for a in w[1:])} for w in walks]
    pl.seed_everything(seed, verbose=False)
    module = SFTModule(
        make_model(len(tokenizer)),
        tokenizer=tokenizer,
        optimizer=adam(3e-3),
        lr_scheduler=lambda optimizer: Warmup(optimizer, shape="cosine"),
    )
    trainer(folder, max_epochs=epochs, gradient_clip_val=1.0).fit(module, SFTDataModule(rows, batch_size=50, seed=seed))
    module.save_pretrained(f"{folder}/sft")
    return f"{folder}/sft"


@dataclass(frozen=True)
class Method:
    """A way of learning from the rounds; objects with weights are created for each run."""

    make: Callable[[], dict[str, Any]]
    """Arguments of the module: objective, advantage, critic."""
    rate: float = 5e-4
    group: int = 4
    epochs: int = 2
    minibatches: int = 4


# Settings were chosen on seeds 10 to 14: with twice the learning rate, or without warm-up, one run in five unlearns a
# node, whose group then has equal rewards. Only the KL term has a gradient there.
METHODS = {
    "group advantages": Method(lambda: {"objective": ClippedSurrogate(), "advantage": GroupCentered("std")}),
    "PPO and critic": Method(
        lambda: {
            "objective": ClippedSurrogate(),
            "advantage": GAE(),
            "critic": Critic(learning_rate=2e-3, coefficient=1.0),
        },
        group=1,
    ),
}


def reinforced(
    method: Method,
    graph: Graph,
    model: str,
    seed: int,
    folder: str,
    rounds: int = ROUNDS,
    rollouts: int = ROLLOUTS,
    curve: "Curve | None" = None,
) -> tuple[PolicyRLModule, list[float]]:
    """The trained policy, and the mean score of each round; `curve` records all statistics of the rounds."""
    pl.seed_everything(seed, verbose=False)

    def score(completions: list[str], start: list[int]) -> list[float]:
        return [graph.score(*row) for row in zip(start, completions, strict=True)]

    module = PolicyRLModule(
        model,
        rewards=[FunctionReward(score, name="score")],
        sampler=Sampler(max_tokens=STEPS + 2),
        kl=KLPenalty(0.005),
        optimizer=adam(method.rate),
        lr_scheduler=lambda optimizer: Warmup(optimizer, shape="constant", warmup_steps=0.1),
        **method.make(),
    )
    draw, per_round = random.Random(seed), rollouts // method.group
    starts = [draw.randrange(1, NODES) for _ in range(rounds * per_round)]
    rows = [{"prompt": f"n{start}", "start": start} for start in starts]
    updates = {"update_epochs": method.epochs, "minibatches": method.minibatches}
    data = PromptDataModule(rows, prompts_per_round=per_round, group_size=method.group, seed=seed, **updates)
    curve = curve or Curve()
    trainer(folder, max_epochs=1, gradient_clip_val=1.0, callbacks=[curve]).fit(module, data)
    return module, curve.of("reward")


class Curve(pl.Callback):
    """Records the statistics of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record them when a round begins."""
        if batch["statistics"]:
            self.rounds.append(dict(batch["statistics"]))

    def of(self, name: str) -> list[float]:
        """One statistic of every round."""
        return [round(one[name], 4) for one in self.rounds]


def measured(module: Any, graph: Graph, samples: int = 64) -> dict[str, float]:
    """Mean score over all nodes, of sampled and of greedy answers."""
    from rlhf_lightning.data.prompts import prompt_example
    from rlhf_lightning.rollout.runner import EpisodeRunner

    found = {}
    for name, temperature, count in (("drawn", 1.0, samples), ("greedy", 0.0, 1)):
        tasks = [
            (prompt_example(module.renderer, {"prompt": f"n{start}"}, start), sample)
            for start in range(1, NODES)
            for sample in range(count)
        ]
        with torch.no_grad():
            runner = EpisodeRunner(module.model_sampler, module.renderer, (12345,), temperature=temperature)
            episodes = runner.run(tasks)
        found[name] = round(statistics.mean(graph.score(episode.group, episode.response) for episode in episodes), 4)
    return found


def run(seed: int) -> dict[str, Any]:
    """Run SFT, and each method from its result."""
    graph, tokenizer = Graph(seed), make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model = supervised(graph, tokenizer, seed, folder)
        start = PolicyRLModule(model, sampler=Sampler(max_tokens=STEPS + 2))
        start.configure_model()
        result: dict[str, Any] = {"sft": measured(start, graph)}
        for name, method in METHODS.items():
            module, curve = reinforced(method, graph, model, seed, folder)
            result[name] = {**measured(module, graph), "curve": curve}
    return result


def report(runs: dict[str, Any]) -> str:
    """The table, with the mean of sampled answers and its 95% interval."""
    names = ("sft", *METHODS)
    lines = [
        [seed, *(f"{result[name]['drawn']:.3f} ({result[name]['greedy']:.3f})" for name in names)]
        for seed, result in runs.items()
    ]
    ends = [shown([result[name]["drawn"] for result in runs.values()]) for name in names]
    head = ["seed", *(f"{name}, sampled (greedy)" for name in ("SFT", *METHODS))]
    return table(head, [*lines, ["sampled, mean", *ends]])


def draw(runs: dict[str, Any], path: Path) -> None:
    """The mean score of each round, with its deviation between seeds."""
    series = {}
    for name in METHODS:
        found = over_seeds([one[name]["curve"] for one in runs.values()])
        points = [(i * ROLLOUTS, score) for i, score in enumerate(found["mean"])]
        series[name] = plots.Series(points, found["deviation"])
    plots.save(path, [plots.Panel(f"mean score of a round, {len(runs)} seeds", series, x="rollouts before it")])


def main() -> None:
    """Run the missing seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--fresh", action="store_true", help="discard the seeds of earlier runs")
    given = parser.parse_args()
    settings = {"nodes": NODES, "edge": EDGE, "steps": STEPS, "walks": WALKS, "rounds": ROUNDS, "rollouts": ROLLOUTS}
    results: dict[str, Any] = {"machine": machine(), "settings": settings}
    results["runs"] = kept(RESULTS, settings, given.fresh)
    for seed in given.seeds:
        if str(seed) not in results["runs"]:
            results["runs"][str(seed)] = run(seed)
            write_json(RESULTS, results)
    runs = {str(seed): results["runs"][str(seed)] for seed in given.seeds}
    print(report(runs))
    draw(runs, PLOTS / "graph_walk.svg")


if __name__ == "__main__":
    main()
