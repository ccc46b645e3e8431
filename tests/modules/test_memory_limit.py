"""`memory_limit`: as few layers are checkpointed as make a step fit, and results stay the same."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.callbacks.memory import MemoryEstimate
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.memory import MARGIN, checkpoint_layers, parse_bytes, separate_layers, tensor_bytes
from rlhf_lightning.models.packed_forward import PackedForward
from tests.helpers.memory import peak
from tests.helpers.models import build_model
from tests.helpers.modules import module_and_data, same, weights
from tests.helpers.rows import chats
from tests.helpers.training import adamw, trainer

pytestmark = pytest.mark.usefixtures("every_comparison")


def checkpointed(module: Any) -> list[int]:
    """Number of checkpointed layers of each trained model; these are its first layers."""
    found = []
    for part in module.forward_passes():
        flags = [layer.gradient_checkpointing for layer in separate_layers(part.model)]
        assert flags == sorted(flags, reverse=True)
        found.append(sum(flags))
    return found


def needed(module: Any, left: int) -> int:
    """The lowest limit if all but `left` layers of each model are checkpointed; the module was trained."""
    for part in module.forward_passes():
        checkpoint_layers(part.model, len(separate_layers(part.model)) - left)
    return module.estimate_memory(*module.step_sizes()).peak(MARGIN)


@pytest.fixture
def deep(tokenizer: Any, tmp_path: Path) -> str:
    """A model with six layers, whose activations need more memory than its weights."""
    build_model(tokenizer, hidden_size=64, num_hidden_layers=6).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return str(tmp_path / "deep")


def test_peak_stays_below_the_limit_and_fewer_layers_are_checkpointed_under_a_higher_one(
    deep: str, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "rlhf_lightning")

    def run(limit: int | None, measure: Any = lambda fit: fit()) -> tuple[Any, int]:
        torch.manual_seed(0)
        module = SFTModule(deep, optimizer=adamw(1e-2), memory_limit=limit)
        module.configure_model()
        data = SFTDataModule(chats(32), batch_size=16, seed=1, show_example=False)
        one = trainer(tmp_path, callbacks=[MemoryEstimate()])
        return module, measure(lambda: one.fit(module, data))

    plain, _ = run(None)
    wanted = weights(plain)
    limits = [needed(plain, left) for left in (1, 4, 6)]
    for limit, count in zip(limits, (5, 2, 0), strict=True):
        caplog.clear()
        module, measured = run(limit, peak)
        measured += tensor_bytes(module.parameters())
        assert checkpointed(module) == [count]
        assert measured < limit
        assert count or measured > limits[0]  # so that checkpointing is needed there
        same(weights(module), wanted)
        (line,) = [record.message for record in caplog.records if "estimated" in record.message]
        assert line.startswith(f"checkpointing {count} of 6 layers: estimated ")
    with pytest.raises(
        ConfigError, match=r"a step needs .* with 5 of 6 layers checkpointed[^\n]*\n  - halve data.batch"
    ):
        run(limits[0] - 1)
    with pytest.raises(ConfigError, match=r"weights, gradients and optimizer state alone need[^\n]*\n  - trainer.prec"):
        run(tensor_bytes(plain.parameters()))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("sft", "32-true"), ("sft", "bf16-mixed"), ("preference", "32-true"), ("policy", "32-true")],
)
def test_results_do_not_depend_on_the_limit(
    kind: str, precision: Any, lora: LoRA | None, base: str, tmp_path: Path
) -> None:
    def run(limit: int | None) -> Any:
        torch.manual_seed(0)
        module, data = module_and_data(kind, base, lora=lora, memory_limit=limit)
        trainer(tmp_path, precision=precision).fit(module, data)
        return module

    plain = run(None)
    wanted = weights(plain)
    found = run(needed(plain, 1))
    assert checkpointed(found) == [1] * (2 if kind == "policy" else 1)  # of two layers, and those of the critic
    same(weights(found), wanted)


def test_fused_layers_are_checkpointed(tokenizer: Any) -> None:
    model = build_model(tokenizer).train()
    forward = PackedForward(model, model.get_decoder())
    forward.check(16)  # not below, where tensors for backward are not kept
    ids = torch.arange(64).view(4, 16) % len(tokenizer)

    def saved(count: int) -> int:
        checkpoint_layers(model, count)
        sizes: list[int] = []
        with (
            torch.autocast("cpu", torch.bfloat16),
            saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes), lambda packed: packed),
        ):
            assert forward.copied_bytes
            forward(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(4, dtype=torch.long))
        return sum(sizes)

    none, one, both = saved(0), saved(1), saved(2)
    assert none > 1.5 * one > 3 * both


def test_all_ranks_make_the_choice_of_the_rank_that_needs_most(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_lightning.modules.memory.gather", lambda value, every: [value, (value[0], 1)])
    module, data = module_and_data("sft", base, memory_limit="1 GB")
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert checkpointed(module) == [1]
    monkeypatch.setattr("rlhf_lightning.modules.memory.gather", lambda value, every: [value, (10**10, 1)])
    with pytest.raises(ConfigError, match="memory_limit is 1 GB, but a step needs 10 GB"):
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_unusable_limits_are_refused(base: str, tmp_path: Path, tokenizer: Any) -> None:
    assert [parse_bytes("x", value) for value in (5, "5", "8GB", "1.5 kib", "2g")] == [5, 5, 8 * 10**9, 1536, 2 * 10**9]
    for value in ("much", "8 GX", "0GB", 0, -1, "", True):
        with pytest.raises(ConfigError, match=r"model\.memory_limit is .*text such as 8GB"):
            SFTModule(base, memory_limit=value)
    for other in ("gradient_checkpointing", "activation_offload"):
        with pytest.raises(ConfigError, match=f"model.{other}: true .*set only one"):
            SFTModule(base, memory_limit="8GB", **{other: True})
    streamed = SFTModule(base, memory_limit="8GB")
    batch = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "loss_mask")}
    with pytest.raises(ConfigError, match="needs the lengths of the training rows"):
        trainer(tmp_path, max_steps=1).fit(streamed, torch.utils.data.DataLoader([batch], batch_size=None))
