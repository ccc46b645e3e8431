"""Selects the messages of a conversation that are trained."""

from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import Message

TRAIN_ON = ("last_assistant", "all_assistant", "all_messages", "everything", "trainable")


def select(messages: list[Message], train_on: str) -> list[bool]:
    """Select the messages to train, by `data.train_on` and the marks of messages.

    Returns:
        For each message, True if it is trained.

    Raises:
        RowError: If no message is trained.

    Example:
        >>> select([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "all_assistant")
        [False, True]
    """
    assistant = [message["role"] == "assistant" for message in messages]
    kept = [message.get("trainable") is not False for message in messages]
    if train_on == "all_messages":
        return kept
    if train_on == "trainable":
        chosen = [message.get("trainable", False) for message in messages]
        if not all(isinstance(flag, bool) for flag in chosen):
            raise RowError("'trainable' must be true or false")
        if not any(chosen):
            raise RowError("no message has trainable: true, but data.train_on is trainable")
        return chosen
    if not any(assistant):
        raise RowError(f"there is no assistant turn to train on (roles: {' '.join(m['role'] for m in messages)})")
    if train_on == "all_assistant":
        return [chosen and keep for chosen, keep in zip(assistant, kept, strict=True)]
    if train_on == "last_assistant":
        last = max(i for i, chosen in enumerate(assistant) if chosen)
        return [i == last and kept[i] for i in range(len(messages))]
    raise ConfigError(f"train_on is {train_on!r}; it must be one of {', '.join(TRAIN_ON)}")


def refuse_blank(messages: list[Message], selected: list[bool]) -> None:
    """Raise `RowError` if all selected turns are empty: training on an end marker alone teaches empty answers."""
    chosen = [message for message, flag in zip(messages, selected, strict=True) if flag]
    if not chosen:
        raise RowError("no token is trained: all turns are marked as not trained (weight: 0, train: false)")
    if not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in chosen):
        raise RowError("no token is trained: all turns to train on are empty")
