"""Optimizer state of torchao's optimizers, with 4 or 8 bits per number, in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_leaves

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.checkpointing.io import AtomicCheckpointIO
from rlhf_lightning.checkpointing.quantized_state import as_plain
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.memory import optimizer_bytes
from tests.helpers.models import build_model
from tests.helpers.rows import chats
from tests.helpers.training import trainer

pytestmark = pytest.mark.usefixtures("every_comparison")


@pytest.fixture
def wide(tokenizer: Any, tmp_path: Path) -> str:
    """A model with matrices that torchao quantizes: of at least 4,096 values."""
    build_model(tokenizer, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_run_with_quantized_optimizer_state_is_resumed_bit_for_bit(name: str, wide: str, tmp_path: Path) -> None:
    optimizers = pytest.importorskip("torchao.optim")

    def run(checkpoint: Path | None = None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        module = SFTModule(wide, optimizer=lambda p: getattr(optimizers, name)(p, lr=1e-2))
        data = SFTDataModule(chats(6), batch_size=2, seed=1, show_example=False)
        saver = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
        one = trainer(
            tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saver], plugins=[AtomicCheckpointIO()]
        )
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step for each shape
            one.fit(module, data, ckpt_path=checkpoint and str(checkpoint))
        assert one.global_step == 6
        state = [value for values in one.optimizers[0].state.values() for value in values.values()]
        quantized = [value for value in state if type(value) is not torch.Tensor]
        assert len(quantized) > 4
        return {key: value.clone() for key, value in module.state_dict().items()}, [q.dequantize() for q in quantized]

    (wanted, wanted_state), middle = run(), tmp_path / "checkpoints" / "epoch=0.ckpt"
    torch.load(middle, map_location=lambda storage, place: storage, weights_only=True)  # as Lightning and other tools
    found, found_state = run(middle)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert all(torch.equal(a, b) for a, b in zip(wanted_state, found_state, strict=True))


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_estimate_of_quantized_optimizer_state_is_exact(name: str) -> None:
    optimizers = pytest.importorskip("torchao.optim")

    def factory(parameters: Any) -> Any:
        return getattr(optimizers, name)(parameters)

    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 192), (8192,), (8, 20), (5,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = factory(parameters)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    state = as_plain([optimizer.state_dict()["state"]])
    size = sum(value.numel() * value.element_size() for value in tree_leaves(state) if isinstance(value, torch.Tensor))
    assert optimizer_bytes(factory, parameters) == size


def test_checkpoint_does_not_decide_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(name: str) -> str:
        value = {"tensor_subclass": name, "tensors": {}, "attributes": []}
        content = {
            "state_dict": {},
            "pytorch-lightning_version": "2",
            "optimizer_states": [{"state": {0: {"m": value}}}],
        }
        AtomicCheckpointIO().save_checkpoint(content, tmp_path / "one.ckpt")
        return str(tmp_path / "one.ckpt")

    imported: list[str] = []

    def missing(name: str) -> None:
        imported.append(name)
        raise ModuleNotFoundError(f"No module named {name!r}", name="torchao")

    monkeypatch.setattr("rlhf_lightning.checkpointing.quantized_state.import_module", missing)
    with pytest.raises(UserError, match=r"unknown class, 'subprocess\.Popen'"):
        AtomicCheckpointIO().load_checkpoint(stored("subprocess.Popen"))
    assert not imported
    with pytest.raises(UserError, match=r"OptimState8bit\).*pip install torchao"):
        AtomicCheckpointIO().load_checkpoint(stored("OptimState8bit"))
    assert imported == ["torchao.optim.subclass_8bit"]
