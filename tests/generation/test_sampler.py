"""The sampler: its tokens and stops do not depend on neighboring rows, batches and engines."""

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation import local_engine
from rlhf_lightning.generation.fused_decoder import FusedDecoder, _Product, supports
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import ModelSampler, Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams, is_complete, sample_token
from rlhf_lightning.models.decoding_layers import decoding_layers
from rlhf_lightning.models.lora import LoRA, base_of, lora_factors
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from tests.helpers.models import build_model

PLAIN = ["qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3", "phi", "phi3", "gpt2", "cohere", "neox"]
FALLBACK = ["bloom", "mamba", "falcon"]


def built(model: Any, tokenizer: Any, **options: Any) -> ModelSampler:
    return Sampler(**options).build(model, Renderer(tokenizer))


@pytest.mark.parametrize("architecture", PLAIN + FALLBACK)
def test_greedy_equals_generate(
    tokenizer: Any, architecture: str, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    # In float64, so that rounding does not decide which token is the likeliest.
    model, untouched = (build_model(tokenizer, architecture=architecture).double().to(device) for _ in range(2))
    tokenizer.chat_template = None
    settings = Sampler(max_tokens=12, temperature=0.0, slots=3)
    sampler = settings.build(model, Renderer(tokenizer, format="raw"))
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7], [40], [9, 9]]
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        samples = sampler.generate(prompts, [0] * 5)
    assert any("with its own generate" in message for message in caplog.messages) == (architecture in FALLBACK)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt], device=device)
        out = untouched.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert sample.ids == out[0, len(prompt) :].tolist()
        assert sample.stop_reason == ("stop" if sample.ids[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.parametrize("architecture", PLAIN + FALLBACK)
def test_samples_depend_only_on_their_seed_and_logprobs_equal_the_trainers(
    tokenizer: Any, architecture: str, device: torch.device
) -> None:
    model = build_model(tokenizer, architecture=architecture).double().to(device)
    renderer = Renderer(tokenizer)
    texts = ("one", "one two three", "one", "two", "four five one", "one", "three")
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
    seeds = list(range(1, 8))
    together, few, alone = (
        built(model, tokenizer, max_tokens=10, temperature=0.8, slots=slots).generate(prompts, seeds)
        for slots in (256, 3, 1)  # rows wait for the slots of finished rows
    )
    assert [sample.ids for sample in together] == [sample.ids for sample in alone] == [sample.ids for sample in few]
    assert together[0].ids != together[2].ids
    rows = [prompt + sample.ids for prompt, sample in zip(prompts, together, strict=True)]
    masks = [[0] * len(p) + [1] * len(s.ids) for p, s in zip(prompts, together, strict=True)]
    batch = pad_tokens(rows, masks, 0)
    scores = TokenLogprobs(model)(batch["input_ids"].to(device), batch["loss_mask"].to(device), 0.8).logprobs.cpu()
    for row, prompt, sample in zip(scores, prompts, together, strict=True):
        sampled = row[len(prompt) : len(prompt) + len(sample.ids)]
        # transformers hands a logits processor float32, and gives a capped attention a float32 softmax.
        exact = 1e-5 if architecture in (*FALLBACK, "gemma2") else 1e-9
        torch.testing.assert_close(sampled, torch.tensor(sample.logprobs, dtype=torch.float64), rtol=0, atol=exact)


def test_waiting_rows_take_the_slots_of_finished_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tokenizer)
    engine = LocalEngine(model, tokenizer.decode, slots=4)
    engine.generate([[5]], SamplingParams(max_tokens=1), [0])
    fed: list[int] = []
    step = LocalEngine.step
    monkeypatch.setattr(
        LocalEngine, "step", lambda self, cache, tokens: fed.append(len(tokens)) or step(self, cache, tokens)
    )
    stops = tuple(range(0, len(tokenizer), 3))  # a third of all tokens: responses of unlike length
    samples = engine.generate(
        [[5, 6 + i % 3] for i in range(12)], SamplingParams(30, stop_token_ids=stops), list(range(12))
    )
    lengths = sorted(len(sample.ids) for sample in samples)
    assert lengths[0] < lengths[-1]
    assert max(fed) == 4
    assert fed[-1] < 4, "slots that are empty for good are given up"
    # Without reuse of slots, each batch of four would wait for its slowest row.
    assert len(fed) < sum(sorted(lengths)[3::4])


def test_kv_cache_grows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lightning.generation import kv_cache

    model = build_model(tokenizer).double()
    wanted = built(model, tokenizer, max_tokens=20).generate([[5, 6], [7]], [1, 2])
    monkeypatch.setattr(kv_cache, "STEP", 2)
    found = built(model, tokenizer, max_tokens=20).generate([[5, 6], [7]], [1, 2])
    assert [s.ids for s in found] == [s.ids for s in wanted]


def test_sampling_does_not_change_the_model(tokenizer: Any) -> None:
    model = build_model(tokenizer).train()
    model.model.layers[0].eval()
    built(model, tokenizer, max_tokens=3).generate([[5]], [0])
    assert model.training
    assert not model.model.layers[0].training
    ids = torch.tensor([[5, 6, 7]])
    model(ids).logits.sum().backward()  # no tensor is left in inference mode


def test_bf16_samples_match_the_trainers_precision(tokenizer: Any, device: torch.device) -> None:
    model = build_model(tokenizer, head_dim=16).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        (sample,) = built(model, tokenizer, max_tokens=12).generate([[5, 6, 7]], [3])
        batch = pad_tokens([[5, 6, 7, *sample.ids]], [[0, 0, 0] + [1] * len(sample.ids)], 0)
        scores = (
            TokenLogprobs(model)(batch["input_ids"].to(device), batch["loss_mask"].to(device)).logprobs[0, 3:].cpu()
        )
    gap = (scores.detach() - torch.tensor(sample.logprobs)).abs()
    assert gap.mean() <= 0.02


@pytest.mark.parametrize("lora", [False, True])
def test_decoding_layers_compute_as_autocast_does(lora: bool, tokenizer: Any) -> None:
    """The same bits, although weights are converted only once, and no layer is left changed."""
    model: Any = build_model(tokenizer, head_dim=16)
    if lora:
        model = get_peft_model(model, LoRA(rank=4).config(model, "CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(ids).logits
        hidden = base_of(model).get_decoder()(ids)[0]
        with decoding_layers(model):
            layers = [module for module in model.modules() if "forward" in vars(module)]
            converted = [layer.forward.keywords["weight"].dtype for layer in layers]
            assert torch.equal(base_of(model).get_decoder()(ids)[0], hidden)
            assert torch.equal(model(ids).logits, plain)
    assert set(converted) == {torch.bfloat16}
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert len(converted) == len(linear) - 1, "all but the head"
    assert not any("forward" in vars(module) for module in linear)


def test_samples_follow_the_distribution(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    sampler = built(model, tokenizer, max_tokens=1, temperature=1.5, slots=4096)
    sampled = torch.tensor([s.ids[0] for s in sampler.generate([[5, 6]] * 4000, list(range(4000)))])
    wanted = (model(torch.tensor([[5, 6]])).logits[0, -1] / 1.5).softmax(-1).detach()
    found = torch.bincount(sampled, minlength=len(tokenizer)) / 4000
    # The expected total variation of 4000 draws is about Σ sqrt(p(1-p)/(2π·4000)); three times that is far off.
    bound = 3 * float((wanted * (1 - wanted) / (2 * torch.pi * 4000)).sqrt().sum())
    assert float((found - wanted).abs().sum() / 2) < bound


def test_excluded_tokens_are_never_sampled(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    top = model(torch.tensor([[5, 6]])).logits[0, -1].detach().softmax(-1).sort(descending=True)
    third = float(top.values[2] / top.values[0]) - 1e-4
    for options, allowed in (
        ({"top_k": 3}, 3),
        ({"top_p": float(top.values[:2].sum()) - 1e-4}, 2),
        ({"min_p": third}, 3),
        ({"top_k": 5, "min_p": third}, 3),
    ):
        sampler = built(model, tokenizer, max_tokens=1, **options)
        samples = sampler.generate([[5, 6]] * 200, list(range(200)))
        assert {s.ids[0] for s in samples} == set(top.indices[:allowed].tolist())
        # What is recorded is of the full softmax.
        for sample in samples[:5]:
            place = top.indices.tolist().index(sample.ids[0])
            assert sample.logprobs[0] == pytest.approx(float(top.values[place].log()), abs=1e-4)


def test_no_response_ends_before_min_tokens(tokenizer: Any) -> None:
    engine = LocalEngine(build_model(tokenizer), tokenizer.decode)
    stops = tuple(range(0, len(tokenizer), 2))
    params = SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=stops)
    samples = engine.generate([[5, 6]] * 40, params, list(range(40)))
    assert min(len(sample.ids) for sample in samples) == 5  # four, then one that ends it
    assert any(sample.stop_reason == "stop" for sample in samples)


def test_sample_at_the_upper_edge_is_a_possible_token(device: torch.device) -> None:
    logits = torch.full((3, 130), -torch.inf, device=device)
    logits[:, [3, 70, 100]] = 0.0
    tokens, logprobs = sample_token(logits, torch.tensor([0.0, 0.5, 1.0 - 2**-24], device=device), SamplingParams())
    assert tokens.tolist() == [3, 70, 100]
    assert logprobs.exp().tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"min_tokens": 200},
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"sampler.{next(iter(options))} is"):
        Sampler(**options)


def test_warns_about_biased_sampling(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        Sampler().warn_of_bias()
        assert not caplog.messages
        Sampler(top_p=0.9, min_p=0.1).warn_of_bias()
    assert "sampler.top_p and sampler.min_p" in caplog.messages[0]


def test_stop_texts_end_a_response(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}[end]{% endfor %}"
    renderer = Renderer(tokenizer)
    sampler = Sampler(max_tokens=40).build(build_model(tokenizer), renderer)
    assert sampler.params.stop_strings == ("[end]",)
    assert not is_complete(tokenizer("one two")["input_ids"], sampler.params, tokenizer.decode)
    assert is_complete(tokenizer("one two[end]")["input_ids"], sampler.params, tokenizer.decode)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_fused_decoder_computes_adapters_and_leaves_hooked_models_alone(tokenizer: Any, architecture: str) -> None:
    base: Any = build_model(tokenizer, architecture=architecture)
    model: Any = get_peft_model(base, LoRA(rank=4, target=["q_proj", "v_proj", "down_proj"]).config(base, "CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.double()
    engine = LocalEngine(model, tokenizer.decode)
    request = [[5, 6, 7], [9] * 40, [5, 6, 7]], SamplingParams(max_tokens=12), [1, 2, 3]
    assert supports(model)
    fused = engine.generate(*request)
    calls: list[int] = []
    hook = engine.backbone.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert not supports(model)
    plain = engine.generate(*request)
    hook.remove()
    assert calls
    for a, b in zip(fused, plain, strict=True):
        assert a.ids == b.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


def test_fused_products_round_adapters_as_training_does_unlike_merged_weights(tokenizer: Any) -> None:
    base: Any = build_model(tokenizer, head_dim=16)
    base.to(torch.bfloat16).float()  # weights as models are published
    model: Any = get_peft_model(base, LoRA(rank=4).config(base, "CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapters, attention = dict(lora_factors(model)), base.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    found = [adapters[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    x = torch.randn(256, layers[0].in_features)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = torch.cat([layer(x) for layer in layers], -1).float()
        bases = [layer.base_layer for layer in layers]
        fused = _Product(bases, found, torch.bfloat16)(x).float()
        exact = _Product(bases, found, torch.float32)
        merged = torch.cat([x @ (w.base_layer.weight + f.b @ f.a).t() for w, f in zip(layers, found, strict=True)], -1)
    # Sums of a product may be rounded in another order, which changes few of its outputs.
    assert (fused != wanted).float().mean() < 0.02
    assert (merged.float() != wanted).float().mean() > 0.2
    with torch.inference_mode():
        torch.testing.assert_close(exact(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5, rtol=0)


def test_weights_are_copied_once_per_session_and_anew_afterwards(tokenizer: Any) -> None:
    model: Any = build_model(tokenizer)
    engine = LocalEngine(model, tokenizer.decode)
    request = [[5, 6, 7], [8, 9]], SamplingParams(max_tokens=4), [1, 2]
    with engine.session():
        before = engine.generate(*request)
        copy = engine._kept
        assert copy is not None
        assert engine.generate(*request) == before
        assert engine._kept is copy
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.generate(*request)
        assert engine._kept is not copy
    assert engine._kept is None
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    assert engine.generate(*request) != before
    assert engine._kept is None


def test_prompts_shared_by_groups_of_rows_change_no_tokens(tokenizer: Any, monkeypatch: Any) -> None:
    model: Any = build_model(tokenizer).double()
    engine = LocalEngine(model, tokenizer.decode, slots=6)
    prompts = [list(range(5, 40)), list(range(3, 53)), list(range(9, 30))]
    rows = [prompts[0]] * 5 + [prompts[1]] * 3 + [prompts[2]]
    request = rows, SamplingParams(max_tokens=20, stop_token_ids=tuple(range(0, 100, 7))), range(len(rows))
    alone = engine.generate(*request)
    assert len({len(completion.ids) for completion in alone}) > 2  # slots become free at different times
    calls: list[int] = []
    grouped = FusedDecoder._attend_in_groups

    def seen(*args: Any) -> torch.Tensor:
        calls.append(len(args[1]))
        return grouped(*args)

    monkeypatch.setattr(FusedDecoder, "_attend_in_groups", seen)
    monkeypatch.setattr(local_engine, "SHARED_KEYS", 16)
    together = engine.generate(*request)
    assert len(set(calls)) > 1
    for a, b in zip(alone, together, strict=True):
        assert a.ids == b.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


def test_model_without_finite_logits_is_refused(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="all logits of Qwen3ForCausalLM are NaN or infinite"):
        built(model, tokenizer, max_tokens=4).generate([[5, 6, 7]], [0])
