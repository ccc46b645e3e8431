"""Torchmetrics metrics that are exact over batches and ranks, including uneven last batches."""

import math

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class Count(Metric):
    """A sum of integers, exact beyond the range of float32.

    Example:
        >>> count = Count()
        >>> count.update(torch.tensor(3))
        >>> count.compute()
        tensor(3.)
    """

    number: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("number", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, count: Tensor) -> None:
        """Add a scalar."""
        self.number += count.long()

    def compute(self) -> Tensor:
        """The sum as a float, which Lightning requires."""
        return self.number.float()


class Perplexity(MeanMetric):
    """Perplexity: exp of the mean negative log-likelihood per token.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor(0.0), weight=torch.tensor(5.0))  # mean in nats, and its number of tokens
        >>> perplexity.compute()
        tensor(1.)
    """

    def compute(self) -> Tensor:
        """Perplexity per token, a scalar."""
        return super().compute().exp()


class BitsPerByte(Metric):
    """Total negative log-likelihood in bits, divided by the number of bytes of the text.

    Example:
        >>> bits = BitsPerByte()
        >>> bits.update(torch.tensor(math.log(2) * 8), torch.tensor(4))
        >>> bits.compute()
        tensor(2.)
    """

    nats: Tensor
    bytes: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, nll_sum: Tensor, bytes: Tensor) -> None:
        """Add a batch.

        Args:
            nll_sum: Sum of the negative log-likelihood in nats, a scalar.
            bytes: Number of bytes, a scalar.
        """
        self.nats += nll_sum
        self.bytes += bytes

    def compute(self) -> Tensor:
        """Bits per byte, a scalar."""
        return self.nats / (math.log(2) * self.bytes.clamp(min=1))
