"""Scorers give responses a score. The same object scores in training, in user code, and as a reward in RL."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.distributed import even_chunks, safe_point
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import MODEL_CONFIGS, read_stage, real_path
from rlhf_lightning.models.heads import check_head, find_head, pad_token
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.precision import NARROW
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.settings import Settings, arguments
from rlhf_lightning.types import JSON, PreferenceTokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scored(NamedTuple):
    """Scores of N rows, and the log-probabilities that they were computed from, if any.

    Attributes:
        scores: `[N]`.

    Example:
        >>> Scored(torch.tensor([0.5, -0.5])).logprobs is None
        True
    """

    scores: Tensor
    logprobs: Tensor | None = None
    """Log-probability of each response token, in nats, `[N, T]`."""
    reference_logprobs: Tensor | None = None
    """Log-probability of each response token under the reference, in nats, `[N, T]`."""
    reference_scores: Tensor | None = None
    """The reference's part of each score, `[N]`."""


class ScorerRecord(TypedDict):
    """A scorer in `stage.json`."""

    name: str
    """Its class."""
    init_args: dict[str, JSON]
    """The arguments of its constructor."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, and other inputs for building a scorer.

    Args:
        model: A Hugging Face model of the scorer's `task`, or a `PeftModel` around one.
        tokenizer: Its tokenizer.
        stop_token_ids: Ids that end a response.
        max_tokens_per_batch: Number of tokens that the model computes at once, see `PackedForward`.
        reference: The reference, for a scorer that requires one.

    Example:
        ```python
        loaded = LoadedModel(model, tokenizer, stop_token_ids=[tokenizer.eos_token_id])
        scores = SequenceLogprob().build(loaded)(batch)  # [N]
        ```
    """

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    stop_token_ids: Sequence[int]
    max_tokens_per_batch: int | None = None
    reference: Reference | None = None


class ModelScorer(ABC):
    """A scorer with its model; the result of `Scorer.build`.

    A batch has `input_ids` and `loss_mask`, `[N, T]`, with mask 1 on the response, and `lengths`, `[N]`.

    Args:
        packed_forward: The packed forward that runs the model.
        reference: The reference, if the scorer requires one.

    Example:
        ```python
        class LastLogprobScores(ModelScorer):
            def __init__(self, loaded):
                self.token_logprobs = TokenLogprobs(loaded.model, loaded.max_tokens_per_batch)
                super().__init__(self.token_logprobs.packed_forward)

            def __call__(self, batch):
                logprobs = self.token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
                return logprobs.gather(1, batch["lengths"][:, None] - 1).squeeze(1)
        ```
    """

    head: nn.Module | None = None
    """The score head, if there is one; it stays in float32."""

    def __init__(self, packed_forward: PackedForward, reference: Reference | None = None) -> None:
        self.packed_forward, self.reference = packed_forward, reference

    @abstractmethod
    def __call__(self, batch: PreferenceTokens) -> Tensor:
        """Scores of a batch, `[N]`, float32 or wider."""

    def detailed(self, batch: PreferenceTokens) -> Scored:
        """Scores, and the log-probabilities that they were computed from."""
        return Scored(self(batch))

    def reference_logprobs(self, batch: PreferenceTokens) -> Tensor:
        """The reference's log-probabilities of the response tokens, in nats, `[N, T]`.

        Raises:
            ConfigError: If there is no reference, or it was released.
        """
        if self.reference is None:
            raise ConfigError(
                "the reference was released after its log-probabilities were stored (scorer.store), but these rows "
                "were not stored; score them with the saved model folder"
            )
        return self.reference.logprobs(batch["input_ids"], batch["loss_mask"])

    def release_reference(self) -> None:
        """Release the reference and its memory, once its log-probabilities are stored."""
        self.reference = None


class Scorer(Settings, ABC):
    """Base class of the settings of scorers; `build` makes the `ModelScorer`.

    The arguments of the constructor must be plain values, because `stage.json` stores them.

    Example:
        ```python
        class LastLogprob(Scorer):  # the log-probability of the last token
            task = "CAUSAL_LM"

            def build(self, loaded):
                return LastLogprobScores(loaded)  # see ModelScorer
        ```
    """

    task: str
    """Kind of the Hugging Face model: `CAUSAL_LM` or `SEQ_CLS`."""
    requires: tuple[str, ...] = ()
    """Requirements: `head` for a score head, `reference` for a reference model."""
    provides: tuple[str, ...] = ("lengths",)
    """Names of the tensors that `ModelScorer.detailed` provides to losses."""
    beta: float | None = None
    """Factor of the log-probabilities, if the score is computed from them."""
    length_normalized = False
    """True if the score is a mean over tokens instead of a sum."""
    tail_weight = 1.0
    """Weight of the tokens of a pair's longer response past the length of the shorter one."""
    reference: str | None = None
    """Model folder of the reference; None for the model that the stage starts from."""
    store = False
    """True if the reference's log-probabilities are stored before training."""

    @abstractmethod
    def build(self, loaded: LoadedModel) -> ModelScorer:
        """Make the scorer with a model; called once, after the model is loaded.

        Args:
            loaded: The model, and the inputs that `requires` lists.
        """

    def settings(self) -> ScorerRecord:
        """The record in `stage.json` from which the scorer can be built again."""
        return {"name": _name(type(self)), "init_args": arguments(self)}


class _LogprobScorer(Scorer):
    """Common settings of the scorers that sum token log-probabilities."""

    task = "CAUSAL_LM"
    beta: float

    def __init__(self, beta: float, length_normalized: bool, tail_weight: float) -> None:
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be above 0")
        if not 0 <= tail_weight <= 1:
            raise ValueError(f"tail_weight is {tail_weight}; it must be in [0, 1]")
        self.beta, self.length_normalized, self.tail_weight = beta, length_normalized, tail_weight

    def build(self, loaded: LoadedModel) -> ModelScorer:
        return LogprobScores(self, loaded)


class SequenceLogprob(_LogprobScorer):
    """beta · Σ_t log π over the response, including its stop token; the mean instead of the sum if `length_normalized`.

    With the Bradley-Terry loss this is the preference model of the MinT recipe. Normalized, with beta 2 and the SimPO
    loss, it is SimPO (arXiv 2405.14734). Summed log-probabilities favor short responses.

    Args:
        length_normalized: Use the mean over tokens instead of the sum.
        beta: Factor of the score, above 0.
        tail_weight: Weight, in [0, 1], of the tokens of a pair's longer response past the length of the shorter one.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> SequenceLogprob(length_normalized=True, beta=2.0).provides
        ('lengths', 'logps', 'beta')
    """

    provides = ("lengths", "logps", "beta")

    def __init__(self, length_normalized: bool = False, beta: float = 1.0, tail_weight: float = 1.0) -> None:
        super().__init__(beta, length_normalized, tail_weight)


class ImplicitReward(_LogprobScorer):
    """beta · Σ_t (log π − log π_reference) over the response; with the Bradley-Terry loss this is DPO.

    This is the reward that a policy implies, without the term that is equal for both responses of a pair. Source: DPO,
    arXiv 2305.18290, eq. 5.

    Args:
        beta: Factor of the log-ratio, above 0. A larger beta keeps the policy closer to the reference.
        reference: Model folder of the reference; by default the model that the stage starts from.
        length_normalized: Use the mean over tokens instead of the sum; beta is then larger, 1 to 10.
        tail_weight: Weight, in [0, 1], of the tokens of a pair's longer response past the length of the shorter one;
            below 1 this is length-desensitized DPO (arXiv 2409.06411).
        store: Compute the log-probabilities of the reference once before training, and store them in a file next to the
            data for this and later runs. The reference then takes no memory in training.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> scorer = ImplicitReward(beta=0.1, store=True)
        >>> scorer.requires
        ('reference',)
    """

    requires = ("reference",)
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


class LogprobScores(ModelScorer):
    """Sums of token log-probabilities or, with a reference, of their differences from those of the reference.

    Args:
        scorer: The settings; they determine whether a reference is needed.
        loaded: The model, and the reference.
    """

    def __init__(self, scorer: _LogprobScorer, loaded: LoadedModel) -> None:
        self.scorer, self.token_logprobs = scorer, TokenLogprobs(loaded.model, loaded.max_tokens_per_batch)
        super().__init__(self.token_logprobs.packed_forward, loaded.reference)

    def __call__(self, batch: PreferenceTokens) -> Tensor:
        return self.detailed(batch).scores

    def detailed(self, batch: PreferenceTokens) -> Scored:
        """Scores, the log-probabilities that they were computed from, and the reference's part of each score."""
        if "reference" not in self.scorer.requires:
            logprobs = self.token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
            return Scored(self._score(logprobs, batch), logprobs)
        reference = batch["reference_logprobs"] if "reference_logprobs" in batch else self.reference_logprobs(batch)
        logprobs = self.token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs
        reference = reference.to(logprobs.dtype)
        scores = self._score(logprobs - reference, batch)
        return Scored(scores, logprobs, reference, self._score(reference, batch))

    def _score(self, logprobs: Tensor, batch: PreferenceTokens) -> Tensor:
        """Reduce token log-probabilities to a score per row: beta times their sum or mean.

        Args:
            logprobs: In nats, `[N, T]`, 0 outside the response.
            batch: A batch. If it has `shared_lengths` `[N]`, `tail_weight` applies after that number of response
                tokens.
        """
        loss_mask, scorer = batch["loss_mask"], self.scorer
        if scorer.tail_weight != 1 and "shared_lengths" in batch:
            tail = loss_mask.cumsum(-1) > batch["shared_lengths"][:, None]
            logprobs = torch.where(tail, scorer.tail_weight * logprobs, logprobs)
        total = logprobs.sum(-1)
        return scorer.beta * (total / loss_mask.sum(-1).clamp(min=1) if scorer.length_normalized else total)


class RewardHead(Scorer):
    """A scalar head on the last hidden state, read at the last non-padding token.

    The head has no bias and is initialized with standard deviation 1/√(hidden + 1) (Stiennon et al., arXiv 2009.01325).
    The saved folder loads with `AutoModelForSequenceClassification` and gives the same score.

    Args:
        last_k: Number of last tokens of the response over which the score is averaged. Stock libraries read only the
            last token, so above 1 only `rlhf score` and rewards give the right score.

    Raises:
        ValueError: If `last_k` is below 1.

    Example:
        >>> RewardHead().settings()
        {'name': 'RewardHead', 'init_args': {'last_k': 1}}
    """

    task = "SEQ_CLS"
    requires = ("head",)

    def __init__(self, last_k: int = 1) -> None:
        if last_k < 1:
            raise ValueError(f"last_k is {last_k}; it must be at least 1")
        self.last_k = last_k

    def build(self, loaded: LoadedModel) -> ModelScorer:
        return HeadScores(loaded, self.last_k)


class HeadScores(ModelScorer):
    """Scores of a score head at the last tokens of the response.

    Args:
        loaded: The model.
        last_k: See `RewardHead`.
    """

    head: nn.Module

    def __init__(self, loaded: LoadedModel, last_k: int) -> None:
        base, tokenizer = base_of(loaded.model), loaded.tokenizer
        check_head(base)
        super().__init__(PackedForward(loaded.model, base.base_model, loaded.max_tokens_per_batch))
        self.head, self.last_k = find_head(base), last_k
        if next(self.head.parameters()).dtype in NARROW:
            self.head.float()
        # Stock pooling reads the last token that is not padding, so the padding token must not end responses.
        tokenizer.pad_token = pad_token(tokenizer, loaded.stop_token_ids)
        base.config.get_text_config().pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
        rows = base.get_input_embeddings().weight.shape[0]
        if tokenizer.pad_token_id >= rows:
            base.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)

    def __call__(self, batch: PreferenceTokens) -> Tensor:
        return run_unsharded(self.packed_forward.model, self._scores, batch)

    def _scores(self, batch: PreferenceTokens) -> Tensor:
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
        scores: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return scores.squeeze(-1)


def padded(ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], device: torch.device) -> PreferenceTokens:
    """Make a batch for a scorer.

    Args:
        ids: Token ids of each row.
        masks: 1 on the response, 0 elsewhere, for each row.
        device: Device of the model.
    """
    tokens = pad_tokens(ids, masks, pad_id=0)
    return {
        "input_ids": tokens["input_ids"].to(device),
        "loss_mask": tokens["loss_mask"].to(device),
        "lengths": tokens["lengths"].to(device),
    }


def by_length(ids: Sequence[Sequence[int]]) -> list[int]:
    """Indices of rows in the order of their lengths."""
    return sorted(range(len(ids)), key=lambda i: len(ids[i]))


def padded_batches(
    ids: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    size: int,
    device: torch.device,
    order: Sequence[int] | None = None,
    even: bool = False,
) -> Iterator[tuple[Sequence[int], PreferenceTokens]]:
    """Make batches of rows to score, each with the indices of its rows.

    Args:
        ids: Token ids of each row.
        masks: 1 on the tokens to score, 0 elsewhere, for each row.
        size: Number of rows per batch.
        device: Device of the model.
        order: Indices of the rows; by default all rows, ordered by length.
        even: Give every rank the same number of batches, because the forward passes may be collective. An empty batch
            is a row with mask 0.
    """
    order = by_length(ids) if order is None else order
    chunks = even_chunks(order, size) if even else (order[k : k + size] for k in range(0, len(order), size))
    for chunk in chunks:
        safe_point()
        yield chunk, padded([ids[i] for i in chunk] or [[0, 0]], [masks[i] for i in chunk] or [[0, 0]], device)


def scorer_of(folder: str | Path) -> Scorer:
    """The scorer that a saved preference model was trained with; `RewardHead` for any other reward model.

    A folder may come from an untrusted source, so the scorer's name never causes an import: it must be a class of this
    module, or a class that the user's command or code has already imported.

    Args:
        folder: Model folder.

    Raises:
        ConfigError: If the name is unknown, or the scorer does not accept the stored arguments.
    """
    settings = recorded_scorer(folder)
    if settings is None:
        return RewardHead()
    name = settings["name"]
    known = {_name(found): found for found in _subclasses(Scorer)}  # type: ignore[type-abstract]
    if name not in known:
        raise ConfigError(
            f"stage.json of {folder} names the scorer {name!r}, which is not part of rlhf-lightning. A folder may not "
            "cause an import. If it is your own class, give it with --scorer, in the reward's init_args (scorer), or "
            "import it before this call in Python"
        )
    given = dict(settings["init_args"])
    if "reference" in given:
        # A scorer without this argument uses the start of the stage as the reference.
        accepted = inspect.signature(known[name]).parameters
        given = {**given, "reference": recorded_reference(folder)}
        given = {key: value for key, value in given.items() if key != "reference" or key in accepted}
    try:
        return known[name](**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stage.json of {folder}: the scorer {name} cannot be built: {error}") from None


def recorded_reference(folder: str | Path) -> str | None:
    """Folder of the reference of a saved preference model; None if it names none.

    Args:
        folder: Model folder.

    Raises:
        ConfigError: If the folder names itself, or a reference that is not on this machine.
    """
    settings = recorded_scorer(folder)
    named = settings["init_args"].get("reference") if settings is not None else None
    if not named:
        return None
    relative = read_stage(folder).get("reference")
    return _reference_of(Path(folder), str(named), relative if isinstance(relative, str) else None)


def recorded_scorer(folder: str | Path) -> ScorerRecord | None:
    """The record of the scorer in a folder's `stage.json`; None if there is none.

    Args:
        folder: Model folder.

    Raises:
        ConfigError: If the record is damaged.
    """
    settings = read_stage(folder).get("scorer")
    if settings is None:
        return None
    name = settings.get("name") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(name, str):
        raise ConfigError(f"stage.json of {folder}: scorer is {settings!r}; it must have a name. Restore the file")
    init_args = settings.get("init_args") or {}
    if not isinstance(init_args, dict):
        raise ConfigError(
            f"stage.json of {folder}: init_args of the scorer {name} is {init_args!r}; it must be a mapping. Restore "
            "the file"
        )
    return {"name": name, "init_args": init_args}


def _name(scorer: type[Scorer]) -> str:
    """Name of a scorer in `stage.json`; the class name alone for scorers of this module."""
    own = scorer.__module__ == __name__
    return scorer.__qualname__ if own else f"{scorer.__module__}.{scorer.__qualname__}"


def _subclasses(of: type[Scorer]) -> Iterator[type[Scorer]]:
    """All public subclasses, recursively."""
    for found in of.__subclasses__():
        if not found.__name__.startswith("_"):
            yield found
        yield from _subclasses(found)


def _reference_of(folder: Path, named: str, relative: str | None) -> str:
    """Folder of a model's reference: the recorded path or, if the run was moved or copied, the relative path."""
    neighbor = real_path(folder / relative) if relative else None
    found = str(neighbor) if neighbor is not None and neighbor.is_dir() else named
    if Path(found).is_dir():
        if real_path(found) == real_path(folder):
            raise ConfigError(
                f"{folder} names itself as its reference, so every score would be 0; set the model that it was trained "
                "from"
            )
        return found
    return _downloaded(folder, found)


def _downloaded(folder: Path, name: str) -> str:
    """Local folder of a Hub model. A model that only a folder names is never downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in MODEL_CONFIGS:
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:  # a path that does not exist
            break
        if isinstance(found, str):
            return str(Path(found).parent)
    remedy = f"If you trust it: hf download {name}" if name.count("/") == 1 else "Restore that folder or its run"
    raise ConfigError(
        f"stage.json of {folder} names the reference {name!r}, which is not on this machine. A folder may "
        f"not cause a download. {remedy}"
    )
