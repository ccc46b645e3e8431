"""The memory of a training step: its estimate, and the layers that must be checkpointed to stay below a limit."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from rlhf_lightning.data.preference_rows import PreferenceExample
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.fused_decoder import copied_bytes
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.distillation import Teacher
from rlhf_lightning.models.lora import LoRA, is_quantized
from rlhf_lightning.models.memory import (
    MARGIN,
    OptimizerFactory,
    activation_bytes,
    cache_bytes,
    checkpoint_layers,
    checkpointed_bytes,
    compute_size,
    device_bytes,
    logit_bytes,
    optimizer_bytes,
    parse_bytes,
    separate_layers,
    tensor_bytes,
    trained,
)
from rlhf_lightning.models.offload import placements
from rlhf_lightning.models.packed_forward import GRADIENT_TOKENS, PACKED_CHECK, PackedForward
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.models.token_logprobs import COMPARED, TokenLogprobs
from rlhf_lightning.modules.trainer_state import row_data_of
from rlhf_lightning.modules.usage_checks import CheckedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
FITS = 0.8
"""Fraction of the available memory above which an estimate is shown with advice."""


class StepSizes(NamedTuple):
    """Sizes of the largest micro-batch and of a round; the arguments of `estimate_memory`.

    Attributes:
        tokens: Number of tokens in a micro-batch. The shared prompt of a pair or a group counts once.
        scored: Number of these tokens whose logits are needed; 0 with a reward head.
        rows: Number of rows that the sampler decodes in parallel.
        row_tokens: Maximum number of tokens of such a row.

    Example:
        >>> StepSizes(tokens=4096, scored=1024).rows
        0
    """

    tokens: int
    scored: int
    rows: int = 0
    row_tokens: int = 0


@dataclass
class MemoryUse:
    """Estimated memory on one device, in bytes.

    Attributes:
        weights: Weights of the trained models, frozen backbones included.
        gradients: Gradients of the trained weights.
        optimizer: Optimizer state.
        activations: Activations kept for the backward pass of a step.
        logits: Logits and their gradients in a step.
        available: Memory of the device; None if unknown.

    Example:
        >>> estimate = MemoryUse(4_000_000, 4_000_000, 8_000_000, 0, 2_000_000, 1_000_000)
        >>> estimate.total
        19000000
    """

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    """Reference and reward models that stay on the device."""
    activations: int
    logits: int
    cache: int = 0
    """The sampler's KV cache."""
    copies: int = 0
    """The sampler's copy of the weights; see `FusedDecoder`."""
    visiting: int = 0
    """The largest model that is only temporarily on the device; see `Placement`."""
    buckets: int = 0
    """DDP's copies of the gradients."""
    available: int | None = None
    advice: list[str] = field(default_factory=list)
    """Settings to change if the run does not fit; first those that do not change results."""

    @property
    def permanent(self) -> int:
        """Bytes that are needed whatever the size of a batch."""
        return self.weights + self.gradients + self.buckets + self.optimizer + self.frozen

    @property
    def total(self) -> int:
        """Peak memory in bytes. Training steps and rollouts alternate, so only the larger of the two counts."""
        return self.peak(1.0)

    def peak(self, margin: float) -> int:
        """The total if activations and logits are `margin` times as large as estimated."""
        step = round(margin * (self.activations + self.logits))
        return self.permanent + max(step, self.cache + self.copies, self.visiting)

    @property
    def fits(self) -> bool:
        """True if there is enough memory, with a margin for memory that is not estimated."""
        return self.available is None or self.total <= FITS * self.available

    def terms(self) -> str:
        """The terms of the estimate that are not 0."""
        names = (
            "weights",
            "gradients",
            "buckets",
            "optimizer",
            "frozen",
            "activations",
            "logits",
            "cache",
            "copies",
            "visiting",
        )
        return ", ".join(f"{name} {size_text(getattr(self, name))}" for name in names if getattr(self, name))

    def text(self) -> str:
        """The estimate as text: one line, followed by advice if it does not fit."""
        available = f" of {size_text(self.available)}" if self.available else ""
        line = f"estimated memory: {size_text(self.total)}{available} ({self.terms()})"
        return line if self.fits else f"{line}; it may not fit. Try, in this order:{self.advice_lines()}"

    def advice_lines(self) -> str:
        """The advice, one line each."""
        return "".join(f"\n  - {setting}" for setting in self.advice)


def size_text(count: int) -> str:
    """A number of bytes with three digits, for example `7.41 GB`."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / scale:.3g} {unit}" if count < 1e12 else f"{count / 1e9:.0f} GB"


class MemoryAwareModule(CheckedModule):
    """Base class of `RLHFModule` that estimates the memory of a step, and checkpoints layers to fit into a limit.

    Example:
        >>> module.configure_model()  # doctest: +SKIP
        >>> print(module.estimate_memory(tokens=16_384, scored=4096).text())  # doctest: +SKIP
    """

    model: "PreTrainedModel"
    teacher: Teacher | None
    lora: LoRA | None
    optimizer_factory: OptimizerFactory
    gradient_checkpointing: bool
    activation_offload: bool
    memory_limit: int | None
    """Bytes that a step may take."""
    smaller_batch = "halve data.batch_size, double"
    """What makes a micro-batch smaller, for advice."""

    @abstractmethod
    def forward_passes(self) -> list[PackedForward]:
        """The packed forward passes of all trained models."""

    @property
    def offload_settings(self) -> str | None:
        """Settings of frozen models that can be kept on the CPU, for advice; None if there are none."""
        return None if self.teacher is None else "model.distillation"

    @property
    def _token_logprobs(self) -> TokenLogprobs | None:
        """The object that computes logits; None with a reward head."""
        found = getattr(getattr(self, "model_scorer", self), "token_logprobs", None)
        return found if isinstance(found, TokenLogprobs) else None

    @property
    def _precision(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes the context manager with the precision of training."""
        return self._trainer.precision_plugin.forward_context if self._trainer else nullcontext

    # -- the estimate ---------------------------------------------------------------------------------------------

    def step_sizes(self) -> StepSizes | None:
        """The sizes of the largest micro-batch of the data; None if they are unknown. The model must be loaded."""
        data = row_data_of(self.trainer)
        prepared = data.prepared.get("train") if data else None
        if data is None or not prepared or not isinstance(prepared.rows, list):
            return None
        tokens = sorted((_tokens(row) for row in prepared.rows), reverse=True)[: data.batch_size]
        scored = sorted((row.trained for row in prepared.rows), reverse=True)[: data.batch_size]
        return StepSizes(sum(tokens), sum(scored) if self._token_logprobs else 0) if tokens else None

    def estimate_memory(
        self, tokens: int, scored: int, rows: int = 0, row_tokens: int = 0, shards: int = 1
    ) -> MemoryUse:
        """Estimate the memory that training needs on this device. The model must be loaded (`configure_model`).

        Args:
            tokens: Number of tokens in a micro-batch.
            scored: Number of these tokens whose logits are needed; 0 with a reward head.
            rows: Number of rows that the sampler decodes in parallel.
            row_tokens: Maximum number of tokens of such a row.
            shards: Number of devices that will share weights, gradients and optimizer state; 1 if they are sharded
                already.
        """
        size, device = compute_size(self.model, self._precision), next(self.model.parameters()).device
        parameters, token_logprobs, forwards = trained(self), self._token_logprobs, self.forward_passes()
        ours = {id(p) for part in forwards for p in part.model.parameters()} | {id(p) for p in parameters}
        places = placements(self)
        away = {id(p) for place in places for p in place.model.parameters()}
        there = [p for p in self.parameters() if id(p) in ours]
        with self._precision():
            fused = self.teacher is None and token_logprobs is not None and token_logprobs.backbone.fuses_logprobs()
        buffers = scored if self.teacher is None else scored * COMPARED
        gradients = -(-tensor_bytes(parameters) // shards)
        counts = [
            part.config.num_hidden_layers if self.gradient_checkpointing else _checkpointed(part) for part in forwards
        ]
        use = MemoryUse(
            weights=-(-tensor_bytes(there) // shards),
            gradients=gradients,
            optimizer=-(-optimizer_bytes(self.optimizer_factory, parameters) // shards),
            frozen=tensor_bytes(p for p in self.parameters() if id(p) not in ours | away),
            activations=self._activations(self._kept(tokens), counts, tokens),
            logits=logit_bytes(token_logprobs.backbone, buffers, size, token_logprobs.logit_bytes, fused)
            if token_logprobs and scored
            else 0,
            cache=cache_bytes(self.model, rows, row_tokens, size) if rows else 0,
            copies=copied_bytes(self.model, size) if rows else 0,
            visiting=max((tensor_bytes(place.model.parameters()) for place in places if place.offload), default=0),
            buckets=gradients if self._copies_gradients() else 0,
            available=device_bytes(device),
        )
        use.advice = self._advice(use)
        return use

    def _copies_gradients(self) -> bool:
        """True if DDP reduces copies of the gradients."""
        wrapped = self._trainer.strategy.model if self._trainer else None
        return isinstance(wrapped, DistributedDataParallel) and not wrapped.gradient_as_bucket_view

    def _kept(self, tokens: int) -> list[int]:
        """Bytes of the activations of each forward pass without checkpointing."""
        return [activation_bytes(part, tokens, self._precision) for part in self.forward_passes()]

    def _activations(self, kept: Sequence[int], counts: Sequence[int], tokens: int) -> int:
        """Bytes of all activations if the first layers of each forward pass are checkpointed."""
        size, on_gpu = compute_size(self.model, self._precision), next(self.model.parameters()).device.type == "cuda"
        total = 0
        for part, whole, count in zip(self.forward_passes(), kept, counts, strict=True):
            if self.activation_offload and on_gpu:
                total += whole // part.config.num_hidden_layers  # only those of the current layer are on the device
            else:
                with self._precision():
                    copied = part.copied_bytes
                total += copied + checkpointed_bytes(part.model, whole - copied, tokens, size, count)
        return total

    def _advice(self, use: MemoryUse) -> list[str]:
        """Settings that would save memory and are not set; first those that do not change results."""
        found = []
        on_gpu = next(self.model.parameters()).device.type == "cuda"
        if not self.gradient_checkpointing and self.memory_limit is None:
            found.append(
                "model.gradient_checkpointing: true (keeps a fraction of the activations; takes about a third longer)"
            )
        if self.memory_limit is None or use.permanent < self.memory_limit:
            found.append(
                f"{self.smaller_batch} trainer.accumulate_grad_batches (fewer activations and logits, same gradient)"
            )
        if not self.activation_offload and self.memory_limit is None and on_gpu:
            found.append("model.activation_offload: true (keeps activations in CPU memory)")
        if self.offload_settings is not None and use.frozen:
            found.append(
                f"set offload: true, or device: cpu, in {self.offload_settings} ({size_text(use.frozen)} less)"
            )
        if use.cache > use.activations + use.logits:
            found.append("lower model.sampler.slots (smaller KV cache)")
        # The following settings change results.
        if next(iter(self.model.parameters())).element_size() > 2:
            found.append(
                "trainer.precision: bf16-mixed (smaller activations), or bf16-true (also smaller weights and optimizer "
                "state)"
            )
        if self.lora is None:
            found.append(
                f"model.lora: {{}} (saves most of the {size_text(use.gradients + use.optimizer)} of gradients and "
                "optimizer state)"
            )
        elif not is_quantized(self.model) and on_gpu:
            found.append(
                f"model.lora.quantize: nf4 (shrinks the {size_text(use.weights)} of weights to less than a fifth)"
            )
        found.append("shard the weights over more devices with trainer.strategy, see docs/memory.md")
        return found

    # -- the limit ------------------------------------------------------------------------------------------------

    def fit_into_limit(self) -> None:
        """Checkpoint as few layers as make a step fit into `memory_limit`, and log the choice.

        It is made from the estimate, with `MARGIN` times the activations and logits. All ranks must call this together;
        they make the same choice.

        Raises:
            ConfigError: If the limit is too small, if the sizes of the batches are unknown, or if weights are sharded.
        """
        limit = self.memory_limit
        if limit is None:
            return
        self._check_limit()
        sizes = self.step_sizes()
        if sizes is None:
            raise ConfigError(
                "model.memory_limit needs the lengths of the training rows, which are unknown before they are read "
                "(data.streaming, data.cache, recorded rounds, your own DataLoader). Leave it out and set "
                "model.gradient_checkpointing: true"
            )
        forwards = self.forward_passes()
        for part in forwards:
            checkpoint_layers(part.model, 0)  # an earlier fit may have chosen another number
        use, kept = self.estimate_memory(*sizes), self._kept(sizes.tokens)
        # Checkpointing the last layer saves nothing: at the end of the forward pass, backward recomputes it first.
        most = [len(separate_layers(part.model)) - 1 for part in forwards]
        for number in range(sum(most) + 1):
            counts = _filled(number, most)
            use.activations = self._activations(kept, counts, sizes.tokens)
            if use.peak(MARGIN) <= limit:
                break
        found = gather((use.peak(MARGIN), number), every=True)
        layers = sum(part.config.num_hidden_layers for part in forwards)
        needed, number = max(peak for peak, _ in found), max(number for _, number in found)
        if needed > limit:
            use.advice = self._advice(use)
            alone = f"weights, gradients and optimizer state alone need {size_text(use.permanent)}"
            step = f"a step needs {size_text(needed)} with {number} of {layers} layers checkpointed"
            raise ConfigError(
                f"model.memory_limit is {size_text(limit)}, but {alone if use.permanent >= limit else step} "
                f"({use.terms()}; activations and logits count {MARGIN} times). Raise it to at least "
                f"{size_text(needed)}, or try, in this order:{use.advice_lines()}"
            )
        for part, whole, count in zip(forwards, kept, _filled(number, most), strict=True):
            checkpoint_layers(part.model, count)
            # The comparison of gradients runs without checkpointing, and holds two copies of them and one of weights.
            spare = limit - use.weights - use.frozen - use.buckets - 12 * sum(p.numel() for p in trained(self))
            fitting = spare * sizes.tokens / (MARGIN * PACKED_CHECK * max(1, whole))
            part.gradient_tokens = min(GRADIENT_TOKENS, max(16, int(fitting)))
        use.activations = self._activations(kept, _filled(number, most), sizes.tokens)
        if self.global_rank == 0:
            log.info(
                "checkpointing %d of %d layers: estimated %s of %s (%s)",
                number,
                layers,
                size_text(use.total),
                size_text(limit),
                use.terms(),
            )
            if not use.fits and use.available is not None:
                log.warning("the device has %s, so the step may not fit", size_text(use.available))

    def _check_limit(self) -> None:
        """Raise `ConfigError` if a limit is not supported with the strategy or the model."""
        strategy = self.trainer.strategy
        # Not a subclass of DDPStrategy: that of DeepSpeed shards weights.
        if is_sharded(self.model) or not (isinstance(strategy, SingleDeviceStrategy) or type(strategy) is DDPStrategy):
            raise ConfigError(
                f"model.memory_limit is for one device and for DDP, not for {type(strategy).__name__}. Leave it out "
                "and set model.gradient_checkpointing: true"
            )
        for part in self.forward_passes():
            if not separate_layers(part.model):
                raise ConfigError(
                    f"model.memory_limit: the layers of {type(part.model).__name__} cannot be checkpointed one by one. "
                    "Leave it out and set model.gradient_checkpointing: true"
                )


def check_memory_limit(
    memory_limit: int | str | None, gradient_checkpointing: bool, activation_offload: bool
) -> int | None:
    """The limit in bytes; raises `ConfigError` if it is unusable or contradicts another setting."""
    if memory_limit is None:
        return None
    for name, given in (
        ("gradient_checkpointing", gradient_checkpointing),
        ("activation_offload", activation_offload),
    ):
        if given:
            raise ConfigError(
                f"model.memory_limit chooses which layers are checkpointed, and model.{name}: true changes all of "
                "them; set only one of the two"
            )
    return parse_bytes("model.memory_limit", memory_limit)


def round_sizes(
    prompts: Sequence[Prompt], count: int, group_size: int, minibatches: int, sampler: Sampler
) -> StepSizes:
    """The sizes of a round of policy RL on one rank.

    Args:
        prompts: All prompts.
        count: Number of prompts of the round on this rank.
        group_size: Number of responses per prompt.
        minibatches: Number of mini-batches of the round.
        sampler: The sampler's settings.
    """
    prompt, sampled = max(row.tokens for row in prompts), sampler.max_tokens
    batch = -(-count * group_size // minibatches)
    tokens = min(count, batch) * prompt + batch * sampled
    decoded = min(count * group_size, sampler.slots) if sampler.engine is None else 0
    return StepSizes(tokens, batch * sampled, decoded, prompt + sampled)


def _filled(number: int, most: Sequence[int]) -> list[int]:
    """`number` layers over models that can take `most` each, the first model first."""
    counts = []
    for room in most:
        counts.append(min(number, room))
        number -= counts[-1]
    return counts


def _checkpointed(part: PackedForward) -> int:
    """Number of layers that are checkpointed one by one."""
    return sum(layer.gradient_checkpointing for layer in separate_layers(part.model))


def _tokens(row: Rendered | PreferenceExample) -> int:
    if isinstance(row, Rendered):
        return row.tokens
    shared = min(side.loss_mask.index(1) if 1 in side.loss_mask else 0 for side in row.sides)
    return shared + sum(side.tokens - shared for side in row.sides)
