"""Columns with a common meaning. Each one is used, or the row is refused; no column is dropped silently."""

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
"""Keys by which datasets mark a message as trained or not."""
WEIGHTS = ("weight", "loss_weight", "train", "trainable")
"""Columns with the weight of a row, which is not supported."""
OTHER_MARKS = ("mask", "masked", "loss_mask", "compute_loss", "train_on_turn")
"""Further keys by which other formats mark messages; whether 1 means trained differs between them."""
UNUSABLE = ("train_detail", "training_detail", "tools", "functions", *MEDIA, *OTHER_MARKS)
"""Keys that messages may have, but that are not supported there."""
OPENING = ("system", "developer")
"""Roles that only the first message may have."""
PAIR_REMEDY = (
    "rlhf preference learns from pairs. To imitate the chosen answers, set columns: {completion: chosen} (with a "
    "'prompt'), or columns: {messages: chosen}"
)
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns with the scores of a pair's sides, as datasets name them; `rlhf score` writes the second."""
TRAINING_COLUMNS = (*WEIGHTS, "label", "margin", "tie", "score_chosen", "score_rejected")
"""Columns that determine how a row is trained on; they do not apply to prompts."""
UNWANTED = (0, False, "0", "false", "undesirable")
RESPONSES = ("completion", "response", "chosen", "rejected")
"""Columns with one response each."""


def refuse_media(data: Row) -> None:
    """Raise `RowError` for images, audio, video and per-row template settings, which are not supported."""
    if not is_empty(data.get("chat_template_kwargs")):
        raise RowError(
            "the row has 'chat_template_kwargs', but all rows are rendered with the same settings: set "
            "data.template_kwargs, and ignore the column with columns: {chat_template_kwargs: null}"
        )
    refuse_misspelled(data, (*SYSTEM, *TOOLS, *MEDIA))
    for name in MEDIA:
        if not is_empty(data.get(name)):
            raise RowError(
                f"the row has {name!r}, but only text is supported. Leave out such rows, or use only their text with "
                f"columns: {{{name}: null}}"
            )


def refuse_misspelled(data: Row, names: Sequence[str]) -> None:
    """Raise `RowError` for a column such as `System` where `system` has a meaning; it would not be used."""
    for column, value in data.items():
        name = column.strip().lower() if isinstance(column, str) else column
        if name != column and name in names and name not in data and not is_empty(value):
            raise RowError(
                f"the row has {column!r}, but the column must be named {name!r}. Map it with columns: {{{name}: "
                f"{column!r}}}, or ignore it with columns: {{{column!r}: null}}"
            )


def is_empty(value: JSON) -> bool:
    """True if a column has no value."""
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
            hint = f"did you mean {close[0]}?" if close else f"columns that are used: {', '.join(sorted(used))}"
            raise ConfigError(f"data.columns: {{{ours}: {theirs}}}: these rows do not use a column {ours!r}; {hint}")


def with_system(data: Row, messages: list[Message]) -> list[Message]:
    """Add the text of a row's `system` (`system_prompt`, `system_message`) column before its messages.

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
            f"the column {column!r} differs from the system message at the beginning of the conversation. Remove one "
            f"of them; columns: {{{column}: null}} ignores the column"
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
        raise RowError(f"the row has {' and '.join(map(repr, found))}, but they differ; remove one of them")
    return next(iter(found.items()), ("", ""))


def take_marks(message: Row, where: str) -> None:
    """Replace the `MARKS` of a message with one key, `trainable`.

    Raises:
        RowError: If the message has a mark or another key that cannot be used.
    """
    for name in UNUSABLE:
        if not is_empty(message.get(name)):
            help = "; put it into a column of the row" if name in TOOLS else "; remove it"
            if name in OTHER_MARKS:
                help = "; replace it with 'weight', which is 0 for a message that is not trained, and 1 otherwise"
            raise RowError(f"{where} has {name!r}, which is not supported in a message{help}")
    marks = set()
    for name in MARKS:
        if (value := message.pop(name, None)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            wanted = "0 (not trained) or 1" if name.endswith("weight") else "true or false"
            raise RowError(f"{where}: {name!r} is {described(value)}; it must be {wanted}")
        marks.add(bool(value))
    if len(marks) > 1:
        raise RowError(f"{where} is marked both as trained and as not trained ({', '.join(MARKS)})")
    if marks:
        message["trainable"] = marks.pop()


def unmarked(messages: Sequence[Message]) -> list[Message]:
    """Messages of a prompt without their marks, because no part of a prompt is trained."""
    copies = [message.copy() for message in messages]
    for message in copies:
        message.pop("trainable", None)
    return copies


def refuse_untrained(messages: Sequence[Message], why: str) -> None:
    """Raise `RowError` for a message that is marked as not trained where this is not possible."""
    if any(message.get("trainable") is False for message in messages):
        raise RowError(f"a message is marked as not trained (weight: 0, train: false), but {why}")


def refuse_unwanted(data: Row) -> None:
    """Raise `RowError` for a row that must not be imitated: a bad answer, a pair, or a weighted row."""
    refuse_weight(data)
    label = data.get("label")
    if isinstance(label, bool | int | float | str) and (label.lower() if isinstance(label, str) else label) in UNWANTED:
        raise RowError(
            f"'label' is {label!r}, which marks a bad answer, and SFT would imitate it. Leave out such rows (or set "
            "data.on_bad_row: skip), or train on labels with rlhf preference. If the column has another meaning, "
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


def refuse_unused_answer(data: Row, messages: Sequence[Message]) -> None:
    """Raise `RowError` if the last message has no answer, but the row has one in another column."""
    column = next((name for name in ("completion", "response", "output") if not is_empty(data.get(name))), None)
    if column is not None and messages[-1]["role"] != "assistant":
        raise RowError(
            f"the conversation ends with a {messages[-1]['role']} message, and its answer seems to be in {column!r}, "
            f"which is not used next to a conversation. Append it to the messages, or ignore it with columns: "
            f"{{{column}: null}}"
        )


def repeats_prompt(data: Row) -> bool:
    """True if the prompt and all responses of a row are texts, and each response begins with the whole prompt."""
    prompt = data.get("prompt")
    if not isinstance(prompt, str) or not (start := prompt.strip()):
        return False
    listed = data.get("responses")
    responses = [*(listed if isinstance(listed, list) else []), *(data.get(name) for name in RESPONSES)]
    texts = [text for text in responses if isinstance(text, str) and text]
    return bool(texts) and all(text.strip().startswith(start) for text in texts)


def has_pair(data: Row) -> bool:
    """True if a row has the two responses of preference data."""
    return not is_empty(data.get("chosen")) and not is_empty(data.get("rejected"))


def refuse_weight(data: Row) -> None:
    """Raise `RowError` for a weight of a whole row."""
    for name in WEIGHTS:
        value = data.get(name)
        if isinstance(value, str):  # weights in tables are text
            value = {"true": 1, "false": 0}.get(value.strip().lower(), _number(value))
        if isinstance(value, bool | int | float) and value != 1:
            raise RowError(
                f"{name!r} is {data[name]!r}, but row weights are not supported. Remove rows with weight 0, or ignore "
                f"the column with columns: {{{name}: null}}"
            )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def refuse_beside_text(data: Row) -> None:
    """Raise `RowError` if a row of plain text has columns that need a chat template, or is one message of several."""
    if isinstance(role := data.get("role"), str) and role:
        raise RowError(
            f"the row is plain text, but has a 'role' ({role!r}), so it seems to be a single message. Collect the "
            "messages of each conversation in 'messages', or ignore the column with columns: {role: null}"
        )
    for name in (*SYSTEM, *TOOLS):
        value = data.get(name)
        if not is_empty(value) and value != "[]":
            raise RowError(
                f"the row is plain text, but has {name!r}, which only conversations can use. Give 'messages', or "
                f"ignore the column with columns: {{{name}: null}}"
            )
