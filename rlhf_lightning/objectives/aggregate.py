"""From per-token losses to a sum and the number it is to be divided by."""

from torch import Tensor

MODES = ("token_sum", "token_mean", "sequence_mean", "constant")


def aggregate(per_token: Tensor, loss_mask: Tensor, mode: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum a per-token loss and give its denominator; the loss is `total / denominator`.

    Both are returned apart so that a caller who accumulates micro-batches or runs several ranks can add up
    the totals and the denominators before dividing.

    Args:
        per_token: loss of each token, float `[B, T]`.
        loss_mask: 1 where a token counts, 0 elsewhere, `[B, T]`.
        mode: `token_sum` (denominator 1; Tinker), `token_mean` (number of tokens; DAPO, arXiv 2503.14476 eq. 8),
            `sequence_mean` (sum of per-sequence token means over the number of sequences; GRPO, arXiv 2402.03300
            eq. 3), `constant` (`length` times the number of sequences; Dr. GRPO, arXiv 2503.20783).
        length: tokens per sequence, for `constant`.

    Returns:
        `(total, denominator)`, two scalars. A sequence whose mask is all 0 is no sequence.

    Raises:
        ValueError: unknown mode, or `constant` without `length`.
    """
    loss_mask = loss_mask.to(per_token.dtype)
    masked = per_token * loss_mask
    tokens = loss_mask.sum(-1)
    sequences = (tokens > 0).to(per_token.dtype).sum()
    if mode == "token_sum":
        return masked.sum(), tokens.new_ones(())
    if mode == "token_mean":
        return masked.sum(), tokens.sum()
    if mode == "sequence_mean":
        return (masked.sum(-1) / tokens.clamp(min=1)).sum(), sequences
    if mode == "constant":
        if not length:
            raise ValueError("aggregate(mode='constant') needs length=, the tokens each sequence is divided by")
        return masked.sum(), sequences * length
    raise ValueError(f"unknown aggregation {mode!r}; one of {', '.join(MODES)}")
