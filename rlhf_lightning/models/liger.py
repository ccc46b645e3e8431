"""Norms, SwiGLU and rotary embeddings by liger-kernel, for Llama-like models on CUDA.

The modules of one model get another `forward`; no class or function of transformers is replaced. Weights keep their
names, other models of the process run unchanged, and a copy of a model computes as the model does.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from subprocess import SubprocessError
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.models.fused_layers import MODELS
from rlhf_lightning.models.lora import base_of

log = logging.getLogger(__name__)
DEVICE = "cuda"
"""Type of the devices on which the kernels run."""
ROTARY = "apply_rotary_pos_emb"
"""The function that the attention of transformers' models calls for rotary embeddings."""

_FAILURES = (
    ImportError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    OSError,
    SubprocessError,
)


@dataclass
class Kernels:
    """What the modules of a model know in common.

    Attributes:
        required: True if the user asked for the kernels.
        on: True if the modules compute with them; False until a comparison has accepted them.

    Example:
        >>> Kernels(required=False).on
        False
    """

    required: bool
    on: bool = False


def use(model: nn.Module, wanted: bool | None, device: torch.device, conflict: str | None = None) -> None:
    """Let the modules of a model compute with liger-kernel on CUDA, from the comparison of `PackedForward.check` on.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.
        wanted: True if the kernels are required, None to use them where possible, False to remove them.
        device: Where the model will run.
        conflict: Why another setting excludes the kernels.

    Raises:
        ConfigError: If the kernels are required, but cannot be used.
    """
    if wanted is False:
        remove(model)
        return
    modules, name = _computations(model), type(base_of(model)).__name__
    missing = unavailable(device)
    installed = bool(modules) and all(_kernels_of(module) for module in modules)
    reason = missing or conflict or _unsupported(model, modules) or (None if installed else _failure(device))
    if reason:
        remove(model)
        if wanted:
            raise ConfigError(_refusal(reason))
        if not missing:
            log.info("model.use_liger_kernel: %s runs its own modules, because %s", name, reason)
        return
    kernels = Kernels(bool(wanted))
    for module, compute in modules.items():
        module.forward = partial(compute, module, kernels)
    if not installed:
        log.info("model.use_liger_kernel: liger-kernel computes norms, SwiGLU and rotary embeddings of %s", name)


def remove(model: nn.Module) -> None:
    """Let the modules of a model compute themselves again."""
    for module in base_of(model).modules():
        if _kernels_of(module):
            del module.forward


def require(device: torch.device) -> None:
    """Raise `ConfigError` if the kernels cannot be used on a device."""
    if reason := unavailable(device):
        raise ConfigError(_refusal(reason))


def kernels_of(model: nn.Module) -> Kernels | None:
    """What `use` has attached to the modules of a model on CUDA; None if they compute themselves in any case."""
    found = (kernels for module in base_of(model).modules() if (kernels := _kernels_of(module)))
    return next(found, None) if next(model.parameters()).device.type == DEVICE else None


def reject(model: nn.Module, reason: str) -> None:
    """Remove kernels that do not compute what the model computes, with a warning.

    Args:
        model: The model.
        reason: What was found.

    Raises:
        ConfigError: If the kernels are required.
    """
    name, kernels = type(base_of(model)).__name__, kernels_of(model)
    if kernels and kernels.required:
        raise ConfigError(_refusal(f"its kernels do not reproduce {name} ({reason})"))
    remove(model)
    log.warning("model.use_liger_kernel: %s runs its own modules, because liger-kernel differs (%s)", name, reason)


@contextmanager
def switched(kernels: Kernels, on: bool) -> Iterator[None]:
    """Context manager in which kernels are on or off."""
    before, kernels.on = kernels.on, on
    try:
        yield
    finally:
        kernels.on = before


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of kernels that cannot be imported, compiled or started."""
    try:
        from triton.errors import TritonError
    except ImportError:
        TritonError = ImportError  # noqa: N806
    return (TritonError, *_FAILURES)


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot be used on a device of this machine; None if they can."""
    if device.type != DEVICE:
        return f"its kernels need CUDA, and the model runs on {device.type}"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'rlhf-lightning[cuda]')"
    return None


def _refusal(reason: str) -> str:
    return f"model.use_liger_kernel is true, but {reason}. With null it is used only where it can be"


def _unsupported(model: nn.Module, modules: dict[nn.Module, Callable[..., Any]]) -> str | None:
    """Why a model cannot use the kernels; None if it can."""
    if len({*modules.values()}) < len(COMPUTATIONS):
        return f"only models of type {', '.join(MODELS)} with transformers' own layers and SwiGLU are supported"
    if any("forward" in vars(module) and not _kernels_of(module) for module in modules):
        return "something else has replaced the forward of its modules"
    if next(model.parameters()).dtype == torch.float64:
        return "its kernels do not compute in float64"
    return None


def _failure(device: torch.device) -> str | None:
    """Why not even a few numbers can be computed, for example because there is no C compiler; None if they can."""
    try:
        x, size = torch.ones(1, 1, 2, 16, device=device, requires_grad=True), torch.ones(1, 2, 16, device=device)
        normed = _run("liger_rms_norm", x, size[0, 0], 1e-6, in_place=False)
        query, key = _rotated(normed, normed * 2, size, size)
        _run("liger_swiglu", query, key).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except failures() as error:
        return f"its kernels fail here ({first_line(error)})"
    return None


def _computations(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The modules of a model that the kernels can compute, and how."""
    config = base_of(model).config.get_text_config()
    if config.model_type not in MODELS or config.hidden_act != "silu":
        return {}
    file = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    found = {}
    for module in base_of(model).modules():
        kind = type(module)
        for ending, compute in COMPUTATIONS.items():
            if kind.__module__ == file and kind.__name__.endswith(ending):
                if compute is _attention and ROTARY not in kind.forward.__code__.co_names:
                    continue
                found[module] = compute
    return found


def _kernels_of(module: nn.Module) -> Kernels | None:
    """What `use` has attached to a module."""
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and forward.func in COMPUTATIONS.values():
        kernels: Kernels = forward.args[1]
        return kernels
    return None


@cache
def _functions() -> Any:
    """The kernels, imported when they are used first."""
    import liger_kernel.transformers.functional as functional

    return functional


def _run(name: str, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel on the device of its first argument, which Triton does not look at."""
    with torch.cuda.device_of(states):
        return getattr(_functions(), name)(states, *args, **kwargs)


def _observed(*modules: nn.Module | None) -> bool:
    """True if hooks see the outputs of modules. The kernels overwrite these, or skip a module.

    The hooks of ZeRO-3 only gather and release weights.
    """
    for module in modules:
        for one in (module, getattr(module, "base_layer", None)):  # an adapter that is off returns its layer's output
            if one is None:
                continue
            places = (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks, one._backward_pre_hooks)
            hooks = (hook for place in places for hook in place.values())
            if any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks):
                return True
    return False


def _norm(module: nn.Module, kernels: Kernels, hidden_states: Tensor) -> Any:
    """The forward of an RMS norm."""
    if not _is_on(kernels, hidden_states):
        return type(module).forward(module, hidden_states)
    # Not in place: backward would overwrite the gradient of the output, which hooks of tensors may have kept.
    return _run("liger_rms_norm", hidden_states, module.weight, module.variance_epsilon, in_place=False)


def _mlp(module: nn.Module, kernels: Kernels, x: Tensor) -> Any:
    """The forward of an MLP with SwiGLU."""
    gate, up = module.gate_proj, module.up_proj
    if not _is_on(kernels, x) or _observed(gate, up, module.act_fn):  # type: ignore[arg-type]
        return type(module).forward(module, x)
    return module.down_proj(_run("liger_swiglu", gate(x), up(x)))  # type: ignore[operator]


def _attention(module: nn.Module, kernels: Kernels, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention layer: transformers' own, with other rotary embeddings."""
    parts = (getattr(module, name, None) for name in ("q_proj", "k_proj", "q_norm", "k_norm"))
    if not _is_on(kernels, hidden_states) or _observed(*parts):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    kind = type(module)
    if kind not in _ROTATING:
        _ROTATING[kind] = _rotating(kind)
    return _ROTATING[kind](module, hidden_states, *args, **kwargs)


_ROTATING: dict[type[nn.Module], Callable[..., Any]] = {}


def _rotating(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of an attention class with the kernel in place of transformers' function.

    It reads a copy of its module's names, so that the function stays as it is for all other models.
    """
    own: Any = kind.forward
    names = {**own.__globals__, ROTARY: _rotated}
    del names["__name__"]  # by which torch.compile would look names up in the module itself
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Rotary embedding of `[B, heads, n, size]`; `cos` and `sin` are `[B or 1, n, size]`."""
    return _run("liger_rope", query, key, cos, sin)


def _is_on(kernels: Kernels, states: Tensor) -> bool:
    return kernels.on and states.device.type == DEVICE and states.dtype != torch.float64


COMPUTATIONS: dict[str, Callable[..., Any]] = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention}
"""How a module is computed, by the end of its class's name."""
