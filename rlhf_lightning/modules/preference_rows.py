"""Named inputs of a preference loss from scored rows, and the rows of all ranks for losses that couple rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.distributed import data_rank, gather
from rlhf_lightning.models.scorers import Scored
from rlhf_lightning.objectives.kl import k2

if TYPE_CHECKING:
    from rlhf_lightning.types import PreferenceBatch

Named = dict[str, Tensor]
SIDES = ("chosen", "rejected")


def name_rows(kind: str, scored: Scored, batch: "PreferenceBatch") -> Named:
    """Values of the examples, by the names that losses use.

    Args:
        kind: `pairs`, `labels` or `rankings`.
        scored: Scores and log-probabilities of the batch's rows.
        batch: The batch.

    Returns:
        Tensors with one entry per example: `[B]`, or for rankings `[B, K]`.
    """
    facts = _facts(scored, batch)
    if kind == "pairs":
        named = {}
        for name, value in facts.items():
            for side, part in zip(SIDES, value.chunk(2), strict=True):
                named[side if name == "scores" else f"{side}_{name}"] = part
        return named | {name: batch[name].to(scored.scores.dtype) for name in ("margin", "ties") if name in batch}
    if kind == "labels":
        return facts | {"labels": batch["labels"].to(scored.scores.dtype)}
    return _rankings(scored.scores, batch)


def _facts(scored: Scored, batch: "PreferenceBatch") -> Named:
    """Values of each response, `[N]`."""
    dtype = scored.scores.dtype
    facts = {"scores": scored.scores, "lengths": batch["loss_mask"].sum(-1).to(dtype).clamp(min=1)}
    if scored.logprobs is not None:
        facts["logps"] = scored.logprobs.sum(-1).to(dtype)
    if scored.reference_scores is not None:
        facts["reference_scores"] = scored.reference_scores.to(dtype)
    if scored.logprobs is not None and scored.reference_logprobs is not None:
        facts["kl"] = k2(scored.logprobs, scored.reference_logprobs).sum(-1).to(dtype)
    return facts


def _rankings(scores: Tensor, batch: "PreferenceBatch") -> Named:
    """Responses of each ranking as a row, `[B, K]`: `scores`, `ranks`, and `answer_mask`, 1 where there is one."""
    ranking, ranks = batch["ranking"], batch["ranks"]
    count = int(ranking[-1]) + 1
    sizes = torch.bincount(ranking, minlength=count)
    starts = sizes.cumsum(0) - sizes
    column = torch.arange(len(ranking), device=ranking.device) - starts[ranking]
    shape = (count, int(sizes.max()))
    named = {"scores": scores, "ranks": ranks.to(scores.dtype), "answer_mask": torch.ones_like(scores)}
    return {name: value.new_zeros(shape).index_put((ranking, column), value) for name, value in named.items()}


def whole_step(rows: Named) -> Named:
    """Concatenate the rows of all ranks, `[B]` each; gradients flow only to this rank's own rows.

    All ranks must call this together; a rank may have no rows.
    """
    own = torch.stack(list(rows.values()), -1)
    parts = gather(own.detach().cpu())
    if len(parts) > 1:
        rank = data_rank()
        parts = [own if number == rank else part.to(own.device) for number, part in enumerate(parts)]
        own = torch.cat(parts)
    return dict(zip(rows, own.unbind(-1), strict=True))
