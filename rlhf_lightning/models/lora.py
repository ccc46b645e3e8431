"""LoRA with the usual settings. Target layers are found by structure, in any architecture."""

import copy
import logging
import math
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.settings import plain

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from transformers import BitsAndBytesConfig, PreTrainedModel

log = logging.getLogger(__name__)
HEADS = ("score", "classifier", "classification_head")
GROUPS = ("attention", "mlp", "unembedding", "all")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)

MOST_RANK = 2**16
"""Largest rank; above the width of any layer."""


@plain
@dataclass
class LoRA:
    """Low-rank adapters instead of full training (LoRA, arXiv 2106.09685).

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout probability on the input of the adapters in SFT; the other stages do not use dropout.
        target: One or a list of `attention`, `mlp`, `unembedding`, `all` (all three), or layer names.
        quantize: `nf4` or `fp4` keeps the frozen linear layers in 4 bits (QLoRA, arXiv 2305.14314), with their scales
            in 8 bits, and computes in bfloat16. Requires CUDA and bitsandbytes.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> lora = LoRA(rank=8, alpha=16, target="all")
        >>> lora.target
        ['all']
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: list[str] | str = field(default_factory=lambda: ["attention", "mlp"])
    quantize: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target, str):
            self.target = [self.target]
        if not isinstance(self.target, list | tuple | set) or not self.target:
            raise ConfigError(
                f"lora.target is {self.target!r}; it must list any of {', '.join(GROUPS)}, or layer names"
            )
        check_whole("lora.rank", self.rank, most=MOST_RANK)
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}; it must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.quantize not in (None, "nf4", "fp4"):
            raise ConfigError(f"lora.quantize is {self.quantize!r}; it must be nf4, fp4, or null")

    def quantization(self) -> "dict[str, BitsAndBytesConfig]":
        """Arguments of `from_pretrained` that load the base quantized; empty without `quantize`.

        Raises:
            ConfigError: If CUDA or bitsandbytes is missing.
        """
        if self.quantize is None:
            return {}
        if not torch.cuda.is_available():
            raise ConfigError(
                f"lora.quantize: {self.quantize} needs CUDA, but this machine has no CUDA device; leave it out to "
                "train the adapter on weights that are not quantized"
            )
        if find_spec("bitsandbytes") is None:
            raise ConfigError("lora.quantize needs bitsandbytes: pip install 'rlhf-lightning[cuda]'")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return {"quantization_config": config}

    def add_to(self, model: "PreTrainedModel", task_type: str) -> "PeftModel":
        """Add a new adapter to a model, with a warning if it does not contain all layers of `target`.

        Args:
            model: The model; its layers are replaced.
            task_type: `CAUSAL_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`.

        Raises:
            ConfigError: If a target is not found, or peft cannot adapt it.
        """
        from peft import get_peft_model

        config, names = self.config(model, task_type), self.layer_names(model)
        experts = [name for name, weight in model.named_parameters() if "experts" in name and weight.ndim > 2]
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"lora.target {self.target}: {error}. Give names of layers instead") from None
        layers = {name for name, module in model.named_modules() if getattr(module, "lora_A", None)}
        if left := [name for name in names if name not in layers]:
            log.warning(
                "lora.target %s: peft adapts the experts of %s instead of %d other layers (for example %s), which are "
                "not trained",
                self.target, type(model).__name__, len(left), left[0],
            )  # fmt: skip
        elif {"mlp", "all"} & {*self.target} and (out := [e for e in experts if e.rpartition(".")[0] not in layers]):
            log.warning(
                "lora.target %s: the experts of %s are not trained, because their weights (for example %s) are not "
                "linear layers",
                self.target, type(model).__name__, out[0],
            )  # fmt: skip
        return adapted

    def config(self, model: nn.Module, task_type: str) -> "LoraConfig":
        """peft's `LoraConfig` for a model.

        Args:
            model: The model that gets the adapter.
            task_type: `CAUSAL_LM`, `SEQ_CLS` or `FEATURE_EXTRACTION`.

        Raises:
            ConfigError: If a target is not found.
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.layer_names(model),
            task_type=task_type,
        )

    def layer_names(self, model: nn.Module) -> list[str]:
        """Full names of the layers that get an adapter, sorted.

        Raises:
            ConfigError: If a target is not found.
        """
        head = _unembedding(model)
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        layers = {name: _group(name) for name in linear if name not in (head, *HEADS)}  # score heads are fully trained
        wanted = set(GROUPS[:3]) if "all" in self.target else set(self.target)
        names = [name for name, group in layers.items() if group in wanted]
        if "unembedding" in wanted and head:
            names.append(head)
        for target in wanted - set(GROUPS):
            found = [name for name in layers if name == target or name.endswith(f".{target}")]
            if not found:
                endings = sorted({name.rpartition(".")[2] for name in layers})
                raise ConfigError(
                    f"lora.target {target!r} matches no layer; use {', '.join(GROUPS)} or {', '.join(endings)}"
                )
            names += found
        if not names:
            raise ConfigError(
                f"lora.target {self.target} matches no layer of {type(model).__name__}; give names of its linear layers"
            )
        return sorted(set(names))

    def continues(self, adapter: "PeftConfig", model: nn.Module) -> bool:
        """True if an adapter with this config can be trained further: plain LoRA with equal rank, alpha and targets."""
        if not simple(adapter):
            return False
        names = set(self.layer_names(model))
        targets = adapter.target_modules
        if isinstance(targets, str):
            return False
        matched = {n for n, _ in model.named_modules() if n in targets or any(n.endswith(f".{t}") for t in targets)}
        return adapter.r == self.rank and adapter.lora_alpha == self.alpha and matched == names


def base_of(model: nn.Module) -> "PreTrainedModel":
    """The Hugging Face model inside a `PeftModel`, or the model itself. Its layers include any adapters."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: nn.Module) -> "TypeGuard[PeftModel]":
    """True for a `PeftModel`. Some versions of peft leave `peft_config` on a base after merging."""
    return hasattr(model, "get_base_model")


@contextmanager
def adapter_disabled(model: "PeftModel") -> Iterator[None]:
    """Context manager in which the model runs without its adapters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with model.disable_adapter():
        yield
    # peft changes `requires_grad` when it enables adapters.
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def is_quantized(model: nn.Module) -> bool:
    """True if linear layers of the model are in 4 bits."""
    return bool(getattr(base_of(model), "is_loaded_in_4bit", False))


def _dequantized(parameter: nn.Parameter) -> Tensor:
    """The weight in its full shape, dequantized if it is in 4 bits."""
    if not hasattr(parameter, "quant_state"):
        return parameter.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(parameter).detach()


def named_weights(model: nn.Module, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the weights by their Hugging Face names.

    Sharded weights are gathered one at a time; all ranks must iterate.

    Args:
        model: The model.
        merged: True to merge adapters, False to leave them out.
    """
    base, adapters = base_of(model), getattr(model, "peft_config", {})
    modules = dict(base.named_modules())
    seen: set[int] = set()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if of_adapter(name, adapters):
            continue
        value = _trained(modules, name, parameter) if merged else None
        if value is None:
            # A tied head is yielded once, with the embeddings, unless one of them is adapted.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            value = _dequantized(parameter)
        # Sharded weights are gathered one at a time.
        yield plain_name(name), value.full_tensor() if hasattr(value, "full_tensor") else value


def _trained(modules: dict[str, nn.Module], name: str, parameter: nn.Parameter) -> Tensor | None:
    """A weight with its adapter applied; None if no adapter changes it."""
    owner, wrapped, rest = name.partition(".original_module.")
    if wrapped:
        return modules[f"{owner}.modules_to_save.default"].get_parameter(rest).detach()
    owner, wrapped, rest = name.partition(".token_adapter.base_layer.")
    if wrapped:
        tokens: TrainableTokensLayer = modules[f"{owner}.token_adapter"]
        return tokens.get_merged_weights(["default"]).detach()
    # peft wraps several parameters of a module in nested layers.
    parts = name.split(".base_layer")
    owners: list[LoraLayer] = [modules[".base_layer".join(parts[:end])] for end in range(1, len(parts))]
    rest = parts[-1].removeprefix(".")
    own = [one for one in owners if getattr(one, "parameter_name", "weight") == rest and "default" in one.scaling]
    if not own:
        return None
    if any(one.use_dora.get("default") for one in own):
        merged = copy.deepcopy(own[0])
        merged.merge(adapter_names=["default"])
        return merged.get_base_layer().get_parameter(rest).detach()
    value = _dequantized(parameter)
    for one in own:
        value = value + one.get_delta_weight("default").detach().to(value.dtype)
    return value


class LoRAFactors(NamedTuple):
    """An adapter of one layer: its update of the weight is `b @ a`.

    Attributes:
        a: `[rank, inputs]`.
        b: `[outputs, rank]`, multiplied by the adapter's scale.

    Example:
        >>> update = LoRAFactors(torch.ones(2, 3), torch.ones(4, 2))
        >>> (update.b @ update.a).shape
        torch.Size([4, 3])
    """

    a: Tensor
    b: Tensor


def lora_factors(model: nn.Module) -> Iterator[tuple[str, LoRAFactors]]:
    """Iterate over the adapter of each layer that has one, by the layer's Hugging Face name.

    Sharded weights are gathered one at a time; all ranks must iterate.
    """
    for name, module in base_of(model).named_modules():
        if "default" in getattr(module, "lora_A", ()):
            layer: LoraLayer = module
            pair = [getattr(layer, part)["default"].weight.detach() for part in ("lora_A", "lora_B")]
            a, b = (value.full_tensor() if hasattr(value, "full_tensor") else value for value in pair)
            yield name, LoRAFactors(a, b * layer.scaling["default"])


_NOT_FACTORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_A": "adapters of embeddings",
    "lora_embedding_B": "adapters of embeddings",
    "modules_to_save": "fully trained modules",
    "trainable_tokens_delta": "trained tokens",
    "trainable_tokens_original": "trained tokens",
}


def lora_obstacles(model: nn.Module) -> list[str]:
    """What the base weights with `lora_factors` leave out of a policy, in words; empty if they give the policy.

    Args:
        model: The policy.
    """
    if not is_adapted(model):
        return ["no adapter"]
    found = set()
    modules = dict(base_of(model).named_modules())
    for name, parameter in base_of(model).named_parameters():
        parts = name.split(".")
        if not of_adapter(name, model.peft_config):
            if parameter.requires_grad:
                found.add("trained weights of the base")
        elif "default" in parts:
            layer = modules.get(".".join(parts[:-3]))
            plain_factor = parts[-3:] in (["lora_A", "default", "weight"], ["lora_B", "default", "weight"])
            if plain_factor and getattr(layer, "parameter_name", "weight") == "weight":
                continue
            known = [words for part, words in _NOT_FACTORS.items() if part in parts]
            found.add(known[0] if known else f"adapters of another kind ({name})")
    return sorted(found)


def of_adapter(name: str, adapters: Container[str]) -> bool:
    """True if a weight belongs to an adapter; peft adds the adapter's name to the weight's name."""
    return any(part in adapters for part in name.split("."))


def plain_name(name: str) -> str:
    """A weight's name without the wrappers that peft adds."""
    for around in (".token_adapter.base_layer", ".original_module", ".base_layer"):
        name = name.replace(around, "")
    return name


def simple(config: "PeftConfig") -> bool:
    """True if an adapter is plain LoRA on layers, and its initialization changes no other weight."""
    unlike = {"bias": "none", "init_lora_weights": True}
    extra = (
        "use_rslora",
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "rank_pattern",
        "alpha_pattern",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "alora_invocation_tokens",
        "use_qalora",
        "arrow_config",
    )
    return (
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and not set(config.modules_to_save or ()) - set(HEADS)
        and all(getattr(config, name) == value for name, value in unlike.items())
        and not any(getattr(config, name, None) for name in extra)
    )


def _is_linear(module: nn.Module) -> bool:
    # The linear layers of GPT-2 are Conv1D. Mixture-of-experts blocks with fused weights are not linear layers.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _group(name: str) -> str | None:
    """`attention` or `mlp`, by a layer's name; None outside the stack of decoder layers."""
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        return None  # outside the decoder layers: an embedding projection, a score head
    return "attention" if any(_ATTENTION.search(part) for part in parts) else "mlp"


def _unembedding(model: "PreTrainedModel") -> str | None:
    """Name of the language-model head, if there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head else None
