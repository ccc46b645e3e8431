"""The packed forward equals the plain one, which computes each row separately and completely."""

import logging
import multiprocessing
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import PolicyRLModule, PreferenceModule, SFTModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.compiled_layers import compile_layers, uncompiled
from rlhf_lightning.models.last_layer import KeptLayout
from rlhf_lightning.models.logits import TokenLogprobsFunction
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix, find_shared_prefixes, group_by_token_budget
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.models.sharding import layers_of
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.rewards import FunctionReward
from tests.helpers.models import build_model
from tests.helpers.modules import vowels
from tests.helpers.packed import close, gradients, model_of, rows_of
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.training import sgd, trainer

pytestmark = pytest.mark.usefixtures("every_comparison")
PACKING = ["qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3", "phi", "phi3", "gpt2", "cohere", "neox"]


def plain(model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Each row alone, with all logits."""
    result = []
    for ids, loss_mask, length in zip(batch["input_ids"], batch["loss_mask"], batch["lengths"].tolist(), strict=True):
        logits = model(ids[None, :length]).logits[0, :-1].double() / temperature
        logp = logits.log_softmax(-1).gather(-1, ids[1:length, None])[:, 0] * loss_mask[1:length]
        result.append(torch.nn.functional.pad(logp, (1, ids.shape[0] - length)))
    return torch.stack(result)


def on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


CASES = {
    "pairs": [(6, (4, 7)), (9, (3, 3)), (2, (8, 1))],
    "a group": [(7, (5, 9, 2, 9, 1, 4))],
    "long prompts": [(30, (2, 3)), (21, (4, 1, 2))],
    "alone": [(4, (6,)), (9, (2,)), (1, (1,)), (3, (12,))],
    "one-token responses": [(6, (1, 1, 1)), (3, (1, 5))],
    "mixed": [(5, (3, 3, 8)), (11, (2,)), (1, (4, 2)), (8, (7, 1))],
}


@pytest.mark.parametrize("architecture", PACKING)
@pytest.mark.parametrize("budget", [None, 12])
def test_shared_rows_equal_plain_ones(
    architecture: str, budget: int | None, device: torch.device, tokenizer: Any
) -> None:
    options = {"gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.25}}.get(architecture, {})
    model = model_of(architecture, tokenizer, **options).double().to(device)
    token_logprobs = TokenLogprobs(model, max_tokens_per_batch=budget)
    for trees in CASES.values():
        batch = on(device, rows_of(*trees))
        output = token_logprobs(batch["input_ids"], batch["loss_mask"], 0.7)
        assert token_logprobs.packed_forward.packs, architecture
        wanted = plain(model, batch, 0.7)
        # Attention with a cap is eager in transformers, with a softmax in float32 whatever the dtype of the model.
        exact = 1e-6 if architecture == "gemma2" else 1e-9
        torch.testing.assert_close(output.logprobs, wanted, rtol=exact, atol=exact)
        weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
        # HF norms compute in float32 even in a float64 model.
        found = gradients(model, (output.logprobs * weights).sum())
        close(found, gradients(model, (wanted * weights).sum()), 1e-6)


@pytest.mark.parametrize("architecture", [name for name in PACKING if name != "gpt2"])  # it restores its input's shape
def test_last_layer_computes_wanted_positions_only(architecture: str, tokenizer: Any) -> None:
    """Its keys are computed at all positions, its feed-forward layer at those whose next token is scored."""
    model = model_of(architecture, tokenizer)
    scorer = TokenLogprobs(model)
    tokens: list[int] = []
    layers_of(model)[-1].mlp.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    batch = rows_of(*CASES["long prompts"])
    scorer.packed_forward.check(batch["input_ids"].shape[1])
    tokens.clear()
    scorer(batch["input_ids"], batch["loss_mask"]).logprobs.sum().backward()
    # Both prompts' last tokens are wanted once for all responses; no token follows the last one of a response.
    assert tokens == [2 + int(batch["loss_mask"].sum()) - 5]


def test_model_whose_last_layer_reads_all_positions_computes_them(tokenizer: Any, caplog: Any) -> None:
    """The numerical check finds a layer whose output depends on the positions that it computes."""
    model = model_of("qwen3", tokenizer)

    def differs(layer: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1.0 if isinstance(kwargs.get("layout"), KeptLayout) else output

    layers_of(model)[-1].register_forward_hook(differs, with_kwargs=True)
    with caplog.at_level("INFO"):
        forward = PackedForward(model, model.get_decoder())
    assert forward.packs
    assert "the last layer of Qwen3ForCausalLM computes all positions" in caplog.text


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2"])
def test_shared_rows_equal_plain_ones_in_float32(architecture: str, device: torch.device, tokenizer: Any) -> None:
    """With FlexAttention on CUDA, which does not support float64 and heads below 16."""
    model = model_of(architecture, tokenizer, hidden_size=64, head_dim=16).to(device)
    token_logprobs = TokenLogprobs(model)
    batch = on(device, rows_of(*CASES["mixed"], *CASES["long prompts"]))
    found, wanted = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs, plain(model, batch)
    assert token_logprobs.packed_forward.packs
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    close(gradients(model, found.sum()), gradients(model, wanted.sum()), 1e-3)


@pytest.mark.slow
def test_flex_attention_compiles_to_one_graph(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for CUDA and run eagerly: windows, a soft cap, gradients, inference, autocast."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention import flex_attention as flex

    from rlhf_lightning.generation.local_engine import LocalEngine
    from rlhf_lightning.generation.token_sampling import SamplingParams
    from rlhf_lightning.models import attention

    monkeypatch.setattr(attention, "_use_flex", lambda query: True)
    monkeypatch.setattr(attention, "_FLEX", [])
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = model_of("gemma2", tokenizer)
    token_logprobs = TokenLogprobs(model)
    batch = rows_of(*CASES["mixed"], (90, (40, 60)), (150, (20,)))
    found, wanted = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs, plain(model, batch)
    assert token_logprobs.packed_forward.packs
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    close(gradients(model, found.sum()), gradients(model, wanted.sum()), 1e-3)
    engine = LocalEngine(model, tokenizer.decode)
    engine.generate([[5, 6, 7], [8] * 150], SamplingParams(max_tokens=2), [0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
        engine.generate([[5, 6, 7], [8] * 150], SamplingParams(max_tokens=2), [0, 1])
    assert engine.packed_forward.packs
    assert float((half - found).detach().abs().mean()) < 0.05
    # The measured number is 9.
    assert 8 < counter.frame_count < attention.GRAPHS / 2, "PyTorch's own limit is 8; past a limit it is an error"


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "falcon"])
def test_model_that_cannot_pack_runs_padded_rows(
    architecture: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(architecture, tokenizer)
    batch = rows_of(*CASES["mixed"])
    with caplog.at_level(logging.INFO, "rlhf_lightning"):
        token_logprobs = TokenLogprobs(model, max_tokens_per_batch=20)
        output = token_logprobs(batch["input_ids"], batch["loss_mask"])
        token_logprobs(batch["input_ids"], batch["loss_mask"])
    assert not token_logprobs.packed_forward.packs
    assert sum("cannot run packed rows" in message or "using padded" in message for message in caplog.messages) <= 1
    torch.testing.assert_close(output.logprobs.double(), plain(model, batch), rtol=1e-4, atol=1e-4)


def test_wrong_packed_attention_is_detected(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lightning.models import attention

    honest = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *args, **kwargs: honest(*args, **kwargs) * 1.01)
    forward = PackedForward(model := model_of("qwen3", tokenizer), model.model)
    forward.check(16)
    assert not forward.packs


def test_rows_do_not_affect_each_other(tokenizer: Any) -> None:
    """The results of a row are bit-identical next to rows with extreme values and next to normal rows."""
    model = model_of("qwen3", tokenizer)
    token_logprobs = TokenLogprobs(model)
    batch = rows_of((6, (4, 7)), (9, (3, 3)))
    kept = {0, 3}
    before = token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = 1e15
        model.model.embed_tokens.weight[2] = float("nan")
    for poison in (1, 2):
        ids = batch["input_ids"].clone()
        for row in range(len(ids)):
            if row not in kept and not any(torch.equal(ids[row, :4], ids[other, :4]) for other in kept):
                ids[row] = poison
        # The unembedding is tied, so poisoned rows are compared by their hidden states, not by their logits.
        wanted = batch["loss_mask"] != 0
        hidden = token_logprobs.packed_forward(ids, wanted, batch["loss_mask"].int().argmax(1))
        again = token_logprobs.packed_forward(batch["input_ids"], wanted, batch["loss_mask"].int().argmax(1))
        for row in kept:
            assert torch.equal(hidden.states[hidden.rows == row], again.states[again.rows == row])
    assert before.isfinite().all()


def test_shared_prompt_is_computed_once(tokenizer: Any) -> None:
    model = model_of("qwen3", tokenizer)
    token_logprobs = TokenLogprobs(model, max_tokens_per_batch=50)
    token_logprobs.packed_forward.check(64)
    sizes: list[int] = []
    plain_forward = model.model.forward
    model.model.forward = lambda *a, **kw: sizes.append(kw["input_ids"].numel()) or plain_forward(*a, **kw)
    batch = rows_of((20, (5, 5, 5, 5)), (10, (4, 6)), (7, (9,)))
    token_logprobs(batch["input_ids"], batch["loss_mask"])
    # The last token of a response is predicted, but is not an input.
    assert sum(sizes) == (20 + 4 * 4) + (10 + 3 + 5) + (7 + 8)
    assert max(sizes) <= 50


def test_groups_are_within_the_budget() -> None:
    trees = [SharedPrefix((i,), n, (0,)) for i, n in enumerate((70, 3, 9, 40, 12))] + [
        SharedPrefix((5, 6, 7), 10, (20, 5, 15))
    ]
    groups = group_by_token_budget(trees, 32)
    assert sorted(row for group in groups for tree in group for row in tree.rows) == list(range(8))
    for group in groups:
        assert sum(tree.tokens for tree in group) <= 32 or [tree.rows for tree in group] in ([(0,)], [(3,)])


def test_rows_with_equal_prefixes_form_trees() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 0], [1, 9, 3, 4], [1, 2, 3, 4]])
    trees = find_shared_prefixes(ids, [2, 2, 2, 0], [4, 3, 4, 4])
    assert trees == [SharedPrefix((0, 1), 2, (2, 1)), SharedPrefix((2,), 4, (0,)), SharedPrefix((3,), 4, (0,))]
    assert all(len(tree.rows) == 1 for tree in find_shared_prefixes(ids, [2] * 4, [4] * 4, share=False))
    assert find_shared_prefixes(ids, [2] * 4, [0, 0, 4, 0]) == [SharedPrefix((2,), 4, (0,))]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_mask(window: int | None) -> None:
    trees = [SharedPrefix((0, 1), 3, (2, 1)), SharedPrefix((2,), 4, (0,))]
    layout = PackedLayout(trees, torch.device("cpu"))
    tokens = [(t, b, p) for t, b, p in zip(layout._tree, layout._branch, layout.columns, strict=True)]
    n = len(tokens)
    places = torch.arange(n)
    found = layout.allowed(places[:, None], places[None], window)
    for i, (tree, branch, position) in enumerate(tokens):
        for j, (other, its, where) in enumerate(tokens):
            allowed = tree == other and its in (0, branch) and 0 <= position - where < (window or n)
            assert bool(found[i, j]) == bool(allowed)
    assert torch.equal(layout.prefix_mask(0, window, torch.bool), found[:3, :3])
    assert torch.equal(layout.branch_mask(0, window, torch.bool), found[3:5, :5])
    bias = layout.branch_mask(0, window, torch.bfloat16)
    assert torch.equal(bias.exp(), found[3:5, :5].to(torch.bfloat16))
    assert layout.branch_mask(0, window, torch.bfloat16) is bias, "one for all layers"


# -- logits to log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logprobs_and_entropy_equal_those_of_autograd(
    temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(7, 50, generator=generator, dtype=torch.float64)).to(device, dtype)
    targets = torch.randint(50, (7,), generator=generator).to(device)
    targets[0] = logits[0].argmax()
    weights = torch.randn(2, 7, generator=generator, dtype=torch.float64).to(device)

    reference = logits.double().clone().requires_grad_()
    logp = (reference / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, targets[:, None])[:, 0]
    (weights[0] @ chosen + weights[1] @ entropy).backward()

    leaf = logits.clone().requires_grad_()
    found, found_entropy, correct = TokenLogprobsFunction.apply(leaf * 1.0, targets, temperature, True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), chosen.detach(), rtol=1e-5, atol=max(tolerance, 1e-12))
    torch.testing.assert_close(found_entropy.double(), entropy.detach(), rtol=1e-5, atol=max(tolerance, 1e-12))
    assert torch.equal(correct, (logits.argmax(-1) == targets).to(correct.dtype))
    (weights[0].to(found.dtype) @ found + weights[1].to(found.dtype) @ found_entropy).backward()
    torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=0, atol=tolerance)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[0.0, 300.0, -300.0]]).expand(3, 3).clone().requires_grad_()
    found, _, _ = TokenLogprobsFunction.apply(logits * 1.0, torch.tensor([0, 1, 2]), 1.0, False)
    assert found.tolist() == [-300.0, 0.0, -600.0]
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_memory_for_backward_does_not_grow_with_the_vocabulary(tokenizer: Any) -> None:
    def kept(vocabulary: int) -> int:
        model = build_model(tokenizer, vocab_size=vocabulary)
        token_logprobs = TokenLogprobs(model, logit_bytes=4 * vocabulary)
        batch = rows_of((4, (60, 60)))
        token_logprobs.packed_forward.check(64)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = token_logprobs(batch["input_ids"], batch["loss_mask"])
        output.logprobs.sum().backward()
        # The storage of the tied weight belongs to the model; it is not an activation.
        weight = model.get_input_embeddings().weight
        return sum(size for pointer, size in sizes.items() if pointer != weight.untyped_storage().data_ptr())

    assert kept(8000) <= kept(1000) * 1.05


# -- options that must not change results -----------------------------------------------------------------------------


def module_of(kind: str, base: str, **options: Any) -> tuple[Any, Any]:
    from rlhf_lightning import PreferenceDataModule, PromptDataModule, SFTDataModule

    options.setdefault("optimizer", sgd(0.1))
    if kind == "sft":
        return SFTModule(base, **options), SFTDataModule(chats(8), batch_size=4, seed=1)
    if kind == "policy":
        module = PolicyRLModule(base, rewards=[FunctionReward(vowels)], sampler=Sampler(max_tokens=6), **options)
        return module, PromptDataModule(prompts(4), prompts_per_round=2, group_size=3, seed=1)
    scorer = ImplicitReward(beta=0.5) if kind == "dpo" else RewardHead()
    return PreferenceModule(base, scorer=scorer, **options), PreferenceDataModule(pairs(8), batch_size=4, seed=1)


def trained(kind: str, base: str, root: Any, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    flags = {"precision": options.pop("precision")} if "precision" in options else {}
    module, data = module_of(kind, base, **options)
    trainer(root, **flags).fit(module, data)
    return {name: value.detach().clone() for name, value in module.state_dict().items() if "metric" not in name}


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "policy"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"max_tokens_per_batch": 16},
        {"gradient_checkpointing": True, "lora": LoRA(rank=2)},
    ],
)
def test_computation_settings_do_not_change_the_trained_weights(
    kind: str, options: dict[str, Any], base: str, tmp_path: Any
) -> None:
    same = {"lora": options["lora"]} if "lora" in options else {}
    wanted = trained(kind, base, tmp_path, **same)
    found = trained(kind, base, tmp_path, **options)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def compiling() -> Iterator[None]:
    """Compilation as in a new process: an earlier test may have left a sampling generator open, which turns it off."""
    torch.compiler.reset()
    with torch.compiler.set_stance("default"):
        yield


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("sft", "aot_eager"),
        pytest.param("policy", "aot_eager", marks=pytest.mark.slow),
        pytest.param("sft", "inductor", marks=pytest.mark.slow),
        pytest.param("policy", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_give_the_same_weights(
    kind: str, backend: str, base: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Generating and building C++ takes most of a minute; the fast cases skip it.
    monkeypatch.setattr("rlhf_lightning.modules.base.compile_layers", partial(compile_layers, backend=backend))
    wanted, found = trained(kind, base, tmp_path), trained(kind, base, tmp_path, compile=True)
    assert wanted.keys() == found.keys(), "compiling must not rename weights"
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("compiling")
def test_rows_of_new_lengths_compile_nothing_after_two_steps(
    base: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.testing import CompileCounter

    from rlhf_lightning import SFTDataModule

    class Graphs(pl.Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []
            self.tokens: set[int] = set()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.counts.append(counter.frame_count)
            self.tokens.add(int(batch["lengths"].sum()))

    counter, graphs = CompileCounter(), Graphs()
    monkeypatch.setattr("rlhf_lightning.modules.base.compile_layers", partial(compile_layers, backend=counter))
    module = SFTModule(base, compile=True)
    caplog.set_level(logging.INFO, "rlhf_lightning")
    trainer(tmp_path, max_steps=6, callbacks=[graphs]).fit(module, SFTDataModule(chats(12), batch_size=2))
    assert len(graphs.tokens) > 3
    assert counter.frame_count > 0
    assert graphs.counts[1:] == [counter.frame_count] * 5
    logged = [message.partition(" s of ")[2] for message in caplog.messages if "went into compiling" in message]
    assert logged[0] == "step 1 went into compiling"
    assert len(logged) <= 2


@pytest.mark.usefixtures("compiling")
def test_another_thread_does_not_turn_compilation_off() -> None:
    """The switch is that of all threads; a sampling thread and the main one would overwrite each other's."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    function, x = torch.compile(lambda x: x + 1, backend=counter), torch.zeros(2)
    entered, done = threading.Event(), threading.Event()

    def sample() -> None:
        with uncompiled():
            entered.set()
            done.wait(60)

    thread = threading.Thread(target=sample)
    thread.start()
    assert entered.wait(60)
    function(x)
    done.set()
    thread.join()
    assert counter.frame_count == 1
    with uncompiled():
        function(torch.zeros(2, 2))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("compiling")
def test_layers_run_uncompiled_without_a_compiler(
    base: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    wanted = trained("sft", base, tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        found = trained("sft", base, tmp_path, compile=True)
    assert [record for record in caplog.messages if "the layers run uncompiled" in record and "g++" in record]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_bf16_loss_is_near_that_of_fp32(kind: str, base: str, tmp_path: Any) -> None:
    wanted, found = trained(kind, base, tmp_path), trained(kind, base, tmp_path, precision="bf16-mixed")
    start = module_of(kind, base)[0]
    torch.manual_seed(0)
    start.configure_model()
    before = start.state_dict()
    moved = torch.stack([(wanted[name] - before[name]).norm() for name in wanted if name in before]).norm()
    apart = torch.stack([(wanted[name] - found[name]).norm() for name in wanted if name in before]).norm()
    assert 0 < apart < 0.1 * moved


def test_dpo_starts_at_the_reference_and_improves(base: str, tmp_path: Any) -> None:
    from rlhf_lightning import PreferenceDataModule
    from rlhf_lightning.callbacks.export import ExportModel
    from rlhf_lightning.models.reward_model import RewardModel

    module = PreferenceModule(base, scorer=ImplicitReward(beta=0.5), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    module.configure_model()
    texts = [row["prompt"] for row in pairs(6)], [row["chosen"] for row in pairs(6)]
    assert module.score(*texts).abs().max() == 0
    run = trainer(tmp_path, max_epochs=6, callbacks=[ExportModel()])
    run.fit(module, PreferenceDataModule(pairs(24), pairs(6), batch_size=4, seed=1))
    found = run.validate(module, PreferenceDataModule(pairs(24), pairs(6), batch_size=4), verbose=False)[0]
    assert found["val/accuracy"] == 1.0
    # The saved folder is an ordinary causal model; with the start model as reference, it gives the same reward.
    saved = RewardModel(str(tmp_path / "model"))
    torch.testing.assert_close(saved.score(*texts), module.score(*texts).detach(), rtol=1e-4, atol=1e-4)


def test_reference_from_a_folder_has_no_dropout(base: str, tokenizer: Any, tmp_path: Any) -> None:
    build_model(tokenizer, attention_dropout=0.5).save_pretrained(tmp_path / "start")
    module = PreferenceModule(base, scorer=ImplicitReward(reference=str(tmp_path / "start")))
    module.configure_model()
    module.train()
    batch = rows_of(*CASES["pairs"])
    batch["input_ids"] %= len(tokenizer)
    with torch.no_grad():
        assert torch.equal(module.model_scorer(batch), module.model_scorer(batch))


def test_row_with_one_token_has_no_scored_token(tokenizer: Any) -> None:
    token_logprobs = TokenLogprobs(model_of("qwen3", tokenizer))
    output = token_logprobs(torch.tensor([[5], [6]]), torch.ones(2, 1), details=True)
    assert output.logprobs.tolist() == [[0.0], [0.0]]


def test_weights_for_an_external_engine_are_merged(tokenizer: Any) -> None:
    """A tied head with its own adapter follows the embeddings, with its update."""
    from rlhf_lightning.models.loading import Start
    from rlhf_lightning.models.lora import named_weights

    model = Start(model_of("qwen3", tokenizer), lora=LoRA(rank=2, target=["all"])).load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    other = model_of("qwen3", tokenizer, tie_word_embeddings=False).eval()
    missing, unexpected = other.load_state_dict(dict(named_weights(model)), strict=False)
    assert not missing
    assert not unexpected
    torch.testing.assert_close(other(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


# -- the sampler's protocol -------------------------------------------------------------------------------------------


def _serve(connection: Any) -> None:
    """An engine in another process, which has only the weights that were sent to it."""
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from rlhf_lightning.generation.local_engine import LocalEngine

    model = AutoModelForCausalLM.from_pretrained(connection.recv())
    decode = {}.get
    while (request := connection.recv()) is not None:
        if request[0] == "sync":
            missing, unexpected = model.load_state_dict(request[1], strict=False)
            connection.send((list(missing), list(unexpected)))
        else:
            connection.send(LocalEngine(model, decode).generate(*request[1:]))


class Elsewhere:
    """Calls an engine in another process."""

    def __init__(self, folder: str) -> None:
        self.connection, there = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        self.connection.send(folder)
        self.versions: list[int] = []

    def _ask(self, *request: Any) -> Any:
        self.connection.send(request)
        assert self.connection.poll(120)
        return self.connection.recv()

    def sync(self, named_tensors: Any, version: int) -> None:
        missing, unexpected = self._ask("sync", dict(named_tensors))
        assert not unexpected
        assert all("lm_head" in name for name in missing)  # tied
        self.versions.append(version)

    def generate(self, prompt_ids: Any, params: Any, seeds: Any) -> Any:
        return self._ask("generate", prompt_ids, params, seeds)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["attention", "mlp"])])
def test_external_engine_replaces_the_local_one(lora: Any, base: str, tmp_path: Any) -> None:
    from rlhf_lightning import PromptDataModule

    results = []
    engine = Elsewhere(base)
    for there in (None, engine):
        torch.manual_seed(0)
        module = PolicyRLModule(
            base,
            lora=lora,
            rewards=[FunctionReward(vowels)],
            sampler=Sampler(max_tokens=6, engine=there),
            optimizer=sgd(0.1),
        )
        trainer(tmp_path).fit(module, PromptDataModule(prompts(6), prompts_per_round=2, group_size=3, seed=1))
        results.append(module.last_episodes)
    engine.connection.send(None)
    assert engine.versions == [0, 1, 2]
    for ours, theirs in zip(*results, strict=True):
        assert ours.training_samples[0].ids == theirs.training_samples[0].ids
        assert ours.training_samples[0].sampling_logprobs == pytest.approx(
            theirs.training_samples[0].sampling_logprobs, abs=1e-4
        )


def test_long_rows_do_not_change_the_frequencies_of_short_ones(tokenizer: Any) -> None:
    """With LongRoPE (Phi), transformers chooses the frequencies by the longest row of a batch."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    model = build_model(
        tokenizer, architecture="phi3", rope_parameters=rope, original_max_position_embeddings=16, sliding_window=None
    ).double()
    batch = rows_of((3, (4, 20, 13)), (2, (14, 16)))
    with torch.no_grad():
        found = TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs
        torch.testing.assert_close(found, plain(model, batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_beyond_the_context(architecture: str, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    size = {"n_positions": 16} if architecture == "gpt2" else {"max_position_embeddings": 16}
    token_logprobs = TokenLogprobs(build_model(tokenizer, architecture=architecture, **size))
    inside, beyond = rows_of((6, (11, 2))), rows_of((6, (12, 2)))
    token_logprobs(inside["input_ids"], inside["loss_mask"])
    if architecture == "gpt2":
        with pytest.raises(ConfigError, match="a row needs 17 positions, but GPT2LMHeadModel has only 16"):
            token_logprobs(beyond["input_ids"], beyond["loss_mask"])
    else:
        for _ in range(2):
            token_logprobs(beyond["input_ids"], beyond["loss_mask"])
    assert caplog.text.count("LlamaForCausalLM was made for 16 positions") == (architecture == "llama")
