"""The objective of supervised fine-tuning."""

from torch import Tensor


def nll(logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Negative log-likelihood of each trained token, in nats: -log p, `[B, T]`, zero where the mask is 0."""
    return -logprobs * loss_mask.to(logprobs.dtype)
