"""What stands on the policy: its reference, its critic's values, and what is computed for the rows of a round."""

from typing import Any

from torch import Tensor

from rlhf_lightning.models.loading import check_vocabulary, load_for_scoring
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.token_logprobs import TokenLogprobsOutput
from rlhf_lightning.objectives.kl import beyond
from rlhf_lightning.objectives.policy.importance import token_log_ratio
from rlhf_lightning.rollout.collect import RowScorer
from rlhf_lightning.rollout.kl import KLPenalty


def make_reference(module: Any, kl: KLPenalty) -> Reference:
    """The policy as the stage starts it, or the model that is named; raises `ConfigError`."""
    budget = module.max_tokens_per_batch
    if kl.reference is None:
        moves = bool(kl.refresh_every)
        return Reference(module.model, module.fresh_adapter, budget, moves, kl.device, kl.offload)
    model = load_for_scoring(kl.reference, module.task, module.dtype_name)
    check_vocabulary(model, module.tokenizer, "the reference")
    return Reference.of(model, budget, kl.device, kl.offload)


def critic_values(module: Any, ids: Tensor, loss_mask: Tensor, scores: TokenLogprobsOutput | None = None) -> Tensor:
    """The critic's values `[B, T]`; where it shares the policy's backbone, from the policy's own forward, `scores`."""
    if not module.critic.shared:
        return module.critic(ids, loss_mask)
    values = (scores or module.token_logprobs(ids, loss_mask, module.sampler.temperature, details=True)).values
    assert values is not None, "bind() has put the value head on the policy"
    return values


def row_scorers(module: Any) -> dict[str, RowScorer]:
    """What is computed for the rows of a round, with the weights that the round starts with, by column."""
    temperature, scorers = module.sampler.temperature, {}
    if module.reference is not None:
        scorers["reference_logprobs"] = lambda ids, loss_mask: module.reference.logprobs(ids, loss_mask, temperature)
    if module.importance_weights is not None:
        scorers["recomputed_logprobs"] = lambda ids, loss_mask: (
            module.token_logprobs(ids, loss_mask, temperature).logprobs
        )
    if module.critic is not None:
        scorers["values"] = lambda ids, loss_mask: critic_values(module, ids, loss_mask)
    return scorers


def clamped(module: Any, logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
    """1 at the tokens `[B, T]` with a log ratio beyond ±20, which the loss, its KL or its weights cut off."""
    old, loss_mask = batch["old_logprobs"], batch["loss_mask"]
    cut = module.objective.clamped(logprobs, old, loss_mask)
    if module.kl is not None and module.kl.place == "loss":
        cut = cut | beyond(token_log_ratio(logprobs, batch["reference_logprobs"], loss_mask))
    if module.importance_weights is not None:
        cut = cut | beyond(token_log_ratio(old, batch["sampling_logprobs"], loss_mask))
    return cut.to(loss_mask.dtype)
