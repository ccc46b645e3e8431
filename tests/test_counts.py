"""Amounts of work that do not depend on the machine, counted from outside, so that speed cannot be lost unnoticed.

Expected values are computed from the rows by hand here, not taken from the package.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.training import trainer


class Counts(pl.Callback):
    """Tokens that decoders compute, rows that heads compute and forwards, inside and outside of training steps.

    The first epoch does not count: what can be packed is checked there, once.
    """

    def __init__(self, *, reference: bool = False) -> None:
        self.reference = reference
        self.inside = False

    def on_train_epoch_start(self, *args: Any) -> None:
        self.tokens, self.rows, self.forwards = ({True: 0, False: 0} for _ in range(3))

    def on_train_start(self, trainer: Any, module: Any) -> None:
        model = module.model
        if self.reference:
            model = module.reference.copy
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        head = model.get_output_embeddings() or model.score
        decoder.register_forward_pre_hook(self._decoder, with_kwargs=True)
        head.register_forward_pre_hook(self._head)

    def _decoder(self, decoder: Any, args: Any, kwargs: Any) -> None:
        self.tokens[self.inside] += kwargs["input_ids"].numel()
        self.forwards[self.inside] += 1

    def _head(self, head: Any, args: Any) -> None:
        self.rows[self.inside] += args[0].shape[:-1].numel()

    def on_train_batch_start(self, *args: Any) -> None:
        self.inside = True

    def on_train_batch_end(self, *args: Any) -> None:
        self.inside = False


def branches(sides: list[Any], last: int = 1) -> int:
    """Tokens of responses to one prompt, counting the prompt once; the `last` token of each row predicts nothing."""
    prompt = min(side.loss_mask.index(1) for side in sides)
    return prompt + sum(len(side.ids) - last - prompt for side in sides)


def counted(root: Path, module: Any, data: Any, *callbacks: Counts) -> Any:
    trainer(root, callbacks=list(callbacks), max_epochs=2).fit(module, data)
    return data.prepared["train"].rows


def test_sft_computes_no_padding_and_only_logits_of_trained_tokens(base: str, tmp_path: Path) -> None:
    counts = Counts()
    rows = counted(tmp_path, SFTModule(base), SFTDataModule(chats(7), batch_size=7, show_example=False), counts)
    assert len({row.tokens for row in rows}) > 3
    assert counts.tokens[True] == sum(row.tokens - 1 for row in rows)
    assert counts.rows[True] == sum(sum(row.loss_mask) for row in rows)
    assert counts.forwards == {True: 1, False: 0}


@pytest.mark.parametrize("store", [False, True])
def test_dpo_computes_prompts_once_and_the_reference_once(base: str, tmp_path: Path, store: bool) -> None:
    policy, reference = Counts(), Counts(reference=True)
    module = PreferenceModule(base, ImplicitReward(0.1, store=store))
    data = PreferenceDataModule(pairs(5), batch_size=5, show_example=False)
    rows = counted(tmp_path, module, data, *([policy] if store else [policy, reference]))
    wanted = sum(branches(row.sides) for row in rows)
    assert policy.tokens[True] == wanted
    assert policy.rows[True] == sum(sum(side.loss_mask) for row in rows for side in row.sides)
    assert policy.forwards == {True: 1, False: 0}
    if not store:  # with it the reference has been let go before the first step
        assert reference.tokens[True] == wanted
        assert reference.rows[True] == policy.rows[True]
        assert reference.forwards == {True: 1, False: 0}


def test_reward_model_computes_prompts_once_and_one_score_per_response(base: str, tmp_path: Path) -> None:
    counts = Counts()
    module = PreferenceModule(base, RewardHead())
    rows = counted(tmp_path, module, PreferenceDataModule(pairs(5), batch_size=5, show_example=False), counts)
    assert counts.tokens[True] == sum(branches(row.sides, last=0) for row in rows)
    assert counts.rows[True] == 2 * len(rows)
    assert counts.forwards == {True: 1, False: 0}


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_policy_step_computes_group_prompts_once_and_the_reference_once_per_round(base: str, tmp_path: Path) -> None:
    policy, reference = Counts(), Counts(reference=True)
    module = PolicyRLModule(base, rewards=[FunctionReward(vowels)], kl=KLPenalty(0.1), sampler=Sampler(max_tokens=6))
    data = PromptDataModule(prompts(3), prompts_per_round=3, group_size=4, update_epochs=2, show_example=False)
    counted(tmp_path, module, data, policy, reference)
    groups: dict[int, list[Any]] = {}
    for episode in module.last_episodes:
        groups.setdefault(episode.group, []).append(episode.training_samples[0])
    wanted = sum(branches(group) for group in groups.values())
    sampled = [sum(row.loss_mask) for group in groups.values() for row in group]
    assert len(groups) == 3
    assert policy.forwards[True] == 2  # the epochs
    assert policy.tokens[True] == 2 * wanted
    assert policy.rows[True] == 2 * sum(sampled)
    # A round: the prompts, and a step for each further token of the longest response. Nothing is computed again.
    assert policy.forwards[False] == 1 + (max(sampled) - 1)
    assert reference.forwards == {True: 0, False: 1}
    assert reference.tokens[False] == wanted
    assert reference.rows[False] == sum(sampled)


# -- the sampler --------------------------------------------------------------------------------------------------


def makespan(lengths: list[int], slots: int) -> int:
    """Number of steps if rows take a slot as soon as one is free; a row's first token comes with its prompt."""
    ends = [0] * slots
    for length in lengths:
        ends[ends.index(min(ends))] += length - 1
    return max(ends)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_number_of_generation_steps_with_refilled_slots(model: Any, tokenizer: Any, slots: int) -> None:
    engine = LocalEngine(model, tokenizer.decode, slots=slots)
    prompt, params = [5, 6, 7, 8], SamplingParams(max_tokens=24, stop_token_ids=list(range(0, len(tokenizer), 8)))
    engine.generate([prompt], params, [0])  # the checks of a first call
    steps, step = [], engine.step
    engine.step = lambda *args: steps.append(1) or step(*args)  # type: ignore[method-assign]
    lengths = [len(sample.ids) for sample in engine.generate([prompt] * 8, params, list(range(8)))]
    assert len(set(lengths)) > 2
    assert len(steps) == makespan(lengths, slots)


def test_equal_prompts_are_computed_once(model: Any, tokenizer: Any) -> None:
    engine = LocalEngine(model, tokenizer.decode)
    rows, params = [[5, 6, 7, 8]] * 4 + [[9, 10, 11]] * 3, SamplingParams(max_tokens=1)
    engine.generate(rows, params, list(range(7)))
    tokens: list[int] = []
    hook = engine.backbone.decoder.register_forward_pre_hook(
        lambda part, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    heads: list[int] = []
    other = engine.backbone.lm_head.register_forward_pre_hook(lambda part, args: heads.append(len(args[0])))
    engine.generate(rows, params, list(range(7)))
    hook.remove()
    other.remove()
    assert tokens == [4 + 3]
    assert heads == [2]


class Copies(TorchDispatchMode):
    """Bytes of every tensor of at least `size` bytes that an operation creates, by operation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and not a.is_mkldnn}
        if isinstance(out, torch.Tensor):
            bytes_written = out.numel() * out.element_size()
            fresh = out.untyped_storage().data_ptr() not in inputs or "copy_" in str(func)
            if fresh and bytes_written >= self.size:
                self.found[str(func)] = self.found.get(str(func), 0) + bytes_written
        return out


def test_sampling_step_does_not_copy_the_cache(model: Any, tokenizer: Any) -> None:
    engine = LocalEngine(model, tokenizer.decode)
    rows, length = 4, 200
    made = [[(7 * i + j) % 50 for j in range(length)] for i in range(rows)]
    engine.generate(made, SamplingParams(max_tokens=2), list(range(rows)))
    step, copies, buffers = engine.step, [], []
    config = model.config
    layer = rows * config.num_key_value_heads * length * config.head_dim * 4  # bytes of the keys that are there
    assert layer > 2 * rows * len(tokenizer) * 4  # so that logits are not taken for them

    def watched(cache: Any, tokens: Any) -> Any:
        buffers.append([part.data_ptr() for one in cache.layers for part in (one.keys, one.values)])
        with Copies(layer) as copied:
            logits = step(cache, tokens)
        copies.append(copied.found)
        return logits

    engine.step = watched  # type: ignore[method-assign]
    engine.generate(made, SamplingParams(max_tokens=12), list(range(rows)))
    assert len(copies) == 11
    assert copies == [{}] * 11
    assert all(one == buffers[0] for one in buffers)  # written in place
    with Copies(layer) as control:
        torch.zeros(layer).clone()
    assert control.found


# -- data ---------------------------------------------------------------------------------------------------------


def renders(build: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Templates rendered and texts tokenized to prepare a number of rows."""
    data = build(count)
    data.renderer  # noqa: B018 - what is done once for a template is not counted
    kind = type(data.renderer.tokenizer)
    calls = {"apply_chat_template": 0, "__call__": 0}

    def counting(name: str) -> Any:
        inner = getattr(kind, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return inner(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(kind, name, counting(name))
        data.setup("fit")
    return calls["apply_chat_template"], calls["__call__"]


BUILD = {
    "sft": lambda t, n: SFTDataModule(chats(n), tokenizer=t, show_example=False),
    "preference": lambda t, n: PreferenceDataModule(pairs(n), tokenizer=t, show_example=False),
    "prompts": lambda t, n: PromptDataModule(prompts(n), tokenizer=t, show_example=False),
}


@pytest.mark.parametrize(("kind", "most"), [("sft", (3, 1)), ("preference", (4, 2)), ("prompts", (1, 1))])
def test_number_of_renderings_per_row(
    kind: str, most: tuple[int, int], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each further row: with and without the turn, and its end; one text is tokenized per trained row."""
    few, many = (renders(lambda n: BUILD[kind](tokenizer, n), count, monkeypatch) for count in (4, 10))
    assert tuple(b - a for a, b in zip(few, many, strict=True)) == tuple(6 * number for number in most)


OPENED: dict[str, int] = {}
WATCHED: list[str] = []


def _audit(event: str, args: Any) -> None:
    if WATCHED and event == "open" and str(args[0]) in WATCHED:
        OPENED[str(args[0])] = OPENED.get(str(args[0]), 0) + 1


@contextmanager
def opened(*paths: str) -> Iterator[dict[str, int]]:
    """How often each file is opened in the meantime; an audit hook cannot be removed, so it is installed once."""
    if not hasattr(sys, "_rlhf_counts"):
        sys.addaudithook(_audit)
        sys._rlhf_counts = True  # type: ignore[attr-defined]
    WATCHED[:] = paths
    OPENED.clear()
    try:
        yield OPENED
    finally:
        WATCHED.clear()


def test_file_is_read_once_over_epochs(base: str, tmp_path: Path) -> None:
    train, held = (write_rows(tmp_path / f"{name}.jsonl", chats(4)) for name in ("train", "held"))
    data = SFTDataModule(train, held, batch_size=2, show_example=False)
    with opened(train, held) as found:
        trainer(tmp_path, max_epochs=3).fit(SFTModule(base), data)
    assert found == {train: 1, held: 1}
