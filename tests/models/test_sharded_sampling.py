"""Two ranks that share the policy's weights sample as one process does, with the weights of the last step."""

import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.distributed import gather
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.lora import LoRA
from tests.helpers.modules import data, make, same
from tests.helpers.runs import in_ranks
from tests.helpers.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ([5, 9, 40, 7], [60, 3], [8, 8, 71, 22, 14])
"""An odd number, so that ranks have unequally many."""
Sampled = dict[str, tuple[list[int], list[float]]]


class Probe(Callback):
    """After each optimizer step: responses of the policy as it is then, the episodes of its round, and its weights."""

    def __init__(self, measure_memory: bool = False) -> None:
        self.measure_memory = measure_memory
        self.sampled: list[Sampled] = []
        self.exported: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rank, world = data_ranks(run)
        sampler, mine = module.model_sampler, range(len(PROMPTS))[rank::world]
        before = held()
        with module.sampling_context(), sampler.engine.session():
            during = held()
            found = sampler.generate([PROMPTS[i] for i in mine], seeds=list(mine))
        if self.measure_memory:
            copies = sum(weight.numel() * weight.element_size() for weight in module.model.parameters())
            embedding = module.model.get_input_embeddings().weight
            # FSDP pads each weight to a multiple of the ranks, and may keep the buffer of one group of weights; that
            # of the embedding is the largest.
            buffer = 1.1 * embedding.numel() * embedding.element_size()
            assert 0.99 * copies <= during - before <= 1.1 * copies + buffer
            assert held() - before <= buffer < copies / 2
        own: Sampled = {f"prompt {i}": (one.ids, one.logprobs) for i, one in zip(mine, found, strict=True)}
        for episode in module.last_episodes:
            for sample in episode.training_samples:
                own[f"episode {episode.group} {episode.sample_index} {batch_idx}"] = (
                    sample.ids,
                    sample.sampling_logprobs,
                )
        self.sampled.append({name: value for part in gather(own) for name, value in part.items()})
        self.exported.append({name: value.clone() for name, value in PolicyWeights(module.model)})


def held() -> int:
    """Bytes of all tensors of the process, each storage once."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def run(base: str, options: dict[str, Any], folder: Path, strategy: Any = None, measure_memory: bool = False) -> None:
    torch.manual_seed(0)  # the first weights of adapters
    probe, world = Probe(measure_memory), 1 if strategy is None else 2
    one = trainer(folder, devices=world, strategy=strategy or "auto", callbacks=[probe], max_epochs=1)
    # The last of three rounds has one prompt, so with FSDP2 the second rank has none.
    # One step per round: mini-batches would be other rows on other numbers of ranks.
    source = data("policy", 9, minibatches=1)
    one.fit(make("policy", base, dtype="float64", **options), source)
    if one.is_global_zero:
        folder.mkdir(exist_ok=True)
        torch.save((probe.sampled, probe.exported), folder / "probe.pt")


STRATEGIES: dict[str, tuple[Callable[[], FSDP2], bool | None]] = {
    "fsdp2": (FSDP2, True),
    "fsdp2 in step": (FSDP2, False),
    "tensor parallel": (lambda: FSDP2(tensor_parallel_size=2), True),
}


@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        ("fsdp2", False),
        # Each takes seconds.
        pytest.param("fsdp2", True, marks=pytest.mark.slow),
        *(pytest.param("fsdp2 in step", lora, marks=pytest.mark.slow) for lora in (False, True)),
        *(pytest.param("tensor parallel", lora, marks=pytest.mark.slow) for lora in (False, True)),
    ],
)
def test_sampling_equals_one_process(strategy: str, lora: bool, base: str, tmp_path: Path) -> None:
    make_strategy, gathers = STRATEGIES[strategy]
    options = {"lora": LoRA(rank=2, target=["all"]) if lora else None, "sampler": Sampler(max_tokens=6, gather=gathers)}
    run(base, options, tmp_path / "one")
    measure = strategy == "fsdp2" and not lora
    in_ranks(2, lambda: run(base, options, tmp_path / "two", make_strategy(), measure), tmp_path / "two")
    (sampled, exported), (sampled_two, exported_two) = (torch.load(tmp_path / f / "probe.pt") for f in ("one", "two"))
    assert len(sampled) == len(sampled_two) == 3
    for step, (mine, theirs) in enumerate(zip(sampled, sampled_two, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, (ids, logprobs) in mine.items():
            assert theirs[name][0] == ids, (step, name)
            assert theirs[name][1] == pytest.approx(logprobs, rel=1e-6, abs=1e-6)
        same(exported[step], exported_two[step], rtol=1e-6, atol=1e-7)
    numbers = [[logprobs for _, logprobs in step.values()] for step in sampled]
    assert all(a != b for a, b in pairwise(numbers))
