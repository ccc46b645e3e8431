"""Layers computed by several ranks together (tensor parallel): trained, resumed and saved as by one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import in_ranks
from tests.test_modules import same
from tests.test_sharding import PLAIN, train

pytestmark = pytest.mark.filterwarnings("ignore")
FAST = ("preference-lora",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
def test_two_ranks_compute_layers_as_one_process(name: str, base: str, tmp_path: Path) -> None:
    train(name, base, tmp_path / "one")
    in_ranks(2, lambda: train(name, base, tmp_path / "two", 2, 2, tensor=2), tmp_path / "two")
    one, two = (torch.load(tmp_path / folder / "weights.pt") for folder in ("one", "two"))
    same(one, two, rtol=1e-6, atol=1e-8)
    files = [next((tmp_path / folder / "model").glob("*model.safetensors")) for folder in ("one", "two")]
    same(load_file(files[0]), load_file(files[1]), rtol=1e-6, atol=1e-8)
    assert {path.name for path in files[0].parent.iterdir()} == {path.name for path in files[1].parent.iterdir()}
