"""Columns with a common meaning: each is used, or the row is refused. Nothing is dropped silently."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.tool_calls import described
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON, Message, Row

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
MARKS = ("trainable", "train", "training", "loss", "weight", "loss_weight")
"""Keys under which data sets mark a message as trained or not."""
WEIGHTS = ("weight", "loss_weight", "train", "trainable")
"""Columns under which data sets keep the weight of a row, which is not supported here."""
UNUSABLE = ("train_detail", "training_detail", "tools", "functions", *MEDIA)
"""Keys that a message may have but that cannot be used there."""
OPENING = ("system", "developer")
"""Roles of a message that may only come first."""
PAIR_REMEDY = (
    "rlhf preference learns from pairs. To imitate the chosen answers, set columns: {completion: chosen} (with a "
    "'prompt'), or columns: {messages: chosen}"
)
TRAINING_COLUMNS = (*WEIGHTS, "label", "margin", "tie", "score_chosen", "score_rejected")
"""Columns that say how a row is trained on; they do not apply to prompts."""
UNWANTED = (0, False, "0", "false", "undesirable")


def refuse_media(data: Row) -> None:
    """Raise `RowError` for images, audio and video, which no model here takes, and for per-row template settings."""
    if not is_empty(data.get("chat_template_kwargs")):
        raise RowError(
            "the row has 'chat_template_kwargs', but all rows are rendered with the same settings: set "
            "data.template_kwargs, and ignore the column with columns: {chat_template_kwargs: null}"
        )
    refuse_misspelled(data, (*SYSTEM, *TOOLS, *MEDIA))
    for name in MEDIA:
        if not is_empty(data.get(name)):
            raise RowError(
                f"the row has {name!r}, but models here read text only. Leave such rows out, or use only their text "
                f"with columns: {{{name}: null}}"
            )


def refuse_misspelled(data: Row, names: Sequence[str]) -> None:
    """Raise `RowError` for `System` where `system` has a meaning, since the column would not be used."""
    for column, value in data.items():
        name = column.strip().lower() if isinstance(column, str) else column
        if name != column and name in names and name not in data and not is_empty(value):
            raise RowError(
                f"the row has {column!r}, but the column that is read is {name!r}: map it with columns: {{{name}: "
                f"{column!r}}}, or ignore it with columns: {{{column!r}: null}}"
            )


def is_empty(value: JSON) -> bool:
    """True if a column holds nothing."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def refuse_unused_names(columns: Mapping[str, str | None] | None, used: set[str]) -> None:
    """Raise `ConfigError` for a `columns:` mapping to a name that no row was read from.

    Args:
        columns: The mapping.
        used: The names that rows were read from; empty if examples keep all columns.
    """
    known = {*used, *MEDIA, *MARKS, *WEIGHTS, "label"}  # these are checked in every row
    for ours, theirs in (columns or {}).items():
        if used and theirs is not None and ours not in known:
            close = get_close_matches(ours, sorted(used), n=1)
            hint = f"did you mean {close[0]}?" if close else f"they are read from the columns {', '.join(sorted(used))}"
            raise ConfigError(f"data.columns: {{{ours}: {theirs}}}: these rows are not read from {ours!r}; {hint}")


def with_system(data: Row, messages: list[Message]) -> list[Message]:
    """Put the text of a row's `system` (`system_prompt`, `system_message`) column before its messages.

    Raises:
        RowError: If the column is not text, or the messages begin with another system message.
    """
    column, text = _system(data)
    if not text:
        return messages
    if messages and messages[0]["role"] in OPENING:
        if str(messages[0]["content"]).strip() == text.strip():
            return messages
        raise RowError(
            f"the column {column!r} differs from the system message that the conversation begins with. Leave one of "
            f"them out; columns: {{{column}: null}} ignores the column"
        )
    return [{"role": "system", "content": text}, *messages]


def _system(data: Row) -> tuple[str, str]:
    """Name and text of the row's system column; empty if there is none."""
    found: dict[str, str] = {}
    for column in SYSTEM:
        value = data.get(column)
        if is_empty(value):
            continue
        if not isinstance(value, str):
            raise RowError(f"{column!r} is {described(value)}; it must be text")
        if value.strip():
            found[column] = value
    if len({text.strip() for text in found.values()}) > 1:
        raise RowError(f"the row has {' and '.join(map(repr, found))}, which differ")
    return next(iter(found.items()), ("", ""))


def take_marks(message: Row, where: str) -> None:
    """Replace the `MARKS` of a message by one key, `trainable`.

    Raises:
        RowError: If the message has a mark or another key that cannot be used.
    """
    for name in UNUSABLE:
        if not is_empty(message.get(name)):
            help = ": put it into a column of the row" if name in TOOLS else ""
            raise RowError(f"{where} has {name!r}, which is not used there{help}")
    marks = set()
    for name in MARKS:
        if (value := message.pop(name, None)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            wanted = "0 (not trained) or 1" if name.endswith("weight") else "true or false"
            raise RowError(f"{where}: {name!r} must be {wanted}, but it is {described(value)}")
        marks.add(bool(value))
    if len(marks) > 1:
        raise RowError(f"{where} is marked both as trained and as not trained ({', '.join(MARKS)})")
    if marks:
        message["trainable"] = marks.pop()


def unmarked(messages: Sequence[Message]) -> list[Message]:
    """Messages of a prompt without their marks, since nothing of a prompt is trained."""
    copies = [message.copy() for message in messages]
    for message in copies:
        message.pop("trainable", None)
    return copies


def refuse_untrained(messages: Sequence[Message], why: str) -> None:
    """Raise `RowError` for a turn marked as not trained where no turn can be left out."""
    if any(message.get("trainable") is False for message in messages):
        raise RowError(f"a message is marked as not trained (weight: 0, train: false), and {why}")


def refuse_unwanted(data: Row) -> None:
    """Raise `RowError` for a row that is not meant to be imitated: a bad answer, a pair, or a weighted row."""
    refuse_weight(data)
    label = data.get("label")
    if isinstance(label, bool | int | float | str) and (label.lower() if isinstance(label, str) else label) in UNWANTED:
        raise RowError(
            f"'label' is {label!r}: an undesirable answer, which must not be imitated. Leave such rows out (or set "
            "data.on_bad_row: skip), or train on labels with rlhf preference. If the column means something else, "
            "ignore it with columns: {label: null}"
        )
    if not has_pair(data):
        return
    chosen = data["chosen"]
    if any(
        data.get(name) is chosen or data.get(name) == chosen for name in ("messages", "conversations", "completion")
    ):
        return
    raise RowError(f"the row has 'chosen' and 'rejected': {PAIR_REMEDY}")


def has_pair(data: Row) -> bool:
    """True if a row has the two responses of preference data."""
    return not is_empty(data.get("chosen")) and not is_empty(data.get("rejected"))


def refuse_weight(data: Row) -> None:
    """Raise `RowError` for a weight of a whole row."""
    for name in WEIGHTS:
        value = data.get(name)
        if isinstance(value, str):  # in tables, weights are text
            value = {"true": 1, "false": 0}.get(value.strip().lower(), _number(value))
        if isinstance(value, bool | int | float) and value != 1:
            raise RowError(
                f"the row has {name!r} {data[name]!r}, and row weights are not supported: remove rows of weight 0, "
                f"or ignore the column with columns: {{{name}: null}}"
            )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def refuse_beside_text(data: Row) -> None:
    """Raise `RowError` for columns that need a chat template in a row of plain text."""
    for name in (*SYSTEM, *TOOLS):
        value = data.get(name)
        if not is_empty(value) and value != "[]":
            raise RowError(
                f"the row is plain text and has {name!r}, which only a conversation can render: give 'messages', or "
                f"ignore it with columns: {{{name}: null}}"
            )
