"""Values and gradients against TRL 1.16.0: its list of DPO losses and KTO, as functions and through a model.

Where the two differ on purpose:

- `sft`: TRL divides by the tokens of the micro-batch, so a long response weighs more and the loss changes with
  accumulation; RPO (arXiv 2404.19733) and ours take the mean of each response. Equal where lengths are equal.
- `ipo` is length-normalised in TRL; ours is with `ImplicitReward(length_normalised=True)`, and the paper's sum without.
- KTO's reference point: TRL shifts responses within the preprocessing batch and takes the mean of a micro-batch; ours
  shifts in the whole file and takes the mean of the optimizer step. The same rows give the same loss.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning import PreferenceModule
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives import preference
from tests.conftest import build_model, pairs

trl = pytest.importorskip("trl")
BETA, SMOOTHING, TEMPERATURE = 0.3, 0.1, 0.05
# For each of TRL's: our class, whether scores are means over tokens, and the share of a tail token.
LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sigmoid": (preference.BradleyTerry(), {}),
    "hinge": (preference.Hinge(), {}),
    "ipo": (preference.IPO(), {"length_normalised": True}),
    "exo_pair": (preference.EXO(SMOOTHING), {}),
    "nca_pair": (preference.NCA(), {}),
    "robust": (preference.Robust(SMOOTHING), {}),
    "bco_pair": (preference.BCO().eval(), {}),
    "sppo_hard": (preference.SPPO(), {}),
    "aot": (preference.AOT(SMOOTHING), {}),
    "aot_unpaired": (preference.AOTUnpaired(SMOOTHING), {}),
    "apo_zero": (preference.APOZero(), {}),
    "apo_down": (preference.APODown(), {}),
    "discopop": (preference.DiscoPOP(TEMPERATURE), {}),
    "sft": (preference.SFT(), {}),
    "sigmoid_norm": (preference.BradleyTerry(), {"length_normalised": True}),
    "length_desensitised": (preference.BradleyTerry(), {"tail_weight": 0.4}),
}


def fake_trainer(kind: str, loss_type: str, ld_alpha: float | None = None) -> Any:
    """What a TRL trainer's `_compute_loss` reads of itself."""
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
    """Masks of responses of unlike length after prompts of unlike length, `[rows, 12]`."""
    mask = torch.zeros(rows, 12)
    for i in range(rows):
        start = 1 + i % 3
        mask[i, start : start + (5 if equal else 2 + (3 * i) % 7)] = 1
    return mask


def ours(loss: Any, scorer: ImplicitReward, mask: torch.Tensor, logprobs: torch.Tensor, ref: torch.Tensor) -> Any:
    """Our loss of per-token log-probabilities, by the path that the module takes."""
    from rlhf_lightning.models.scorers import Scored
    from rlhf_lightning.modules.preference_rows import name_rows

    shared = torch.stack(mask.sum(-1).chunk(2)).amin(0)
    batch = {"mask": mask, "shared_lengths": torch.cat([shared, shared])}
    scores = scorer.number(logprobs - ref, batch)
    named = name_rows("pairs", Scored(scores, logprobs, ref, scorer.number(ref, batch)), batch)
    known = {**named, "beta": scorer.beta}
    return loss(named["chosen"], named["rejected"], **{key: known[key] for key in loss.keywords() if key in known})


@pytest.mark.parametrize("name", LOSSES)
def test_functions_equal_trl_in_value_and_gradient(name: str) -> None:
    loss, options = LOSSES[name]
    scorer = ImplicitReward(BETA, **options)
    mask = responses(10, equal=name == "sft").double()
    generator = torch.Generator().manual_seed(3)
    draw = lambda: -2 * torch.rand(mask.shape, generator=generator).double() * mask  # noqa: E731
    first, ref = draw(), draw()
    kind = "sigmoid" if name == "length_desensitised" else name
    fake = fake_trainer("dpo", kind, scorer.tail_weight if name == "length_desensitised" else None)
    weighted = ref
    if name == "length_desensitised":
        lengths = torch.stack(mask.sum(-1).chunk(2)).amin(0).repeat(2)[:, None]
        weighted = torch.where(mask.cumsum(-1) > lengths, 0.4 * ref, ref)
    theirs = first[:, 1:].clone().requires_grad_()
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape),
        "completion_mask": mask,
        "ref_chosen_logps": weighted.sum(-1)[:5],
        "ref_rejected_logps": weighted.sum(-1)[5:],
    }
    value = trl.DPOTrainer._compute_loss(fake, lambda **_: outputs(theirs), inputs, False)
    value.backward()
    own = first.clone().requires_grad_()
    found = ours(loss, scorer, mask, own, ref).mean()
    found.backward()
    torch.testing.assert_close(found, value.double(), rtol=1e-6, atol=1e-12)
    assert own.grad is not None
    assert theirs.grad is not None
    inside = mask[:, 1:]  # a scorer gives 0 outside, and nothing flows there
    torch.testing.assert_close(own.grad[:, 1:] * inside, theirs.grad * inside, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl_in_value_and_gradient(name: str) -> None:
    mask = responses(8, equal=False).double()
    generator = torch.Generator().manual_seed(5)
    draw = lambda: -2 * torch.rand(mask.shape, generator=generator).double() * mask  # noqa: E731
    first, ref, mismatched, mismatched_ref = draw(), draw(), 0.5 * draw(), draw()
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])
    fake = fake_trainer("kto", name)
    if name == "apo_zero_unpaired":
        fake.desirable_weight = fake.undesirable_weight = 1.0
    fake._compute_kl_logps = lambda model, batch: mismatched.sum(-1)
    theirs = first[:, 1:].clone().requires_grad_()
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape),
        "completion_mask": mask,
        "label": labels.bool(),
        "ref_logps": ref.sum(-1),
        "ref_KL_logps": mismatched_ref.sum(-1),
    }
    value = trl.KTOTrainer._compute_loss(fake, lambda **_: outputs(theirs), inputs, False)
    value.backward()
    own = first.clone().requires_grad_()
    loss = preference.KTO(1.2, 0.7) if name == "kto" else preference.APOUnpaired()
    named = {"mismatched": BETA * (mismatched - mismatched_ref).sum(-1)} if name == "kto" else {}
    found = loss(BETA * (own - ref).sum(-1), labels.double(), **named).mean()
    found.backward()
    torch.testing.assert_close(found, value.double(), rtol=1e-6, atol=1e-12)
    assert own.grad is not None
    assert theirs.grad is not None
    inside = mask[:, 1:]  # a scorer gives 0 outside, and nothing flows there
    torch.testing.assert_close(own.grad[:, 1:] * inside, theirs.grad * inside, rtol=1e-6, atol=1e-12)


@pytest.fixture
def policy_and_reference(tmp_path: Path, tokenizer: Any) -> tuple[str, str]:
    """Two model folders: a reference, and a policy some way from it."""
    for name, seed in (("reference", 0), ("policy", 1)):
        build_model(tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    reference, policy = (tmp_path / name for name in ("reference", "policy"))
    from transformers import AutoModelForCausalLM

    near, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, reference))
    with torch.no_grad():
        for a, b in zip(near.parameters(), start.parameters(), strict=True):
            a.copy_(b + 0.02 * (a - b))
    near.save_pretrained(policy)
    return str(policy), str(reference)


def trl_batch(kind: str, loss_type: str, folders: tuple[str, str], tmp_path: Path) -> tuple[Any, Any, Any]:
    """TRL's trainer, its model's loss on its first batch (gradients filled in), and that batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, reference = folders
    model = AutoModelForCausalLM.from_pretrained(policy)
    rows = [
        {"prompt": r["prompt"] + "?", "chosen": " " + r["chosen"], "rejected": " " + r["rejected"]} for r in pairs(6)
    ]
    if kind == "kto":
        rows = [
            {"prompt": r["prompt"], "completion": r["chosen"] if i % 2 else r["rejected"], "label": bool(i % 2)}
            for i, r in enumerate(rows)
        ]
    config = trl.KTOConfig if kind == "kto" else trl.DPOConfig
    arguments = config(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=6,
        beta=BETA,
        loss_type=[loss_type] if kind == "dpo" else loss_type,
        report_to="none",
        max_length=None,
        disable_dropout=True,
        **({"label_smoothing": SMOOTHING} if kind == "dpo" else {}),
    )
    make = trl.KTOTrainer if kind == "kto" else trl.DPOTrainer
    trainer = make(
        model,
        AutoModelForCausalLM.from_pretrained(reference),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return trainer, loss.detach(), batch


def same_gradients(module: Any, theirs: Any) -> None:
    """As one vector over all weights, in float32."""
    others = dict(theirs.named_parameters())
    pairs = [(parameter.grad, others[name].grad) for name, parameter in module.model.named_parameters()]
    ours, wanted = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs, strict=True))
    assert float(wanted.norm()) > 0
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", "length_desensitised")])
def test_a_step_through_a_model_equals_trl(name: str, policy_and_reference: tuple[str, str], tmp_path: Path) -> None:
    trainer, value, batch = trl_batch("dpo", name, policy_and_reference, tmp_path)
    loss, options = LOSSES[name]
    policy, reference = policy_and_reference
    module = PreferenceModule(policy, ImplicitReward(BETA, reference, **options), loss)
    module.configure_model()
    rows = {
        "input_ids": batch["input_ids"],
        "mask": batch["completion_mask"].float(),
        "lengths": batch["attention_mask"].sum(-1),
        "weights": torch.ones(len(batch["input_ids"]) // 2),
    }
    if name == "bco_pair":
        module.loss.eval()  # TRL's has no running mean
    found = module._losses(module._named(rows)).mean()
    found.backward()
    torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-5)
    same_gradients(module, trainer.model)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_a_kto_step_through_a_model_equals_trl(
    name: str, policy_and_reference: tuple[str, str], tmp_path: Path
) -> None:
    trainer, value, batch = trl_batch("kto", name, policy_and_reference, tmp_path)
    policy, reference = policy_and_reference
    loss = preference.KTO() if name == "kto" else preference.APOUnpaired()
    module = PreferenceModule(policy, ImplicitReward(BETA, reference), loss)
    module.configure_model()

    def rows(prefix: str) -> dict[str, Any]:
        return {
            "input_ids": batch[f"{prefix}input_ids"],
            "mask": batch[f"{prefix}completion_mask"].float(),
            "lengths": batch[f"{prefix}attention_mask"].sum(-1),
        }

    whole = {**rows(""), "labels": batch["label"].float(), "weights": torch.ones(6)}
    if name == "kto":
        whole["mismatched"] = rows("KL_")
    found = module._losses(module._named(whole)).mean()
    found.backward()
    torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-5)
    same_gradients(module, trainer.model)
