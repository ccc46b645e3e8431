"""Metrics as torchmetrics objects: exact over batches and ranks, uneven last ones included."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class PairAccuracy(Metric):
    """The part of pairs whose chosen response scores higher; a tie is wrong. `update(chosen, rejected, weights)`."""

    correct: Tensor
    pairs: Tensor
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor, weights: Tensor | None = None) -> None:
        """Add pairs: scores `[B]` each; a weight of 0 leaves a pair out."""
        weights = torch.ones_like(chosen) if weights is None else weights
        self.correct += ((chosen > rejected) * weights).sum()
        self.pairs += weights.sum()

    def compute(self) -> Tensor:
        """Accuracy in [0, 1]."""
        return self.correct / self.pairs.clamp(min=1)


class Count(Metric):
    """How many there are, exact beyond what a float32 can count. `update(count)`."""

    number: Tensor
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("number", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, count: Tensor) -> None:
        """Add a scalar."""
        self.number += count.long()

    def compute(self) -> Tensor:
        """As a float, which Lightning asks for."""
        return self.number.float()


class Perplexity(MeanMetric):
    """exp of the mean negative log-likelihood; `update(mean, weight=tokens)`."""

    def compute(self) -> Tensor:
        """Perplexity a token."""
        return super().compute().exp()


class BitsPerByte(Metric):
    """Total negative log-likelihood in bits over the bytes of the text; `update(nll_sum, bytes)`."""

    nats: Tensor
    bytes: Tensor
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, nll_sum: Tensor, bytes: Tensor) -> None:
        """Add a batch: two scalars."""
        self.nats += nll_sum
        self.bytes += bytes

    def compute(self) -> Tensor:
        """Bits a byte."""
        return self.nats / (math.log(2) * self.bytes.clamp(min=1))
