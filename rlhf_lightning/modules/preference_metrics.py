"""Metrics of preference learning: sums of a training step, and a report on all evaluated rows."""

from collections.abc import Sequence
from typing import Required, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from rlhf_lightning.objectives.calibration import area_under_curve, brier, expected_calibration_error, reliability

Rows = dict[str, Tensor]
MEANS = {
    "pairs": ("loss", "margin", "chosen_score", "rejected_score", "chosen_logps", "rejected_logps", "kl"),
    "labels": ("loss", "desirable_score", "undesirable_score", "mismatched_score", "logps", "kl"),
    "rankings": ("loss", "accuracy", "top1"),
}


def step_names(kind: str) -> tuple[str, ...]:
    """Names of the metrics that `step_sums` may return."""
    return (*MEANS[kind], "accuracy") if kind == "pairs" else MEANS[kind]


def step_sums(kind: str, rows: Rows, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of each metric over the rows of a batch.

    Args:
        kind: `pairs`, `labels` or `rankings`.
        rows: Values of each row by name, `[B]`.
        weights: Weight of each row, `[B]`.
    """
    rows = {name: value.detach() for name, value in rows.items()}
    found = columns(kind, rows, weights)
    if kind == "pairs":
        right = (rows["chosen"] > rows["rejected"]).to(weights.dtype)  # a tie is wrong
        found["accuracy"] = (right, weights * (1 - rows.get("ties", torch.zeros_like(weights))))
    return {
        # Rows of weight 0 may hold any value, even NaN.
        name: (torch.where(of != 0, values * of, 0.0).sum(), of.sum())
        for name, (values, of) in found.items()
    }


def columns(kind: str, rows: Rows, weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics to average.

    Args:
        kind: `pairs`, `labels` or `rankings`.
        rows: Values of each row by name, `[B]`.
        weights: Weight of each row, `[B]`.

    Returns:
        For each metric its values and their weights, `[B]` each.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if kind == "pairs":
        chosen, rejected = rows["chosen"], rows["rejected"]
        values = {"margin": chosen - rejected, "chosen_score": chosen, "rejected_score": rejected}
        values |= {name: rows[name] for name in ("chosen_logps", "rejected_logps") if name in rows}
        if "chosen_kl" in rows:
            values["kl"] = (rows["chosen_kl"] + rows["rejected_kl"]) / 2
        found = {name: (value, weights) for name, value in values.items()}
    elif kind == "labels":
        scores, labels = rows["scores"], rows["labels"]
        found = {"desirable_score": (scores, weights * labels), "undesirable_score": (scores, weights * (1 - labels))}
        found |= {name: (rows[name], weights) for name in ("logps", "kl") if name in rows}
        if "mismatched" in rows:
            found["mismatched_score"] = (rows["mismatched"], weights)
    else:
        found = {name: (value, weights) for name, value in ranked(rows).items()}
    return {"loss": (rows["loss"], weights), **found} if "loss" in rows else found


def ranked(rows: Rows) -> Rows:
    """Metrics of each ranking, `[B]`.

    `accuracy` is the fraction of its pairs in the right order (ties are wrong); `top1` is 1 if a best response scores
    highest.
    """
    if "accuracy" in rows:
        return {name: rows[name] for name in ("accuracy", "top1")}
    scores, ranks, answer_mask = rows["scores"], rows["ranks"], rows["answer_mask"].bool()
    better = (ranks[:, :, None] < ranks[:, None, :]) & answer_mask[:, :, None] & answer_mask[:, None, :]
    right = (scores[:, :, None] > scores[:, None, :]) & better
    first = scores.masked_fill(~answer_mask, -torch.inf).argmax(-1, keepdim=True)
    top = ranks.gather(-1, first).squeeze(-1) == 0
    return {"accuracy": right.sum((1, 2)) / better.sum((1, 2)).clamp(min=1), "top1": top.to(scores.dtype)}


class Report(TypedDict, total=False):
    """Results of an evaluation of preference learning, over all its rows."""

    numbers: Required[dict[str, float]]
    """Metrics to log, by name."""
    reliability: list[dict[str, float]]
    """For pairs: `confidence`, `accuracy` and number of `pairs` at each point of the reliability curve."""


class Tables(Metric):
    """Collects the rows of an evaluation over all batches and ranks.

    Example:
        >>> tables = Tables()
        >>> tables.update({"loss": torch.tensor([1.0, 3.0])}, torch.tensor([1.0, 0.0]))
        >>> tables.compute()
        {'loss': tensor(1.)}
    """

    rows: list[Tensor]
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.categories: list[str] = []
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(
        self, rows: Rows, weights: Tensor, category: Tensor | None = None, categories: Sequence[str] | None = None
    ) -> None:
        """Add rows.

        Args:
            rows: `[B]` tensors by name; rankings are reduced by `ranked` first.
            weights: Weight of each row, `[B]`; 0 excludes a row.
            category: Index of each row's category, `[B]`.
            categories: Names of the categories.
        """
        if "ranks" in rows:
            rows = {"loss": rows["loss"], **ranked(rows)}
        self.categories = list(categories or [])
        rows = {**rows, "weight": weights}
        if category is not None:
            rows["category"] = category
        self.names = list(rows)
        dtype = next(iter(rows.values())).dtype
        self.rows.append(torch.stack([value.detach().to(dtype) for value in rows.values()], -1))

    def compute(self) -> Rows:
        """Values of all rows with a weight above 0, `[n]`, by name."""
        table = dim_zero_cat(self.rows)
        rows = dict(zip(self.names, table[table[:, self.names.index("weight")] > 0].unbind(-1), strict=True))
        return {name: value for name, value in rows.items() if name != "weight"}

    def report(self, kind: str, rows: Rows) -> Report:
        """Compute the metrics of all rows.

        Args:
            kind: `pairs`, `labels` or `rankings`.
            rows: The rows, as `compute` returns them.
        """
        ones = torch.ones_like(rows["loss"])
        numbers = {
            name: float((values * of).sum() / of.sum().clamp(min=1))
            for name, (values, of) in columns(kind, rows, ones).items()
            if of.any()
        }
        if kind == "labels" and {"desirable_score", "undesirable_score"} <= numbers.keys():
            numbers["auc"] = float(area_under_curve(rows["scores"], rows["labels"]))
            numbers["margin"] = numbers["desirable_score"] - numbers["undesirable_score"]
        if kind != "pairs":
            return {"numbers": numbers}
        parts, curve = pair_report(rows, self.categories)
        return {"numbers": numbers | parts, "reliability": curve}


def pair_report(rows: Rows, categories: list[str]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Accuracy of pairs overall and in subsets, calibration, and the reliability curve.

    A tie of scores counts as wrong; pairs labeled as ties are left out.

    Args:
        rows: Scores and lengths of each pair by name, `[n]`.
        categories: Names of the categories.

    Returns:
        The metrics, and the points of the reliability curve.
    """
    decided = rows.get("ties", torch.zeros_like(rows["chosen"])) == 0
    if not decided.any():
        return {}, []
    rows = {name: value[decided] for name, value in rows.items()}
    difference = rows["chosen"] - rows["rejected"]
    correct, longer = (difference > 0).to(difference.dtype), rows["chosen_lengths"] - rows["rejected_lengths"]
    confidence = difference.abs().sigmoid()
    numbers = {
        "accuracy": correct.mean(),
        "accuracy_longer_wins": (longer > 0).to(correct.dtype).mean(),
        "ece": expected_calibration_error(confidence, correct),
        "brier": brier(difference.sigmoid()),
    }
    parts = {"chosen_longer": longer > 0, "chosen_shorter": longer < 0, "same_length": longer == 0}
    parts |= _quarters(difference.abs())
    for number, name in enumerate(categories):
        parts[f"category_{name}"] = rows["category"] == number
    numbers |= {f"accuracy_{name}": correct[part].mean() for name, part in parts.items() if part.any()}
    curve = zip(*(value.tolist() for value in reliability(confidence, correct)), strict=True)
    names = ("confidence", "accuracy", "pairs")
    return {name: float(value) for name, value in numbers.items()}, [
        dict(zip(names, row, strict=True)) for row in curve
    ]


def _quarters(margin: Tensor) -> dict[str, Tensor]:
    """Masks of the pairs in four quarters by the distance of their scores, smallest (q1) to largest (q4)."""
    if len(margin) < 4:
        return {}
    quarter = margin.argsort().argsort() * 4 // len(margin)
    return {f"margin_q{number + 1}": quarter == number for number in range(4)}
