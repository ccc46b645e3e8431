"""How vLLM gets the policy's weights: the adapter alone or merged, confirmed after each sync."""

import copy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, SyncError
from rlhf_lightning.generation import vllm_engine
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_engine import LoadedVLLM, VLLMEngine
from rlhf_lightning.generation.vllm_weights import differing
from rlhf_lightning.models.lora import LoRA, LoRAFactors
from tests.helpers.adapters import train_adapter, with_trained_adapter
from tests.helpers.models import save_small_model

pytestmark = pytest.mark.vllm
installed = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
CONTEXT = 64
PROMPTS = [[5, 6, 7], [7 + i % 40 for i in range(50)]]  # the second fills blocks of vLLM's cache
EXACT = 1e-4
ALIVE: list[LoadedVLLM] = []
"""An engine that is deleted ends the process groups of the others in its process."""
OPTIONS = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**26}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), CONTEXT)


class Run:
    """A policy with a trained adapter, its sampler with vLLM, and the prompts' log-probabilities."""

    def __init__(self, folder: Path, dtype: str = "float32", lora: LoRA | None = None, **options: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():  # so that the base of the policy is not that of the folder
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        self.policy = with_trained_adapter(model, lora=lora)
        settings = VLLMEngine(
            str(folder), memory=0.05, max_length=CONTEXT, options={"dtype": dtype, **OPTIONS}, **options
        )
        renderer = Renderer(AutoTokenizer.from_pretrained(folder))
        self.sampler = Sampler(max_tokens=8, engine=settings).build(self.policy, renderer)
        self.engine: Any = self.sampler.engine.engine  # type: ignore[union-attr]
        ALIVE.append(self.engine)
        self.autocast = dtype != "float32"
        self.version = 0

    def sync(self) -> None:
        """Pass the weights on, with the check, in the precision of training."""
        self.version += 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast), torch.no_grad():
            self.sampler.sync(self.version)

    def train(self) -> None:
        """One step of training, which changes the adapter."""
        train_adapter(self.policy, torch.arange(12)[None] + self.version)

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference of log-probabilities of sampled tokens between vLLM and the policy."""
        found = []
        for prompt in PROMPTS:
            (completion,) = self.engine.generate([prompt], SamplingParams(8), [3])
            logits = self.policy(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            found.append(float((torch.tensor(completion.logprobs) - wanted).abs().max()))
        return max(found)


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Run(folder)


@installed
def test_the_adapter_alone_is_passed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several times in turn; the one before is removed, and its file as well."""
    monkeypatch.setattr(vllm_engine, "SHARED_MEMORY", tmp_path)
    numbers = []
    for _ in range(3):
        run.train()
        run.sync()
        assert run.difference() < EXACT
        (held,) = run.engine.llm.collective_rpc("list_loras")
        numbers += held
        assert run.engine.version == run.version
    assert numbers == sorted(set(numbers)), "one adapter at a time, with increasing numbers"
    assert len(numbers) == 3
    assert not list(tmp_path.iterdir())


@installed
@pytest.mark.parametrize("target", ["all", "unembedding", "q_proj"])
def test_layers_with_an_adapter(folder: Path, target: str) -> None:
    """Also the head, whose weight is that of the embeddings."""
    run = Run(folder, lora=LoRA(rank=3, target=target))
    run.sync()
    assert run.difference() < EXACT
    found = run.engine.generate([PROMPTS[0]] * 5, SamplingParams(8), range(5))
    again = [run.engine.generate([PROMPTS[0]], SamplingParams(8), [seed])[0] for seed in range(5)]
    assert [one.ids for one in found] == [one.ids for one in again]


def scaled(factor: float) -> Any:
    def fault(adapter: dict[str, LoRAFactors], before: dict[str, LoRAFactors]) -> dict[str, LoRAFactors]:
        return {name: LoRAFactors(factors.a, factors.b * factor) for name, factors in adapter.items()}

    return fault


FAULTS = {
    "scaled by 1.1": scaled(1.1),
    "merged twice": scaled(2.0),
    "one version stale": lambda adapter, before: before,
    "one layer is missing": lambda adapter, before: dict(list(adapter.items())[1:]),
}


@pytest.fixture
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter that vLLM reads is not the one that was passed."""
    write, before = vllm_engine.write_adapter, [{}]

    def wrong(folder: Path, adapter: Any) -> None:
        write(folder, FAULTS[request.param](adapter, before[0]) if before[0] else adapter)
        before[0] = {name: LoRAFactors(a.clone(), b.clone()) for name, (a, b) in adapter.items()}

    monkeypatch.setattr(vllm_engine, "write_adapter", wrong)


@installed
@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_a_wrong_adapter_is_noticed_by_its_digest(run: Run, faulty: None) -> None:
    run.sync()
    run.train()
    with pytest.raises(SyncError, match=r"\d+ of 14 adapters of layers that vLLM holds are not those of the policy"):
        run.sync()
    with pytest.raises(ConfigError, match="the last sync of weights failed"):
        run.engine.generate([PROMPTS[0]], SamplingParams(2), [1])


@installed
@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_a_wrong_adapter_is_noticed_by_its_log_probabilities(
    run: Run, faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "_confirm", lambda *_: None)
    run.sync()
    run.train()
    with pytest.raises(SyncError, match="trainer and engine differ by"):
        run.sync()


@pytest.fixture(scope="module")
def low(folder: Path) -> Run:
    return Run(folder, dtype="bfloat16")


@installed
def test_low_precision(low: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding passes the check; digests are equal bit for bit; an adapter that is merged twice is noticed without."""
    for _ in range(3):
        low.train()
        low.sync()
    assert low.difference() > 1e-4
    write = vllm_engine.write_adapter
    monkeypatch.setattr(vllm_engine, "write_adapter", lambda folder, adapter: write(folder, scaled(2.0)(adapter, {})))
    monkeypatch.setattr(vllm_engine, "_confirm", lambda *_: None)
    with pytest.raises(SyncError, match="trainer and engine differ by"):
        low.sync()


# -- all weights --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(folder: Path) -> Run:
    return Run(folder, lora_sync="merged")


@installed
def test_merged_weights_are_passed(merged: Run) -> None:
    for _ in range(2):
        merged.train()
        merged.sync()
        assert merged.difference() < EXACT


@installed
@pytest.mark.parametrize("place", ["mlp.gate_proj", "self_attn.v_proj", "embed_tokens", "model.norm"])
def test_a_wrong_weight_is_noticed_by_its_digest(merged: Run, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Also in layers that vLLM fuses, and of which it keeps only a repacked copy on a CPU."""
    call = merged.engine.llm.collective_rpc

    def wrong(method: str, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if method == "reload_weights":
            pairs = kwargs["weights_iterator"]
            kwargs = {"weights_iterator": ((n, t * (1 + 2e-7) if f"{place}.weight" in n else t) for n, t in pairs)}
        return call(method, args=args, kwargs=kwargs)

    monkeypatch.setattr(merged.engine.llm, "collective_rpc", wrong)
    with pytest.raises(SyncError, match=f"weights that vLLM holds are not those of the policy, .*{place}.weight"):
        merged.sync()


@installed
def test_a_tied_head_that_is_not_renewed_is_noticed(merged: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    merged.sync()
    with torch.no_grad():
        merged.policy.get_base_model().get_input_embeddings().weight.mul_(1.01)
    monkeypatch.setattr(vllm_engine, "renew_heads", lambda model: None)
    with pytest.raises(SyncError, match=r"1 of .* weights that vLLM holds are not those of the policy, .*probed=True"):
        merged.sync()


@installed
@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_are_compared_with_those_of_a_folder(merged: Run, tmp_path: Path, place: str) -> None:
    """As the worker of a server does it; a change of one element by one unit in the last place is noticed."""
    merged.sync()
    tensors = {name: tensor.clone() for name, tensor in PolicyWeights(merged.policy)}
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = merged.engine.llm.apply_model(partial(differing, folder=tmp_path))
    assert found == []
    tensors[place][0, 0] = tensors[place][0, 0].nextafter(torch.tensor(torch.inf))
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = merged.engine.llm.apply_model(partial(differing, folder=tmp_path))
    assert found == [place]


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "vLLM cannot hold DoRA as an adapter"),
        ({"modules_to_save": ["lm_head"]}, "vLLM cannot hold fully trained modules as an adapter"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "vLLM cannot hold adapters of embeddings as an adapter"),
        ({"trainable_token_indices": [1]}, "vLLM cannot hold trained tokens as an adapter"),
        pytest.param({"r": 513}, "rank 513, but vLLM's adapters have at most 512; lower lora.rank", marks=installed),
    ],
    ids=["DoRA", "trained module", "embeddings", "trained tokens", "rank"],
)
def test_adapters_that_vllm_cannot_hold_are_refused(
    model: Any, tokenizer: Any, change: dict[str, Any], message: str
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | change))
    policy = get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ConfigError, match=f"{message}.*set sampler.engine.lora_sync: merged"):
        VLLMEngine("any").build(policy, tokenizer)


@dataclass
class FakeLLM:
    """Records the calls of vLLM's sleep mode, for which there is no GPU here."""

    calls: list[str] = field(default_factory=list)
    model_config: Any = None

    def __post_init__(self) -> None:
        text = type("Text", (), {"tie_word_embeddings": False})
        self.model_config = type(
            "Config",
            (),
            {
                "get_vocab_size": lambda _: 100,
                "max_model_len": 64,
                "dtype": torch.float32,
                "hf_text_config": text,
            },
        )()

    def get_tokenizer(self) -> Any:
        return type("Tokenizer", (), {"eos_token_id": None})

    def apply_model(self, function: Any) -> list[Any]:
        return [{}]

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[Any]:
        self.calls.append(method)
        list(kwargs["weights_iterator"])
        return [None]

    def reset_prefix_cache(self) -> bool:
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake_up")


def test_vllm_sleeps_between_rounds_and_wakes_before_a_sync(model: Any, tokenizer: Any) -> None:
    """The order of calls only: vLLM frees memory on a GPU, where this was not run."""
    llm = FakeLLM()
    engine = LoadedVLLM(llm, tokenizer, sleeps=True)  # type: ignore[arg-type]
    for version in (1, 2):
        engine.sync(PolicyWeights(model), version)
        with engine.session():
            llm.calls.append("sample")
    with engine.session():  # groups of the round that are sampled again, without a sync
        llm.calls.append("sample")
    first = ["reload_weights", "sample", "sleep 1"]
    again = ["wake_up", "reload_weights", "sample", "sleep 1", "wake_up", "sample", "sleep 1"]
    assert llm.calls == first + again


@installed
def test_sleep_is_refused_without_a_gpu(model: Any, tokenizer: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"sampler.engine.sleep: vLLM can free memory only on a GPU"):
        VLLMEngine("any", sleep=True).build(model, tokenizer)
