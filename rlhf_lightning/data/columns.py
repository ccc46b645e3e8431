"""Columns with a common meaning: each is used, or the row is refused. Nothing of a row is left out silently."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.tool_calls import short
from rlhf_lightning.errors import ConfigError

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
MARKS = ("trainable", "train", "training", "loss", "weight", "loss_weight")
"""What data sets call the mark of a message that is trained or not."""
WEIGHTS = ("weight", "loss_weight", "train", "trainable")
"""What they call the weight of a row, by which it cannot be learnt from more or less."""
UNUSABLE = ("train_detail", "training_detail", "tools", "functions", *MEDIA)
"""What a message holds that cannot be used there."""
OPENING = ("system", "developer")
"""Roles of a message that only stands first."""
PAIR_REMEDY = (
    "rlhf preference learns from it. To imitate the chosen answers, set columns: {completion: chosen} (with a "
    "'prompt'), or columns: {messages: chosen}"
)
LEARNT = (*WEIGHTS, "label", "margin", "tie", "score_chosen", "score_rejected")
"""What says how a row is learnt from, where rows are learnt from and not only asked."""
UNWANTED = (0, False, "0", "false", "undesirable")


def refuse_media(data: Mapping[str, Any]) -> None:
    """Raise `RowError` for images, audio and videos, which no model here is given, and for settings of a template."""
    if not is_empty(data.get("chat_template_kwargs")):
        raise RowError(
            "the row has 'chat_template_kwargs', and all rows are rendered alike: set data.template_kwargs, and leave "
            "the column out with columns: {chat_template_kwargs: null}"
        )
    refuse_misspelt(data, (*SYSTEM, *TOOLS, *MEDIA))
    for name in MEDIA:
        if not is_empty(data.get(name)):
            raise RowError(
                f"the row has {name!r}, and models here are given text only. Leave such rows out, or take the text "
                f"without it with columns: {{{name}: null}}"
            )


def refuse_misspelt(data: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `RowError` for `System` where `system` has a meaning: it would be used for nothing."""
    for column, value in data.items():
        name = column.strip().lower() if isinstance(column, str) else column
        if name != column and name in names and name not in data and not is_empty(value):
            raise RowError(
                f"the row has {column!r}, and {name!r} is what is read: map it with columns: {{{name}: {column!r}}}, "
                f"or leave it out with columns: {{{column!r}: null}}"
            )


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def noting_unused(
    module: Any, name: str, unused: dict[str, None], used: set[str] | None = None
) -> Callable[[dict[str, Any]], list[Any]]:
    """The function of a data module that makes examples of a row, which notes what of the row is not used.

    Args:
        module: the data module. name: of its source.
        unused: where the names of columns that hold something and are not used are noted.
        used: where those that are used are, for `refuse_unused_names`.
    """
    convert, mapped = module.examples(name), set((module.columns or {}).values())

    def noting(data: dict[str, Any]) -> list[Any]:
        refuse_media(data)
        if (names := module.used_columns(name, data)) is not None:
            refuse_misspelt(data, LEARNT)
            unused.update(dict.fromkeys(k for k, v in data.items() if k not in names | mapped and not is_empty(v)))
            if used is not None:
                used.update(names)
        return list(convert(data))

    return noting


def refuse_unused_names(columns: Mapping[str, str | None] | None, used: set[str]) -> None:
    """Raise `ConfigError` for a `columns:` mapping to a name that no row was read from.

    Args:
        columns: the mapping. used: the names that rows were read from; empty where all of them stay with a row.
    """
    known = {*used, *MEDIA, *MARKS, *WEIGHTS, "label"}  # these are looked at in every row
    for ours, theirs in (columns or {}).items():
        if used and theirs is not None and ours not in known:
            close = get_close_matches(ours, sorted(used), n=1)
            hint = f"did you mean {close[0]}?" if close else f"they are read from {', '.join(sorted(used))}"
            raise ConfigError(f"data.columns: {{{ours}: {theirs}}}: these rows are not read from {ours!r}; {hint}")


def with_system(data: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a row with the text of its `system` (`system_prompt`, `system_message`) column in front.

    Raises:
        RowError: the column is no text, or the messages begin with another system message.
    """
    column, text = _system(data)
    if not text:
        return messages
    if messages and messages[0]["role"] in OPENING:
        if str(messages[0]["content"]).strip() == text.strip():
            return messages
        raise RowError(
            f"the column {column!r} and the system message that the conversation begins with are not the same. Leave "
            f"one of them out; the column with columns: {{{column}: null}}"
        )
    return [{"role": "system", "content": text}, *messages]


def _system(data: Mapping[str, Any]) -> tuple[str, str]:
    found: dict[str, str] = {}
    for column in SYSTEM:
        value = data.get(column)
        if is_empty(value):
            continue
        if not isinstance(value, str):
            raise RowError(f"{column!r} is {short(value)}; it must be text")
        if value.strip():
            found[column] = value
    if len({text.strip() for text in found.values()}) > 1:
        raise RowError(f"the row has {' and '.join(map(repr, found))}, and they are not the same")
    return next(iter(found.items()), ("", ""))


def take_marks(message: dict[str, Any], where: str) -> None:
    """Bring the `MARKS` of a message to one key, `trainable`; raises `RowError` for what cannot be used either."""
    for name in UNUSABLE:
        if not is_empty(message.get(name)):
            help = ": it belongs into a column of the row" if name in TOOLS else ""
            raise RowError(f"{where} has {name!r}, which is not used there{help}")
    marks = set()
    for name in MARKS:
        if (value := message.pop(name, None)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            wanted = "0 (not trained) or 1" if name.endswith("weight") else "true or false"
            raise RowError(f"{where}: {name!r} must be {wanted}, this is {short(value)}")
        marks.add(bool(value))
    if len(marks) > 1:
        raise RowError(f"{where} is marked to be trained and not to be trained ({', '.join(MARKS)})")
    if marks:
        message["trainable"] = marks.pop()


def unmarked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a prompt, of which nothing is trained whatever their marks say."""
    return [{key: value for key, value in message.items() if key != "trainable"} for message in messages]


def refuse_untrained(messages: Sequence[dict[str, Any]], why: str) -> None:
    """Raise `RowError` for a turn that is marked not to be trained where no turn can be left out."""
    if any(message.get("trainable") is False for message in messages):
        raise RowError(f"a message is marked not to be trained (weight: 0, train: false), and {why}")


def refuse_unwanted(data: Mapping[str, Any]) -> None:
    """Raise `RowError` for a row that is not there to be imitated: a bad answer, a pair, one that is weighted."""
    refuse_weight(data)
    label = data.get("label")
    if isinstance(label, bool | int | float | str) and (label.lower() if isinstance(label, str) else label) in UNWANTED:
        raise RowError(
            f"'label' is {label!r}: an undesirable answer, which must not be imitated. Leave such rows out (or set "
            "data.on_bad_row: skip), or train on labels with rlhf preference. If the column means something else, "
            "leave it out with columns: {label: null}"
        )
    if not has_pair(data):
        return
    chosen = data["chosen"]
    if any(
        data.get(name) is chosen or data.get(name) == chosen for name in ("messages", "conversations", "completion")
    ):
        return
    raise RowError(f"the row has 'chosen' and 'rejected': {PAIR_REMEDY}")


def has_pair(data: Mapping[str, Any]) -> bool:
    """Whether a row has the two responses of preference data."""
    return not is_empty(data.get("chosen")) and not is_empty(data.get("rejected"))


def refuse_weight(data: Mapping[str, Any]) -> None:
    """Raise `RowError` for a weight of a whole row."""
    for name in WEIGHTS:
        value = data.get(name)
        if isinstance(value, str):  # as tables have them
            value = {"true": 1, "false": 0}.get(value.strip().lower(), _number(value))
        if isinstance(value, bool | int | float) and value != 1:
            raise RowError(
                f"the row has {name!r} {data[name]!r}, and rows have no weights: leave out those of weight 0, or the "
                f"column with columns: {{{name}: null}}"
            )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def refuse_beside_text(data: Mapping[str, Any]) -> None:
    """Raise `RowError` for what no template can put into a row of plain text."""
    for name in (*SYSTEM, *TOOLS):
        value = data.get(name)
        if not is_empty(value) and value != "[]":
            raise RowError(
                f"the row is plain text and has {name!r}, which only a conversation can show: give 'messages', or "
                f"leave it out with columns: {{{name}: null}}"
            )
