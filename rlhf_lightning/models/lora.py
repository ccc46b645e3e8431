"""LoRA by the field's settings: rank, alpha, dropout, and which layers, found in any architecture by structure."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError, check_whole

HEADS = ("score", "classifier", "classification_head")
GROUPS = ("attention", "mlp", "unembedding", "all")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)

MOST_RANK = 2**16
"""Above the width of any layer."""


@dataclass
class LoRA:
    """Low-rank adapters (arXiv 2106.09685) in place of full training.

    Args:
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of the adapters, in SFT; the other stages compute without dropout.
        target: any of `attention`, `mlp`, `unembedding`, `all` (the three), or names of layers; one, or a list.
        quantize: `nf4` or `fp4` keeps the linear layers that are not trained in 4 bits (QLoRA, arXiv 2305.14314), with
            their scales in 8 bits, and computes in bfloat16. On CUDA, with bitsandbytes.
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
            raise ConfigError(f"lora.target is {self.target!r}; any of {', '.join(GROUPS)}, or names of layers")
        check_whole("lora.rank", self.rank, most=MOST_RANK)
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}: an adapter scaled by 0 would not learn; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; a part of the inputs, at least 0 and below 1")
        if self.quantize not in (None, "nf4", "fp4"):
            raise ConfigError(f"lora.quantize is {self.quantize!r}; nf4, fp4, or nothing")

    def quantization(self) -> dict[str, Any]:
        """What `from_pretrained` needs to load the base quantised; raises `ConfigError` where that cannot be done."""
        if self.quantize is None:
            return {}
        if not torch.cuda.is_available():
            raise ConfigError(
                f"lora.quantize: {self.quantize} runs on CUDA, and there is no CUDA device here; leave it out to train "
                "the adapter on weights that are not quantised"
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

    def config(self, model: nn.Module, task_type: str) -> Any:
        """peft's `LoraConfig` for this model; raises `ConfigError` where a target is not found."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.layer_names(model),
            task_type=task_type,
        )

    def layer_names(self, model: nn.Module) -> list[str]:
        """Full names of the layers that get an adapter."""
        head = _unembedding(model)
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        layers = {name: _group(name) for name in linear if name not in (head, *HEADS)}  # a score head is trained whole
        wanted = set(GROUPS[:3]) if "all" in self.target else set(self.target)
        names = [name for name, group in layers.items() if group in wanted]
        if "unembedding" in wanted and head:
            names.append(head)
        for target in wanted - set(GROUPS):
            found = [name for name in layers if name == target or name.endswith(f".{target}")]
            if not found:
                endings = sorted({name.rpartition(".")[2] for name in layers})
                raise ConfigError(
                    f"lora.target {target!r} names no layer; one of {', '.join(GROUPS)} or {', '.join(endings)}"
                )
            names += found
        if not names:
            raise ConfigError(f"lora.target {self.target} finds no layer in {type(model).__name__}")
        return sorted(set(names))

    def continues(self, adapter: Any, model: nn.Module) -> bool:
        """Whether an adapter with this `LoraConfig` can simply be trained on: equal rank, targets, and all else."""
        if not simple(adapter):
            return False
        names = set(self.layer_names(model))
        targets = adapter.target_modules
        if isinstance(targets, str):
            return False
        matched = {n for n, _ in model.named_modules() if n in targets or any(n.endswith(f".{t}") for t in targets)}
        return adapter.r == self.rank and adapter.lora_alpha == self.alpha and matched == names


def base_of(model: Any) -> Any:
    """The Hugging Face model, whether peft is around it or not; adapters are in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_quantised(model: Any) -> bool:
    """Whether linear layers of a model are in 4 bits."""
    return bool(getattr(base_of(model), "is_loaded_in_4bit", False))


def _dequantised(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "quant_state"):
        return parameter.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(parameter).detach()


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names that the Hugging Face model gives them, one at a time, adapters added in."""
    base, adapters = base_of(model), getattr(model, "peft_config", {})
    modules = dict(base.named_modules())
    seen: set[int] = set()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if of_adapter(name, adapters):
            continue
        value = _trained(modules, name, parameter)
        if value is None:
            # A tied head comes once with the embeddings, and again only where one of the two is adapted.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            value = _dequantised(parameter)
        # Of weights that are split over ranks, one at a time is gathered.
        yield plain_name(name), value.full_tensor() if hasattr(value, "full_tensor") else value


def _trained(modules: dict[str, nn.Module], name: str, parameter: nn.Parameter) -> Tensor | None:
    """What an adapter makes of a weight; None where it leaves it alone."""
    owner, wrapped, rest = name.partition(".original_module.")
    if wrapped:
        return modules[f"{owner}.modules_to_save.default"].get_parameter(rest).detach()
    owner, wrapped, rest = name.partition(".token_adapter.base_layer.")
    if wrapped:
        tokens: Any = modules[f"{owner}.token_adapter"]
        return tokens.get_merged_weights(["default"]).detach()
    # Parameters of one module may each be wrapped, one around the other.
    parts = name.split(".base_layer")
    owners: list[Any] = [modules[".base_layer".join(parts[:end])] for end in range(1, len(parts))]
    rest = parts[-1].removeprefix(".")
    own = [one for one in owners if getattr(one, "parameter_name", "weight") == rest and "default" in one.scaling]
    if not own:
        return None
    if any(one.use_dora.get("default") for one in own):
        merged = copy.deepcopy(own[0])
        merged.merge(adapter_names=["default"])
        return merged.get_base_layer().get_parameter(rest).detach()
    value = _dequantised(parameter)
    for one in own:
        value = value + one.get_delta_weight("default").detach().to(value.dtype)
    return value


def of_adapter(name: str, adapters: Any) -> bool:
    """Whether a weight is an adapter's: in peft the adapter's own name is a part of the weight's."""
    return any(part in adapters for part in name.split("."))


def plain_name(name: str) -> str:
    """A weight's name without the layers that peft puts around it."""
    for around in (".token_adapter.base_layer", ".original_module", ".base_layer"):
        name = name.replace(around, "")
    return name


def simple(config: Any) -> bool:
    """Whether an adapter is LoRA on layers and nothing else, and its first state changed no other weight."""
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
    # GPT-2 writes its linear layers as Conv1D; mixture-of-experts blocks with fused weights are not linear layers.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _group(name: str) -> str | None:
    parts = name.split(".")
    if not any(part.isdigit() for part in parts):
        return None  # outside the stack of layers: a projection of embeddings, a score head
    return "attention" if any(_ATTENTION.search(part) for part in parts) else "mlp"


def _unembedding(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head else None
