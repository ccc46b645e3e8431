"""Values and gradients against TRL 1.16.0, as functions in float64: its DPO losses and KTO.

Whole steps of both through a model, and where the two differ: `benchmarks/parity`, tests/test_parity.py.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.parity import losses
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives import preference

trl = pytest.importorskip("trl")
LOSSES, BETA, SMOOTHING, TEMPERATURE = losses.DPO, losses.BETA, losses.SMOOTHING, losses.TEMPERATURE


def fake_trainer(kind: str, loss_type: str, ld_alpha: float | None = None) -> Any:
    """The attributes that a TRL trainer's `_compute_loss` reads."""
    same = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    common = {
        "accelerator": same,
        "model": SimpleNamespace(training=True),
        "beta": BETA,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    if kind == "kto":
        own = {"loss_type": loss_type, "calculate_KL": loss_type == "kto"}
        return SimpleNamespace(**common, **own, desirable_weight=1.2, undesirable_weight=0.7)
    return SimpleNamespace(
        **common,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=SMOOTHING,
        f_divergence_type="reverse_kl",
        ld_alpha=ld_alpha,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=TEMPERATURE),
    )


def outputs(logprobs: torch.Tensor) -> Any:
    zero = torch.zeros_like(logprobs)
    return SimpleNamespace(log_probs=logprobs, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def responses(rows: int, equal: bool) -> torch.Tensor:
    """Masks of responses of different lengths after prompts of different lengths, `[rows, 12]`."""
    loss_mask = torch.zeros(rows, 12)
    for i in range(rows):
        start = 1 + i % 3
        loss_mask[i, start : start + (5 if equal else 2 + (3 * i) % 7)] = 1
    return loss_mask


def ours(loss: Any, scorer: ImplicitReward, loss_mask: torch.Tensor, logprobs: torch.Tensor, ref: torch.Tensor) -> Any:
    """Our loss from token log-probabilities, by the module's code path."""
    from rlhf_lightning.models.scorers import Scored
    from rlhf_lightning.modules.preference_rows import name_rows

    shared = torch.stack(loss_mask.sum(-1).chunk(2)).amin(0)
    batch = {"loss_mask": loss_mask, "shared_lengths": torch.cat([shared, shared])}
    scores = scorer.number(logprobs - ref, batch)
    named = name_rows("pairs", Scored(scores, logprobs, ref, scorer.number(ref, batch)), batch)
    known = {**named, "beta": scorer.beta}
    return loss(named["chosen"], named["rejected"], **{key: known[key] for key in loss.keywords() if key in known})


def same_value_and_gradient(found: Any, own: Any, value: Any, theirs: Any, loss_mask: torch.Tensor) -> None:
    """Compare our loss and the gradient of our log-probabilities with TRL's, which has no first column."""
    value.backward()
    found.backward()
    torch.testing.assert_close(found, value.double(), rtol=1e-6, atol=1e-12)
    assert own.grad is not None
    assert theirs.grad is not None
    inside = loss_mask[:, 1:]  # a scorer gives 0 outside, and nothing flows there
    torch.testing.assert_close(own.grad[:, 1:] * inside, theirs.grad * inside, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_functions_equal_trl_in_value_and_gradient(name: str) -> None:
    loss, options = LOSSES[name]
    scorer = ImplicitReward(BETA, **options)
    loss_mask = responses(10, equal=name == "sft").double()
    generator = torch.Generator().manual_seed(3)
    draw = lambda: -2 * torch.rand(loss_mask.shape, generator=generator).double() * loss_mask  # noqa: E731
    first, ref = draw(), draw()
    kind = "sigmoid" if name == "length_desensitized" else name
    fake = fake_trainer("dpo", kind, scorer.tail_weight if name == "length_desensitized" else None)
    weighted = ref
    if name == "length_desensitized":
        lengths = torch.stack(loss_mask.sum(-1).chunk(2)).amin(0).repeat(2)[:, None]
        weighted = torch.where(loss_mask.cumsum(-1) > lengths, 0.4 * ref, ref)
    theirs = first[:, 1:].clone().requires_grad_()
    inputs = {
        "input_ids": torch.zeros(loss_mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(loss_mask.shape),
        "completion_mask": loss_mask,
        "ref_chosen_logps": weighted.sum(-1)[:5],
        "ref_rejected_logps": weighted.sum(-1)[5:],
    }
    value = trl.DPOTrainer._compute_loss(fake, lambda **_: outputs(theirs), inputs, False)
    own = first.clone().requires_grad_()
    found = ours(loss, scorer, loss_mask, own, ref).mean()
    same_value_and_gradient(found, own, value, theirs, loss_mask)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl_in_value_and_gradient(name: str) -> None:
    loss_mask = responses(8, equal=False).double()
    generator = torch.Generator().manual_seed(5)
    draw = lambda: -2 * torch.rand(loss_mask.shape, generator=generator).double() * loss_mask  # noqa: E731
    first, ref, mismatched, mismatched_ref = draw(), draw(), 0.5 * draw(), draw()
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])
    fake = fake_trainer("kto", name)
    if name == "apo_zero_unpaired":
        fake.desirable_weight = fake.undesirable_weight = 1.0
    fake._compute_kl_logps = lambda model, batch: mismatched.sum(-1)
    theirs = first[:, 1:].clone().requires_grad_()
    inputs = {
        "input_ids": torch.zeros(loss_mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(loss_mask.shape),
        "completion_mask": loss_mask,
        "label": labels.bool(),
        "ref_logps": ref.sum(-1),
        "ref_KL_logps": mismatched_ref.sum(-1),
    }
    value = trl.KTOTrainer._compute_loss(fake, lambda **_: outputs(theirs), inputs, False)
    own = first.clone().requires_grad_()
    loss = preference.KTO(1.2, 0.7) if name == "kto" else preference.APOUnpaired()
    named = {"mismatched": BETA * (mismatched - mismatched_ref).sum(-1)} if name == "kto" else {}
    found = loss(BETA * (own - ref).sum(-1), labels.double(), **named).mean()
    same_value_and_gradient(found, own, value, theirs, loss_mask)
