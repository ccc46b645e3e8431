"""Estimates the memory of training: weights, gradients and optimizer state exactly, activations by measurement.

Sizes are in bytes on one device. docs/memory.md has the formulas.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import ParamsT

from rlhf_lightning.models.backbone import Backbone, in_mode
from rlhf_lightning.models.logits import CPU_CHUNK, GPU_CHUNK, block_rows
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.sharding import run_unsharded

log = logging.getLogger(__name__)
OptimizerFactory = Callable[[ParamsT], torch.optim.Optimizer]
Precision = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes the context manager in which a forward runs with the precision of training."""
PROBES = (32, 96)
"""Numbers of tokens of the two forward passes from which activations are extrapolated."""


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; each storage is counted once, and of sharded tensors only the local shard."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local = _local(tensor)
        found[local.untyped_storage().data_ptr() or id(tensor)] = local.numel() * local.element_size()
    return sum(found.values())


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def optimizer_bytes(factory: OptimizerFactory, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of an optimizer's state after its first step.

    The factory is called with a small matrix and a small vector of each dtype. State with the shape of its parameter is
    counted per value; other state, such as a step count, is counted once per parameter.

    Args:
        factory: Makes an optimizer from parameters, as in the modules.
        parameters: The trained parameters.
    """
    rates: dict[tuple[torch.dtype, bool], tuple[float, float]] = {}
    total = 0.0
    for parameter in parameters:
        local = _local(parameter)
        matrix = local.ndim > 1
        if (local.dtype, matrix) not in rates:
            rates[local.dtype, matrix] = _state_of_one(factory, local.dtype, matrix)
        for_value, for_parameter = rates[local.dtype, matrix]
        total += for_value * local.numel() + for_parameter
    return round(total)


@torch.enable_grad()
def _state_of_one(factory: OptimizerFactory, dtype: torch.dtype, matrix: bool) -> tuple[float, float]:
    """Bytes per value, and additional bytes per parameter, of an optimizer's state."""
    probe = nn.Parameter(torch.zeros((5, 7) if matrix else (35,), dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer = factory([probe])
        optimizer.step()
    except Exception as error:  # noqa: BLE001 - an optimizer may refuse anything of a lone probe: an estimate stops no run
        log.info("memory: the state of the optimizer cannot be measured (%s); assuming two numbers per weight", error)
        return 2.0 * probe.element_size(), 0.0
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    for_value = sum(value.element_size() for value in state if value.shape == probe.shape)
    return for_value, sum(value.numel() * value.element_size() for value in state if value.shape != probe.shape)


def activation_bytes(forward: PackedForward, tokens: int, context: Precision = contextlib.nullcontext) -> int:
    """Bytes of the activations that backward needs, without gradient checkpointing.

    The model is run twice on a few tokens, and the tensors that autograd saves are counted: each storage once, without
    weights. The result is extrapolated linearly. This is correct for attention that does not materialize scores;
    `eager` attention needs more memory for longer rows.

    Args:
        forward: The model.
        tokens: Number of tokens to estimate for.
        context: Context manager for the precision of training.
    """
    few, more = (_saved(forward, count, context) for count in PROBES)
    slope = (more - few) / (PROBES[1] - PROBES[0])
    with context():
        copied = forward.copied_bytes
    return copied + round(max(0.0, few + slope * (tokens - PROBES[0])))


def _saved(forward: PackedForward, tokens: int, context: Precision) -> int:
    """Bytes that autograd saves in a forward pass of `tokens` tokens."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps storages alive, so that none is reused while they are counted

    def keep(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if not any(isinstance(one, nn.Parameter) for one in (tensor, tensor._base)):
            kept.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(forward.model.parameters()).device
    vocabulary = base_of(forward.model).get_input_embeddings().weight.shape[0]
    # Short rows without shared prefixes, which fit into any table of positions.
    ids = (torch.arange(tokens, device=device) * 7919 % vocabulary).view(-1, 16)
    wanted, prefixes = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    saving, forward.saving = forward.saving, lambda: saved_tensors_hooks(keep, lambda tensor: tensor)
    # Dropout saves masks, so it must be on as in training; the caller's random state is not changed.
    devices = [device] if device.type == "cuda" else []
    try:
        without_checkpointing = _training_without_checkpointing(forward.model)
        with torch.random.fork_rng(devices), without_checkpointing, torch.enable_grad(), context():
            run_unsharded(forward.model, forward, ids, wanted, prefixes)
    finally:
        forward.saving = saving
    return sum(sizes.values())


@contextlib.contextmanager
def _training_without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context manager with training mode on and gradient checkpointing off."""
    flags = [(part, part.gradient_checkpointing) for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    for part, _ in flags:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        with in_mode(model, training=True):
            yield
    finally:
        for part, flag in flags:
            part.gradient_checkpointing = flag


def checkpointed_bytes(model: nn.Module, activations: int, tokens: int, size: int) -> int:
    """Bytes of activations with gradient checkpointing: the input of each layer, and one whole recomputed layer.

    Args:
        model: The model.
        activations: Bytes of all activations, from `activation_bytes`.
        tokens: Number of tokens.
        size: Bytes of a number.
    """
    config = base_of(model).config.get_text_config()
    return config.num_hidden_layers * tokens * config.hidden_size * size + activations // config.num_hidden_layers


def logit_bytes(backbone: Backbone, rows: int, size: int, limit: int, fused: bool = False) -> int:
    """Bytes of the logits: one buffer of at most `limit` bytes, and working copies.

    The copies are those of one chunk: in float32, and its softmax. A soft cap keeps two more buffers for its gradient.
    The gradient of a trained head is computed in a separate buffer before it is added.

    Args:
        backbone: Decoder and head.
        rows: Number of positions.
        size: Bytes of a number in the layers' computations.
        limit: Largest size of the buffer.
        fused: True if logits are computed in blocks of rows (`Backbone.fuses_logprobs`), with a buffer in bfloat16.
    """
    size = backbone.lm_head.weight.element_size() if backbone.wide_head and not fused else size
    vocabulary = backbone.vocabulary
    capped = getattr(base_of(backbone.model).config.get_text_config(), "final_logit_softcapping", None)
    chunk = CPU_CHUNK if next(backbone.model.parameters()).device.type == "cpu" else GPU_CHUNK
    chunk = block_rows(vocabulary) * vocabulary if fused else chunk
    buffer = min(rows * vocabulary * size, max(limit, vocabulary * size))
    head = tensor_bytes(trained(backbone.lm_head)) if backbone.lm_head is not None else 0
    return buffer * (3 if capped else 1) + 2 * 4 * min(rows * vocabulary, max(vocabulary, chunk)) + head


def cache_bytes(model: nn.Module, rows: int, tokens: int, size: int) -> int:
    """Bytes of the sampler's keys and values.

    Args:
        model: The model.
        rows: Number of slots.
        tokens: Tokens per slot.
        size: Bytes of a number.
    """
    config = base_of(model).config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        return 0  # the state of a recurrent model has a fixed size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * heads * width * tokens * size


def compute_size(model: nn.Module, context: Precision) -> int:
    """Bytes of a number in the computations of layers, within a precision context."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    with context():
        mixed = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype
    return 2 if dtype in NARROW else weight.element_size()


def device_bytes(device: torch.device) -> int | None:
    """Bytes that a run may use on a device: free memory and memory that this process already holds; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _system_bytes() if device.type == "cpu" else None


def _system_bytes() -> int | None:
    """The same for the CPU's memory, on Linux."""
    try:
        with open("/proc/meminfo") as stream:
            free = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable:"))
        with open("/proc/self/statm") as stream:
            own = int(stream.read().split()[1]) * 4096
    except (OSError, StopIteration):
        return None
    return free + own
