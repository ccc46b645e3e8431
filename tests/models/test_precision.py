"""Lower precision: weights and activations are rounded, all other numbers stay in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import kept_attention, packed_attention
from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.last_layer import KeptLayout
from rlhf_lightning.models.loading import load_for_scoring
from rlhf_lightning.models.logits import HeadLogprobsFunction, RoundedLogitsFunction, head_logprobs
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix
from rlhf_lightning.models.precision import logprob_rounding, rounded_factors
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.rewards import ModelReward
from rlhf_lightning.types import Completion
from tests.helpers.models import build_model
from tests.helpers.modules import module_and_data
from tests.helpers.packed import graph_names
from tests.helpers.training import trainer

pytestmark = pytest.mark.usefixtures("every_comparison")

KINDS = ("sft", "preference", "policy")
PRECISIONS = ("bf16-mixed", "bf16-true")
LOW = (torch.bfloat16, torch.float16)


class Seen:
    """Dtypes of the inputs and outputs of a module's steps."""

    def __init__(self, module: Any) -> None:
        self.batches: list[Any] = []
        self.types: set[torch.dtype] = set()
        step = module.training_step

        def watched(batch: dict[str, Any], batch_idx: int) -> Any:
            out = step(batch, batch_idx)
            self.batches.append(batch)
            for value in (*batch.values(), *(out.values() if isinstance(out, dict) else [out])):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.types.add(value.dtype)
            return out

        module.training_step = watched


def test_logits_are_wide_under_autocast(model: Any) -> None:
    """Equal to the wide head on the hidden states of autocast; bfloat16 would round them to multiples of 1/8."""
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
    backbone, token_logprobs = Backbone(model), TokenLogprobs(model)
    ids = torch.arange(3, 15)[None]
    loss_mask = (torch.arange(12) > 0).float()[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = backbone.decoder(input_ids=ids, use_cache=False)[0]
        logits = backbone.logits(states)
        logprobs = token_logprobs(ids, loss_mask).logprobs
        assert model.lm_head(states).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert logits.abs().max() > 16
    wide = model.lm_head(states.float())
    # The factors may be rounded to 8 bits, which with AMX they are; the sums are not.
    size = states.float().norm(dim=-1, keepdim=True) * model.lm_head.weight.norm(dim=-1)
    assert ((logits - wide).abs() <= 2e-3 * size).all()
    wanted = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    # Packed rows round a few hidden states otherwise.
    torch.testing.assert_close(logprobs[0, 1:], wanted, rtol=0.0, atol=0.25)
    assert not Backbone(model.bfloat16()).wide_head


def test_gradients_of_the_head_under_autocast_are_rounded_ones() -> None:
    """They differ from those in float64 by the rounding of their factors to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    states, weight, direction = (
        torch.randn(size, generator=generator, requires_grad=True) for size in ((40, 32), (100, 32), (40, 100))
    )
    logits = RoundedLogitsFunction.apply(states, weight)
    found = torch.autograd.grad(logits, (states, weight), direction)
    wide = states.double() @ weight.double().t()
    wanted = torch.autograd.grad(wide, (states, weight), direction.double())
    for ours, exact in zip((logits, *found), (wide, *wanted), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_fused_head_equals_that_of_float64(temperature: float) -> None:
    """Log-probabilities and entropies, and their gradients, over several blocks of rows; nothing wide is kept."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (
        torch.randn(size, generator=generator).bfloat16().float().requires_grad_() for size in ((150, 32), (100, 32))
    )
    targets, by_result = torch.randint(100, (150,), generator=generator), torch.randn(2, 150, generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    logp = (exact[0] @ exact[1].t() / temperature).log_softmax(-1)
    wide = [logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)]
    sizes: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.extend([tensor.shape] if tensor.dtype == torch.float32 else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        *narrow, correct = HeadLogprobsFunction.apply(states, weight, targets, temperature, True)
    assert torch.Size((150, 100)) not in sizes
    assert torch.equal(correct, (logp.argmax(-1) == targets).float())
    for ours, right in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)
    for results in ((0,), (0, 1)):  # without and with the entropy's gradient, which overwrites what is kept
        total = sum(by_result[i] @ narrow[i] for i in results)
        found = torch.autograd.grad(total, (states, weight), retain_graph=results == (0,))
        total = sum(by_result[i].double() @ wide[i] for i in results)
        wanted = torch.autograd.grad(total, exact, retain_graph=True)
        for ours, right in zip(found, wanted, strict=True):
            assert (ours - right).norm() < 5e-3 * right.norm()
    with torch.no_grad():
        alone = head_logprobs(states, weight, targets, temperature, True)
    assert all(torch.equal(*pair) for pair in zip(alone, (*narrow, correct), strict=True))


def test_rounding_of_factors_ends_with_the_last_of_overlapping_users() -> None:
    """Two threads whose uses overlap without one being inside the other."""
    first, second = rounded_factors(), rounded_factors()
    assert torch.get_float32_matmul_precision() == "highest"
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("kept", [None, [3, 10, -1], [-1]])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("branches", [(0,), (7, 3, 0)])
def test_short_attention_equals_that_of_float64(
    branches: tuple[int, ...], window: int | None, kept: list[int] | None
) -> None:
    """Values and gradients of packed rows, with two query heads per key head, and queries of all or a few tokens."""
    generator = torch.Generator().manual_seed(0)
    layout = PackedLayout(
        [SharedPrefix((9,), 4, (0,)), SharedPrefix(tuple(range(len(branches))), 11, branches)], torch.device("cpu")
    )
    n = len(layout.rows)
    exact = [
        torch.randn(1, heads, n, 16, generator=generator, dtype=torch.float64).bfloat16().double().requires_grad_()
        for heads in (4, 2, 2)
    ]
    places = torch.arange(n) if kept is None else torch.tensor(kept) % n
    direction = torch.randn(1, len(places), 4, 16, generator=generator, dtype=torch.float64)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if kept is None:
            return packed_attention(query, key, value, layout, sliding_window=window)
        return kept_attention(query[:, :, places], KeptLayout(layout, places, key, value), sliding_window=window)

    wide = attend(*exact)
    wanted = [wide, *torch.autograd.grad(wide, exact, direction)]
    narrow = [states.detach().bfloat16().requires_grad_() for states in exact]
    out = attend(*narrow)
    assert "ShortAttentionFunction" in graph_names(out)
    found = [out, *torch.autograd.grad(out, narrow, direction.bfloat16())]
    for ours, right in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - right).norm() < 1e-2 * right.norm()


def test_bf16_mixed_clips_gradients_of_a_fused_optimizer(base: str, tmp_path: Path) -> None:
    """The weights after a clipped step are those of an optimizer that is not fused."""
    ends = []
    for fused in (True, False):
        module, data = module_and_data(
            "sft", base, optimizer=lambda weights, fused=fused: torch.optim.SGD(weights, lr=1.0, fused=fused)
        )
        trainer(tmp_path, precision="bf16-mixed", max_steps=1, gradient_clip_val=0.1).fit(module, data)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    start = AutoModelForCausalLM.from_pretrained(base)
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=1e-6)
    assert (ends[0] - before).norm() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("layers", [2, 16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_is_no_failure_and_a_failure_no_rounding(
    precision: Any, layers: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Sampler, trainer and reference agree within the bound of the precision; with other weights they do not."""
    build_model(tokenizer, num_hidden_layers=layers, initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    bound = logprob_rounding(torch.bfloat16, layers, wide_head=precision == "bf16-mixed")

    def fit(change: Callable[[Any], None]) -> list[float]:
        module, data = module_and_data("policy", str(tmp_path / "base"), critic=None, advantage=None)
        module.configure_model()
        change(module)
        found: list[float] = []
        step = module.training_step

        def watched(batch: Any, batch_idx: int) -> Any:
            out = step(batch, batch_idx)
            found.extend(float(out[name]) for name in ("log_ratio_mean", "reference_distance_mean"))
            return out

        module.training_step = watched
        run = trainer(tmp_path, precision=precision, max_steps=1, callbacks=[FirstStepInvariants(strict=True)])
        run.fit(module, data)
        return found

    ratio, reference = fit(lambda module: None)
    assert 0 < ratio <= bound
    assert reference <= bound

    def other_reference(module: Any) -> None:
        with torch.no_grad():
            module.reference.copy.lm_head.weight.mul_(1.5)

    with pytest.raises(UserError, match="the policy differs from its reference before any update"):
        fit(other_reference)

    def other_sampler(module: Any) -> None:
        generate = module.model_sampler.engine.generate

        def wrong(*args: Any) -> list[Completion]:
            return [Completion(c.ids, [p - 2 * bound for p in c.logprobs], c.stop_reason) for c in generate(*args)]

        module.model_sampler.engine.generate = wrong

    with pytest.raises(UserError, match="sampler and trainer disagree on newly sampled episodes"):
        fit(other_sampler)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_weights_and_activations_have_the_narrow_dtype(
    kind: str, precision: Any, lora: Any, device: torch.device, base: str, tmp_path: Any
) -> None:
    module, data = module_and_data(kind, base, lora=lora)
    seen, checks = Seen(module), [FirstStepInvariants(strict=True)]
    options = {"precision": precision, "accelerator": device.type, "max_epochs": 2}
    run = trainer(tmp_path, callbacks=[*checks, ExportModel()], **options)
    torch.manual_seed(0)
    run.fit(module, data)
    assert run.global_step == 4
    assert seen.types == {torch.float32}  # losses, advantages, log-probabilities, margins
    heads = {id(p) for head in module.heads() for p in head.parameters()}
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters() if id(p) not in heads} == {wanted}
    assert {p.dtype for head in module.heads() for p in head.parameters()} <= {torch.float32}
    assert not {b.dtype for b in module.buffers()} & set(LOW)
    if kind == "preference":
        assert module.score(["How?"], ["So."]).dtype == torch.float32
    folder = tmp_path / "model"
    if lora is None:
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
        auto = "SequenceClassification" if kind == "preference" else "CausalLM"
        stock = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder)
        assert torch.isfinite(stock(input_ids=torch.arange(5)[None]).logits).all()
    else:
        assert load_for_scoring(str(folder), module.task)


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_rollout_numbers_reach_the_loss_unrounded(precision: Any, base: str, tmp_path: Path) -> None:
    module, data = module_and_data("policy", base)
    seen, run = Seen(module), trainer(tmp_path, precision=precision)
    run.fit(module, data)
    for name in ("old_logprobs", "advantages"):
        column = seen.batches[0][name]
        assert not torch.equal(column.bfloat16().float(), column), name
    episodes = module.last_episodes
    mean = sum(episode.reward for episode in episodes) / len(episodes)
    assert float(run.callback_metrics["train/reward"]) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_policy_starts_equal_to_its_reference(
    precision: Any, lora: Any, device: torch.device, base: str, tmp_path: Path
) -> None:
    module, data = module_and_data("policy", base, lora=lora)
    seen = Seen(module)
    torch.manual_seed(0)
    trainer(tmp_path, precision=precision, accelerator=device.type, max_steps=1).fit(module, data)
    batch = seen.batches[0]
    distance = ((batch["old_logprobs"] - batch["reference_logprobs"]) * batch["loss_mask"]).abs()
    assert float(batch["loss_mask"].sum()) > 0
    assert float(distance.sum() / batch["loss_mask"].sum()) < 0.02


def test_saved_model_equals_the_trained_model_at_any_position(base: str, tmp_path: Path) -> None:
    """Rotary frequencies rounded to bfloat16 would rotate distant positions by whole radians."""
    module, data = module_and_data("sft", base)
    trainer(tmp_path, precision="bf16-true", callbacks=[ExportModel()]).fit(module, data)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    ids = torch.randint(0, len(module.tokenizer), (1, 250), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids).logits.float() for model in (module.model, stock))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_run_resumes_exactly(kind: str, base: str, tmp_path: Path) -> None:
    def fit(name: str, epochs: int, resume: Any = None) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(0)
        module, data = module_and_data(kind, base)
        saver = RunCheckpoints(every=1, keep=9)
        options = {"enable_checkpointing": True, "callbacks": [saver], "max_epochs": epochs}
        trainer(tmp_path / name, precision="bf16-true", **options).fit(
            module, data, ckpt_path=resume, weights_only=True
        )
        return {key: value.clone() for key, value in module.state_dict().items()}, saver.folder

    whole, folder = fit("whole", 2)
    for step in (1, 2, 3):
        resumed, _ = fit(f"from{step}", 2, folder / f"step={step}.ckpt")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_reward_model_keeps_its_dtype(base: str, tmp_path: Path) -> None:
    judge, data = module_and_data("preference", base)
    trainer(tmp_path / "judge", callbacks=[ExportModel()]).fit(judge, data)
    for dtype in (torch.float32, torch.bfloat16):
        reward = ModelReward(str(tmp_path / "judge" / "model"), dtype=str(dtype).removeprefix("torch."))
        module, data = module_and_data("policy", base, rewards=[reward])
        trainer(tmp_path, precision="bf16-true", max_steps=1).fit(module, data)
        judge = module.reward_terms[0].scorer.judge
        assert judge.model.model.embed_tokens.weight.dtype == dtype
        assert judge.model_scorer.head.weight.dtype == torch.float32
