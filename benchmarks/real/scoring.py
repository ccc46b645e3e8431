"""Scores of responses, which both sides are trained on and measured by, and the linear model of pairs."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_lightning.rewards.instructions import followed
from rlhf_lightning.rewards.verifiers import ExactAnswer
from rlhf_lightning.types import Episode

FLOOR = 5
"""Words that an answer must have to follow an instruction; fewer would say nothing."""
LAST_NUMBER = ExactAnswer(pattern=r"-?\d+", numbers=True)


def scores(task: str, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 for a right response, 0 for another.

    Instructions must be followed by an answer of at least `FLOOR` words; in arithmetic, the last number must be
    right.

    Args:
        task: `instructions` or `arithmetic`.
        texts: Responses.
        rows: The row of each.
    """
    if task == "arithmetic":
        said = [[{"role": "assistant", "content": text}] for text in texts]
        episodes = [Episode([], row, 0, responses=told) for told, row in zip(said, rows, strict=True)]
        return [float(score or 0.0) for score in LAST_NUMBER.score(episodes)]
    return [
        float(all(followed(text, row)) and len(text.split()) >= FLOOR) for text, row in zip(texts, rows, strict=True)
    ]


def columns(task: str) -> tuple[str, ...]:
    """Columns of the rows that the score needs."""
    return ("answer",) if task == "arithmetic" else ("instruction_id_list", "kwargs")


def features(text: str) -> list[float]:
    """Length and counts of a text."""
    words = text.split()
    return [
        len(text) / 100,
        math.log1p(len(words)),
        len(set(words)) / max(1, len(words)),
        *(float(text.count(mark)) for mark in "\n.,?!\"'-*:("),
        float(sum(letter.isdigit() for letter in text)),
        float(sum(letter.isupper() for letter in text)),
    ]


def linear_accuracy(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> float:
    """Accuracy on held-out pairs of a logistic regression on the difference of `features`, with L2 of 0.01.

    Args:
        train: Pairs to fit.
        held_out: Pairs to measure on.
    """

    def differences(pairs: Sequence[dict[str, Any]]) -> torch.Tensor:
        sides = ([features(pair[side][-1]["content"]) for pair in pairs] for side in ("chosen", "rejected"))
        chosen, rejected = (torch.tensor(side) for side in sides)
        return chosen - rejected

    given = differences(train)
    scale = given.std(0).clamp(min=1e-3)
    weights = torch.zeros(given.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-(given / scale) @ weights).mean() + 0.01 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((differences(held_out) / scale @ weights.detach() > 0).float().mean())
