"""Estimate of the memory that training needs, and advice if it is more than is available."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch

from rlhf_lightning.checkpointing.deepspeed_strategy import DeepSpeed
from rlhf_lightning.data.preference_rows import PreferenceExample
from rlhf_lightning.data.prompts import Prompt, PromptDataModule
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.generation.fused_decoder import copied_bytes
from rlhf_lightning.models.lora import is_quantized
from rlhf_lightning.models.memory import (
    activation_bytes,
    cache_bytes,
    checkpointed_bytes,
    compute_size,
    device_bytes,
    logit_bytes,
    optimizer_bytes,
    tensor_bytes,
    trained,
)
from rlhf_lightning.models.offload import placements
from rlhf_lightning.models.token_logprobs import COMPARED, TokenLogprobs
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.trainer_state import row_data_of

log = logging.getLogger(__name__)
FITS = 0.8
"""Fraction of the available memory above which an estimate is shown with advice."""


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
    available: int | None = None
    advice: list[str] = field(default_factory=list)
    """Settings to change if the run does not fit; first those that do not change results."""

    @property
    def total(self) -> int:
        """Peak memory in bytes. Training steps and rollouts alternate, so only the larger of the two counts."""
        step, rollout = self.activations + self.logits, max(self.cache + self.copies, self.visiting)
        return self.weights + self.gradients + self.optimizer + self.frozen + max(step, rollout)

    @property
    def fits(self) -> bool:
        """True if there is enough memory, with a margin for memory that is not estimated."""
        return self.available is None or self.total <= FITS * self.available

    def text(self) -> str:
        """The estimate as text: one line, followed by advice if it does not fit."""
        names = ("weights", "gradients", "optimizer", "frozen", "activations", "logits", "cache", "copies", "visiting")
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in names if getattr(self, name))
        available = f" of {_size(self.available)}" if self.available else ""
        line = f"estimated memory: {_size(self.total)}{available} ({parts})"
        if self.fits:
            return line
        advice = [f"  - {setting}" for setting in self.advice]
        return "\n".join([f"{line}; it may not fit. Try, in this order:", *advice])


def estimate_memory(
    module: RLHFModule, tokens: int, scored: int, rows: int = 0, row_tokens: int = 0, shards: int = 1
) -> MemoryUse:
    """Estimate the memory that training needs on this device. The model must be loaded (`configure_model`).

    Args:
        module: The module.
        tokens: Number of tokens in a micro-batch.
        scored: Number of these tokens whose logits are needed; 0 with a reward head.
        rows: Number of rows that the sampler decodes in parallel.
        row_tokens: Maximum number of tokens of such a row.
        shards: Number of devices that will share weights, gradients and optimizer state; 1 if they are sharded already.
    """
    context = module._trainer.precision_plugin.forward_context if module._trainer else nullcontext
    size, device = compute_size(module.model, context), next(module.model.parameters()).device
    parameters, token_logprobs = trained(module), _token_logprobs(module)
    ours = {id(p) for part in module.forward_passes() for p in part.model.parameters()} | {id(p) for p in parameters}
    places = placements(module)
    away = {id(p) for place in places for p in place.model.parameters()}
    there = [p for p in module.parameters() if id(p) in ours]
    with context():
        fused = module.teacher is None and token_logprobs is not None and token_logprobs.backbone.fuses_logprobs()
    buffers = scored if module.teacher is None else scored * COMPARED
    estimate = MemoryUse(
        weights=-(-tensor_bytes(there) // shards),
        gradients=-(-tensor_bytes(parameters) // shards),
        optimizer=-(-optimizer_bytes(module.optimizer_factory, parameters) // shards),
        frozen=tensor_bytes(p for p in module.parameters() if id(p) not in ours | away),
        activations=_activations(module, tokens, size, context, device),
        logits=logit_bytes(token_logprobs.backbone, buffers, size, token_logprobs.logit_bytes, fused)
        if token_logprobs and scored
        else 0,
        cache=cache_bytes(module.model, rows, row_tokens, size) if rows else 0,
        copies=copied_bytes(module.model, size) if rows else 0,
        visiting=max((tensor_bytes(place.model.parameters()) for place in places if place.offload), default=0),
        available=device_bytes(device),
    )
    estimate.advice = _advice(module, estimate)
    return estimate


def _activations(
    module: RLHFModule,
    tokens: int,
    size: int,
    context: Callable[[], AbstractContextManager[None]],
    device: torch.device,
) -> int:
    total = 0
    for part in module.forward_passes():
        needed = kept = activation_bytes(part, tokens, context)
        if module.gradient_checkpointing:
            needed = checkpointed_bytes(part.model, kept, tokens, size)
        if module.activation_offload and device.type == "cuda":
            # Only the activations of the current layer are on the device.
            needed = kept // part.config.num_hidden_layers
        total += needed
    return total


def _advice(module: RLHFModule, estimate: MemoryUse) -> list[str]:
    """Settings that would save memory and are not set; first those that do not change results."""
    policy, found = isinstance(module, PolicyRLModule), []
    on_gpu = next(module.model.parameters()).device.type == "cuda"
    if not module.gradient_checkpointing:
        found.append(
            "model.gradient_checkpointing: true (keeps a fraction of the activations; takes about a third longer)"
        )
    smaller = "raise data.minibatches and" if policy else "halve data.batch_size, double"
    found.append(f"{smaller} trainer.accumulate_grad_batches (fewer activations and logits, same gradient)")
    if not module.activation_offload and on_gpu:
        found.append("model.activation_offload: true (keeps activations in CPU memory)")
    if (policy or module.teacher is not None) and estimate.frozen:
        size = _size(estimate.frozen)
        owners = "model.kl, model.distillation and reward models" if policy else "model.distillation"
        found.append(f"set offload: true, or device: cpu, in {owners} ({size} less)")
    if policy and estimate.cache > estimate.activations + estimate.logits:
        found.append("lower model.sampler.slots (smaller KV cache)")
    # The following settings change results.
    if next(iter(module.model.parameters())).element_size() > 2:
        found.append(
            "trainer.precision: bf16-mixed (smaller activations), or bf16-true (also smaller weights and optimizer "
            "state)"
        )
    if module.lora is None:
        found.append(
            f"model.lora: {{}} (saves most of the {_size(estimate.gradients + estimate.optimizer)} of gradients and "
            "optimizer state)"
        )
    elif not is_quantized(module.model) and on_gpu:
        found.append(
            f"model.lora.quantize: nf4 (shrinks the {_size(estimate.weights)} of weights to less than a fifth)"
        )
    found.append("shard the weights over more devices with trainer.strategy, see docs/memory.md")
    return found


def _size(count: int) -> str:
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if count >= s), ("kB", 1e3))
    return f"{count / scale:.3g} {unit}" if count < 1e12 else f"{count / 1e9:.0f} GB"


class MemoryEstimate(pl.Callback):
    """Logs an estimate of the required memory before training: one line, or advice if it may not fit.

    Example:
        >>> callback = MemoryEstimate()
        >>> trainer = Trainer(callbacks=[callback])  # doctest: +SKIP
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeed):
            return  # its shards and buffers are not known here
        if not isinstance(pl_module, RLHFModule) or (sizes := step_sizes(trainer, pl_module)) is None:
            return
        self.estimate = estimate_memory(pl_module, *sizes)
        if trainer.is_global_zero:
            tell = log.info if self.estimate.fits else log.warning
            tell(self.estimate.text())


def step_sizes(trainer: pl.Trainer, module: RLHFModule) -> tuple[int, int, int, int] | None:
    """The arguments of `estimate_memory` for the largest micro-batch of the data; None if the data is unknown.

    The shared prompt of a pair or a group counts once.

    Args:
        trainer: The Trainer.
        module: The module, with its model loaded.
    """
    data = row_data_of(trainer)
    prepared = data.prepared.get("train") if data else None
    if data is None or not prepared or not isinstance(prepared.rows, list) or not prepared.rows:
        return None
    if isinstance(module, PolicyRLModule) and isinstance(data, PromptDataModule):
        return None if data.recorded else _round_sizes(trainer, module, data, prepared.rows)
    sizes = sorted((_tokens(row) for row in prepared.rows), reverse=True)[: data.batch_size]
    scored = sum(sorted((row.trained for row in prepared.rows), reverse=True)[: data.batch_size])
    return sum(sizes), scored if _token_logprobs(module) else 0, 0, 0


def _token_logprobs(module: RLHFModule) -> TokenLogprobs | None:
    """The object that computes logits; None with a reward head."""
    return getattr(getattr(module, "model_scorer", module), "token_logprobs", None)


def _tokens(row: Rendered | PreferenceExample) -> int:
    if isinstance(row, Rendered):
        return row.tokens
    shared = min(side.loss_mask.index(1) if 1 in side.loss_mask else 0 for side in row.sides)
    return shared + sum(side.tokens - shared for side in row.sides)


def _round_sizes(
    trainer: pl.Trainer, module: PolicyRLModule, data: PromptDataModule, rows: Sequence[Prompt]
) -> tuple[int, int, int, int]:
    prompt, sampled = max(row.tokens for row in rows), module.sampler.max_tokens
    prompts = -(-min(data.prompts_per_round, len(rows)) // data_ranks(trainer)[1])
    batch = -(-prompts * data.group_size // data.minibatches)
    tokens = min(prompts, batch) * prompt + batch * sampled
    decoded = min(prompts * data.group_size, module.sampler.slots) if module.sampler.engine is None else 0
    return tokens, batch * sampled, decoded, prompt + sampled
