"""The check after each sync of weights, with an engine that computes on its own copy of the model."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import PolicyRLModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, SyncError
from rlhf_lightning.generation.canary import Canary, compute_dtype, scale_error
from rlhf_lightning.generation.digest import digest
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import EngineSettings, LeaderEngine, Sampler
from rlhf_lightning.models.lora import base_of, lora_factors, lora_obstacles, named_weights
from rlhf_lightning.objectives.policy import ImportanceWeights
from rlhf_lightning.types import Completion
from tests.helpers.adapters import train_adapter, with_trained_adapter


class OwnCopy:
    """An engine with its own copy of the weights, in a given precision; a fault changes what it receives."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype
        self.fault: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        weights = self.fault({name: tensor.clone() for name, tensor in named_tensors})
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        assert not weights or set(missing) <= {"lm_head.weight"}, "a tied head is sent with the embeddings"

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        ids = torch.tensor(rows)
        logprobs = self.model(ids).logits[:, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[:, 1:, None])[..., 0].tolist()

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        return [Completion([5], [0.0], "length") for _ in prompts]


def updates(policy: Any) -> dict[str, Tensor]:
    """The adapter's update of each weight."""
    return {f"{name}.weight": factors.b @ factors.a for name, factors in lora_factors(policy)}


def scaled(policy: Any, factor: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A fault: the adapter is multiplied by a factor; 2 merges it twice."""
    delta = {name: update.detach() for name, update in updates(policy).items()}

    def fault(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value + (factor - 1) * delta.get(name, torch.zeros(())) for name, value in weights.items()}

    return fault


@pytest.fixture
def policy(model: Any) -> Any:
    return with_trained_adapter(model)


def test_an_engine_with_the_weights_passes(model: Any, policy: Any) -> None:
    engine = OwnCopy(model)
    engine.sync(PolicyWeights(policy), 1)
    assert Canary(engine, policy).check(1) < 1e-6


@pytest.mark.parametrize("factor", [1.001, 1.1, 2.0, 0.9, 0.0])
def test_an_adapter_with_another_scale_is_noticed(model: Any, policy: Any, tokenizer: Any, factor: float) -> None:
    """2.0 is an adapter that is merged twice, 0.0 one that is missing."""
    engine = OwnCopy(model)
    sampler = Sampler(engine=engine).build(policy, Renderer(tokenizer))
    sampler.sync(2)
    engine.fault = scaled(policy, factor)
    with pytest.raises(SyncError, match="after the sync of version 3, trainer and engine differ by"):
        sampler.sync(3)


def test_weights_of_the_sync_before_are_noticed(model: Any, policy: Any, tokenizer: Any) -> None:
    engine = OwnCopy(model)
    sampler = Sampler(engine=engine).build(policy, Renderer(tokenizer))
    sampler.sync(2)
    train_adapter(policy, torch.arange(12)[None])
    engine.fault = lambda weights: {}
    with pytest.raises(SyncError, match="after the sync of version 3, trainer and engine differ by"):
        sampler.sync(3)
    engine.fault = lambda weights: weights
    sampler.sync(3)


def test_rounding_passes_and_a_wrong_scale_does_not_in_low_precision(model: Any, policy: Any) -> None:
    """The mean difference is below the bound of bfloat16; the factor of the adapter's effect is not."""
    engine = OwnCopy(model, torch.bfloat16)
    canary = Canary(engine, policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.sync(PolicyWeights(policy), 1)
        gap = canary.check(1)
        assert gap > 1e-4
        engine.fault = scaled(policy, 1.07)
        engine.sync(PolicyWeights(policy), 2)
        with pytest.raises(SyncError, match=r"the adapter's effect in the engine is 1\.\d+ ± 0\.0\d+ times"):
            canary.check(2)


def test_the_check_leaves_the_model_as_it_was(model: Any, policy: Any) -> None:
    before = {name: (p.requires_grad, p.clone()) for name, p in policy.named_parameters()}
    engine = OwnCopy(model)
    engine.sync(PolicyWeights(policy), 1)
    Canary(engine, policy).check(1)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_precision_of_the_trainer(device: torch.device) -> None:
    layer = torch.nn.Linear(1, 1, device=device)
    assert compute_dtype(layer) == (torch.float32 if device.type == "cpu" else torch.float16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert compute_dtype(layer) == torch.bfloat16
    assert compute_dtype(layer.to(torch.bfloat16)) == torch.bfloat16
    layer.weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.uint8, device=device), requires_grad=False)
    assert compute_dtype(layer) == torch.bfloat16


def test_scale_error() -> None:
    generator = torch.Generator().manual_seed(0)
    base, effect, noise = (torch.randn(200, generator=generator) for _ in range(3))
    ours = base + effect
    slope, deviation = scale_error(ours, ours + 0.1 * effect + 0.01 * noise + 3.0, base)
    assert slope == pytest.approx(0.1, abs=4 * deviation)
    assert deviation == pytest.approx(0.01 / 200**0.5, rel=0.2)  # noise over effect, both of variance 1
    assert scale_error(ours, ours + noise, ours)[1] == float("inf")


def test_an_engine_that_cannot_score_is_not_checked(policy: Any, tokenizer: Any) -> None:
    class Silent:
        def sync(self, named_tensors: Any, version: int) -> None:
            self.names = dict(named_tensors).keys()

        def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
            return []

    engine = Silent()
    Sampler(engine=engine).build(policy, Renderer(tokenizer)).sync(1)
    assert "model.embed_tokens.weight" in engine.names


# -- the weights ------------------------------------------------------------------------------------------------------


def test_base_and_adapter_give_the_policy(policy: Any) -> None:
    weights = PolicyWeights(policy)
    base, delta = dict(weights.base()), updates(policy)
    assert weights.obstacles() == []
    assert delta.keys() < base.keys()
    for name, value in named_weights(policy):
        torch.testing.assert_close(base[name] + delta.get(name, 0.0), value, rtol=0, atol=1e-6)


def test_what_an_adapter_leaves_out_is_named(model: Any, policy: Any) -> None:
    from peft import LoraConfig, get_peft_model

    def obstacles(**options: Any) -> list[str]:
        config = LoraConfig(r=2, target_modules=options.pop("target", ["q_proj"]), **options)
        return lora_obstacles(get_peft_model(copy.deepcopy(model), config))

    assert obstacles() == []
    assert obstacles(use_dora=True) == ["DoRA"]
    assert obstacles(modules_to_save=["lm_head"]) == ["fully trained modules"]
    assert obstacles(target=["q_proj", "embed_tokens"]) == ["adapters of embeddings"]
    assert obstacles(trainable_token_indices=[1, 2]) == ["trained tokens"]
    assert obstacles(lora_bias=True)[0].startswith("adapters of another kind (")
    assert lora_obstacles(model) == ["no adapter"]
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    assert lora_obstacles(policy) == ["trained weights of the base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digest(dtype: torch.dtype) -> None:
    values = torch.randn(3, 2**19 + 5, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than one chunk
    whole = digest(values)
    assert digest(values.T.contiguous().T) == whole
    assert digest(values.flip(0)) != whole
    for place in (0, 7, values.numel() - 1):
        other = values.clone()
        bits = other.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        bits[place] ^= 1  # the last bit of one number
        assert digest(bits.view(dtype)) != whole
        assert digest(-other) != digest(other)
    assert digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))


def test_an_inverted_word_changes_the_digest() -> None:
    """A shift that repeats the sign bit would map a number and its complement to the same."""
    words = torch.arange(-50, 50, dtype=torch.int32)
    values = torch.cat([words, ~words]).view(torch.float32)
    finite = values[values.isfinite()]
    assert len({digest(one[None]) for one in finite}) == len(set(finite.tolist()))


# -- importance weights by default ------------------------------------------------------------------------------------


class Rounded(EngineSettings):
    """Settings of an engine in low precision."""

    @property
    def low_precision(self) -> bool:
        return True

    def build(self, model: Any, tokenizer: Any) -> OwnCopy:
        return OwnCopy(base_of(model), torch.bfloat16)


def test_importance_weights_are_on_by_default_for_engines_in_low_precision() -> None:
    def weights(engine: Any = None, **options: Any) -> ImportanceWeights | None:
        return PolicyRLModule("any", sampler=Sampler(engine=engine), **options).importance_weights

    assert weights() is None
    assert weights(importance_weights=True) is not None
    assert weights(EngineSettings()) is None
    default = weights(Rounded())
    assert default is not None
    assert (default.level, default.mode, default.low, default.high) == ("token", "truncate", 0.0, 2.0)
    assert weights(Rounded(), importance_weights=False) is None
    chosen = ImportanceWeights(mode="mask", low=0.5)
    assert weights(Rounded(), importance_weights=chosen) is chosen
    assert weights(max_staleness=1) is not None
    with pytest.raises(ConfigError, match=r"model.importance_weights is false, but with model.max_staleness: 1"):
        weights(max_staleness=1, importance_weights=False)


def test_settings_build_the_engine_when_the_model_is_there(model: Any, tokenizer: Any) -> None:
    settings = Sampler(engine=Rounded())
    sampler = settings.build(model, Renderer(tokenizer))
    other = settings.build(copy.deepcopy(model), Renderer(tokenizer))
    assert isinstance(sampler.engine, LeaderEngine)
    assert isinstance(other.engine, LeaderEngine)
    assert other.engine.engine is sampler.engine.engine, "rounds sampled ahead use the same engine"
    sampler.sync(1)  # the canary passes in bfloat16
    assert sampler.generate([[5]], [0])[0].ids == [5]
