"""`kl.reference` behind `vllm serve` on a CPU. `make test-vllm` runs it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.server_reference import ServerReference
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.quickstart.model import make_tokenizer
from tests.helpers.models import save_small_model
from tests.helpers.modules import same, weights
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer
from tests.helpers.vllm_serve import VLLMServe

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
CONTEXT = 64
EXACT = 1e-4
"""Both compute in float32, in another order of the sums."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServe]:
    output = tmp_path_factory.mktemp("server") / "output.txt"
    serve = VLLMServe(folder, output, raw=True, context=CONTEXT, engine=False)
    serve.start()
    yield serve
    serve.kill()


def test_reference(server: VLLMServe, folder: Path) -> None:
    """Log-probabilities are those of the same model in this process, also when the server has cached the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = ServerReference(server.url, tokenizer)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer), (48, CONTEXT - 1), generator=random)
    mask = (torch.rand(ids.shape, generator=random) < 0.5).long()
    mask[:, 0] = 0
    wanted = Reference(AutoModelForCausalLM.from_pretrained(folder), separate=True).logprobs(ids, mask)
    for _ in range(2):
        torch.testing.assert_close(reference.logprobs(ids, mask), wanted, rtol=0, atol=EXACT)
    with pytest.raises(ConfigError, match=f"may have {CONTEXT} tokens"):
        reference.check_length(CONTEXT)
    with pytest.raises(ConfigError, match="has another vocabulary than the policy: the token ids"):
        ServerReference(server.url, make_tokenizer(["entirely different words"] * 5))


def test_training_with_a_served_teacher(server: VLLMServe, folder: Path, tmp_path: Path) -> None:
    """The parameters are those of training with the teacher in this process."""
    student, trained = tmp_path / "student", []
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(folder).save_pretrained(student)
    for teacher in (str(folder), server.url):
        module = PolicyRLModule.distill_pg(str(student), teacher, sampler=Sampler(max_tokens=8), optimizer=sgd(0.1))
        data = PromptDataModule(prompts(4), prompts_per_round=2, group_size=2, seed=1, show_example=False)
        trainer(tmp_path, max_epochs=1).fit(module, data)
        trained.append(weights(module))
    same(*trained, rtol=1e-3, atol=1e-5)
    before = model.get_input_embeddings().weight.detach()
    assert float((trained[0]["model.model.embed_tokens.weight"] - before).abs().max()) > 1e-3
