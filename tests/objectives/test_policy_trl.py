"""The GRPO family and RLOO against the loss methods of TRL 1.16.0, as functions in float64.

Whole steps of both through a model: `benchmarks/parity`, tests/test_parity.py. Needs the `benchmark` extra.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.parity import losses
from rlhf_lightning.objectives import policy
from rlhf_lightning.objectives.advantage import group_centered, leave_one_out
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.kl import k3

pytest.importorskip("trl")

ROWS, PROMPT, LENGTH = 6, 4, 7
CASES = losses.rl(LENGTH)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    """A batch in TRL's form: prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 5, 1, 7, 3, 6])
    loss_mask = (torch.arange(LENGTH) < lengths[:, None]).to(dtype)
    rewards, groups = torch.randn(ROWS, generator=generator, dtype=dtype), torch.tensor([0, 0, 0, 1, 1, 1])
    return {
        "prompt_ids": torch.randint(0, 50, (ROWS, PROMPT), generator=generator),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(0, 50, (ROWS, LENGTH), generator=generator),
        "completion_mask": loss_mask,
        "advantages": group_centered(rewards, groups, "std"),
        "num_items_in_batch": loss_mask.sum(),
        "noise": 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=dtype),
        "reference_noise": 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=dtype),
    }


def theirs(name: str, batch: dict[str, Any], options: dict[str, Any], logprobs: Any, model: Any) -> torch.Tensor:
    """TRL's loss, by its own method on the attributes that it reads from the trainer."""
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
        epsilon_low=options.get("epsilon", 0.2),
        **{"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token"}
        | {key: value for key, value in options.items() if key not in arguments},
    )
    return (RLOOTrainer if name == "rloo" else GRPOTrainer)._compute_loss(trainer, model, batch)


def ours(case: policy.PolicyObjective, batch: dict[str, Any], options: dict[str, Any], logprobs: Any) -> torch.Tensor:
    loss_mask, old = batch["completion_mask"], batch["old_per_token_logps"]
    loss = case(logprobs, old, batch["advantages"][:, None], loss_mask)
    if beta := options.get("beta"):
        estimate = k3(logprobs, batch["ref_per_token_logps"])
        loss = loss + beta * estimate * ((logprobs - old).exp() if options.get("use_bias_correction_kl") else 1)
    total, count = aggregate(loss, loss_mask, case.aggregation, case.length)
    return total / count


@pytest.mark.parametrize("name", CASES)
def test_loss_functions_equal_trl_in_value_and_gradient(name: str) -> None:
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


def test_advantages_equal_trl() -> None:
    """TRL's own lines: GRPO divides by the group's deviation + 1e-4, RLOO subtracts the mean of the others."""
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 6.0]).double(), torch.tensor([0, 0, 0, 1, 1, 1])
    table = rewards.view(-1, 3)
    theirs = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_centered(rewards, groups, "std"), theirs.flatten(), rtol=1e-9, atol=1e-9)
    baselines = (table.sum(1, keepdim=True) - table) / 2
    torch.testing.assert_close(leave_one_out(rewards, groups), (table - baselines).flatten(), rtol=1e-9, atol=1e-9)
