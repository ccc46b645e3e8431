"""Environments of your own: a game of several turns, and tools that the policy calls.

In YAML: `environment: examples.environments.Guess` with `environment_args: {highest: 20}`.
"""

import re
import sys
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.environments.base import Limits, StepResult
from rlhf_lightning.environments.tools import ToolEnv
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import ExactAnswer
from rlhf_lightning.types import Message


class Guess:
    """Guess a number; after each wrong guess the environment answers "Higher." or "Lower.".

    Args:
        row: Data row with the `secret` number.
        highest: Upper end of the range.
    """

    def __init__(self, row: dict[str, Any], highest: int = 20) -> None:
        self.secret, self.highest, self.guesses = int(row["secret"]), highest, 0

    def reset(self) -> list[Message]:
        """The first messages that the policy sees."""
        text = f"I think of a number from 1 to {self.highest}. Guess it; answer with a number alone."
        return [{"role": "user", "content": text}]

    def step(self, message: Message) -> StepResult:
        """Judge a guess. The right one earns 1 / number of guesses; an answer without a number ends the game."""
        found = re.search(r"\d+", message["content"] or "")
        if found is None:
            return StepResult(reward=0.0, done=True, metrics={"guesses": self.guesses})
        self.guesses += 1
        if (guess := int(found[0])) == self.secret:
            return StepResult(reward=1 / self.guesses, done=True, metrics={"guesses": self.guesses})
        hint = "Higher." if guess < self.secret else "Lower."
        return StepResult(done=False, next_messages=[{"role": "user", "content": hint}])


def multiply(a: float, b: float) -> float:
    """Multiply two numbers.

    Args:
        a: First factor.
        b: Second factor.
    """
    return a * b


def main(model: str, folder: str = "runs/examples") -> tuple[PolicyRLModule, PolicyRLModule]:
    """Train one round with each."""
    game = PolicyRLModule(
        model,
        environment=Guess,
        environment_args={"highest": 9},
        limits=Limits(max_turns=3, step_timeout=10, on_error="drop"),
        sampler=Sampler(max_tokens=8),
    )
    tools = PolicyRLModule(
        model,
        environment=ToolEnv,
        environment_args={"tools": [multiply]},
        limits=Limits(max_turns=3),
        rewards=[ExactAnswer(pattern=r"-?\d+", numbers=True)],
        sampler=Sampler(max_tokens=16),
    )
    numbers = [{"prompt": "Guess a number.", "secret": secret} for secret in (3, 7)]
    sums = [{"prompt": f"What is 12 times {n}?", "answer": str(12 * n)} for n in (3, 7)]
    for module, rows in ((game, numbers), (tools, sums)):
        trainer = pl.Trainer(max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
        trainer.fit(module, PromptDataModule(rows, prompts_per_round=2, group_size=4))
    return game, tools


if __name__ == "__main__":
    main(*sys.argv[1:])
