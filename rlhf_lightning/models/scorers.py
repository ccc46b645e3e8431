"""Scorers: what number a (prompt, response) gets. The same object scores in training, by hand and as an RL reward."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.heads import find_head, pad_token
from rlhf_lightning.models.loading import check_vocabulary, load_for_scoring, read_stage
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.token_logprobs import TokenLogprobs


class Scored(NamedTuple):
    """What a scorer knows of rows: `scores` `[N]`, and where it computes them the log-probabilities behind them."""

    scores: Tensor
    logprobs: Tensor | None = None
    """Of each token of the response, `[N, T]`, nats."""
    reference_logprobs: Tensor | None = None
    """Likewise, by the reference."""
    reference_scores: Tensor | None = None
    """What the reference takes from each score, `[N]`."""


class Scorer(ABC):
    """A way to score rows of tokens, `input_ids` and `loss_mask` `[N, T]` (mask 1 on the response), `lengths` `[N]`."""

    task: str
    """`CAUSAL_LM` or `SEQ_CLS`: which Hugging Face class the model is."""
    max_tokens: int | None = None
    """Computed at once by the model, see `PackedForward`; set before `bind`."""
    packed_forward: PackedForward
    """What runs the model; there after `bind`."""
    frozen: nn.Module | None = None
    """A model that it needs beside; whoever binds it registers that, so that it goes to the same device."""
    provides: tuple[str, ...] = ("lengths",)
    """Of the tensors that a loss may ask for by name, those that this scorer's `detailed` allows."""

    @abstractmethod
    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        """Take the model that is to score; called once, after loading. A fresh adapter is still the identity."""

    @abstractmethod
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Scores `[N]`, float32 or wider."""

    def detailed(self, batch: dict[str, Any]) -> Scored:
        """Scores, and what they were made of."""
        return Scored(self(batch))

    def settings(self) -> dict[str, Any]:
        """What `stage.json` keeps to build the scorer again."""
        return {"name": _name(type(self)), "init_args": self.arguments()}

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}


class _LogprobScorer(Scorer):
    """What scorers by log-probabilities share: from those of tokens to a number for the response."""

    task = "CAUSAL_LM"

    def __init__(self, beta: float, length_normalized: bool, tail_weight: float) -> None:
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be above 0")
        if not 0 <= tail_weight <= 1:
            raise ValueError(f"tail_weight is {tail_weight}; it must be in [0, 1]")
        self.beta, self.length_normalized, self.tail_weight = beta, length_normalized, tail_weight

    def arguments(self) -> dict[str, Any]:
        names = ("beta", "length_normalized", "tail_weight")
        return {name: getattr(self, name) for name in names}

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        self.token_logprobs = TokenLogprobs(model, self.max_tokens)
        self.packed_forward = self.token_logprobs.packed_forward

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        return self.detailed(batch).scores

    def number(self, logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
        """beta times the sum (or mean) of `[N, T]`; tokens past `shared_lengths` `[N]`, if given, by `tail_weight`."""
        loss_mask = batch["loss_mask"]
        if self.tail_weight != 1 and "shared_lengths" in batch:
            tail = loss_mask.cumsum(-1) > batch["shared_lengths"][:, None]
            logprobs = torch.where(tail, self.tail_weight * logprobs, logprobs)
        total = logprobs.sum(-1)
        return self.beta * (total / loss_mask.sum(-1).clamp(min=1) if self.length_normalized else total)


class SequenceLogprob(_LogprobScorer):
    """beta · Σ log π of the response tokens, stop token included; the mean instead of the sum if length_normalized.

    With the Bradley-Terry loss: the preference model of the MinT recipe; normalized, with beta 2 and the SimPO loss,
    SimPO (arXiv 2405.14734). Summed log-probabilities favor short answers.

    Args:
        length_normalized: the mean over tokens in place of the sum.
        beta: factor of the score.
        tail_weight: of the tokens of a pair's longer response that are past the length of the shorter one.
    """

    provides = ("lengths", "logps", "beta")

    def __init__(self, length_normalized: bool = False, beta: float = 1.0, tail_weight: float = 1.0) -> None:
        super().__init__(beta, length_normalized, tail_weight)

    def detailed(self, batch: dict[str, Any]) -> Scored:
        logprobs = self.token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
        return Scored(self.number(logprobs, batch), logprobs)


class ImplicitReward(_LogprobScorer):
    """beta · Σ (log π − log π_reference) of the response tokens: with the Bradley-Terry loss this is DPO.

    The reward that a policy implies (arXiv 2305.18290, eq. 5, without the term that both sides of a pair share).

    Args:
        beta: weight of the distance from the reference.
        reference: model folder to measure from; by default the model that the stage starts from.
        length_normalized: the mean over tokens in place of the sum; beta is then larger, 1 to 10.
        tail_weight: of the tokens of a pair's longer response that are past the length of the shorter one; below 1 it
            is length-desensitized DPO (arXiv 2409.06411).
        store: compute the reference's log-probabilities once, before training, and keep them in a file beside the data
            for this and later runs; the reference then needs no memory in training.
    """

    provides = ("lengths", "logps", "reference_scores", "kl", "beta")

    def __init__(
        self,
        beta: float = 0.1,
        reference: str | None = None,
        length_normalized: bool = False,
        tail_weight: float = 1.0,
        store: bool = False,
    ) -> None:
        super().__init__(beta, length_normalized, tail_weight)
        self.reference, self.store = reference, store

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "reference": self.reference}

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        super().bind(model, tokenizer, stop_token_ids, fresh_adapter)
        if self.reference is None:
            self.frozen = Reference(model, fresh_adapter, self.max_tokens)
        else:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            reference = load_for_scoring(self.reference, self.task, dtype)
            check_vocabulary(reference, tokenizer, f"the reference {self.reference}")
            self.frozen = Reference.of(reference, self.max_tokens)

    def detailed(self, batch: dict[str, Any]) -> Scored:
        reference = batch.get("reference_logprobs")
        if reference is None:
            reference = self.reference_logprobs(batch)
        logprobs = self.token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
        reference = reference.to(logprobs.dtype)
        scores = self.number(logprobs - reference, batch)
        return Scored(scores, logprobs, reference, self.number(reference, batch))

    def reference_logprobs(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of response tokens by the reference, `[N, T]`, nats."""
        if not isinstance(self.frozen, Reference):
            raise ConfigError(
                "the reference was let go when its log-probabilities had been stored (scorer.store), and these rows "
                "are others: score them with the saved model folder"
            )
        return self.frozen.logprobs(batch["input_ids"], batch["loss_mask"])

    def release(self) -> None:
        """Let a reference go that has a copy of the weights; its stored log-probabilities are used from now on."""
        if isinstance(self.frozen, Reference) and self.frozen.copy is not None:
            self.frozen = None


class RewardHead(Scorer):
    """A scalar head on the last hidden state, read at the last real token.

    The head has no bias and starts at std 1/sqrt(hidden + 1) (Stiennon et al., arXiv 2009.01325). What is saved opens
    with `AutoModelForSequenceClassification` and gives the same number.

    Args:
        last_k: the mean of the score over so many last tokens of the response. Stock libraries read the last one only:
            with more than 1 the folder gives its number through `rlhf score` and as a reward, not through them.
    """

    task = "SEQ_CLS"

    def __init__(self, last_k: int = 1) -> None:
        if last_k < 1:
            raise ValueError(f"last_k is {last_k}; it must be at least 1")
        self.last_k = last_k

    def arguments(self) -> dict[str, Any]:
        return {"last_k": self.last_k}

    def bind(self, model: Any, tokenizer: Any, stop_token_ids: Sequence[int], fresh_adapter: bool = False) -> None:
        base = base_of(model)
        self.backbone = base.base_model
        self.head = find_head(base)
        if next(self.head.parameters()).dtype in NARROW:
            self.head.float()
        self.packed_forward = PackedForward(model, self.backbone, self.max_tokens)
        # Stock pooling looks for the last token that is not padding: that must not be one that ends a response.
        pad = pad_token(tokenizer, stop_token_ids)
        tokenizer.pad_token = pad
        base.config.get_text_config().pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
        rows = base.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token_id >= rows:
            base.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        return run_unsharded(self.packed_forward.model, self._scores, batch)

    def _scores(self, batch: dict[str, Any]) -> Tensor:
        ids, loss_mask, ends = batch["input_ids"], batch["loss_mask"], batch["lengths"][:, None]
        places = torch.arange(ids.shape[1], device=ids.device)
        read = places == ends - 1
        if self.last_k > 1:
            read |= (places < ends) & (places >= ends - self.last_k) & (loss_mask != 0)
        hidden = self.packed_forward(ids, read, prefix_lengths(loss_mask))
        with torch.autocast(hidden.states.device.type, enabled=False):
            found = run_unsharded(self.head, self._read, hidden.states)
            found = found.to(torch.promote_types(hidden.states.dtype, torch.float32))
        if self.last_k == 1:
            return found[hidden.rows.argsort()]
        grid = found.new_zeros(read.shape).index_put((hidden.rows, hidden.columns), found)
        return grid.sum(-1) / read.sum(-1)

    def _read(self, states: Tensor) -> Tensor:
        return self.head(states.to(next(self.head.parameters()).dtype)).squeeze(-1)


def scorer_of(folder: Any) -> Scorer:
    """The scorer that a saved preference model was trained with; `RewardHead` for any other reward model folder.

    A folder may come from anyone, so its name imports nothing: it is one of this module, or a class of the user's that
    the user's command or code has imported before.

    Raises:
        ConfigError: another name, or arguments that the scorer does not take.
    """
    stage = read_stage(folder)
    settings = stage.get("scorer")
    if settings is None:
        return RewardHead()
    if not (isinstance(settings, dict) and isinstance(settings.get("name"), str)):
        raise ConfigError(f"stage.json of {folder}: its scorer is {settings!r}, which names no class")
    name, arguments = settings["name"], settings.get("init_args")
    known = {_name(found): found for found in _subclasses(Scorer)}  # type: ignore[type-abstract]
    if name not in known:
        raise ConfigError(
            f"stage.json of {folder} names the scorer {name!r}, which is none of rlhf-lightning, and is not imported "
            "because a folder says so. If it is your own class, name it: --scorer of the command, scorer of the reward "
            "(init_args), or an import before in Python"
        )
    try:
        arguments = dict(arguments or {})
        if arguments.get("reference"):
            arguments["reference"] = _reference_of(Path(folder), arguments["reference"], stage.get("reference"))
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stage.json of {folder}: the scorer {name} cannot be made: {error}") from None


def _name(scorer: type[Scorer]) -> str:
    """What `stage.json` calls a scorer: one of this module by its plain name."""
    own = scorer.__module__ == __name__
    return scorer.__qualname__ if own else f"{scorer.__module__}.{scorer.__qualname__}"


def _subclasses(of: type[Scorer]) -> Iterator[type[Scorer]]:
    for found in of.__subclasses__():
        if not found.__name__.startswith("_"):
            yield found
        yield from _subclasses(found)


def _reference_of(folder: Path, named: str, relative: str | None) -> str:
    """Where the reference of a model folder is: beside it, if the run was moved or copied, else where it was."""
    beside = (folder / relative).resolve() if relative else None
    found = str(beside) if beside is not None and beside.is_dir() else named
    if Path(found).is_dir():
        if Path(found).resolve() == folder.resolve():
            raise ConfigError(
                f"{folder} names itself as its reference: every score would be 0. Name the model before it."
            )
        return found
    return _downloaded(folder, found)


def _downloaded(folder: Path, name: str) -> str:
    """The place of a Hub's model on this machine: the Hub is not asked for one that only a folder names."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:  # a path that is not there
            break
        if isinstance(found, str):
            return str(Path(found).parent)
    remedy = f"If you trust it: hf download {name}" if name.count("/") == 1 else "Restore it, or the run it was in."
    raise ConfigError(
        f"stage.json of {folder} names the reference {name!r}, which is not on this machine, and the Hub is not asked "
        f"because a folder says so. {remedy}"
    )
