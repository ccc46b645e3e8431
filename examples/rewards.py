"""Rewards of your own: a function, and a class with settings.

In YAML `class_path: rlhf_lightning.rewards.FunctionReward` with `function: examples.rewards.polite` among its
`init_args`, and `class_path: examples.rewards.Covers`.
"""

import sys

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.data.records import RowError, require_list
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import FunctionReward, Reward
from rlhf_lightning.types import Episode, Row


def polite(completions: list[str], tone: list[str]) -> list[float | None]:
    """1 for an answer with "please" or "thank you", 0 without; None for rows whose `tone` is not polite."""
    words = ("please", "thank you")
    return [
        float(any(word in text.lower() for word in words)) if wanted == "polite" else None
        for text, wanted in zip(completions, tone, strict=True)
    ]


class Covers(Reward):
    """The fraction of the row's key points that the answer mentions.

    Args:
        column: Data column with a list of texts.
        weight: Weight of this term.
    """

    def __init__(self, column: str = "points", weight: float = 1.0) -> None:
        super().__init__(weight, name="covers")
        self.column = column

    def check_row(self, row: Row) -> None:
        """Reject a row without key points. Called before training; the error message has the file and line."""
        if not require_list(row, self.column):
            raise RowError(f"{self.column!r} is empty, so there is nothing to look for")

    def score_one(self, episode: Episode) -> float:
        """A score in [0, 1]."""
        points = require_list(episode.row, self.column)
        return sum(str(point) in episode.response.lower() for point in points) / len(points)


def main(model: str, folder: str = "runs/examples") -> pl.Trainer:
    """Train two rounds of policy RL with both rewards."""
    rows = [
        {"prompt": "How do I make tea?", "tone": "polite", "points": ["water", "leaves"]},
        {"prompt": "How do I boil an egg?", "tone": "brief", "points": ["water", "minutes"]},
    ]
    module = PolicyRLModule(
        model, rewards=[FunctionReward(polite, weight=0.5), Covers()], sampler=Sampler(max_tokens=48)
    )
    trainer = pl.Trainer(max_epochs=2, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, PromptDataModule(rows, prompts_per_round=2, group_size=4))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
