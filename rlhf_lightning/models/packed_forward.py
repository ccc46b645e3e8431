"""The forward pass: computes the hidden states of requested positions without padding and repeated prefixes."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.models import fused_layers, last_layer, liger
from rlhf_lightning.models.attention import install, installed, uninstall
from rlhf_lightning.models.backbone import in_mode
from rlhf_lightning.models.compiled_layers import uncompiled
from rlhf_lightning.models.lora import base_of, is_quantized
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix, find_shared_prefixes, group_by_token_budget
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.projection import LayerWeights
from rlhf_lightning.models.sharding import (
    full_tensor,
    is_sharded,
    layers_of,
    max_over_ranks,
    run_unsharded,
    runs_unsharded,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


log = logging.getLogger(__name__)
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Default number of tokens computed at once; on a CPU, the number that fits into its caches (benchmarks/sharing.py)."""
LONG = 2048
"""Rows above this number of tokens are checked at the next multiple of its half."""
GRADIENT_TOKENS = 256
"""Length in tokens up to which gradients are compared. At 1,024, this took more memory than a training step."""
_CHECK_ROWS = 4
"""Number of rows that are compared."""
PACKED_CHECK = 1.5
"""Number of tokens of the compared rows when they are packed, per token of the longest."""
KEPT = 0.75
"""Largest fraction of positions for which the last layer leaves out the others."""
_POSITIONS = re.compile(r"pos|wpe", re.IGNORECASE)
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
"""Exceptions of models that do not support packed rows."""


class Hidden(NamedTuple):
    """Last hidden states of wanted positions, in any order.

    Attributes:
        states: `[n, H]`.
        rows: Row of each position in the batch, `[n]`.
        columns: Column of each position in the batch, `[n]`.

    Example:
        >>> hidden = Hidden(torch.zeros(2, 8), rows=torch.tensor([0, 1]), columns=torch.tensor([3, 5]))
        >>> hidden.states.shape
        torch.Size([2, 8])
    """

    states: Tensor
    rows: Tensor
    columns: Tensor


class PackedForward:
    """Runs a model's decoder on packed rows, computing shared prefixes once.

    The results of packed rows are compared numerically with those of plain rows. A model for which they differ (with
    recurrent layers, biases by index, or an attention other than transformers' own) runs right-padded rows of similar
    length instead, and logs this.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.
        decoder: The part of the model that computes hidden states.
        max_tokens_per_batch: Largest number of tokens computed at once; by default 2,048 on a CPU, 16,384 elsewhere.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        forward = PackedForward(model, model.get_decoder())
        hidden = forward(input_ids, wanted=loss_mask.bool(), prefixes=prefix_lengths(loss_mask))
        ```
    """

    def __init__(
        self, model: "PreTrainedModel | PeftModel", decoder: nn.Module, max_tokens_per_batch: int | None = None
    ) -> None:
        self.model, self.decoder, self.max_tokens_per_batch = model, decoder, max_tokens_per_batch
        self.config = base_of(model).config.get_text_config()
        self.saving: Callable[[], AbstractContextManager[None]] = nullcontext
        """Context manager in which the model runs; it determines where activations for backward are stored."""
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        """Number of positions that the model was made for; None if it has no limit."""
        self._switch = _frequency_switch(self.config)
        self._exceeded = False
        self.gradient_tokens = GRADIENT_TOKENS
        """Length in tokens up to which `check` compares gradients."""
        self._checked = {False: 0, True: 0}
        """Length in tokens up to which packed rows were compared, without and with gradients."""
        layers = layers_of(model)
        self._last = layers[-1] if layers else None
        """The last decoder layer, which computes only wanted positions; None if it computes all."""
        if self._last is not None:
            last_layer.install(self._last)
        self._fuses = fused_layers.install(model)
        """True if layers are fused, which happens under autocast to bfloat16 on a CPU."""
        # Compare immediately on a few tokens, because an attention that cannot be replaced must not stay replaced.
        if install(self.config):
            self._compare(16, gradients=False)

    @property
    def packs(self) -> bool:
        """True if rows are packed and prompts are shared."""
        return installed(self.config)

    @property
    def checked_length(self) -> int:
        """Number of tokens up to which `check` has compared rows without gradients."""
        return self._checked[False]

    def __call__(self, input_ids: Tensor, wanted: Tensor, prefixes: Tensor) -> Hidden:
        """Compute hidden states where `wanted` is True.

        Args:
            input_ids: Right-padded, `[N, T]`.
            wanted: Positions to return, bool `[N, T]`.
            prefixes: Number of leading tokens of each row that are computed once for all rows that share them, `[N]`.

        Returns:
            The hidden states and their positions.

        Raises:
            ConfigError: If a row is longer than the model's table of positions.
        """
        wanted = wanted.cpu()
        columns = torch.arange(1, wanted.shape[1] + 1)
        ends = (wanted * columns).amax(1)
        self._check_context(int(ends.max()))
        self.check(max_over_ranks(int(ends.max()), self.model))
        trees = find_shared_prefixes(input_ids, prefixes.tolist(), ends.tolist(), share=self.packs)
        budget = self.budget(input_ids.device)
        run = self._packed if self.packs else self._padded
        # Rows beyond the switch are computed apart, because they would change the frequencies of the others.
        beyond = [tree.prefix + max(tree.branches) > self._switch for tree in trees]
        sides = [[tree for tree, far in zip(trees, beyond, strict=True) if far is side] for side in (False, True)]
        groups = [group for side in sides for group in group_by_token_budget(side, budget)]
        spare = max_over_ranks(len(groups), self.model) - len(groups)
        weights = self._layer_weights()
        with self.saving():
            parts = [run(input_ids, wanted, group, weights) for group in groups]
        states, rows, numbers = (torch.cat(part) for part in zip(*parts, strict=True))
        for _ in range(spare):
            # Ranks must run a sharded model equally often, including backward, so this adds a term of value 0.
            states = states + 0.0 * self.decoder(input_ids=input_ids[:1, :1], use_cache=False)[0].sum()
        return Hidden(states, rows, numbers)

    def _check_context(self, length: int) -> None:
        """Refuse rows without a position in the model's table; warn once about rows beyond the model's context."""
        if self.context is None or length <= self.context:
            return
        if any(
            isinstance(module, nn.Embedding) and _POSITIONS.search(name.rpartition(".")[2])
            for name, module in self.decoder.named_modules()
        ):
            raise ConfigError(
                f"a row needs {length} positions, but {type(base_of(self.model)).__name__} has only {self.context}; "
                "shorten the rows (data.max_length)"
            )
        if not self._exceeded:
            self._exceeded = True
            log.warning(
                "a row needs %d positions, but %s was made for %d positions, so its results beyond are unreliable; "
                "shorten the rows (data.max_length)",
                length,
                type(base_of(self.model)).__name__,
                self.context,
            )

    def budget(self, device: torch.device) -> int:
        """Number of tokens computed at once on a device."""
        return self.max_tokens_per_batch or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)

    def _can_fuse(self) -> bool:
        """True if fused layers can run: of weights that autocast rounds, and without hooks, dropout and compilation."""
        wide = next(iter(self.model.parameters())).dtype not in NARROW
        return self._fuses and self.packs and wide and fused_layers.runs(self.model)

    def _layer_weights(self) -> LayerWeights | None:
        """Weights of fused layers, which all token groups share; None if the layers' own modules run."""
        if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        return LayerWeights(torch.bfloat16) if self._can_fuse() else None

    @property
    def copied_bytes(self) -> int:
        """Bytes of the rounded weights that a step keeps for fused layers; autograd does not count them as saved."""
        weights = self._layer_weights()
        counts = (p.numel() for layer in layers_of(self.model) for p in layer.parameters())
        return 0 if weights is None else sum(counts) * weights.dtype.itemsize

    def _packed(
        self, input_ids: Tensor, wanted: Tensor, trees: list[SharedPrefix], weights: LayerWeights | None = None
    ) -> Hidden:
        """Hidden states of a group of trees, as one packed row."""
        layout = PackedLayout(trees, input_ids.device)
        layout.weights = weights
        places, rows, columns = layout.places(wanted)
        if self._reduces_last_layer(input_ids.device) and len(kept := places.unique()) <= KEPT * len(layout.rows):
            layout.kept, places = kept, torch.searchsorted(kept, places)
        states = self.decoder(
            input_ids=input_ids[layout.rows, layout.columns][None],
            position_ids=layout.columns[None],
            # A mask of four dimensions is passed through unchanged; the layout determines the attention.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            layout=layout,
        )[0][0]
        return Hidden(states[places], rows, columns)

    def _reduces_last_layer(self, device: torch.device) -> bool:
        """True if the last layer computes only wanted positions: neither on a GPU, sharded nor compiled."""
        last = self._last
        return last is not None and device.type == "cpu" and not is_sharded(self.model) and not _is_compiled(last)

    def _padded(
        self, input_ids: Tensor, wanted: Tensor, trees: list[SharedPrefix], weights: LayerWeights | None = None
    ) -> Hidden:
        """Hidden states of a group of right-padded rows, without sharing."""
        numbers = torch.tensor([tree.rows[0] for tree in trees])
        width = max(tree.tokens for tree in trees)
        # No mask is needed: a causal model never attends to padding on the right.
        states = self.decoder(input_ids=input_ids[numbers.to(input_ids.device), :width], use_cache=False)[0]
        places, columns = (part.to(states.device) for part in wanted[numbers, :width].nonzero(as_tuple=True))
        return Hidden(states[places, columns], numbers.to(states.device)[places], columns)

    # -- numerical check ------------------------------------------------------------------------------------------

    def check(self, length: int) -> None:
        """Compare packed with plain rows of up to `length` tokens, once; stop packing if they differ.

        Likewise, kernels of liger-kernel are compared with the model's own modules, and are not used before.

        Values are compared at the next power of two, from `LONG` on at the next multiple of its half, so that this
        happens only a few times. If gradients are on, they are compared, too, at up to `gradient_tokens` tokens,
        because this takes memory as a training step does.

        Args:
            length: Longest row of the batch, in tokens.
        """
        # Not within a forward pass of a sharded model: a backward pass would reshard weights that are still needed.
        gradients = torch.is_grad_enabled() and not runs_unsharded(self.model)
        if length <= self._checked[gradients] or not self._has_shortcuts:
            return
        size = max(16, 1 << (length - 1).bit_length())
        if size > LONG:  # twice the length would take four times the memory of a mask
            size = LONG // 2 * -(-length // (LONG // 2))
        # A model with learned positions has no positions beyond its table.
        size = min(size, self.context or size)
        if length > self._checked[False]:
            self._compare(size, gradients=False)
        self._checked[False] = self._checked[gradients] = max(length, size)
        if gradients and self._has_shortcuts:
            self._compare(min(size, self.gradient_tokens), gradients=True)

    @property
    def _has_shortcuts(self) -> bool:
        return self.packs or liger.kernels_of(self.model) is not None

    def _compare(self, length: int, gradients: bool) -> None:
        """Stop using a shortcut whose results fail or differ by more than rounding."""
        name, device = type(base_of(self.model)).__name__, next(iter(self.model.parameters())).device
        # First, because the other comparisons run the kernels, too.
        if kernels := liger.kernels_of(self.model):
            compare = partial(self._kernel_difference, kernels)
            if reason := self._failure(compare, length, gradients, liger.failures()):
                liger.reject(self.model, reason)
            kernels.on = reason is None
        if not self.packs:
            return
        if reason := self._failure(self._packing_difference, length, gradients):
            uninstall(self.config)
            log.info("%s cannot run packed rows (%s); using padded rows without shared prompts", name, reason)
            return
        if self._reduces_last_layer(device) and (
            reason := self._failure(self._last_layer_difference, length, gradients)
        ):
            self._last = None
            log.info("the last layer of %s computes all positions, also those without a use (%s)", name, reason)
        if self._can_fuse() and (reason := self._failure(self._fusion_difference, length, gradients)):
            self._fuses = False
            log.info("the layers of %s run their own modules, which is slower (%s)", name, reason)

    def _failure(
        self,
        compare: Callable[[int, bool], float],
        length: int,
        gradients: bool,
        failures: tuple[type[Exception], ...] = FAILURES,
    ) -> str | None:
        """The reason why results differ by more than rounding; None if they do not."""
        try:
            difference = compare(length, gradients)
        except torch.OutOfMemoryError:
            raise
        except failures as error:
            return first_line(error)
        if difference <= tolerance(self.model, gradients):
            return None
        return f"relative difference {difference:.1e} at {length} tokens"

    def _packing_difference(self, length: int, gradients: bool) -> float:
        """Largest relative difference of packed from plain rows, of hidden states and optionally gradients."""
        ids, wanted, shared = self._check_rows(length)
        ends = wanted.sum(1).tolist()
        # Row by row, because the graphs of all rows would take more memory than that of the packed ones.
        plain = ([SharedPrefix((row,), end, (0,))] for row, end in enumerate(ends))
        with _exact_mode(self.model, ids.device, gradients):
            return self._difference(
                (run_unsharded(self.model, self._padded, ids, wanted, trees) for trees in plain),
                (run_unsharded(self.model, self._packed, ids, wanted, trees) for trees in [shared]),
                length,
            )

    def _kernel_difference(self, kernels: liger.Kernels, length: int, gradients: bool) -> float:
        """The same of plain rows computed with liger-kernel, from the model's own modules."""
        ids, wanted, _ = self._check_rows(length)

        def plain(on: bool) -> Iterator[Hidden]:
            with liger.switched(kernels, on):
                for row, end in enumerate(wanted.sum(1).tolist()):
                    trees = [SharedPrefix((row,), end, (0,))]
                    yield run_unsharded(self.model, self._padded, ids, wanted, trees)

        with _exact_mode(self.model, ids.device, gradients):
            return self._difference(plain(False), plain(True), length)

    def _last_layer_difference(self, length: int, gradients: bool) -> float:
        """The same of packed rows whose last layer computes wanted positions only, from all positions."""
        ids, wanted, shared = self._check_rows(length)
        wanted &= torch.arange(length) % 3 == 2
        last = self._last

        def packed(layer: nn.Module | None) -> Iterator[Hidden]:
            self._last = layer
            yield self._packed(ids, wanted, shared)

        with _exact_mode(self.model, ids.device, gradients):
            return self._difference(packed(None), packed(last), length)

    def _fusion_difference(self, length: int, gradients: bool) -> float:
        """The same of packed rows of fused layers, from the layers' own modules."""
        ids, wanted, shared = self._check_rows(length)
        weights = LayerWeights(next(iter(self.model.parameters())).dtype)
        with _exact_mode(self.model, ids.device, gradients):
            own, fused = ((self._packed(ids, wanted, shared, way) for way in ways) for ways in ([None], [weights]))
            return self._difference(own, fused, length)

    def _check_rows(self, length: int) -> tuple[Tensor, Tensor, list[SharedPrefix]]:
        """Random rows of up to `length` tokens, the positions of their tokens, and the prefixes that they share."""
        weight = next(iter(self.model.parameters()))
        generator = torch.Generator().manual_seed(length)
        vocabulary = base_of(self.model).get_input_embeddings().weight.shape[0]
        # An unrelated row, then a prefix with a long, a short and an empty branch.
        ids = torch.randint(0, vocabulary, (_CHECK_ROWS, length), generator=generator)
        prefix = max(1, length // 2)
        ids[2:, :prefix] = ids[1, :prefix]
        ends = [length // 3 + 1, length, min(length, prefix + length // 8 + 1), prefix]
        wanted = torch.arange(length) < torch.tensor(ends)[:, None]
        branches = tuple(end - prefix for end in ends[1:])
        return (
            ids.to(weight.device),
            wanted,
            [SharedPrefix((0,), ends[0], (0,)), SharedPrefix((1, 2, 3), prefix, branches)],
        )

    def _difference(self, right: Iterable[Hidden], found: Iterable[Hidden], length: int) -> float:
        """Largest relative difference of hidden states, and of the gradients of a random projection of them."""
        gradients: list[Tensor] = []
        states = self._states(right, length, gradients, 1.0)
        norms = [tensor.norm() for tensor in (states, *gradients)]
        scale = 1e-3 * torch.stack(norms[1:]).norm() if gradients else 0.0
        # Subtracted at once, because those of both ways and of a backward pass would be three copies of the gradients.
        states -= self._states(found, length, gradients, -1.0)
        differences = [a.norm() / (norm + scale) for a, norm in zip((states, *gradients), norms, strict=True)]
        return float(torch.stack(differences).nan_to_num(torch.inf).max())

    def _states(self, parts: Iterable[Hidden], length: int, gradients: list[Tensor], factor: float) -> Tensor:
        """Hidden states in batch order; adds their gradients, times a factor, to a list that may still be empty."""
        states: list[Tensor] = []
        order: list[Tensor] = []
        for hidden in parts:
            states.append(hidden.states.detach().float())
            order.append(hidden.rows * length + hidden.columns)
            if hidden.states.requires_grad:
                generator = torch.Generator().manual_seed(length)
                direction = torch.randn(_CHECK_ROWS, length, states[0].shape[-1], generator=generator)
                direction = direction[hidden.rows.cpu(), hidden.columns.cpu()].to(hidden.states.device)
                found = _gradients(self.model, (hidden.states.float() * direction).sum())
                gradients += [torch.zeros_like(gradient) for gradient in found] if not gradients else []
                for total, gradient in zip(gradients, found, strict=True):
                    total.add_(gradient, alpha=factor)
        return torch.cat(states)[torch.cat(order).argsort()]


def _frequency_switch(config: "PretrainedConfig") -> float:
    """Length beyond which LongRoPE uses other frequencies for all rows of a batch; infinite for other models."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # of all layers, or by type of layer
    return min(
        (part["original_max_position_embeddings"] for part in kinds if part.get("rope_type") == "longrope"),
        default=math.inf,
    )


def _gradients(model: nn.Module, total: Tensor) -> list[Tensor]:
    """Gradients of `total` by the trained weights that it depends on; `grad` is left unchanged."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not is_sharded(model):
        found = torch.autograd.grad(total, trained, allow_unused=True)
        return [gradient.float() for gradient in found if gradient is not None]
    # Sharded weights receive gradients only in `grad`, through backward.
    before = [p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    total.backward()
    split_ones = [p.grad for p in trained if p.grad is not None]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    return [full_tensor(gradient).float() for gradient in split_ones]


def tolerance(model: nn.Module, gradients: bool) -> float:
    """Relative difference that rounding can explain.

    Rounding to bfloat16 in 30 layers makes gradients of short rows differ by more than 0.1 (SmolLM2-135M: 0.13 at 16
    tokens, 0.04 at 64), while hidden states differ by 0.01. One wrong token changes gradients by 1 and states by 0.2.

    Args:
        model: The model.
        gradients: True for gradients, False for hidden states.
    """
    if next(iter(model.parameters())).dtype in NARROW or is_quantized(model):
        return 0.3 if gradients else 0.1
    return 1e-3


def _is_compiled(layer: nn.Module) -> bool:
    return getattr(layer, "_compiled_call_impl", None) is not None


@contextmanager
def _exact_mode(model: nn.Module, device: torch.device, gradients: bool) -> Iterator[None]:
    """Context manager with full precision, no dropout, no compilation, and gradients on or off."""
    with (
        in_mode(model, training=False),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        uncompiled(),
    ):
        yield
