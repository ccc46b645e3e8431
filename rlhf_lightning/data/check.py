"""Checks a file of rows as a stage would read it: contents, errors and duplicates."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Required, TypeAlias, TypedDict

from rlhf_lightning.data.columns import refuse_unused_names
from rlhf_lightning.data.mixing import Mixture, inner_sources
from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.preference_rows import Pair, PreferenceExample, row_kind
from rlhf_lightning.data.prompts import Prompt, PromptDataModule
from rlhf_lightning.data.records import LocatedRow, Reading, RowError, SkippedRow, Source, rename_columns
from rlhf_lightning.data.rendering import Rendered, masked_pieces
from rlhf_lightning.data.response_starts import ResponseStarts, StartFigures
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.data.splits import RowKey, leaks
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import visible
from rlhf_lightning.types import JSON, Tokenizer

StageData: TypeAlias = SFTDataModule | PreferenceDataModule | PromptDataModule
Checkable: TypeAlias = Rendered | PreferenceExample | Prompt
MODULES: dict[str, type[StageData]] = {
    "sft": SFTDataModule,
    "preference": PreferenceDataModule,
    "prompts": PromptDataModule,
}
Key = tuple[tuple[int, ...], ...]


@dataclass
class Checked:
    """The result of checking one file.

    Attributes:
        source: The file.
        examples: Examples, each with the location of its row.
        bad: Bad rows: the location of each, and the reason.
        rows: Number of rows.
        blank: Number of blank lines.
        truncated: Number of rows that were truncated.
        openings: Comparison of the beginnings of answers with generation prompts.

    Example:
        >>> Checked("chats.jsonl", rows=3, bad=[("chats.jsonl:2", "no 'messages'")]).truncated
        0
    """

    source: str
    examples: list[tuple[str, Checkable]] = field(default_factory=list)
    keys: list[RowKey] = field(default_factory=list)
    """Keys of the rows that were converted to examples."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Rows that were left out as set by the user (`overlong: skip`), with the reason."""
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    """Count of each value type, per column."""
    unused: dict[str, None] = field(default_factory=dict)
    """Columns that are not used for rows of this kind."""
    rows: int = 0
    blank: int = 0
    truncated: int = 0
    openings: ResponseStarts = field(default_factory=ResponseStarts)


def data_module(kind: str, model: str, chat_template: str | None = None, **settings: Any) -> StageData:
    """Build the data module of a stage with a model's tokenizer, as `rlhf KIND fit` does.

    Args:
        kind: `sft`, `preference` or `prompts`.
        model: Model folder or Hub id.
        chat_template: File of a chat template that replaces the tokenizer's.
        **settings: Arguments of the data module.

    Raises:
        ConfigError: If there is no tokenizer, or a setting is not valid for this kind of data.
    """
    tokenizer = load_tokenizer(model, chat_template=chat_template)
    try:
        module = MODULES[kind](tokenizer=tokenizer, show_example=False, **settings)
    except TypeError as error:
        raise ConfigError(f"--kind {kind}: {str(error).rpartition('__init__() ')[2]}") from None
    module.start = model
    return module


def check(module: StageData, source: Source, split: str = "train", limit: int | None = None) -> Checked:
    """Read and render every row. Bad rows are collected, and do not stop the check.

    Args:
        module: The data module of a stage.
        source: The rows, or a mixture of sources.
        split: The split to read.
        limit: Number of rows to read of each source, for files larger than memory; by default all.

    Raises:
        DataError: If the file does not exist or cannot be read.
    """
    reading = Reading(unreadable=[])
    mixture = Mixture.of(source)
    found = Checked(str(source) if mixture is None else ", ".join(one.name for one in mixture.sources))
    rows: list[LocatedRow] = []
    for one in inner_sources(source):
        if limit is None:
            rows += module.read(one, split, reading)
        else:
            rows += islice(module.located(one, split, reading), min(limit, sys.maxsize))
    _choose_kind(module, rows)
    module._truncated = 0
    module.renderer.openings = found.openings
    used: set[str] = set()
    convert = module.converter("train", found.unused, used)
    for row in rows:
        for name, value in row.data.items():
            found.columns.setdefault(name, Counter())[_type(value)] += 1
        try:
            data = rename_columns(row, module.columns).data
            found.examples += [(row.where, example) for example in convert(data) if isinstance(example, Checkable)]
            key = module.key(data)
            key.where = row.where
            found.keys.append(key)
        except SkippedRow as error:
            found.skipped.append((row.where, str(error)))
        except RowError as error:
            found.bad.append((row.where, str(error)))
    module.renderer.openings = None
    refuse_unused_names(module.columns, used)
    found.bad = sorted([*(reading.unreadable or []), *found.bad], key=lambda item: _line(item[0]))
    found.rows, found.blank = len(rows) + len(reading.unreadable or []), reading.blank
    found.truncated = module._truncated
    return found


def _choose_kind(module: StageData, rows: Sequence[LocatedRow]) -> None:
    """Use the most frequent kind of rows, because there is no loss that determines the kind."""
    if isinstance(module, PreferenceDataModule) and module._kind is None and rows:
        module._kind = Counter(row_kind(row.data) for row in rows).most_common(1)[0][0]


def _line(where: str) -> int:
    """Line number or index in a row's location, for sorting."""
    digits = where.rstrip("]").replace("[", ":").rpartition(":")[2]
    return int(digits) if digits.isdigit() else 0


def _type(value: JSON) -> str:
    names = {str: "text", bool: "bool", int: "number", float: "number", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


class Overlap(TypedDict):
    """Validation rows that are also training rows."""

    rows: list[dict[str, str]]
    """Location of each row, as `where`, and of the equal training row, as `same_as`."""
    prompts: int
    """Number of rows whose prompt is in the training data."""


class Duplicates(TypedDict, total=False):
    """Rows that repeat earlier rows."""

    duplicates: list[dict[str, str]]
    reversed: list[dict[str, str]]
    """Pairs that prefer the response that an earlier one rejects."""
    repeated_prompts: int


class FileFigures(Duplicates, total=False):
    """Statistics of a file; the keys from `lengths` on exist only if the file has an example."""

    file: Required[str]
    rows: Required[int]
    examples: Required[int]
    blank_lines: Required[int]
    truncated: Required[int]
    skipped: Required[list[dict[str, str]]]
    bad: Required[list[dict[str, str]]]
    columns: Required[dict[str, dict[str, int]]]
    """Count of each value type, per column."""
    columns_not_used: Required[list[str]]
    lengths: dict[str, dict[str, float]]
    """Results of `statistics`, in tokens."""
    chosen_longer: float
    """Fraction of pairs whose chosen response is longer."""
    histogram: list[dict[str, int]]
    openings: StartFigures
    samples: list[dict[str, str]]


class Figures(FileFigures, total=False):
    """The output of `rlhf data check --json`."""

    kind: str
    model: str
    validation: FileFigures
    overlap: Overlap
    ok: bool


# -- report -----------------------------------------------------------------------------------------------------------


def report(found: Checked, tokenizer: Tokenizer, samples: int = 2) -> FileFigures:
    """Summarize a file as JSON values: rows, columns, tokens, duplicates, bad rows and rendered samples.

    Args:
        found: Result of `check`.
        tokenizer: The tokenizer.
        samples: Number of rendered samples.
    """
    examples = [example for _, example in found.examples]
    figures: FileFigures = {
        "file": found.source,
        "rows": found.rows,
        "examples": len(examples),
        "blank_lines": found.blank,
        "truncated": found.truncated,
        "skipped": [{"where": where, "reason": reason} for where, reason in found.skipped],
        "bad": [{"where": where, "reason": reason} for where, reason in found.bad],
        "columns": {name: dict(types) for name, types in found.columns.items()},
        "columns_not_used": list(found.unused),
    }
    if not examples:
        return figures
    lengths = {"tokens": [example.tokens for example in examples]}
    if not isinstance(examples[0], Prompt):
        lengths["trained"] = [example.trained for example in examples]
    if isinstance(examples[0], Pair):
        pairs = [example for example in examples if isinstance(example, Pair)]
        lengths["chosen"] = [pair.chosen.trained for pair in pairs]
        lengths["rejected"] = [pair.rejected.trained for pair in pairs]
        longer = sum(c > r for c, r in zip(lengths["chosen"], lengths["rejected"], strict=True))
        figures["chosen_longer"] = longer / len(examples)
    figures["lengths"] = {name: statistics(values) for name, values in lengths.items()}
    figures["histogram"] = histogram(lengths["tokens"])
    if found.openings.message:
        figures["openings"] = found.openings.figures()
    figures.update(duplicates(found))
    figures["samples"] = [
        {"where": where, "text": show(pieces(example, tokenizer))} for where, example in found.examples[:samples]
    ]
    return figures


def statistics(values: Sequence[int]) -> dict[str, float]:
    """Total, mean and quantiles (nearest rank) of lengths.

    Example:
        >>> statistics([1, 2, 3])["median"]
        2
    """
    ordered = sorted(values)

    def quantile(part: float) -> int:
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    return {
        "total": sum(ordered),
        "mean": sum(ordered) / len(ordered),
        "min": ordered[0],
        "median": quantile(0.5),
        "p95": quantile(0.95),
        "max": ordered[-1],
    }


def histogram(values: Sequence[int], bins: int = 10) -> list[dict[str, int]]:
    """Count lengths in bins of equal width; `from` and `to` are inclusive."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // bins))
    counts = Counter((value - low) // width for value in values)
    return [
        {"from": low + i * width, "to": low + (i + 1) * width - 1, "count": counts[i]}
        for i in range((high - low) // width + 1)
    ]


def duplicates(found: Checked) -> Duplicates:
    """Find rows with the same tokens as an earlier row, pairs that reverse an earlier pair, and repeated prompts."""
    first: dict[Key, str] = {}
    same, reversed_pairs = [], []
    for where, example in found.examples:
        key = _key(example)
        if key in first:
            same.append({"where": where, "same_as": first[key]})
            continue
        if isinstance(example, Pair) and not example.tie and (key[1], key[0]) in first:
            reversed_pairs.append({"where": where, "reverses": first[key[1], key[0]]})
        first[key] = where
    prompts = Counter(_prompt(example) for _, example in found.examples)
    repeated = sum(count - 1 for prompt, count in prompts.items() if prompt)
    if isinstance(found.examples[0][1], Pair):
        return {"duplicates": same, "reversed": reversed_pairs, "repeated_prompts": repeated}
    return {"duplicates": same, "repeated_prompts": repeated}


def overlap(train: Checked, validation: Checked) -> Overlap:
    """Find validation rows that are also in the training data, and count those with a prompt of the training data.

    Rows are compared by `RowDataModule.key`.
    """
    found = leaks(train.keys, validation.keys)
    return {"rows": [{"where": a, "same_as": b} for a, b in found.rows], "prompts": len(found.prompts)}


def _key(example: Checkable) -> Key:
    """The tokens of an example, and the position at which its response begins."""
    if isinstance(example, Prompt):
        return (tuple(example.ids),)
    sides = [example] if isinstance(example, Rendered) else example.sides
    return tuple((*side.ids, -1 - side.loss_mask.index(1)) for side in sides)


def _prompt(example: Checkable) -> tuple[int, ...]:
    """The ids before the first trained token; empty for plain text."""
    if isinstance(example, Prompt):
        return tuple(example.ids)
    side = example if isinstance(example, Rendered) else example.sides[0]
    return tuple(side.ids[: side.loss_mask.index(1)]) if side.loss_mask.index(1) > 1 else ()


def pieces(example: Checkable, tokenizer: Tokenizer) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Text of an example for display: for each side a name and pieces of text, each with a flag if it is trained."""
    if isinstance(example, Prompt):
        return [("", [(tokenizer.decode(example.ids, skip_special_tokens=False), False)])]
    if isinstance(example, Rendered):
        return [("", masked_pieces(tokenizer, example.ids, example.loss_mask))]
    names = (
        ["chosen", "rejected"] if isinstance(example, Pair) else [f"response {i}" for i in range(len(example.sides))]
    )
    return [
        (name, masked_pieces(tokenizer, side.ids, side.loss_mask))
        for name, side in zip(names, example.sides, strict=True)
    ]


def show(sides: list[tuple[str, list[tuple[str, bool]]]], marks: tuple[str, str] = ("⟦", "⟧")) -> str:
    """Text of an example with the trained pieces between `marks`; control characters are escaped."""
    lines = []
    for name, stretches in sides:
        text = "".join(f"{marks[0]}{visible(t)}{marks[1]}" if trained else visible(t) for t, trained in stretches)
        lines.append(f"{name}: {text}" if name else text)
    return "\n".join(lines)
