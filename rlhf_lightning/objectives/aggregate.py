"""Reduction of per-token losses to a total and its denominator."""

from torch import Tensor

DENOMINATORS = {"token_sum": None, "token_mean": "tokens", "sequence_mean": "sequences", "constant": "sequences"}
"""The count of a whole optimizer step that each mode divides by; `constant` also divides by `length`."""
MODES = tuple(DENOMINATORS)


def aggregate(per_token: Tensor, loss_mask: Tensor, mode: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum a per-token loss and return its denominator; the loss is `total / denominator`.

    Both are returned, so that a caller can add up the totals and denominators of several micro-batches or ranks before
    dividing.

    Args:
        per_token: Loss of each token, float `[B, T]`.
        loss_mask: 1 where a token counts, 0 elsewhere, `[B, T]`.
        mode: How to normalize.

            - `token_sum`: denominator 1 (Tinker).
            - `token_mean`: the number of tokens (DAPO, arXiv 2503.14476 eq. 8).
            - `sequence_mean`: per-sequence token means over the number of sequences (GRPO, arXiv 2402.03300 eq. 3).
            - `constant`: `length` times the number of sequences (Dr. GRPO, arXiv 2503.20783).
        length: Tokens per sequence; required by `constant`.

    Returns:
        `(total, denominator)`, two scalars. Rows whose mask is all 0 are not counted as sequences.

    Raises:
        ValueError: If `mode` is unknown, or `constant` is given without `length`.

    Example:
        >>> import torch
        >>> per_token, loss_mask = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(per_token, loss_mask, "token_mean")
        (tensor(6.), tensor(3.))
        >>> aggregate(per_token, loss_mask, "sequence_mean")
        (tensor(4.5000), tensor(2.))
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
            raise ValueError(
                "aggregate(mode='constant') requires length, the number of tokens to divide each sequence by"
            )
        return masked.sum(), sequences * length
    raise ValueError(f"unknown aggregation {mode!r}; it must be one of {', '.join(MODES)}")
