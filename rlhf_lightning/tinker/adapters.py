"""The served model with LoRA adapters: all of them share the weights of one base."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.token_logprobs import TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, Tensor]
"""The weights of an adapter by their names in the `PeftModel`; empty for the base itself."""


class AdaptedModel:
    """The base with an adapter of one rank and set of layers; it computes for every adapter of this form in turn.

    The layers are copies that share the weights of the base. So the number of training runs costs no memory beyond
    their own weights, gradients and optimizer states.

    Args:
        base: The base model, which is not changed.
        lora: Form of the adapter; None for the base itself.
        decode: Maps token ids to text, for stop texts.
        slots: Number of samples decoded in parallel.

    Attributes:
        model: The model with the adapter.
        token_logprobs: Computes log-probabilities under it.
        engine: Samples from it.
        parameters: The adapter's weights by name.

    Example:
        >>> adapted = AdaptedModel(base, LoRA(rank=8), tokenizer.decode)  # doctest: +SKIP
        >>> adapted.load(adapted.fresh(seed=0))  # doctest: +SKIP
    """

    def __init__(
        self, base: "PreTrainedModel", lora: LoRA | None, decode: Callable[[list[int]], str], slots: int = 16
    ) -> None:
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        self.lora = lora
        self.model = copy.deepcopy(base, shared)
        if lora is not None:
            self.model = lora.add_to(self.model, "CAUSAL_LM")
        self.model.eval()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.token_logprobs = TokenLogprobs(self.model)
        self.engine = LocalEngine(self.model, decode, slots)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def fresh(self, seed: int) -> Weights:
        """Initial weights of an adapter, which do not change the model yet.

        Args:
            seed: Seed of the random numbers.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.model.modules():
                if hasattr(module, "reset_lora_parameters"):
                    module.reset_lora_parameters("default", True)
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Compute with these weights from now on.

        Args:
            weights: Weights of an adapter of this form.
        """
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


FORMS = 8
"""Number of forms of adapters whose models are kept."""


class AdaptedModels:
    """One `AdaptedModel` per form of adapter, made when it is needed. The last `FORMS` that were used are kept.

    Args:
        loaded: The served model.
        slots: Number of samples decoded in parallel.

    Example:
        >>> models = AdaptedModels(LanguageModel("Qwen/Qwen3-0.6B"))  # doctest: +SKIP
        >>> models.of(LoRA(rank=32)) is models.of(LoRA(rank=32))  # doctest: +SKIP
        True
    """

    def __init__(self, loaded: LanguageModel, slots: int = 16) -> None:
        self.loaded, self.slots = loaded, slots
        self._models: OrderedDict[tuple[int, str] | None, AdaptedModel] = OrderedDict()

    def of(self, lora: LoRA | None) -> AdaptedModel:
        """The model for a form of adapter.

        Args:
            lora: The form; None for the base itself.
        """
        key = None if lora is None else (lora.rank, ",".join(lora.target))
        if key not in self._models:
            tokenizer = self.loaded.tokenizer
            self._models[key] = AdaptedModel(self.loaded.model, lora, tokenizer.decode, self.slots)
        self._models.move_to_end(key)
        if len(self._models) > FORMS:
            self._models.popitem(last=False)
        return self._models[key]
