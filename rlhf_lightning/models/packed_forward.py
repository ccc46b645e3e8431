"""The forward: hidden states of the positions that are asked for, and nothing computed that they do not need."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.models.attention import install, installed, uninstall
from rlhf_lightning.models.backbone import evaluating
from rlhf_lightning.models.lora import base_of, is_quantized
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix, find_shared_prefixes, group_by_token_budget
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.sharding import full_tensor, is_sharded, max_over_ranks, run_unsharded, runs_unsharded

log = logging.getLogger(__name__)
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Tokens of a group by default: on a CPU what stays in its caches (benchmarks/sharing.py)."""
GRADIENT_TOKENS = 1024
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
"""How a model fails that is run in a way it was not written for."""


class Hidden(NamedTuple):
    """Last hidden states `[n, H]` of wanted positions, in any order, and the `rows` and `columns` `[n]` they are of."""

    states: Tensor
    rows: Tensor
    columns: Tensor


class PackedForward:
    """Runs the decoder of a model on packed rows, shared prefixes once.

    A model whose packed rows differ from plain ones by numbers (recurrent layers, biases by index, an attention that
    is not transformers' own) runs right-padded rows of like length instead; a log line says so.

    Args:
        model: a Hugging Face model, or peft around one. decoder: the part of it that gives hidden states.
        max_tokens: of a group that is computed at once; by default 2,048 on a CPU, 16,384 elsewhere.
    """

    def __init__(self, model: Any, decoder: Any, max_tokens: int | None = None) -> None:
        self.model, self.decoder, self.max_tokens = model, decoder, max_tokens
        self.config = base_of(model).config.get_text_config()
        self.saving: Callable[[], AbstractContextManager[Any]] = nullcontext
        """In which the model runs: decides what becomes of the activations that backward needs."""
        self._checked = {False: 0, True: 0}
        """Tokens up to which values have been compared, and gradients."""
        # At once, if only for a few tokens: an attention that cannot be replaced must not stay replaced.
        if install(self.config):
            self._compare(16, gradients=False)

    @property
    def packs(self) -> bool:
        """Whether rows are packed and prompts shared."""
        return installed(self.config)

    def __call__(self, input_ids: Tensor, wanted: Tensor, prefixes: Tensor) -> Hidden:
        """Hidden states where `wanted`.

        Args:
            input_ids: right-padded, `[N, T]`. wanted: `[N, T]`, bool. prefixes: `[N]`, tokens at the beginning of each
                row that are computed once where several rows have the same.
        """
        wanted = wanted.cpu()
        columns = torch.arange(1, wanted.shape[1] + 1)
        ends = (wanted * columns).amax(1)
        self.check(max_over_ranks(int(ends.max()), self.model))
        trees = find_shared_prefixes(input_ids, prefixes.tolist(), ends.tolist(), share=self.packs)
        budget = self.budget(input_ids.device)
        run = self._packed if self.packs else self._padded
        groups = group_by_token_budget(trees, budget)
        spare = max_over_ranks(len(groups), self.model) - len(groups)
        with self.saving():
            parts = [run(input_ids, wanted, group) for group in groups]
        states, rows, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
        for _ in range(spare):
            # Where ranks go through the model together: its value is 0, but its backward goes along as well.
            states = states + 0.0 * self.decoder(input_ids=input_ids[:1, :1], use_cache=False)[0].sum()
        return Hidden(states, rows, numbers)

    def budget(self, device: torch.device) -> int:
        """Tokens of a group."""
        return self.max_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)

    def _packed(self, input_ids: Tensor, wanted: Tensor, trees: list[SharedPrefix]) -> Hidden:
        layout = PackedLayout(trees, input_ids.device)
        states = self.decoder(
            input_ids=input_ids[layout.rows, layout.columns][None],
            position_ids=layout.columns[None],
            # Four dimensions: a mask that is taken as it is. The layout says what attends to what.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            layout=layout,
        )[0][0]
        places, rows, columns = layout.places(wanted)
        return Hidden(states[places], rows, columns)

    def _padded(self, input_ids: Tensor, wanted: Tensor, trees: list[SharedPrefix]) -> Hidden:
        numbers = torch.tensor([tree.rows[0] for tree in trees])
        width = max(tree.tokens for tree in trees)
        # No mask: with padding on the right, a causal model never sees it.
        states = self.decoder(input_ids=input_ids[numbers.to(input_ids.device), :width], use_cache=False)[0]
        places, columns = (part.to(states.device) for part in wanted[numbers, :width].nonzero(as_tuple=True))
        return Hidden(states[places, columns], numbers.to(states.device)[places], columns)

    # -- can this model do it? ------------------------------------------------------------------------------------

    def check(self, length: int) -> None:
        """Compare packed with plain rows as long as `length`, once; fall back where they differ.

        Values are compared at that length (rather at the next power of two, so that it is done a few times at most);
        where gradients are on, these too, at no more than `GRADIENT_TOKENS`, since they need the memory of a training
        step.
        """
        # Not in the middle of a forward of what is split: a backward there would give back the weights it runs with.
        gradients = torch.is_grad_enabled() and not runs_unsharded(self.model)
        if not self.packs or length <= self._checked[gradients]:
            return
        size = max(16, 1 << (length - 1).bit_length())
        # A model with a table of positions has none beyond it.
        size = min(size, getattr(self.config, "max_position_embeddings", None) or size)
        if length > self._checked[False]:
            self._compare(size, gradients=False)
        self._checked[False] = self._checked[gradients] = max(length, size)
        if self.packs and gradients:
            self._compare(min(size, GRADIENT_TOKENS), gradients=True)

    def _compare(self, length: int, gradients: bool) -> None:
        try:
            difference = self._difference(length, gradients)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            difference, reason = torch.inf, str(error).strip().splitlines()[0]
        else:
            reason = f"relative difference {difference:.1e} at {length} tokens"
        if difference > tolerance(self.model):
            uninstall(self.config)
            name = type(base_of(self.model)).__name__
            log.info("%s cannot pack rows (%s); it runs padded rows, without sharing prompts", name, reason)

    def _difference(self, length: int, gradients: bool) -> float:
        """The largest relative difference of hidden states, or of these and gradients."""
        weight = next(iter(self.model.parameters()))
        generator = torch.Generator().manual_seed(length)
        vocabulary = base_of(self.model).get_input_embeddings().weight.shape[0]
        # A prefix with a long, a short and an empty branch, and a stranger before it.
        ids = torch.randint(0, vocabulary, (4, length), generator=generator)
        prefix = max(1, length // 2)
        ids[2:, :prefix] = ids[1, :prefix]
        ends = [length // 3 + 1, length, min(length, prefix + length // 8 + 1), prefix]
        ids, wanted = ids.to(weight.device), torch.arange(length) < torch.tensor(ends)[:, None]
        plain = [SharedPrefix((row,), end, (0,)) for row, end in enumerate(ends)]
        shared = [plain[0], SharedPrefix((1, 2, 3), prefix, tuple(end - prefix for end in ends[1:]))]
        with _quiet(self.model, weight.device, gradients):
            packed = self._effects([run_unsharded(self.model, self._packed, ids, wanted, shared)], length)
            apart = self._effects(
                [run_unsharded(self.model, self._padded, ids, wanted, [tree]) for tree in plain], length
            )
        scale = 1e-3 * torch.stack([tensor.norm() for tensor in apart[1:]]).norm() if len(apart) > 1 else 0.0
        differences = [(a - b).norm() / (b.norm() + scale) for a, b in zip(packed, apart, strict=True)]
        return float(torch.stack(differences).nan_to_num(torch.inf).max())

    def _effects(self, parts: list[Hidden], length: int) -> list[Tensor]:
        """Hidden states in the order of the batch, and the gradients of a random direction of theirs."""
        hidden = Hidden(*(torch.cat(part) for part in zip(*parts, strict=True)))
        states = hidden.states.float()[(hidden.rows * length + hidden.columns).argsort()]
        if not states.requires_grad:
            return [states]
        generator = torch.Generator().manual_seed(length)
        direction = torch.randn(states.shape, generator=generator).to(states.device)
        return [states.detach(), *_gradients(self.model, (states * direction).sum())]


def _gradients(model: Any, total: Tensor) -> list[Tensor]:
    """Of `total`, by the weights that are trained and that it depends on; nothing is left in their `grad`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not is_sharded(model):
        found = torch.autograd.grad(total, trained, allow_unused=True)
        return [gradient.float() for gradient in found if gradient is not None]
    # What is split has its gradients handed over to `grad`, in backward only.
    before = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    total.backward()
    split_ones = [p.grad for p in trained if p.grad is not None]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    return [full_tensor(gradient).float() for gradient in split_ones]


def tolerance(model: Any) -> float:
    """A relative difference that rounding explains."""
    coarse = next(iter(model.parameters())).dtype in NARROW or is_quantized(model)
    return 0.1 if coarse else 1e-3


@contextmanager
def _quiet(model: nn.Module, device: torch.device, gradients: bool) -> Iterator[None]:
    """Full precision, no dropout, nothing compiled, gradients on or off; then everything as before."""
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
