"""Norms, SwiGLU and rotary embeddings by liger-kernel: when it is used, and that nothing else changes.

Its own kernels run in the cases with `kernels`: on a GPU, or with `TRITON_INTERPRET=1` in Triton's interpreter on a
CPU. All others run stand-ins in plain torch.
"""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models import liger
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from tests.helpers.liger import INSTALLED, INTERPRETS, Stand, interpret, stand_in
from tests.helpers.models import build_model
from tests.helpers.modules import module_and_data, same, weights
from tests.helpers.packed import close, gradients, model_of, rows_of
from tests.helpers.rows import chats
from tests.helpers.runs import in_ranks
from tests.helpers.sharding import assert_same_runs, train
from tests.helpers.training import trainer

CPU = torch.device("cpu")
TREES = ((6, (4, 7)), (9, (3,)), (1, (2,)))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    stand_in(monkeypatch, stand)
    return stand


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            id="interpreter",
            marks=pytest.mark.skipif(not INTERPRETS, reason="needs triton, liger-kernel and TRITON_INTERPRET=1"),
        ),
        *[
            pytest.param(
                "cuda",
                id="cuda",
                marks=[pytest.mark.cuda, pytest.mark.skipif(not INSTALLED, reason="needs liger-kernel")],
            )
            for _ in range(torch.cuda.is_available())
        ],
    ]
)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which liger's own kernels run."""
    if request.param == "cpu":
        interpret(monkeypatch)
    return torch.device(request.param)


def attach(model: Any, device: torch.device = CPU) -> None:
    """Attach kernels, as if they had been compared."""
    liger.use(model, None, device)
    kernels = liger.kernels_of(model)
    assert kernels
    kernels.on = True


def runs(model: Any) -> bool:
    kernels = liger.kernels_of(model)
    return kernels is not None and kernels.on


def logprobs(model: Any, device: torch.device = CPU) -> Tensor:
    batch = {name: value.to(device) for name, value in rows_of(*TREES).items()}
    return TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "use_liger_kernel" in message]


# -- its own kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("architecture", liger.MODELS)
def test_kernels_compute_what_the_modules_compute(
    architecture: str, lora: bool, kernels: torch.device, tokenizer: Any
) -> None:
    from peft import get_peft_model

    model = model_of(architecture, tokenizer).to(kernels)
    if lora:
        model = get_peft_model(model, LoRA(rank=2).config(model, "CAUSAL_LM"))
    own = copy.deepcopy(model)
    liger.use(model, True, kernels)
    found, wanted = logprobs(model, kernels), logprobs(own, kernels)
    assert runs(model)
    assert not runs(own)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, wanted), "other kernels round differently"
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).to(kernels)
    close(gradients(model, (found * direction).sum()), gradients(own, (wanted * direction).sum()), 1e-3)


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_accepts_the_kernels(
    dtype: str, kernels: torch.device, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if dtype == "bfloat16" and kernels.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    model = model_of("qwen3", tokenizer).to(kernels, getattr(torch, dtype))
    liger.use(model, None, kernels)
    PackedForward(model, model.get_decoder()).check(16)
    assert runs(model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_training_with_the_kernels(kernels: torch.device, base: str, tmp_path: Path) -> None:
    def trained(wanted: bool) -> dict[str, Tensor]:
        module = SFTModule(base, use_liger_kernel=wanted, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        options = {} if kernels.type == "cpu" else {"accelerator": "gpu"}
        trainer(tmp_path, max_steps=1, **options).fit(module, SFTDataModule(chats(2), batch_size=2))
        assert (liger._kernels_of(module.model.get_decoder().norm) is not None) == wanted
        return {name: value.detach().cpu() for name, value in weights(module).items()}

    same(trained(False), trained(True), rtol=1e-3, atol=1e-4)


# -- when they are used -----------------------------------------------------------------------------------------------


def test_setting_is_off_without_cuda(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rlhf_lightning")
    module = SFTModule(base)
    trainer(tmp_path, max_steps=1).fit(module, SFTDataModule(chats(2), batch_size=2))
    assert not any("forward" in vars(part) for part in module.model.get_decoder().norm.modules())
    assert not messages(caplog)


def test_required_kernels_need_cuda_and_the_package(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SFTDataModule(chats(2), batch_size=2)
    module = SFTModule(base, use_liger_kernel=True)
    module.configure_model()  # without a Trainer, nothing says yet where the model will run
    with pytest.raises(ConfigError, match=r"use_liger_kernel is true, but its kernels need CUDA, .* runs on cpu"):
        trainer(tmp_path).fit(module, data)
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed \(pip install 'rlhf-lightning\[cuda\]'\)"):
        trainer(tmp_path).fit(SFTModule(base, use_liger_kernel=True), data)
    trainer(tmp_path, max_steps=1).fit(SFTModule(base), data)


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("gpt2", {}, "only models of type llama, mistral, qwen2, qwen3"),
        ("gemma2", {}, "only models of type llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "only models of type"),
        ("llama", {"dtype": "float64"}, "do not compute in float64"),
        ("llama", {"precision": "64-true"}, "do not compute in float64"),
        ("llama", {"compile": True}, "model.compile fuses the same operations"),
        ("llama", {"replaced": True}, "something else has replaced the forward"),
    ],
)
def test_models_and_settings_without_kernels(
    architecture: str,
    options: dict[str, Any],
    reason: str,
    stand: Stand,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_lightning.modules.base.compile_layers", lambda model, device: None)
    act = {name: options[name] for name in ("hidden_act",) if name in options}
    flags = {name: options[name] for name in ("precision",) if name in options}
    more = {name: options[name] for name in ("compile",) if name in options}
    caplog.set_level(logging.INFO, "rlhf_lightning")

    def fit(wanted: bool | None) -> None:
        model = build_model(tokenizer, architecture=architecture, **act).to(
            getattr(torch, options.get("dtype", "float32"))
        )
        if "replaced" in options:
            norm = model.get_decoder().norm
            norm.forward = norm.forward
        module = SFTModule(model, tokenizer=tokenizer, use_liger_kernel=wanted, **more)
        run = trainer(tmp_path, max_steps=1, **flags)
        run.strategy.connect(module)
        module._trainer = run
        module.configure_model()

    fit(None)
    [message] = messages(caplog)
    assert "runs its own modules, because" in message
    assert reason in message
    assert not stand.calls
    with pytest.raises(ConfigError, match=reason):
        fit(True)
    caplog.clear()
    fit(False)
    assert not messages(caplog)


def test_tensor_parallelism_excludes_the_kernels(stand: Stand, tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("llama", tokenizer)
    module = SFTModule(model, tokenizer=tokenizer, use_liger_kernel=True)
    module._trainer = trainer(tmp_path)
    module._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ConfigError, match="untested with tensor parallelism"):
        module._use_liger_kernel(model)


class Broken(Stand):
    def liger_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")


def test_kernels_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch, Broken())
    caplog.set_level(logging.INFO, "rlhf_lightning")
    model = model_of("llama", tokenizer)
    liger.use(model, None, CPU)
    assert "its kernels fail here (Failed to find C compiler)" in messages(caplog)[0]
    assert liger.kernels_of(model) is None
    with pytest.raises(ConfigError, match="Failed to find C compiler"):
        liger.use(model, True, CPU)


class WrongValues(Stand):
    def _rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super()._rotated(states, cos, -sin)


class WrongGradient(Stand):
    def liger_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = (part * 0.9 + (part * 0.1).detach() for part in (gate, up))
        return super().liger_swiglu(gate, up)


class Fails(Stand):
    def liger_rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if query.shape[2] > 2:
            raise LookupError("no such kernel")
        return super().liger_rope(query, key, cos, sin)


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("stand", "reason"), [(WrongValues, "difference"), (WrongGradient, "difference"), (Fails, "no such kernel")]
)
def test_wrong_kernels_are_removed_before_the_first_step(
    stand: type[Stand],
    reason: str,
    packs: bool,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not packs:
        monkeypatch.setattr("rlhf_lightning.models.packed_forward.install", lambda config: False)

    def trained(wanted: bool | None) -> dict[str, Tensor]:
        module = SFTModule(base, use_liger_kernel=wanted, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer(tmp_path, max_steps=2).fit(module, SFTDataModule(chats(4), batch_size=2, seed=1))
        assert module.packed_forward.packs == packs
        assert liger.kernels_of(module.model) is None
        return weights(module)

    expected = trained(False)
    stand_in(monkeypatch, stand())
    same(trained(None), expected, rtol=0, atol=0)
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "runs its own modules, because liger-kernel differs" in warning.getMessage()
    assert reason in warning.getMessage()
    with pytest.raises(ConfigError, match="use_liger_kernel is true, but its kernels do not reproduce"):
        trained(True)


# -- what must not change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "lora": LoRA(rank=2)}], ids=["all", "lora"])
def test_stages_train_the_same_weights(
    kind: str,
    options: dict[str, Any],
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a critic, a reference and the sampler in the policy stage."""
    caplog.set_level(logging.INFO, "rlhf_lightning")

    def trained(wanted: bool | None, folder: str) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        module, data = module_and_data(kind, base, use_liger_kernel=wanted, **options)
        trainer(tmp_path, max_steps=2).fit(module, data)
        module.save_pretrained(tmp_path / folder)
        return module, weights(module)

    _, expected = trained(False, "own")
    stand = Stand()
    stand_in(monkeypatch, stand)
    module, found = trained(None, "kernels")
    assert all(runs(part.model) for part in module.forward_passes())
    assert min(stand.calls[name] for name in ("norm", "swiglu", "rope")) > 10
    assert len(messages(caplog)) == 1
    same(found, expected, rtol=1e-3, atol=1e-4)
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("own", "kernels")]
    assert names[0] == names[1]


def test_saved_model_and_checkpoint_open_without_the_kernels(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stand_in(patch, Stand())
        module = SFTModule(base, use_liger_kernel=True)
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, SFTDataModule(chats(2), batch_size=2))
        run.save_checkpoint(tmp_path / "last.ckpt")
        module.save_pretrained(tmp_path / "model")
        keys = list(module.model.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert list(plain.state_dict()) == keys
    ids = torch.arange(5)[None]
    wanted = plain(ids).logits
    torch.testing.assert_close(module.model.cpu()(ids).logits, wanted, rtol=0, atol=0)  # its own modules on this device
    loaded = SFTModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.use_liger_kernel is True
    torch.testing.assert_close(loaded(ids), wanted, rtol=0, atol=0)


def test_other_models_and_transformers_stay_as_they_are(stand: Stand, tokenizer: Any) -> None:
    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward
    model, other = model_of("llama", tokenizer), model_of("llama", tokenizer)
    attach(model)
    stand.calls.clear()
    expected = other(torch.arange(4)[None]).logits
    assert not stand.calls
    torch.testing.assert_close(model(torch.arange(4)[None]).logits, expected)
    assert stand.calls == {"norm": 5, "swiglu": 2, "rope": 2}
    after = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward, modeling_llama.LlamaMLP.forward
    assert after == before
    replica = copy.deepcopy(model)
    liger.remove(model)
    assert liger.kernels_of(model) is None
    assert runs(replica), "a copy has its own modules"
    assert torch.equal(model(torch.arange(4)[None]).logits, expected)


def test_model_of_an_earlier_stage_takes_the_setting_of_the_next(stand: Stand, tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    liger.use(model, True, CPU)
    liger.use(model, None, CPU)
    assert liger._kernels_of(model.model.norm) == liger.Kernels(required=False)
    liger.use(model, None, CPU, conflict="of another setting")
    assert liger.kernels_of(model) is None
    liger.use(model, None, CPU)
    liger.use(model, False, CPU)
    assert liger.kernels_of(model) is None


@pytest.mark.parametrize("name", ["q_proj", "k_norm", "gate_proj", "act_fn", "down_proj", "input_layernorm"])
def test_hooks_see_what_the_modules_compute(name: str, stand: Stand, tokenizer: Any) -> None:
    """The kernels would overwrite outputs of projections after their hooks, and skip the activation."""
    model = model_of("qwen3", tokenizer)
    attach(model)
    stand.calls.clear()
    seen: list[Tensor] = []
    for part, module in model.named_modules():
        if part.endswith((f"layers.0.{name}", f"layers.0.self_attn.{name}", f"layers.0.mlp.{name}")):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.arange(4)[None])
    assert len(seen) == 1
    skipped = {"q_proj": "rope", "k_norm": "rope", "gate_proj": "swiglu", "act_fn": "swiglu"}.get(name)
    assert stand.calls == {"norm": 9, "swiglu": 2 - (skipped == "swiglu"), "rope": 2 - (skipped == "rope")}


def test_hooks_of_zero3_do_not_count(stand: Stand, tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    attach(model)
    stand.calls.clear()

    def hook(*args: Any) -> None:
        pass

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for module in model.modules():
        module.register_forward_hook(hook)
    model(torch.arange(4)[None])
    assert stand.calls == {"norm": 5, "swiglu": 2, "rope": 2}


def test_model_with_kernels_can_be_compiled_by_its_user(stand: Stand, tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    expected = model(torch.arange(4)[None]).logits
    attach(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(torch.arange(4)[None]).logits, expected)


def test_sharded_training_with_kernels(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("sft", base, tmp_path / "one", dtype="float32")
    stand = Stand()
    stand_in(monkeypatch, stand)

    def run() -> None:
        train("sft", base, tmp_path / "two", 2, 2, dtype="float32")
        assert min(stand.calls[name] for name in ("norm", "swiglu", "rope")) > 10

    in_ranks(2, run, tmp_path / "two")
    assert_same_runs(tmp_path, rtol=1e-3, atol=1e-5)
