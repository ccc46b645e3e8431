"""Estimates the memory of training: weights, gradients and optimizer state exactly, activations by measurement.

Sizes are in bytes on one device. docs/memory.md has the formulas.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.backbone import Backbone, in_mode
from rlhf_lightning.models.logits import CPU_CHUNK, GPU_CHUNK, block_rows
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.sharding import layers_of, run_unsharded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

log = logging.getLogger(__name__)
OptimizerFactory = Callable[[ParamsT], torch.optim.Optimizer]
Precision = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes the context manager in which a forward runs with the precision of training."""
PROBES = (32, 96)
"""Numbers of tokens of the two forward passes from which activations are extrapolated."""
QUANTIZED = 4096
"""Number of values from which optimizers quantize the state of a parameter."""
MARGIN = 1.3
"""Largest factor between measured and estimated activations and logits (tests/models/test_memory.py)."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes from a whole number, or from text such as `8GB` (8 · 10⁹) or `7.5GiB` (7.5 · 2³⁰).

    Args:
        name: Name of the setting.
        value: The value.

    Raises:
        ConfigError: If it is neither, or 0.

    Example:
        >>> parse_bytes("model.memory_limit", "8GB"), parse_bytes("model.memory_limit", "1KiB")
        (8000000000, 1024)
    """
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    found = 0
    if match:
        number, prefix, binary = match.groups()
        found = int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(prefix.lower()) + 1 if prefix else 0))
    if not found:
        raise ConfigError(f"{name} is {value!r}; it must be a number of bytes, or text such as 8GB or 7.5GiB")
    return found


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

    The factory is called with two matrices and two vectors of each dtype, from which bytes per value and per parameter
    follow; once with small ones and once with large ones, because optimizers with quantized state (torchao,
    bitsandbytes) do not quantize that of parameters below `QUANTIZED` values.

    Args:
        factory: Makes an optimizer from parameters, as in the modules.
        parameters: The trained parameters.
    """
    rates: dict[tuple[torch.dtype, bool, bool], tuple[float, float]] = {}
    total = 0.0
    for parameter in parameters:
        local = _local(parameter)
        kind = local.dtype, local.ndim > 1, local.numel() >= QUANTIZED
        if kind not in rates:
            rates[kind] = _state_rates(factory, *kind)
        for_value, for_parameter = rates[kind]
        total += for_value * local.numel() + for_parameter
    return round(total)


def _state_rates(factory: OptimizerFactory, dtype: torch.dtype, matrix: bool, large: bool) -> tuple[float, float]:
    """Bytes per value, and additional bytes per parameter, of an optimizer's state."""
    values = QUANTIZED if large else 32
    try:
        less, more = (
            _state_of_one(factory, torch.zeros((8, count // 8) if matrix else count, dtype=dtype))
            for count in (values, 2 * values)
        )
    except Exception as error:  # noqa: BLE001 - an optimizer may refuse anything of a lone probe: an estimate stops no run
        log.info("memory: the state of the optimizer cannot be measured (%s); assuming two numbers per weight", error)
        return 2.0 * dtype.itemsize, 0.0
    for_value = (more - less) / values
    return for_value, less - for_value * values


@torch.enable_grad()
def _state_of_one(factory: OptimizerFactory, values: Tensor) -> int:
    """Bytes of an optimizer's state for one parameter."""
    probe = nn.Parameter(values)
    probe.grad = torch.zeros_like(probe)
    optimizer = factory([probe])
    # torchao's optimizers compile their step, which takes long. Without torch._dynamo nothing is compiled.
    compiles = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
        optimizer.step()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    return sum(part.numel() * part.element_size() for value in state for part in _stored(value))


def _stored(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the values of a tensor, which may be quantized."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


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
    kept: list[torch.UntypedStorage] = []  # alive, so that none is reused while they are counted

    def keep(tensor: Tensor) -> None:
        # Returns no tensor: a node of the graph that holds its own output would never be freed.
        storage = _local(tensor).untyped_storage()
        if not any(isinstance(one, nn.Parameter) for one in (tensor, tensor._base)):
            kept.append(storage)
            sizes[storage.data_ptr()] = storage.nbytes()

    device = next(forward.model.parameters()).device
    vocabulary = base_of(forward.model).get_input_embeddings().weight.shape[0]
    # Short rows without shared prefixes, which fit into any table of positions.
    ids = (torch.arange(tokens, device=device) * 7919 % vocabulary).view(-1, 16)
    wanted, prefixes = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    saving, forward.saving = forward.saving, lambda: saved_tensors_hooks(keep, lambda packed: packed)
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


def checkpointed_bytes(model: nn.Module, activations: int, tokens: int, size: int, count: int | None = None) -> int:
    """Bytes of activations if the first `count` layers are checkpointed.

    These keep their input. In backward they are recomputed one at a time, when the activations of the later layers are
    already freed; so a recomputed layer adds memory only if every layer is checkpointed.

    Args:
        model: The model.
        activations: Bytes of all activations, from `activation_bytes`.
        tokens: Number of tokens.
        size: Bytes of a number.
        count: Number of checkpointed layers; by default all.
    """
    config = base_of(model).config.get_text_config()
    layers: int = config.num_hidden_layers
    count = layers if count is None else count
    return count * tokens * config.hidden_size * size + activations * max(1, layers - count) // layers


def separate_layers(model: nn.Module) -> "list[GradientCheckpointingLayer]":
    """The decoder layers, if each can be checkpointed or not; empty if the model only checkpoints all of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = layers_of(model)
    found = [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]
    return found if len(found) == len(layers) else []


def checkpoint_layers(model: "PreTrainedModel | PeftModel", count: int | None = None) -> None:
    """Recompute the activations of the first `count` layers in backward instead of storing them.

    Args:
        model: The model.
        count: Number of layers; by default all. Otherwise the model must have `separate_layers`.
    """
    if count != 0:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only reentrant checkpointing needs this hook. The sampler's fused decoder does not run a model with hooks.
        model.disable_input_require_grads()
    if count is not None:
        for layer in separate_layers(model)[count:]:
            layer.gradient_checkpointing = False


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
