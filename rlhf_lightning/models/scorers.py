"""Scorers: what number a (prompt, response) gets. The same object scores in training, by hand and as an RL reward."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.loading import load_for_scoring, read_stage
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scoring import TokenScorer

log = logging.getLogger(__name__)


class Scorer(ABC):
    """A way to score rows of tokens, `input_ids` and `mask` `[N, T]` (mask 1 on the response), `lengths` `[N]`."""

    task: str
    """`CAUSAL_LM` or `SEQ_CLS`: which Hugging Face class the model is."""
    max_tokens: int | None = None
    """Computed at once by the model, see `Forward`; set before `bind`."""
    forward: Forward
    """What runs the model; there after `bind`."""
    frozen: nn.Module | None = None
    """A model that it needs beside; whoever binds it registers that, so that it goes to the same device."""

    @abstractmethod
    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        """Take the model that is to score; called once, after loading. A fresh adapter is still the identity."""

    @abstractmethod
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Scores `[N]`, float32 or wider."""

    def settings(self) -> dict[str, Any]:
        """What `stage.json` keeps to build the scorer again."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": self.arguments()}

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}


class SequenceLogprob(Scorer):
    """beta · Σ log π of the response tokens, stop token included; the mean instead of the sum if length_normalised.

    With the Bradley-Terry loss: the preference model of the MinT recipe; normalised, with beta 2 and a margin, SimPO
    (arXiv 2405.14734). Summed log-probabilities favour short answers.
    """

    task = "CAUSAL_LM"

    def __init__(self, length_normalised: bool = False, beta: float = 1.0) -> None:
        self.length_normalised, self.beta = length_normalised, beta

    def arguments(self) -> dict[str, Any]:
        return {"length_normalised": self.length_normalised, "beta": self.beta}

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        self.tokens = TokenScorer(model, self.max_tokens)
        self.forward = self.tokens.forward

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        total = self.tokens(batch["input_ids"], batch["mask"]).logprobs.sum(-1)
        if self.length_normalised:
            total = total / batch["mask"].sum(-1).clamp(min=1)
        return self.beta * total


class ImplicitReward(Scorer):
    """beta · Σ (log π − log π_reference) of the response tokens: with the Bradley-Terry loss this is DPO.

    The reward that a policy implies (arXiv 2305.18290, eq. 5, without the term that both sides of a pair share).

    Args:
        beta: weight of the distance from the reference. reference: model folder to measure from; by default the model
            that the stage starts from.
    """

    task = "CAUSAL_LM"

    def __init__(self, beta: float = 0.1, reference: str | None = None) -> None:
        self.beta, self.reference = beta, reference

    def arguments(self) -> dict[str, Any]:
        return {"beta": self.beta, "reference": self.reference}

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        self.tokens = TokenScorer(model, self.max_tokens)
        self.forward = self.tokens.forward
        if self.reference is None:
            self.frozen = Reference(model, fresh_adapter, self.max_tokens)
        else:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            self.frozen = Reference.of(load_for_scoring(self.reference, self.task, dtype), self.max_tokens)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        assert isinstance(self.frozen, Reference)
        reference = self.frozen.logprobs(batch["input_ids"], batch["mask"])
        logprobs = self.tokens(batch["input_ids"], batch["mask"]).logprobs
        return self.beta * (logprobs - reference).sum(-1)


class RewardHead(Scorer):
    """A scalar head on the last hidden state, read at the last real token.

    The head has no bias and starts at std 1/sqrt(hidden + 1) (Stiennon et al., arXiv 2009.01325). What is saved opens
    with `AutoModelForSequenceClassification` and gives the same number.
    """

    task = "SEQ_CLS"

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        base = base_of(model)
        self.backbone = base.base_model
        self.head = _head(base)
        self.forward = Forward(model, self.backbone, self.max_tokens)
        # Stock pooling looks for the last token that is not padding: that must not be one that ends a response.
        pad = pad_token(tokenizer, stop_token_ids)
        tokenizer.pad_token = pad
        base.config.get_text_config().pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
        rows = base.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token_id >= rows:
            base.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch["mask"]
        places = torch.arange(ids.shape[1], device=ids.device)
        last_token = places == batch["lengths"][:, None] - 1
        hidden = self.forward(ids, last_token, prefix_lengths(mask))
        last = hidden.states[hidden.rows.argsort()]
        with torch.autocast(last.device.type, enabled=False):
            parameter = next(self.head.parameters())
            return self.head(last.to(parameter.dtype)).squeeze(-1).to(torch.promote_types(last.dtype, torch.float32))


def _head(model: Any) -> nn.Module:
    for name in ("score", "classifier", "classification_head"):
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise ConfigError(f"{type(model).__name__} has no score head that is known; use SequenceLogprob as the scorer")


def init_head(model: Any) -> None:
    """A new score head: weights of std 1/sqrt(hidden + 1), no bias."""
    head = _head(base_of(model))
    # Under peft the head is there twice, as loaded and as trained: both get the same weights.
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    nn.init.normal_(layers[0].weight, std=(layers[0].in_features + 1) ** -0.5)
    for layer in layers:
        layer.load_state_dict({"weight": layers[0].weight}, strict=False)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def pad_token(tokenizer: Any, stop_token_ids: Sequence[int]) -> str:
    """A token to pad with that never ends a response; added to the tokenizer where it has none."""
    candidates = [tokenizer.pad_token, tokenizer.unk_token]
    special = sorted(tokenizer.added_tokens_decoder.items())
    candidates += [str(token) for _, token in special if token.special and "pad" in str(token).lower()]
    candidates += [str(token) for _, token in special if str(token) == "<|endoftext|>"]
    for token in candidates:
        if token and tokenizer.convert_tokens_to_ids(token) not in stop_token_ids:
            return token
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    log.info("the tokenizer has no padding token apart from its stop tokens; <|pad|> was added")
    return "<|pad|>"


def scorer_of(folder: Any) -> Scorer:
    """The scorer that a saved preference model was trained with; `RewardHead` for any other reward model folder."""
    from importlib import import_module

    settings = read_stage(folder).get("scorer")
    if settings is None:
        return RewardHead()
    module, _, name = settings["class_path"].rpartition(".")
    found = getattr(import_module(module), name, None)
    # A model folder may come from anyone: nothing but a scorer is called.
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise ConfigError(f"stage.json of {folder} names {settings['class_path']!r} as its scorer, which is none")
    return found(**settings["init_args"])
