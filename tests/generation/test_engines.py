"""One contract for every sampling engine. Expectations come from a plain forward of the model, not from an engine.

`python -m tests.vllm` (`make test-vllm`) runs it with vLLM too, and writes the table in docs/engines.md.
"""

import copy
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_server import VLLMServer
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.types import Completion
from tests.helpers.docs import ROOT
from tests.helpers.models import save_small_model
from tests.helpers.modules import vowels
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer
from tests.helpers.vllm_serve import VLLMServe

pytestmark = pytest.mark.vllm
CONTEXT = 64
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [40]]
# The built-in engine and `generate` compute in float32 like the plain forward, in another order of the sums.
EXACT = 1e-4
DRAWS = 2000


class Subject:
    """An engine, with the model that it must agree with.

    Args:
        name: The engine: `local`, `generate`, `vllm` (in this process) or `server`.
        folder: Folder of the model.
        raw: See `VLLMEngine.raw_logprobs`; the other engines need no such choice.
    """

    def __init__(self, name: str, folder: Path, raw: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, self.folder = name, folder
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.serve: VLLMServe | None = None
        self.engine: Any = LocalEngine(self.model, self.tokenizer.decode)
        if name == "vllm":
            self.engine = self._vllm(folder, raw)
        if name == "server":
            self.engine = self._server(folder.parent / f"server-{raw}", raw)
        if name == "generate":
            self.engine._plain = False  # as for a model whose cache is not a plain one

    def _vllm(self, folder: Path, raw: bool) -> Any:
        from rlhf_lightning.generation.vllm_engine import VLLMEngine

        options = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**26}
        torch.manual_seed(5)
        settings = VLLMEngine(str(folder), memory=0.05, max_length=CONTEXT, raw_logprobs=raw, options=options)
        engine = settings.build(self.model, self.tokenizer)
        number = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(number, torch.rand(1)), "the trainer's random numbers do not depend on the engine"
        return engine

    def _server(self, place: Path, raw: bool) -> Any:
        place.mkdir()
        self.serve = VLLMServe(self.folder, place / "output.txt", raw, CONTEXT)
        self.serve.start()
        settings = VLLMServer(self.serve.url, str(place / "weights"), dtype="float32")
        engine = settings.build(self.model, self.tokenizer)
        engine.sync(PolicyWeights(self.model), 0)
        return engine

    def close(self) -> None:
        """Kill the server, if there is one."""
        if self.serve is not None:
            self.serve.kill()

    def sample(self, params: SamplingParams, seeds: Sequence[int] = (1, 2, 3), prompts: Any = PROMPTS) -> Any:
        """Responses to the prompts."""
        return self.engine.generate(prompts, params, seeds)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Logits after each token by a plain forward, `[T, V]`."""
        return self.model(torch.tensor([ids])).logits[0]

    def logprobs(self, prompt: list[int], completion: Completion, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of a response's tokens under the full softmax, `[T]`."""
        logits = self.logits(prompt + completion.ids)[len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def _engine(name: str) -> Any:
    missing = name in VLLM and find_spec("vllm") is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="vLLM is not installed: make test-vllm"))


VLLM = ("vllm", "server")
ENGINES = ["local", "generate", *VLLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a shape that vLLM's kernels support."""
    return save_small_model(tmp_path_factory.mktemp("model"), CONTEXT)


@pytest.fixture(scope="module", params=[_engine(name) for name in ENGINES])
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    """Each engine in turn."""
    subject = Subject(request.param, folder, raw=True)
    yield subject
    subject.close()


@pytest.fixture(scope="module", params=[_engine(name) for name in ENGINES])
def at_temperature(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    """Each engine in turn, set up for temperatures other than 1."""
    subject = Subject(request.param, folder, raw=False)
    yield subject
    subject.close()


def chi_square(found: list[int], wanted: Tensor) -> tuple[float, float]:
    """Pearson's statistic of samples, and a bound five standard deviations above its mean.

    Args:
        found: Sampled tokens.
        wanted: Their probabilities, `[V]`. Tokens that are expected fewer than five times are counted together.
    """
    counts, expected = torch.bincount(torch.tensor(found), minlength=len(wanted)).double(), wanted.double() * len(found)
    assert not counts[expected == 0].any(), "a token that cannot be sampled was sampled"
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    statistic = sum(float(((seen - mean) ** 2 / mean).sum()) for seen, mean in cells)
    freedom = sum(len(seen) for seen, _ in cells) - 1
    return statistic, freedom + 5 * (2 * freedom) ** 0.5


def cut(probabilities: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution after min-p, top-k and top-p, in this order, written as their definitions read, `[V]`."""
    kept = [i for i in range(len(probabilities)) if probabilities[i] >= min_p * probabilities.max()]
    kept = sorted(kept, key=lambda i: -float(probabilities[i]))[: top_k or None]
    total, mass, nucleus = sum(float(probabilities[i]) for i in kept), 0.0, []
    for i in kept:
        if mass >= top_p * total:
            break
        nucleus.append(i)
        mass += float(probabilities[i])
    result = torch.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus]
    return result / result.sum()


CUTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.6},
    "min-p": {"min_p": 0.2},
    "top-k with top-p": {"top_k": 4, "top_p": 0.6},
    "all three": {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
}


def test_greedy_tokens(subject: Subject) -> None:
    for prompt, completion in zip(PROMPTS, subject.sample(SamplingParams(12, temperature=0.0)), strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(subject.logits(ids)[-1].argmax()))
        assert completion.ids == ids[len(prompt) :]
        wanted = subject.logprobs(prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_temperature(at_temperature: Subject, temperature: float) -> None:
    prompt = PROMPTS[0]
    many = at_temperature.sample(SamplingParams(1, temperature=temperature), range(DRAWS), [prompt] * DRAWS)
    wanted = (at_temperature.logits(prompt)[-1] / temperature).softmax(-1)
    statistic, bound = chi_square([completion.ids[0] for completion in many], wanted)
    assert statistic < bound
    for prompt, completion in zip(
        PROMPTS, at_temperature.sample(SamplingParams(12, temperature=temperature)), strict=True
    ):
        wanted = at_temperature.logprobs(prompt, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
def test_min_p_top_k_and_top_p(subject: Subject, options: dict[str, Any]) -> None:
    prompt = PROMPTS[1]
    many = subject.sample(SamplingParams(1, **options), range(DRAWS), [prompt] * DRAWS)
    wanted = cut(subject.logits(prompt)[-1].softmax(-1), **options)
    assert 1 < int((wanted > 0).sum()) < len(wanted), "this case cuts something, and leaves a choice"
    statistic, bound = chi_square([completion.ids[0] for completion in many], wanted)
    assert statistic < bound
    for completion in many[:20]:
        expected = subject.logprobs(prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=EXACT)


def test_seeds(subject: Subject) -> None:
    """Tokens depend on the prompt and the seed, not on the other rows; samples of one prompt differ."""
    rows, seeds = [PROMPTS[0]] * 6 + [PROMPTS[1]], [0, 1, 2, 3, 10**9, 1, 1]
    together = subject.sample(SamplingParams(10), seeds, rows)
    alone = [subject.sample(SamplingParams(10), [seed], [row])[0] for row, seed in zip(rows, seeds, strict=True)]
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]
    assert together[1].ids == together[5].ids
    assert len({tuple(completion.ids) for completion in together}) == 6
    shorter = subject.sample(SamplingParams(4), seeds, rows)
    assert [completion.ids for completion in shorter] == [completion.ids[:4] for completion in together]


def test_token_budget(subject: Subject) -> None:
    for completion in subject.sample(SamplingParams(7)):
        assert (len(completion.ids), len(completion.logprobs), completion.stop_reason) == (7, 7, "length")


def _first(ids: list[int], ends: Callable[[list[int]], bool]) -> list[int]:
    """The ids up to the first at which `ends` holds."""
    return next((ids[:count] for count in range(1, len(ids) + 1) if ends(ids[:count])), ids)


def _check_stops(subject: Subject, params: SamplingParams, ends: Callable[[list[int]], bool], rows: int = 60) -> None:
    """Responses with stops are those without, up to the first token that ends them."""
    prompts, seeds = [PROMPTS[0]] * rows, range(rows)
    free = subject.sample(SamplingParams(params.max_tokens), seeds, prompts)
    stopped = 0
    for whole, found in zip(free, subject.sample(params, seeds, prompts), strict=True):
        wanted = _first(whole.ids, ends)
        assert found.ids == wanted
        assert found.logprobs == pytest.approx(whole.logprobs[: len(wanted)], abs=EXACT)
        assert found.stop_reason == ("stop" if ends(wanted) else "length")
        stopped += len(wanted) < len(whole.ids)
    assert stopped > rows // 10, "too few responses stop for this to show anything"


def test_stop_tokens(subject: Subject) -> None:
    stops = tuple(range(0, len(subject.tokenizer), 9))
    _check_stops(subject, SamplingParams(20, stop_token_ids=stops), lambda ids: ids[-1] in stops)


def test_end_token_of_the_model_stops_only_if_given(subject: Subject) -> None:
    """A prompt after which the end token is likely, and is sampled in the middle of a response."""
    end = subject.tokenizer.eos_token_id
    found = subject.sample(SamplingParams(40), range(200), [PROMPTS[0]] * 200)
    assert all(len(completion.ids) == 40 for completion in found)
    assert any(end in completion.ids[:-1] for completion in found)


STOPS = {
    "one character": ("e", "o"),
    "several characters": ("th", "st", "e,"),
    "text of a token": ("<|im_end|>", "<|im_start|>", "z", "q", "x", "Z"),
}


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_stop_texts(subject: Subject, stops: tuple[str, ...]) -> None:
    """Also texts that end in the middle of a token, whose tokens are all kept."""
    decode = subject.tokenizer.decode
    _check_stops(
        subject, SamplingParams(30, stop_strings=stops), lambda ids: any(stop in decode(ids) for stop in stops), 100
    )


def test_stop_text_that_ends_in_the_middle_of_a_token(subject: Subject) -> None:
    decode, vocabulary = subject.tokenizer.decode, range(len(subject.tokenizer))
    long = {decode([token])[:-1] for token in vocabulary if len(decode([token])) > 2 and "�" not in decode([token])}
    stops = tuple(sorted(text for text in long if text.strip() and text.isalpha()))
    _check_stops(
        subject, SamplingParams(30, stop_strings=stops), lambda ids: any(stop in decode(ids) for stop in stops), 100
    )


def test_least_number_of_tokens_with_stop_tokens(subject: Subject) -> None:
    stops = tuple(range(0, len(subject.tokenizer), 2))
    found = subject.sample(SamplingParams(9, min_tokens=4, stop_token_ids=stops), range(60), [PROMPTS[0]] * 60)
    assert min(len(completion.ids) for completion in found) == 5  # four, and the token that ends it
    for completion in found:
        assert not set(completion.ids[:-1]) & set(stops)
        expected = subject.logprobs(PROMPTS[0], completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=EXACT)


def test_least_number_of_tokens_with_stop_texts(subject: Subject) -> None:
    """A stop text within the first tokens does not end a response, one that is complete after them does."""
    decode, stops, least = subject.tokenizer.decode, ("e", "th"), 6

    def ends(ids: list[int]) -> bool:
        early, text = decode(ids[:least]), decode(ids)
        return len(ids) > least and any(stop in text[max(0, len(early) - len(stop) + 1) :] for stop in stops)

    params = SamplingParams(30, min_tokens=least, stop_strings=stops)
    if subject.name in VLLM:
        with pytest.raises(ConfigError, match="also keeps the model's end token"):
            subject.sample(params)
        return
    _check_stops(subject, params, ends, 100)
    free = subject.sample(SamplingParams(30), range(100), [PROMPTS[0]] * 100)
    assert any("e" in decode(completion.ids[:least]) for completion in free), "some would have ended early"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 has no tokens"),
        ([5] * (CONTEXT - 3), f"prompt 1 has {CONTEXT - 3} tokens and sampler.max_tokens is 4"),
        ([5, 10**6], "prompt 1 has the token id 1000000, but the model has the ids 0 to"),
        ([5, -1], "prompt 1 has the token id -1"),
    ],
    ids=["empty", "too long", "id above the vocabulary", "negative id"],
)
def test_invalid_prompts_are_refused(subject: Subject, prompt: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        subject.sample(SamplingParams(4), [0, 1], [PROMPTS[0], prompt])
    (longest,) = subject.sample(SamplingParams(4), [0], [[5] * (CONTEXT - 4)])
    assert len(longest.ids) == 4
    assert subject.sample(SamplingParams(4), [], []) == []


# -- the weights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored(subject: Subject) -> Iterator[Subject]:
    """An engine whose weights a test changes."""
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    yield subject
    subject.model.load_state_dict(before)
    subject.engine.sync(PolicyWeights(subject.model), 0)


def _check_weights(subject: Subject, model: Any) -> None:
    """The engine samples as the model does."""
    # Two blocks of vLLM's cache are full, so that keys of the old weights could be reused.
    for prompt in (PROMPTS[0], [7 + i % 40 for i in range(50)]):
        for temperature in (0.0, 1.0):
            (completion,) = subject.sample(SamplingParams(10, temperature=temperature), [4], [prompt])
            logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1].detach()
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=EXACT)
            if temperature == 0:
                assert completion.ids == logits.argmax(-1).tolist()


def test_new_weights_after_each_sync(restored: Subject) -> None:
    """All weights, including a head that is tied to the embeddings, several times in turn."""
    assert restored.model.config.tie_word_embeddings
    for version in (1, 2, 3):
        _check_weights(restored, restored.model)
        with torch.no_grad():
            for parameter in restored.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        restored.engine.sync(PolicyWeights(restored.model), version)
        _check_weights(restored, restored.model)


def test_merged_adapter(restored: Subject) -> None:
    if restored.name not in VLLM:
        pytest.skip("this engine samples from the trained model itself")
    adapted = Start(copy.deepcopy(restored.model), lora=LoRA(rank=4, target=["attention", "mlp"])).load().eval()
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        restored.engine.sync(PolicyWeights(adapted), version)
        _check_weights(restored, adapted)


REFUSED = {
    "head": ("the policy's head differs from its embeddings", """
        policy = Start(model, lora=LoRA(rank=4, target=["unembedding"])).load()
    """),
    "vocabulary": ("vLLM cannot load the policy's weights of round 7", """
        policy = model
        policy.resize_token_embeddings(policy.config.vocab_size + 64)
    """),
}  # fmt: skip


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")
@pytest.mark.parametrize("case", REFUSED, ids=[f"vllm-{case}" for case in REFUSED])
def test_weights_that_the_engine_cannot_hold_are_refused(case: str, folder: Path) -> None:
    """In a process of its own, because vLLM cannot be used afterwards."""
    message, policy = REFUSED[case]
    start = f"""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from rlhf_lightning import LoRA
        from rlhf_lightning.errors import ConfigError
        from rlhf_lightning.models.loading import Start
        from rlhf_lightning.generation.policy_weights import PolicyWeights
        from rlhf_lightning.generation.token_sampling import SamplingParams
        from rlhf_lightning.generation.vllm_engine import VLLMEngine

        options = {{"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**26}}
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
        settings = VLLMEngine({str(folder)!r}, memory=0.05, max_length={CONTEXT}, options=options)
        engine = settings.build(model, AutoTokenizer.from_pretrained({str(folder)!r}))
    """
    end = """
        def sync():
            engine.sync(PolicyWeights(policy), 7)

        def sample():
            engine.generate([[5]], SamplingParams(2), [1])

        for call in (sync, sample):
            try:
                call()
            except ConfigError as error:
                print("refused:", error)
    """
    code = "\n".join(textwrap.dedent(part) for part in (start, policy, end))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, second = [line for line in out.splitlines() if line.startswith("refused:")]
    assert message in first
    assert "the last sync of weights failed" in second


def test_policy_rl(restored: Subject, tmp_path: Path) -> None:
    """Three rounds of training: the engine samples each with the weights that the trainer has by then."""
    if restored.name == "generate":
        pytest.skip("the model of this test is sampled by the built-in engine")
    engine = restored.engine if restored.name in VLLM else None
    module = PolicyRLModule(
        str(restored.folder),
        rewards=[FunctionReward(vowels)],
        sampler=Sampler(max_tokens=6, engine=engine),
        optimizer=sgd(1.0),
    )
    gaps: list[float] = []
    module.on_train_batch_end = lambda *_: gaps.append(float(fit.callback_metrics["train/logprob_gap"]))
    fit = trainer(tmp_path)
    fit.fit(module, PromptDataModule(prompts(6), prompts_per_round=2, group_size=3, seed=1))
    assert len(gaps) == 3
    assert max(gaps) < EXACT
    moved = [
        float((ours - theirs).detach().abs().max())
        for ours, theirs in zip(module.model.parameters(), restored.model.parameters(), strict=True)
    ]
    assert max(moved) > 100 * EXACT, "weights that stayed behind would be seen"


# -- settings ---------------------------------------------------------------------------------------------------------


def test_unsupported_settings_are_refused_at_setup(at_temperature: Subject) -> None:
    subject, renderer = at_temperature, Renderer(at_temperature.tokenizer)
    for options in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"min_tokens": 2}):
        sampler = Sampler(max_tokens=4, engine=subject.engine if subject.name in VLLM else None, **options)
        if subject.name in VLLM:
            with pytest.raises(ConfigError, match=f"sampler.{next(iter(options))}: vLLM's log-probabilities"):
                sampler.build(subject.model, renderer)
        else:
            sampler.build(subject.model, renderer)


def test_temperature_that_raw_logprobs_cannot_follow_is_refused(subject: Subject) -> None:
    if subject.name not in VLLM:
        pytest.skip("this engine records the log-probabilities at any temperature")
    sampler = Sampler(max_tokens=4, temperature=0.7, engine=subject.engine)
    with pytest.raises(ConfigError, match=r"sampler.temperature is 0.7, but with .*raw_logprobs"):
        sampler.build(subject.model, Renderer(subject.tokenizer))


class Picky:
    """An engine that follows only temperature 1."""

    def check(self, params: SamplingParams) -> None:
        if params.temperature != 1:
            raise ConfigError("temperature 1 only")

    def sync(self, named_tensors: Any, version: int) -> None: ...

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        return [Completion([5], [0.0], "length") for _ in prompts]


def test_an_engine_of_ones_own_is_asked_too(tokenizer: Any, model: Any) -> None:
    with pytest.raises(ConfigError, match="temperature 1 only"):
        Sampler(temperature=0.5, engine=Picky()).build(model, Renderer(tokenizer))
    sampler = Sampler(engine=Picky()).build(model, Renderer(tokenizer))
    assert sampler.generate([[5]], [0])[0].ids == [5]
    with pytest.raises(ConfigError, match="temperature 1 only"):
        sampler.generate([[5]], [0], temperature=0.0)


def test_vllm_that_is_missing_or_old_or_elsewhere(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    from rlhf_lightning.generation import vllm_engine, vllm_requests

    with pytest.raises(ConfigError, match=r"options.tensor_parallel_size must be 1"):
        vllm_engine.VLLMEngine("any", options={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"options.quantization cannot be set"):
        vllm_engine.VLLMEngine("any", options={"quantization": "fp8"})
    with pytest.raises(ConfigError, match=r"lora_sync is 'both'; it must be one of adapter, merged"):
        vllm_engine.VLLMEngine("any", lora_sync="both")
    assert vllm_engine.VLLMEngine("any").low_precision
    assert not vllm_engine.VLLMEngine("any", options={"dtype": "float32"}).low_precision
    with pytest.raises(ConfigError, match=r"vLLM 0\.11\.2 is installed, but at least 0\.32 is needed"):
        vllm_requests.check_version("0.11.2")
    vllm_requests.check_version("0.32.0+cpu")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM cannot be imported .*docs/engines.md"):
        vllm_engine.VLLMEngine("any").build(model, tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="works only with one process"):
        vllm_engine.VLLMEngine("any").build(model, tokenizer)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ConfigError, match="VLLM_ENABLE_V1_MULTIPROCESSING is set"):
        vllm_engine.VLLMEngine("any").build(model, tokenizer)


def test_the_page_lists_every_case() -> None:
    page = (ROOT / "docs" / "engines.md").read_text()
    written = page.partition("<!-- table of tests/vllm.py -->")[2].partition("<!-- end of the table -->")[0]
    rows = re.findall(r"^\| ([\w ]+) \|", written, re.M)
    engines = {"subject", "at_temperature", "restored", "folder"}
    cases = [
        name.removeprefix("test_").replace("_", " ")
        for name, case in globals().items()
        if name.startswith("test_") and engines & set(inspect.signature(case).parameters)
    ]
    assert sorted(rows) == sorted(cases), "make test-vllm writes the table"
