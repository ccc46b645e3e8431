"""Environments: who answers the policy. One object per episode, one or many turns, sync or async."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from rlhf_lightning.data.conversations import Message, to_messages
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import ConfigError, UserError, check_whole
from rlhf_lightning.rollout.calls import check_limit

ON_ERROR = ("fail", "retry", "drop")


class EpisodeError(UserError):
    """An episode could not be played; the message names its prompt, sample and turn."""


@dataclass
class StepResult:
    """What an environment answers to a message."""

    reward: float = 0.0
    """Added to the episode's reward."""
    done: bool = True
    next_messages: list[Message] = field(default_factory=list)
    """Appended to the conversation before the policy's next turn."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as means over episodes."""


class MessageEnv(Protocol):
    """An environment made of messages. Both methods may be async; then all episodes' steps run concurrently.

    It may have `tools`, a list of JSON schemas, which the chat template then shows to the policy.
    """

    def reset(self) -> list[Message] | Awaitable[list[Message]]:
        """The messages that the policy first sees."""

    def step(self, message: Message) -> StepResult | Awaitable[StepResult]:
        """Take the policy's message."""


EnvironmentFactory = Callable[[dict[str, Any]], MessageEnv]
"""Makes the environment of one episode from its row of data."""


@dataclass(frozen=True)
class Limits:
    """What an episode may take, and what happens to one whose environment fails.

    Args:
        max_turns: the policy's turns of an episode.
        max_tokens: tokens that the policy may draw in all turns of an episode; a response over it is cut there.
        step_timeout: seconds that one `reset` or `step` of an environment may take. Plain functions then run in
            threads, several at once.
        on_error: what follows an exception (or a time limit passed): `fail` ends the run and names the episode;
            `retry` plays the episode again from `reset`, with seeds of its own, `retries` times, and then fails; `drop`
            leaves the episode out of everything but `train/failed_episodes`.
        retries: with `on_error: retry`.
    """

    max_turns: int = 8
    max_tokens: int | None = None
    step_timeout: float | None = None
    on_error: str = "fail"
    retries: int = 1

    def __post_init__(self) -> None:
        check_whole("limits.max_turns", self.max_turns)
        if self.max_tokens is not None:
            check_whole("limits.max_tokens", self.max_tokens)
        check_limit("limits.step_timeout", self.step_timeout)
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"limits.on_error is {self.on_error!r}; one of {', '.join(ON_ERROR)}")
        check_whole("limits.retries", self.retries)


def environment_factory(
    environment: str | Callable[..., MessageEnv] | None, arguments: dict[str, Any] | None = None
) -> EnvironmentFactory | None:
    """A factory from a class or function, or its dotted path; `arguments` are given to it after the row, by name.

    A class may have a class method `check(**arguments)`, called here: it refuses arguments before training.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    if environment is None:
        if arguments:
            raise ConfigError("model.environment_args is set, and model.environment is not")
        return None
    found = imported(environment, "model.environment") if isinstance(environment, str) else environment
    if not callable(found):
        raise ConfigError(f"model.environment {environment!r} is no class or function")
    if check := getattr(found, "check", None):
        check(**(arguments or {}))
    return partial(found, **(arguments or {}))


def imported(path: str, setting: str) -> Any:
    """What a dotted path names; raises `ConfigError` with the setting it stands in."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting} {path!r} cannot be imported: {error}") from error


def checked_messages(value: Any) -> list[Message]:
    """What `reset` returned, if it is a list of messages."""
    fine = isinstance(value, list | tuple) and value and all(isinstance(m, dict) and m.get("role") for m in value)
    if not fine:
        raise TypeError(f"reset() returned {_short(value)}; it must be a list of messages, {{role, content}} each")
    return _messages(list(value), "reset() returned")


def checked_result(value: Any) -> StepResult:
    """What `step` returned, if it is a `StepResult` of finite numbers and messages."""
    if not isinstance(value, StepResult):
        raise TypeError(f"step() returned {_short(value)}; it must be a StepResult")
    for name, number in (("reward", value.reward), *((f"metrics[{key!r}]", n) for key, n in value.metrics.items())):
        if not hasattr(number, "__float__") or not math.isfinite(number):
            raise ValueError(f"step() returned {name} {number!r}; it must be a finite number")
    if not all(isinstance(message, dict) and message.get("role") for message in value.next_messages):
        raise TypeError(f"step() returned next_messages {_short(value.next_messages)}; wanted {{role, content}} each")
    if value.next_messages:
        value.next_messages = _messages(list(value.next_messages), "step() returned next_messages:")
    return value


def _messages(value: list[Message], what: str) -> list[Message]:
    """Messages in the form of those that are read from rows: tool calls, results that are objects."""
    try:
        return to_messages(value)
    except RowError as error:
        raise TypeError(f"{what} {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
