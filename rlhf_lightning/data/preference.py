"""Data module for preference learning: pairs, labeled responses and rankings."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.data.base import RowDataModule
from rlhf_lightning.data.batching import pad_right, pad_tokens
from rlhf_lightning.data.cache import Extra, StoredExample
from rlhf_lightning.data.columns import SCORES, SYSTEM, TOOLS, refuse_weight
from rlhf_lightning.data.conversations import tool_schemas
from rlhf_lightning.data.preference_rows import (
    Labeled,
    Pair,
    PreferenceExample,
    Ranking,
    row_kind,
    split_labeled,
    split_pair,
    split_ranking,
)
from rlhf_lightning.data.records import RowError, Source
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.row_streams import Streaming
from rlhf_lightning.data.splits import Prepared, RowKey, conversation_key
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.errors import ConfigError, DataError, is_finite
from rlhf_lightning.objectives.preference.base import LabelLoss, PreferenceLoss
from rlhf_lightning.types import JSON, Message, PreferenceBatch, PreferenceTokens, Row

log = logging.getLogger(__name__)
KINDS = ("pairs", "labels", "rankings")


class PreferenceDataModule(RowDataModule[PreferenceExample, PreferenceBatch]):
    """Data module of pairs, labeled responses or rankings.

    - pairs: `prompt`, `chosen`, `rejected`, each a string or messages, and optionally `margin` and `tie`. Without
      `prompt`, `chosen` and `rejected` are whole conversations; their common beginning is the prompt.
    - labels: `prompt`, `response` (or `completion`), `label` (1 or 0). A pair becomes two labeled responses.
    - rankings: `prompt`, `responses`, and `scores` or `ranks`; without these, best first. A pair is a ranking of two.

    Any row may have `tools`, and a `category` by which accuracy is reported. A batch is a dict with `input_ids` and
    `loss_mask` `[N, T]`, `lengths` `[N]` and `weights` `[B]`; for pairs, the N = 2B rows are all chosen responses, then
    all rejected ones. Further arguments are those of `RowDataModule`.

    Args:
        train: Rows to train on.
        validation: Rows to validate on.
        overlong: What to do with rows above `max_length`: `error`, `truncate` (cuts the prompt on the left), or `skip`
            and count them.
        kind: `pairs`, `labels` or `rankings`; by default the kind that the module's loss needs.
        **kwargs: Arguments of `RowDataModule`.

    Raises:
        ConfigError: If `kind` is unknown, or differs from the kind that the loss needs.

    Example:
        >>> rows = [{"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}]
        >>> data = PreferenceDataModule(train=rows, max_length=1024)
        >>> data.kind
        'pairs'
    """

    stage_kind = "preference"

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        overlong: str = "error",
        kind: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, overlong=overlong, **kwargs)
        if kind not in (None, *KINDS):
            raise ConfigError(f"data.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        self._kind = kind
        self.category_names: list[str] = []
        self._worse: Counter[tuple[str, str]] = Counter()
        """Numbers of pairs in which the rejected response has the higher score, by the columns of the scores."""
        self._margins = False
        """True if rows have margins."""

    @property
    def loss(self) -> PreferenceLoss | None:
        """The loss of the trainer's module; None if there is none."""
        return getattr(self.trainer.lightning_module, "loss", None) if self.trainer is not None else None

    @property
    def kind(self) -> str:
        """Kind of the examples: `pairs`, `labels` or `rankings`.

        Raises:
            ConfigError: If the configured kind is not that of the loss.
        """
        wanted = getattr(self.loss, "kind", None)
        if self._kind and wanted and self._kind != wanted:
            raise ConfigError(
                f"data.kind is {self._kind}, but the loss {type(self.loss).__name__} needs {wanted}; change one of them"
            )
        return self._kind or wanted or "pairs"

    def stored(self, example: PreferenceExample) -> StoredExample:
        extra: Extra = {"category": example.category}
        if isinstance(example, Pair):
            extra |= {"margin": example.margin, "tie": example.tie}
        elif isinstance(example, Labeled):
            extra["label"] = example.label
        elif isinstance(example, Ranking):
            extra["ranks"] = [*example.ranks]
        return StoredExample(example.sides, extra, example.where)

    def restored(self, stored: StoredExample) -> PreferenceExample:
        sides, extra = stored.sides, stored.extra
        example: PreferenceExample
        if "ranks" in extra:
            example = Ranking(sides, extra["category"], extra["ranks"])
        elif "label" in extra:
            example = Labeled(sides, extra["category"], extra["label"])
        else:
            example = Pair(sides, extra["category"], extra["margin"], extra["tie"])
        example.where = stored.where
        return example

    def cache_facts(self) -> dict[str, JSON]:
        loss: JSON = None if self.loss is None else [type(self.loss).__qualname__, *sorted(self.loss.keywords())]
        return {**super().cache_facts(), "kind": self.kind, "loss": loss}

    def examples(self, name: str) -> Callable[[Row], Sequence[PreferenceExample]]:
        ways: dict[str, Callable[[Row], Sequence[PreferenceExample]]]
        ways = {"pairs": self._pair, "labels": self._labeled, "rankings": self._ranking}
        return ways[self.kind]

    def _prepare(self, name: str, required: bool) -> None:
        self._worse, self._margins = Counter(), False
        super()._prepare(name, required)
        for (chosen, rejected), count in self._worse.items() if name in self.prepared else ():
            log.warning("data.%s: %s is higher than %s in %d pairs", name, rejected, chosen, count)
        unused = self.kind != "pairs" or (self.loss is not None and "margin" not in self.loss.keywords())
        if self._margins and self.loss is not None and unused and name in self.prepared:
            log.warning("data.%s has margins, but the loss %s does not use them", name, type(self.loss).__name__)
        found = {
            category
            for prepared in self.prepared.values()
            for category in (
                [row.category for row in prepared.rows] if prepared.categories is None else prepared.categories
            )
        }
        self.category_names = sorted(category for category in found if category is not None)

    def _refuse_mismatched(self, setting: str) -> None:
        """Raise `ConfigError` if the loss needs all rows in memory."""
        if isinstance(self.loss, LabelLoss) and "mismatched" in self.loss.keywords():
            raise ConfigError(
                f"{type(self.loss).__name__} pairs each prompt with the response to another one, which needs all rows "
                f"in memory; leave out {setting}, or choose another loss"
            )

    def _cached(self, name: str, source: Source, folder: Path) -> Prepared[PreferenceExample]:
        self._refuse_mismatched("data.cache")
        return super()._cached(name, source, folder)

    def _open_stream(self, streaming: Streaming) -> TrainingStream[PreferenceExample]:
        self._refuse_mismatched("data.streaming")
        stream = super()._open_stream(streaming)
        # Rows with a category that the first rows do not have count in the total only.
        self.category_names = sorted({*self.category_names, *(row.category for row in stream.checked if row.category)})
        return stream

    def completed(self, name: str) -> None:
        if isinstance(self.loss, LabelLoss) and "mismatched" in self.loss.keywords():
            self._mismatch(name)
            if name == "train":
                self._check_balance()

    def key(self, data: Row) -> RowKey:
        kind, tools = row_kind(data), tool_schemas(data)
        if kind == "pairs":
            prompt, chosen, rejected = split_pair(data)
            return conversation_key(prompt, tools, [chosen, rejected])
        if kind == "labels":
            prompt, response, label = split_labeled(data)
            return conversation_key(prompt, tools, [response, label])
        prompt, responses, ranks = split_ranking(data)
        return conversation_key(prompt, tools, [responses, ranks])

    def used_columns(self, name: str, data: Row) -> set[str] | None:
        kind = row_kind(data)
        shape = {
            "pairs": ("chosen", "rejected", "margin", "tie", *chain(*SCORES)),
            "labels": ("response" if data.get("response") is not None else "completion", "label"),
            "rankings": ("responses", "scores", "ranks"),
        }
        return {"prompt", "category", *shape[kind], *SYSTEM, *TOOLS}

    # -- rows -----------------------------------------------------------------------------------------------------

    def _pair(self, data: Row) -> list[Pair]:
        if (found := row_kind(data)) != "pairs":
            raise RowError(
                f"the row has the columns of {found}, but pairs are needed; set model.loss to a loss for {found}"
            )
        refuse_weight(data)
        prompt, chosen, rejected = split_pair(data)
        if chosen == rejected:
            raise RowError("chosen equals rejected: there is nothing to prefer")
        sides = self._sides(data, prompt, {"chosen": chosen, "rejected": rejected})
        if sides[0].ids == sides[1].ids:
            raise RowError("chosen and rejected have the same tokens: there is nothing to prefer")
        margin, tie = data.get("margin"), data.get("tie")
        if margin is not None and not is_finite(margin):
            raise RowError(f"'margin' is {margin!r}; it must be a number")
        if tie is not None and not (isinstance(tie, bool) or tie in (0, 1)):
            raise RowError(f"'tie' is {tie!r}; it must be true or false")
        self._note_scores(data)
        if tie and self.loss is not None and "ties" not in self.loss.keywords():
            name = type(self.loss).__name__
            raise RowError(
                f"the pair is a tie, but {name} cannot learn from ties; use BradleyTerry, Davidson or RaoKupper"
            )
        return [Pair(sides, _category(data), float(margin) if is_finite(margin) else 0.0, bool(tie))]

    def _labeled(self, data: Row) -> list[Labeled]:
        if row_kind(data) == "pairs":
            refuse_weight(data)
            prompt, chosen, rejected = split_pair(data)
            if chosen == rejected:
                raise RowError("chosen equals rejected: there is nothing to prefer")
            if data.get("tie"):
                raise RowError("the pair is a tie: neither response can be labeled as the better one")
            self._note_scores(data)
            labeled = [(chosen, 1), (rejected, 0)]
        else:
            refuse_weight(data)
            prompt, response, label = split_labeled(data)
            labeled = [(response, label)]
        tools = tool_schemas(data)
        return [
            Labeled(
                self._sides(data, prompt, {"response": response}), _category(data), label, (prompt, response, tools)
            )
            for response, label in labeled
        ]

    def _ranking(self, data: Row) -> list[Ranking]:
        if row_kind(data) == "pairs":
            pair = self._pair(data)[0]
            return [Ranking(pair.sides, pair.category, [0, int(not pair.tie)])]
        refuse_weight(data)
        prompt, responses, ranks = split_ranking(data)
        sides = self._sides(data, prompt, {f"response {i}": response for i, response in enumerate(responses)})
        return [Ranking(sides, _category(data), ranks)]

    def _note_scores(self, data: Row) -> None:
        """Count pairs that contradict their scores, and record whether rows have margins."""
        for names in SCORES:
            chosen, rejected = (data.get(name) for name in names)
            if is_finite(chosen) and is_finite(rejected) and chosen < rejected and not data.get("tie"):
                self._worse[names] += 1
        self._margins = self._margins or bool(data.get("margin"))

    def _sides(self, data: Row, prompt: list[Message], responses: dict[str, list[Message]]) -> list[Rendered]:
        """Render all responses. If the longest is too long, its excess of tokens is cut off all prompts on the left."""
        tools, sides = tool_schemas(data), []
        for name, response in responses.items():
            try:
                self.renderer.refuse_lost(prompt + response, tools)
                sides.append(self.renderer.exchange(prompt, response, tools))
            except RowError as error:
                raise RowError(f"{name}: {error}") from None
        excess = max(side.tokens for side in sides) - self.max_length
        if not self.too_long(excess + self.max_length):
            return sides
        if excess >= min(side.loss_mask.index(1) - self._kept(side) for side in sides):
            self._truncated -= 1
            raise RowError(f"a response alone is longer than data.max_length {self.max_length}; raise it")
        return [self._without(side, excess) for side in sides]

    def _kept(self, side: Rendered) -> int:
        """Number of ids at the beginning that the tokenizer adds (bos_token); a shortened prompt keeps them."""
        begin = self.renderer.prefix_ids
        return len(begin) if side.ids[: len(begin)] == begin else 0

    def _without(self, side: Rendered, count: int) -> Rendered:
        """A side without `count` tokens at the beginning of its prompt."""
        start = self._kept(side)
        end = start + count
        return Rendered(
            side.ids[:start] + side.ids[end:], side.loss_mask[:start] + side.loss_mask[end:], side.text_bytes
        )

    def _mismatch(self, name: str) -> None:
        """Give each row a second side: its prompt with the response to the next prompt that differs.

        The partner is determined by the file, not by the batch, so that neither batch size nor ranks change the loss.
        """
        own = self._labels(name)
        rows = own
        prompts = [row.messages[0] for row in rows]
        if self.sources[name] is None and all(prompt == prompts[0] for prompt in prompts):
            rows = [*rows, *self._labels("train")]  # only one prompt was held out; the training rows have others
            prompts = [row.messages[0] for row in rows]
        if all(prompt == prompts[0] for prompt in prompts):
            loss = type(self.loss).__name__
            raise DataError(f"data.{name}: all rows have the same prompt, but {loss} needs different prompts")
        following = [0] * len(rows)
        partner = next(i for i in range(len(rows)) if prompts[i] != prompts[-1])
        for i in reversed(range(len(rows))):
            following[i] = partner
            if prompts[i - 1] != prompts[i]:
                partner = i
        for row, other in zip(own, following, strict=False):
            prompt, _, tools = row.messages
            side = self.renderer.exchange(prompt, rows[other].messages[1], tools)
            side = self._without(side, max(0, side.tokens - self.max_length))
            side.loss_mask[0] = 0
            row.sides = [row.sides[0], side]

    def _labels(self, name: str) -> list[Labeled]:
        """The labeled responses of a source."""
        return [row for row in self.prepared[name].rows if isinstance(row, Labeled)]

    def _check_balance(self) -> None:
        """Warn if the balance of the two labels is not as recommended for KTO (arXiv 2402.01306)."""
        labels = [row.label for row in self._labels("train")]
        good, bad = sum(labels), len(labels) - sum(labels)
        desirable, undesirable = (getattr(self.loss, name) for name in ("desirable_weight", "undesirable_weight"))
        ratio = desirable * good / max(undesirable * bad, 1e-9)
        if good and bad and not 1 <= ratio <= 4 / 3:
            log.warning(
                "%d desirable and %d undesirable rows have weights of %.2f to 1; 1 to 1.33 to 1 is recommended. Set "
                "model.loss.init_args.desirable_weight to %.2f, or undesirable_weight to %.2f",
                good,
                bad,
                ratio,
                undesirable * bad / good,
                desirable * good / bad,
            )

    # -- batches --------------------------------------------------------------------------------------------------

    def collate(self, rows: list[PreferenceExample], weights: list[float]) -> PreferenceBatch:
        if self.kind == "pairs":
            batch = _collate_pairs([row for row in rows if isinstance(row, Pair)], self.pad_id)
        elif self.kind == "labels":
            batch = _collate_labels([row for row in rows if isinstance(row, Labeled)], self.pad_id)
        else:
            batch = _collate_rankings([row for row in rows if isinstance(row, Ranking)], self.pad_id)
        if names := self.category_names:
            batch["category"] = torch.tensor(
                [names.index(row.category) if row.category in names else -1 for row in rows]
            )
            batch["category_names"] = names
        batch["weights"] = torch.tensor(weights)
        return batch


def _category(data: Row) -> str | None:
    value = data.get("category")
    if value is not None and not isinstance(value, str | int | bool):
        raise RowError(f"'category' is {value!r}; it must be text")
    return None if value is None else str(value)


def _tokens(sides: list[Rendered], references: list[list[float]] | None, pad_id: int) -> PreferenceTokens:
    """Pad the tokens of sides, with stored reference log-probabilities if there are any."""
    batch: PreferenceTokens = {**pad_tokens([side.ids for side in sides], [side.loss_mask for side in sides], pad_id)}
    if references is not None:
        batch["reference_logprobs"] = pad_right(references, 0.0, torch.float32)
    return batch


def _side(rows: Sequence[PreferenceExample], number: int) -> tuple[list[Rendered], list[list[float]] | None]:
    """Side `number` of each row, and its stored log-probabilities if all rows have them."""
    stored = [row.reference[number] for row in rows if row.reference is not None]
    return [row.sides[number] for row in rows], stored if len(stored) == len(rows) else None


def _collate_pairs(rows: list[Pair], pad_id: int) -> PreferenceBatch:
    (chosen, one), (rejected, other) = _side(rows, 0), _side(rows, 1)
    references = one + other if one is not None and other is not None else None
    return {
        **_tokens(chosen + rejected, references, pad_id),
        "margin": torch.tensor([row.margin for row in rows]),
        "ties": torch.tensor([float(row.tie) for row in rows]),
    }


def _collate_labels(rows: list[Labeled], pad_id: int) -> PreferenceBatch:
    batch: PreferenceBatch = {
        **_tokens(*_side(rows, 0), pad_id),
        "labels": torch.tensor([float(row.label) for row in rows]),
    }
    if all(len(row.sides) > 1 for row in rows):
        batch["mismatched"] = _tokens(*_side(rows, 1), pad_id)
    return batch


def _collate_rankings(rows: list[Ranking], pad_id: int) -> PreferenceBatch:
    sides = [side for row in rows for side in row.sides]
    stored = all(row.reference is not None for row in rows)
    references = [values for row in rows for values in row.reference or []] if stored else None
    return {
        **_tokens(sides, references, pad_id),
        "ranking": torch.tensor([i for i, row in enumerate(rows) for _ in row.sides]),
        "ranks": torch.tensor([rank for row in rows for rank in row.ranks]),
    }
