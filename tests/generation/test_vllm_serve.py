"""`VLLMServer` with `vllm serve` on a CPU, which is killed while it samples. `make test-vllm` runs it."""

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_server import Server, VLLMServer
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from tests.helpers.models import save_small_model
from tests.helpers.vllm_serve import VLLMServe
from tests.helpers.vllm_server import train_with_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
CONTEXT = 64
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [40]]
EXACT = 1e-4
"""Both compute in float32, in another order of the sums."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServe]:
    serve = VLLMServe(folder, tmp_path_factory.mktemp("server") / "output.txt", raw=False, context=CONTEXT)
    serve.start()
    yield serve
    serve.kill()


def adapted(folder: Path, rank: int = 4) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Start(model, lora=LoRA(rank=rank, target=["attention", "mlp"])).load().eval()


def test_adapter_of_each_round(server: VLLMServe, folder: Path, tmp_path: Path) -> None:
    """The log-probabilities are those of the newest adapter; the adapter before it is no longer there."""
    policy, params = adapted(folder), SamplingParams(10, temperature=0.7)
    settings = VLLMServer(server.url, str(tmp_path / "weights"), "float32")
    engine = settings.build(policy, AutoTokenizer.from_pretrained(folder))
    assert not engine.raw_logprobs
    for version in range(3):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        engine.sync(PolicyWeights(policy), version)
        for prompt, found in zip(PROMPTS, engine.generate(PROMPTS, params, [1, 2, 3]), strict=True):
            logits = policy(torch.tensor([prompt + found.ids])).logits[0, len(prompt) - 1 : -1].detach() / 0.7
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(found.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found.logprobs), wanted, rtol=0, atol=EXACT)
        (name,) = engine.servers[0].adapters()
        assert name.endswith(f"-round-{version}")


def test_adapter_above_the_rank_of_the_server_is_refused(server: VLLMServe, folder: Path, tmp_path: Path) -> None:
    policy = adapted(folder, rank=32)
    settings = VLLMServer(server.url, str(tmp_path / "weights"), "float32")
    engine = settings.build(policy, AutoTokenizer.from_pretrained(folder))
    with pytest.raises(ConfigError, match=r"the policy's adapter cannot be loaded.*max_lora_rank"):
        engine.sync(PolicyWeights(policy), 0)


def test_server_that_is_killed_in_mid_round(
    server: VLLMServe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three rounds of RL. In the second, the only server gets kill -9 and is started again; the run goes on."""
    sample, killed = Server.sample, threading.Lock()

    def kill(self: Server, prompt: Any, params: Any, seed: Any, weights: Any) -> Any:
        if weights.name.endswith("-round-1") and killed.acquire(blocking=False):
            server.kill()
            server.start(wait=False)
        return sample(self, prompt, params, seed, weights)

    monkeypatch.setattr(Server, "sample", kill)
    gaps = train_with_server(str(folder), server.url, tmp_path)
    assert len(gaps) == 3
    assert max(gaps) < EXACT
    assert killed.locked()
    assert "answers again, and has loaded the weights" in caplog.text
