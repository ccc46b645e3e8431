"""The policy's weights as an engine receives them: with adapters merged, or the base and the adapter apart."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_lightning.models.lora import LoRAFactors, lora_factors, lora_obstacles, named_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PolicyWeights:
    """The weights of a policy by their Hugging Face names. Iterating yields all of them, with adapters merged.

    Sharded weights are gathered one at a time, so all ranks must iterate over all of them. Tensors may share memory
    with the model: copy them, because training changes them.

    Args:
        model: The policy.

    Example:
        >>> dict(PolicyWeights(model)).keys()  # doctest: +SKIP
        dict_keys(['model.embed_tokens.weight', …])
    """

    def __init__(self, model: "PreTrainedModel | PeftModel | nn.Module") -> None:
        self.model = model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.model)

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """The weights below the adapter."""
        return named_weights(self.model, merged=False)

    def adapter(self) -> Iterator[tuple[str, LoRAFactors]]:
        """The factors of the adapter by the names of their layers; see `lora_factors`."""
        return lora_factors(self.model)

    def obstacles(self) -> list[str]:
        """Why base and adapter do not give the policy; see `lora_obstacles`."""
        return lora_obstacles(self.model)


def write_adapter(folder: Path, adapter: Mapping[str, LoRAFactors]) -> None:
    """Write an adapter in peft's format. The factors contain its scale, so the scale in the config is 1.

    Args:
        folder: An existing folder.
        adapter: The factors by the names of their layers, see `PolicyWeights.adapter`.
    """
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": factor.detach().cpu().contiguous()
        for name, factors in adapter.items()
        for part, factor in zip("AB", factors, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = max(len(factors.a) for factors in adapter.values())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(adapter), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
