"""Loss of supervised fine-tuning."""

from torch import Tensor


def nll(logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Negative log-likelihood of each trained token, -log p.

    Args:
        logprobs: Log-probability of each token, in nats, float `[B, T]`.
        loss_mask: 1 at trained tokens, 0 elsewhere, `[B, T]`.

    Returns:
        Loss of each token in nats, `[B, T]`, 0 where the mask is 0.
    """
    return -logprobs * loss_mask.to(logprobs.dtype)
