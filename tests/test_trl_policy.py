"""The GRPO family and RLOO against TRL 1.16.0, whose own loss methods are called. Needs the `benchmark` extra."""

import copy
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning.models.scoring import TokenScorer
from rlhf_lightning.objectives import policy
from rlhf_lightning.objectives.advantage import group_centered, leave_one_out
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.kl import k3

from .conftest import build_model

pytest.importorskip("trl")

ROWS, PROMPT, LENGTH = 6, 4, 7
CASES: dict[str, tuple[policy.PolicyObjective, dict[str, Any]]] = {
    "grpo": (policy.GRPO(), {}),
    "grpo, dual clip": (policy.GRPO(dual_clip=1.5), {"delta": 1.5}),
    "grpo, two bounds": (policy.GRPO(clip_low=0.1, clip_high=0.3), {"epsilon_low": 0.1, "epsilon_high": 0.3}),
    "grpo, kl": (policy.GRPO(), {"beta": 0.3}),
    "grpo, weighted kl": (policy.GRPO(), {"beta": 0.3, "use_bias_correction_kl": True}),
    "gspo": (policy.GSPO(), {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}),
    "dr_grpo": (policy.DrGRPO(length=LENGTH), {"loss_type": "dr_grpo"}),
    "dapo": (policy.DAPO(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": (policy.BNPO(), {"loss_type": "bnpo"}),
    "cispo": (policy.CISPO(ratio_max=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    # TRL keeps the temperatures in float32, where 1.05 is not 1.05.
    "sapo": (policy.SAPO(temperature_negative=1.0625), {"loss_type": "sapo", "sapo_temperature_neg": 1.0625}),
    "rloo": (policy.RLOO(), {}),
}


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """A batch as TRL holds it: prompts and completions, the completions of unequal length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 5, 1, 7, 3, 6])
    mask = (torch.arange(LENGTH) < lengths[:, None]).to(dtype)
    rewards, groups = torch.randn(ROWS, generator=generator, dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 1])
    return {
        "prompt_ids": torch.randint(0, 50, (ROWS, PROMPT), generator=generator),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(0, 50, (ROWS, LENGTH), generator=generator),
        "completion_mask": mask,
        "advantages": group_centered(rewards, groups, "std"),
        "num_items_in_batch": mask.sum(),
        "noise": 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=dtype),
        "reference_noise": 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=dtype),
    }


def theirs(name: str, batch: dict[str, Any], options: dict[str, Any], logprobs: Any, model: Any) -> torch.Tensor:
    """TRL's loss, by its own method on what that method reads of the trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    arguments |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    arguments |= {key: options[key] for key in options if key in arguments}
    trainer = SimpleNamespace(
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        **{"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0}
        | {"importance_sampling_level": "token"}
        | {key: value for key, value in options.items() if key not in arguments},
    )
    return (RLOOTrainer if name == "rloo" else GRPOTrainer)._compute_loss(trainer, model, batch)


def ours(case: policy.PolicyObjective, batch: dict[str, Any], options: dict[str, Any], logprobs: Any) -> torch.Tensor:
    mask, old = batch["completion_mask"], batch["old_per_token_logps"]
    loss = case(logprobs, old, batch["advantages"][:, None], mask)
    if beta := options.get("beta"):
        estimate = k3(logprobs, batch["ref_per_token_logps"])
        loss = loss + beta * estimate * ((logprobs - old).exp() if options.get("use_bias_correction_kl") else 1)
    total, count = aggregate(loss, mask, case.aggregation, case.length)
    return total / count


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_as_functions(name: str) -> None:
    case, options = CASES[name]
    batch = inputs(torch.float64)
    start = -3 * torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _add_old(batch, start)
    results = []
    for side in ("ours", "theirs"):
        leaf = start.clone().requires_grad_()
        loss = ours(case, batch, options, leaf) if side == "ours" else theirs(name, batch, options, leaf, None)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-12)


def _add_old(batch: dict[str, Any], logprobs: torch.Tensor) -> None:
    batch["old_per_token_logps"] = logprobs + batch["noise"]
    batch["ref_per_token_logps"] = logprobs + batch["reference_noise"]
    batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(1)


@pytest.mark.parametrize("name", CASES)
def test_through_a_model_in_float32(name: str, tokenizer: Any) -> None:
    """Both sides compute log-probabilities of one model in their own way; the gradients of its weights are compared."""
    from trl.trainer import add_fused_lm_head
    from trl.trainer.grpo_trainer import GRPOTrainer

    case, options = CASES[name]
    model = build_model(tokenizer).eval()
    patched = copy.deepcopy(model)
    add_fused_lm_head(patched, temperature=1.0)
    batch = inputs(torch.float32)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], 1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    logprobs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, patched, ids, attention, LENGTH)[0]
    _add_old(batch, logprobs.detach())
    their_loss = theirs(name, batch, options, logprobs, patched)
    mask = torch.cat([torch.zeros(ROWS, PROMPT), batch["completion_mask"]], 1)
    our_loss = ours(case, batch, options, TokenScorer(model)(ids, mask).logprobs[:, PROMPT:])
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-6)
    wanted, found = _gradient(their_loss, patched), _gradient(our_loss, model)
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def _gradient(loss: torch.Tensor, model: Any) -> torch.Tensor:
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_advantages_are_theirs() -> None:
    """TRL's own lines: GRPO divides by the group's deviation + 1e-4, RLOO takes off the mean of the others."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 6.0]).double(), torch.tensor([0, 0, 0, 1, 1, 1])
    table = rewards.view(-1, 3)
    theirs = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_centered(rewards, groups, "std"), theirs.flatten(), rtol=1e-9, atol=1e-9)
    baselines = (table.sum(1, keepdim=True) - table) / 2
    torch.testing.assert_close(leave_one_out(rewards, groups), (table - baselines).flatten(), rtol=1e-9, atol=1e-9)
