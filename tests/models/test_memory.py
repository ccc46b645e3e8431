"""Memory of training: offloading does not change results, 4-bit bases, and estimates equal measurements."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning import PolicyRLModule, PromptDataModule, SFTModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.callbacks.memory import MemoryEstimate
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation import fused_decoder
from rlhf_lightning.generation.kv_cache import SlotKVCache
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.loading import load_for_scoring
from rlhf_lightning.models.lora import LoRA, named_weights
from rlhf_lightning.models.memory import MARGIN, activation_bytes, checkpointed_bytes, logit_bytes
from rlhf_lightning.models.offload import ActivationOffload, Placement
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.modules.memory import MemoryUse
from rlhf_lightning.rewards import EnsembleReward, FunctionReward, ModelReward
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.memory import peak
from tests.helpers.models import build_model
from tests.helpers.modules import module_and_data, thirds
from tests.helpers.rows import prompts
from tests.helpers.training import trainer

pytestmark = pytest.mark.usefixtures("every_comparison")

# -- activations on the CPU -------------------------------------------------------------------------------------------


def gradients(token_logprobs: TokenLogprobs, ids: torch.Tensor, loss_mask: torch.Tensor) -> list[torch.Tensor]:
    token_logprobs.backbone.model.zero_grad()
    token_logprobs(ids, loss_mask).logprobs.sum().backward()
    return [p.grad.clone() for p in token_logprobs.backbone.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mamba"])
def test_offloaded_activations_give_the_same_gradients(architecture: str, checkpointing: bool, tokenizer: Any) -> None:
    model = build_model(tokenizer, architecture=architecture)
    token_logprobs = TokenLogprobs(model, max_tokens_per_batch=40)  # in several groups
    ids = torch.randint(0, len(tokenizer), (6, 20), generator=torch.Generator().manual_seed(0))
    ids[3:, :8] = ids[0, :8]
    loss_mask = torch.ones_like(ids)
    loss_mask[:, :8] = 0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    wanted = gradients(token_logprobs, ids, loss_mask)
    made: list[ActivationOffload] = []

    def away() -> ActivationOffload:
        made.append(ActivationOffload("cpu", least=0))
        return made[-1]

    token_logprobs.packed_forward.saving = away
    found = gradients(token_logprobs, ids, loss_mask)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert sum(one.moved for one in made) > 0


def test_offload_moves_only_large_activations() -> None:
    weight, x = nn.Parameter(torch.randn(30, 30)), torch.randn(40, 30, requires_grad=True)
    offload = ActivationOffload("cpu", least=2000)
    with offload:
        y = x * 2
        total = (y @ weight.t()).sum() + (y @ weight).sum() + (y[:1] ** 2).sum()
        copies = [copy for _, copy in offload._copies.values()]
        assert offload.moved == y.numel() * 4  # once, though two products need it; neither weights nor what is small
        assert all(isinstance(copy, tuple) and copy[0].data_ptr() != y.data_ptr() for copy in copies)
        y.data.fill_(7)  # whoever writes there now does not reach what backward will see
    total.backward()
    assert weight.grad is not None
    ones = torch.ones(40, 30)
    torch.testing.assert_close(weight.grad, ones.t() @ (2 * x.detach()) + (2 * x.detach()).t() @ ones)


@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
def test_activation_offload_applies_to_every_trained_model(kind: str, base: str, tmp_path: Path) -> None:
    module, data = module_and_data(kind, base, activation_offload=True, gradient_checkpointing=True)
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert len(module.forward_passes()) == (2 if kind == "policy" else 1)  # with the critic's
    for part in module.forward_passes():
        assert part.saving is ActivationOffload
        assert part.model.is_gradient_checkpointing


# -- models that rest on the CPU --------------------------------------------------------------------------------------


def test_placed_model_is_cast_but_not_moved() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.away = nn.Linear(2, 2), nn.Linear(2, 2)

    whole = Whole()
    place, weight = Placement(whole.away, offload=True), whole.away.weight
    home = weight.data.data_ptr()
    place.work = torch.device("cpu", 0)  # another name, so that it goes through the motions
    with place.on_device() as device:
        assert device == place.work
        whole.away.weight.data = torch.full((2, 2), 9.0)  # what is there is not what is kept
    assert whole.away.weight is weight
    assert weight.data.data_ptr() == home
    whole.to(torch.bfloat16)
    assert whole.away.weight.dtype == torch.bfloat16
    assert whole.kept.weight.dtype == torch.bfloat16
    assert place.work.type == "cpu"


@pytest.fixture
def judge(base: str, tmp_path: Path) -> str:
    module, data = module_and_data("preference", base)
    trainer(tmp_path / "judge", callbacks=[ExportModel()]).fit(module, data)
    return str(tmp_path / "judge" / "model")


@pytest.mark.parametrize("where", [{"offload": True}, {"device": "cpu"}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_reference_and_rewards_on_another_device_give_the_same_run(
    where: dict[str, Any], precision: Any, base: str, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        both = EnsembleReward([judge, base_judge], **options)
        reference = KLPenalty(0.1, refresh_every=2, **options)
        module = PolicyRLModule(
            base,
            rewards=[ModelReward(judge, **options), both],
            kl=reference,
            sampler=Sampler(max_tokens=4),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        )
        data = PromptDataModule(prompts(6), prompts_per_round=2, group_size=2)
        trainer(tmp_path, precision=precision).fit(module, data)
        return {key: value.clone() for key, value in module.state_dict().items()}

    base_judge = str(Path(judge).parent / "copy")
    Path(base_judge).symlink_to(judge)
    calls: list[str] = []
    there, step = Placement.on_device, PolicyRLModule.training_step

    def visited(place: Placement) -> Any:
        calls.append(type(place.model).__name__)
        return there(place)

    def stepped(module: Any, batch: Any, batch_idx: int) -> Any:
        calls.append("step")
        return step(module, batch, batch_idx)

    wanted = run()
    monkeypatch.setattr(Placement, "on_device", visited)
    monkeypatch.setattr(PolicyRLModule, "training_step", stepped)
    found = run(**where)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    rewards = ["RewardModel"] * (3 if "offload" in where else 0)
    assert calls == [*rewards, "Qwen3ForCausalLM", "step"] * 3


def test_invalid_placements_are_refused(base: str) -> None:
    for make in (KLPenalty, lambda **options: ModelReward(base, **options)):
        with pytest.raises(ConfigError, match="set only one of them"):
            make(device="cpu", offload=True)
        with pytest.raises(ConfigError, match="no device 'cuda:99'"):
            make(device="cuda:99")


# -- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
def test_quantize_without_cuda_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"no CUDA device; leave it out"):
        SFTModule(base, lora=LoRA(quantize="nf4")).configure_model()
    with pytest.raises(ConfigError, match=r"lora.quantize is 'int3'"):
        LoRA(quantize="int3")


def test_quantize_without_bitsandbytes_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("rlhf_lightning.models.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-lightning\[cuda\]'"):
        LoRA(quantize="nf4").quantization()


def test_quantization_config_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.models.lora.find_spec", lambda name: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    asked = LoRA(quantize="fp4").quantization()["quantization_config"]
    assert asked.load_in_4bit
    assert asked.bnb_4bit_quant_type == "fp4"
    assert asked.bnb_4bit_use_double_quant
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16
    assert LoRA().quantization() == {}


@pytest.fixture
def wide(tokenizer: Any, tmp_path: Path) -> str:
    """A model with widths that bitsandbytes can pack."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
    build_model(tokenizer, **sizes).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which has kernels for a CPU as well")
@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
def test_quantized_run_on_a_cpu(kind: str, wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QLoRA run from start to export; only the check for CUDA is disabled."""
    asked = LoRA.quantization

    def anywhere(self: LoRA) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: True)
            return asked(self)

    monkeypatch.setattr(LoRA, "quantization", anywhere)

    def fresh(source: str, rank: int = 2) -> tuple[Any, Any]:
        options = {"critic": None, "advantage": None} if kind == "policy" else {}
        return module_and_data(kind, source, lora=LoRA(rank=rank, quantize="nf4"), **options)

    module, data = fresh(wide)
    trainer(tmp_path / "run", callbacks=[FirstStepInvariants(strict=True), ExportModel()]).fit(module, data)
    kinds = {type(part).__name__ for part in module.model.modules()}
    assert "Linear4bit" in kinds
    assert all(head.weight.dtype == torch.float32 for head in module.heads() if hasattr(head, "weight"))
    assert module.packed_forward.packs
    folder = str(tmp_path / "run" / "model")
    base = json.loads((tmp_path / "run/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert "quantization_config" not in json.loads((Path(base) / "config.json").read_text())
    # The weights for an external engine are dequantized, and near the original weights.
    full = dict(load_for_scoring(wide, "CAUSAL_LM").named_parameters())
    with torch.no_grad():
        for name, value in named_weights(module.model):
            if name in full and "proj" in name:
                assert value.shape == full[name].shape
                assert (value - full[name]).norm() < 0.2 * full[name].norm()
    again, _ = fresh(folder)
    again.configure_model()
    own = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(own[name], p) for name, p in module.model.named_parameters() if name in own)
    assert not again.fresh_adapter
    scored = {type(part).__name__ for part in load_for_scoring(folder, module.task).modules()}
    assert "Linear4bit" not in scored  # on full weights
    other, data = fresh(folder, rank=3)  # merged in float32, and quantized again
    trainer(tmp_path / "other", max_steps=1).fit(other, data)
    assert "Linear4bit" in {type(part).__name__ for part in other.model.modules()}


# -- the estimate -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "precision"), [("sft", "32-true"), ("preference", "bf16-true"), ("policy", "32-true")]
)
def test_estimates_of_weights_gradients_and_optimizer_are_exact(
    kind: str, precision: Any, lora: Any, name: str, base: str, tmp_path: Path
) -> None:
    module, data = module_and_data(kind, base, lora=lora, optimizer=OPTIMIZERS[name])
    found, grads = MemoryEstimate(), []

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def measure(optimizer: Any) -> None:
        grads.append(size(p.grad for p in module.parameters() if p.grad is not None))

    module.on_before_optimizer_step = measure
    trainer(tmp_path, callbacks=[found], max_steps=1, precision=precision).fit(module, data)
    estimate = found.estimate
    reference = (
        set(map(id, module.reference.copy.parameters())) if kind == "policy" and module.reference.copy else set()
    )
    assert estimate.weights == size(p for p in module.parameters() if id(p) not in reference)
    assert estimate.frozen == size(p for p in module.parameters() if id(p) in reference)
    assert estimate.gradients == grads[0]
    state = module.trainer.optimizers[0].state.values()
    assert estimate.optimizer == size(v for values in state for v in values.values() if isinstance(v, torch.Tensor))


SHAPES = [
    ("qwen3", {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}),
    ("llama", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}),
    ("gpt2", {"n_embd": 128, "n_layer": 4}),
    ("gemma2", {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 20_000}),
    ("qwen3", {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 20_000}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("architecture", "sizes"), SHAPES, ids=lambda value: str(value)[:40])
def test_estimated_activations_are_near_the_measured_peak(
    architecture: str, sizes: dict[str, int], checkpointing: bool, tokenizer: Any
) -> None:
    model = build_model(tokenizer, architecture=architecture, **sizes)
    # The logits of the last case exceed the budget.
    token_logprobs = TokenLogprobs(model, logit_bytes=2**23 if (architecture, sizes) == SHAPES[-1] else 2**28)
    token_logprobs.packed_forward.check(64)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (16, 60))
    loss_mask = torch.ones_like(ids)
    loss_mask[:, :30] = 0

    def step() -> None:
        token_logprobs(ids, loss_mask).logprobs.sum().backward()

    step()  # from here on there are gradients, which are counted elsewhere
    expected = activation_bytes(token_logprobs.packed_forward, ids.numel())
    if checkpointing:
        expected = checkpointed_bytes(model, expected, ids.numel(), 4)
    expected += logit_bytes(token_logprobs.backbone, int(loss_mask.sum()), 4, token_logprobs.logit_bytes)
    assert 1 / MARGIN < expected / peak(step) < MARGIN


def test_measurement_changes_no_state(tokenizer: Any) -> None:
    model = build_model(tokenizer, architecture="gpt2").train()
    model.transformer.h[0].eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    token_logprobs = TokenLogprobs(model)
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    saving = token_logprobs.packed_forward.saving
    activation_bytes(token_logprobs.packed_forward, 1000)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert token_logprobs.packed_forward.saving is saving
    assert model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_estimated_cache_and_copies_equal_those_of_the_sampler(
    precision: Any, base: str, tmp_path: Path, monkeypatch: Any
) -> None:
    sizes, copies = [], []
    fill, pack = SlotKVCache.fill, fused_decoder._packed

    def packed(weight: torch.Tensor) -> torch.Tensor:
        copies.append(weight.nbytes)
        return pack(weight)

    def seen(slots: SlotKVCache, *args: Any) -> None:
        fill(slots, *args)
        one = slots.layers[0]
        per_token = 2 * one.keys[:, :, 0].numel() * one.keys.element_size() * len(slots.layers)
        sizes.append((slots.count, per_token))

    monkeypatch.setattr(SlotKVCache, "fill", seen)
    monkeypatch.setattr(fused_decoder, "_packed", packed)
    module = PolicyRLModule(base, rewards=[FunctionReward(thirds)], sampler=Sampler(max_tokens=5, min_tokens=5))
    found, data = MemoryEstimate(), PromptDataModule(prompts(4), prompts_per_round=2, group_size=3)
    trainer(tmp_path, callbacks=[found], precision=precision, max_steps=1).fit(module, data)
    count, per_token = sizes[-1]
    longest = max(row.tokens for row in data.prepared["train"].rows)
    assert count == 6
    assert found.estimate.cache == per_token * (longest + 5)
    products = 4 * module.model.config.num_hidden_layers + 1
    assert found.estimate.copies == sum(copies[-products:])


def test_estimate_is_one_line_or_a_warning_with_advice(base: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "rlhf_lightning")
    module, data = module_and_data("policy", base, activation_offload=True)
    trainer(tmp_path, callbacks=[MemoryEstimate()], max_steps=1).fit(module, data)
    (line,) = [record.message for record in caplog.records if record.message.startswith("estimated memory")]
    assert "\n" not in line
    assert "cache" in line
    few = module.estimate_memory(100, 50)
    parted = module.estimate_memory(100, 50, shards=4)
    assert parted.weights == -(-few.weights // 4)
    assert parted.optimizer == -(-few.optimizer // 4)
    assert parted.activations == few.activations
    many = module.estimate_memory(10_000, 5000, rows=10_000, row_tokens=1000)
    assert many.cache > many.activations > 50 * few.activations
    many.available = 10**6
    text = many.text()
    wanted = [
        "gradient_checkpointing",
        "minibatches",
        "offload: true, or device: cpu, in model.kl",
        "slots",
        "bf16",
        "model.lora",
    ]
    places = [text.index(name) for name in wanted]
    assert places == sorted(places)
    assert "activation_offload" not in text  # is on, and would do nothing here


def test_total_is_that_of_the_larger_phase() -> None:
    step = MemoryUse(10, 10, 20, 5, activations=100, logits=50, cache=100, copies=20, visiting=30)
    assert step.total == 45 + 150
    step.cache = 380
    assert step.total == 45 + 400
    step.available = 556
    assert not step.fits
    step.available = 557
    assert step.fits
