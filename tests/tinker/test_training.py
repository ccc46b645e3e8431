"""Training runs against plain transformers and peft."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.adapters import FORMS, AdaptedModel, AdaptedModels
from rlhf_lightning.tinker.losses import loss_of
from rlhf_lightning.tinker.requests import AdamParams, Datum
from rlhf_lightning.tinker.training import TrainingRun

LORA = LoRA(rank=3, target=["all"])


@pytest.fixture(scope="module")
def loaded(folder: str) -> LanguageModel:
    """In float64, so that the order of sums does not count."""
    found = LanguageModel(folder)
    found.model.double()
    return found


@pytest.fixture(scope="module")
def adapted(loaded: LanguageModel) -> AdaptedModel:
    return AdaptedModels(loaded).of(LORA)


def weights(adapted: AdaptedModel, seed: int) -> dict[str, Tensor]:
    """Weights of an adapter that changes the model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in adapted.fresh(seed).items()
    }


def data(seed: int = 0) -> list[Datum]:
    """Rows of different lengths. The last targets are not the next tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in (5, 1, 9, 5):
        ids = torch.randint(0, 250, (length + 1,), generator=generator)
        names = ("weights", "logprobs", "advantages")
        inputs = {name: torch.randn(length, generator=generator) for name in names}
        rows.append(Datum(ids[:-1], ids[1:], inputs))
    return [*rows[:-1], Datum(rows[-1].tokens, torch.tensor([0, 0, 7, 8, 9]), rows[-1].inputs)]


def plainly(folder: str, values: dict[str, Tensor], rows: list[Datum]) -> Any:
    """Log-probabilities, sum of the cross-entropy, and its gradient, of stock transformers and peft, row by row."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=32, target_modules=LORA.layer_names(base), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
    total, logprobs = torch.zeros((), dtype=torch.float64), []
    for row in rows:
        found = model(input_ids=row.tokens[None]).logits[0].log_softmax(-1)
        logprobs.append(found.gather(-1, row.targets[:, None])[:, 0])
        total = total - (logprobs[-1] * row.inputs["weights"]).sum()
    gradients = torch.autograd.grad(total, [named[name] for name in values])
    return [row.detach() for row in logprobs], total.item(), dict(zip(values, gradients, strict=True))


@pytest.mark.parametrize("budget", [None, 6])
def test_equal_to_stock_libraries(folder: str, loaded: LanguageModel, budget: int | None) -> None:
    """Also with every row in a forward pass of its own."""
    adapted = AdaptedModels(loaded).of(LORA)
    adapted.token_logprobs.packed_forward.max_tokens_per_batch = budget
    values = weights(adapted, 1)
    run = TrainingRun(adapted, values)
    logprobs, total, gradients = plainly(folder, values, data())
    found, loss = run.forward_backward(data(), loss_of("cross_entropy", {}))
    assert loss == pytest.approx(total, abs=1e-9)
    for ours, theirs in zip(found, logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert run.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(run.gradients[name], gradient, atol=1e-9, rtol=1e-9)


def test_gradients_add_up_until_the_step(adapted: AdaptedModel) -> None:
    """Two calls with half of the data are one call; a call without backward changes nothing; runs do not mix."""
    loss, rows = loss_of("importance_sampling", {}), data()
    whole, halves, other = (TrainingRun(adapted, weights(adapted, seed)) for seed in (2, 2, 3))
    whole.forward_backward(rows, loss)
    halves.forward_backward(rows[:2], loss)
    other.forward_backward(rows, loss)
    halves.forward_backward(rows, loss, backward=False)
    halves.forward_backward(rows[2:], loss)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(halves.gradients[name], gradient, atol=1e-10, rtol=1e-8)
        assert not torch.equal(other.gradients[name], gradient)
    for run in (whole, halves):
        run.optim_step(AdamParams(learning_rate=1e-3))
        assert not run.gradients
    for name, value in whole.weights.items():
        torch.testing.assert_close(halves.weights[name], value, atol=1e-8, rtol=0)


def test_prompts_are_computed_once(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For policy losses: samples of one prompt count as its tokens and theirs; the numbers are those of single rows."""
    generator = torch.Generator().manual_seed(0)
    prompt, rows = torch.randint(0, 250, (12,), generator=generator), []
    for length in (3, 4, 2, 3):
        ids = torch.cat([prompt, torch.randint(0, 250, (length,), generator=generator)])
        zeros = torch.zeros(len(prompt) - 1)
        inputs = {
            name: torch.cat([zeros, torch.randn(length, generator=generator)]) for name in ("logprobs", "advantages")
        }
        rows.append(Datum(ids[:-1], ids[1:], {"weights": torch.ones(len(ids) - 1), **inputs}))
    forward, loss = adapted.token_logprobs.packed_forward, loss_of("ppo", {})
    apart, together = TrainingRun(adapted, weights(adapted, 3)), TrainingRun(adapted, weights(adapted, 3))
    monkeypatch.setattr(forward, "max_tokens_per_batch", 14)
    single = apart.forward_backward(rows, loss)
    monkeypatch.setattr(forward, "max_tokens_per_batch", 12 + 2 + 3 + 1 + 2)
    assert [len(group) for group in together._groups(rows, loss)] == [4]
    assert [len(group) for group in together._groups(rows, loss_of("cross_entropy", {}))] == [1] * 4
    shared = together.forward_backward(rows, loss)
    assert shared[1] == pytest.approx(single[1], abs=1e-7)
    for ours, theirs, row in zip(shared[0], single[0], rows, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
        assert torch.equal(ours != 0, row.inputs["advantages"] != 0)
    for name, gradient in apart.gradients.items():
        # The model's norms are computed in float32, whatever the dtype of its weights.
        torch.testing.assert_close(together.gradients[name], gradient, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_step_is_that_of_adamw(adapted: AdaptedModel, clip: float) -> None:
    """Two steps with other settings each, computed by AdamW's formula (arXiv 1711.05101, algorithm 2)."""
    run = TrainingRun(adapted, weights(adapted, 4))
    expected = run.snapshot()
    first, second = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    settings = [AdamParams(1e-2, 0.9, 0.95, 1e-12, 0.1, clip), AdamParams(3e-3, 0.8, 0.99, 1e-6, 0.0, clip)]
    for step, params in enumerate(settings, start=1):
        run.forward_backward(data(step), loss_of("cross_entropy", {}))
        norm = torch.stack([gradient.norm() for gradient in run.gradients.values()]).norm()
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for name, gradient in run.gradients.items():
            g = gradient * scale
            first[name] = params.beta1 * first[name] + (1 - params.beta1) * g
            second[name] = params.beta2 * second[name] + (1 - params.beta2) * g**2
            m, v = first[name] / (1 - params.beta1**step), second[name] / (1 - params.beta2**step)
            decayed = expected[name] * (1 - params.learning_rate * params.weight_decay)
            expected[name] = decayed - params.learning_rate * m / (v.sqrt() + params.eps)
        assert run.optim_step(params) == pytest.approx(norm.item())
        for name, value in run.weights.items():
            torch.testing.assert_close(value.detach(), expected[name], atol=1e-10, rtol=1e-9)


def test_base_and_runs_share_the_base(loaded: LanguageModel) -> None:
    models = AdaptedModels(loaded)
    base = dict(loaded.model.named_parameters())
    before = {name: value.clone() for name, value in base.items()}
    for lora in (None, LORA, LoRA(rank=2, target=["attention"])):
        pointers = {value.data_ptr() for value in models.of(lora).model.parameters()}
        assert {value.data_ptr() for value in base.values()} <= pointers
    adapted = models.of(LORA)
    run = TrainingRun(adapted, adapted.fresh(0))
    run.forward_backward(data(), loss_of("cross_entropy", {}))
    run.optim_step(AdamParams(learning_rate=0.1))
    assert models.of(LORA) is adapted
    for rank in range(1, FORMS + 1):
        models.of(LoRA(rank, target=["mlp"]))
    assert len(models._models) == FORMS
    assert models.of(LORA) is not adapted
    assert all(torch.equal(value, before[name]) for name, value in base.items())


def test_fresh_adapter(adapted: AdaptedModel) -> None:
    """The seed decides; the model is that of the base; the random numbers of others go on as they were."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (adapted.fresh(seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    names = [name for name in one if ".lora_A." in name]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in names)
    assert all(not value.any() for name, value in one.items() if name not in names)


def test_what_is_not_finite_is_refused(adapted: AdaptedModel) -> None:
    run = TrainingRun(adapted, weights(adapted, 6))
    with pytest.raises(RequestError, match="no gradients to step with"):
        run.optim_step(AdamParams())
    run.forward_backward(data(), loss_of("cross_entropy", {}))
    kept = dict(run.gradients)
    huge = [Datum(row.tokens, row.targets, {"weights": row.inputs["weights"].double() * 1e308 * 10}) for row in data()]
    with pytest.raises(RequestError, match="not finite; the gradients of this call were dropped"):
        run.forward_backward(huge, loss_of("cross_entropy", {}))
    assert run.gradients == kept


def test_resumed_run_is_bit_equal(adapted: AdaptedModel, tmp_path: Path) -> None:
    loss = loss_of("cross_entropy", {})
    run, resumed = (TrainingRun(adapted, weights(adapted, seed)) for seed in (8, 9))
    for step in range(2):
        run.forward_backward(data(step), loss)
        run.optim_step(AdamParams())
    resumed.forward_backward(data(5), loss)  # dropped by `load`
    resumed.load(run.snapshot(), run.optimizer_state())
    for one in (run, resumed):
        one.forward_backward(data(2), loss)
        one.optim_step(AdamParams())
    assert all(torch.equal(value, resumed.weights[name]) for name, value in run.weights.items())
    assert all(torch.equal(value, resumed.optimizer_state()[name]) for name, value in run.optimizer_state().items())
