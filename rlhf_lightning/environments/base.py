"""Environments answer the policy: one object per episode, for one or many turns, sync or async."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.data.records import RowError
from rlhf_lightning.environments.user_calls import check_limit
from rlhf_lightning.errors import LARGEST, ConfigError, UserError, check_whole, short
from rlhf_lightning.imports import imported
from rlhf_lightning.settings import plain
from rlhf_lightning.types import Message, Row

ON_ERROR = ("fail", "retry", "drop")


class EpisodeError(UserError):
    """An episode failed; the message has its prompt, sample and turn."""


@dataclass
class StepResult:
    """Result of a step: an environment's reaction to a message of the policy.

    Example:
        >>> StepResult(reward=0.5, done=False, next_messages=[{"role": "user", "content": "Try again."}]).done
        False
    """

    reward: float = 0.0
    """Added to the episode's reward."""
    done: bool = True
    """True if the episode ends."""
    next_messages: list[Message] = field(default_factory=list)
    """Messages appended to the conversation before the policy's next turn."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as means over episodes."""


class MessageEnv(Protocol):
    """An environment that exchanges messages with the policy.

    Both methods may be async; the steps of all episodes then run concurrently. It may have an attribute `tools`, a list
    of JSON schemas, which the chat template shows to the policy.

    Example:
        ```python
        class GuessNumber:
            def __init__(self, row):
                self.answer = row["answer"]

            def reset(self):
                return [{"role": "user", "content": "Guess a number from 1 to 9."}]

            def step(self, message):
                right = message["content"].strip() == self.answer
                hint = [{"role": "user", "content": "No. Guess again."}]
                return StepResult(reward=float(right), done=right, next_messages=[] if right else hint)
        ```
    """

    def reset(self) -> list[Message] | Awaitable[list[Message]]:
        """The messages that the policy sees first."""

    def step(self, message: Message) -> StepResult | Awaitable[StepResult]:
        """Respond to the policy's message."""


EnvironmentFactory = Callable[[Row], MessageEnv]
"""Creates the environment of one episode from its data row."""


@plain
@dataclass(frozen=True)
class Limits:
    """Limits of an episode, and the handling of environments that fail.

    Args:
        max_turns: Maximum number of the policy's turns.
        max_tokens: Maximum number of tokens that the policy may sample over all turns; a response is truncated there.
            None for no limit.
        step_timeout: Seconds that one `reset` or `step` may take. If set, plain functions run concurrently in threads.
        on_error: What to do after an exception or a timeout. `fail` ends the run with an error that names the episode.
            `retry` runs the episode again from `reset`, with new seeds, up to `retries` times, and then fails. `drop`
            excludes the episode from everything except `train/failed_episodes`.
        retries: Number of retries with `on_error: retry`.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> Limits(max_turns=4, on_error="retry", retries=2).max_turns
        4
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
            raise ConfigError(f"limits.on_error is {self.on_error!r}; it must be one of {', '.join(ON_ERROR)}")
        check_whole("limits.retries", self.retries)


def environment_factory(
    environment: str | Callable[..., MessageEnv] | None, arguments: dict[str, Any] | None = None
) -> EnvironmentFactory | None:
    """Create a factory from an environment class or function.

    A class may have a class method `check(**arguments)`, which is called here to reject arguments before training.

    Args:
        environment: The class or function, or its dotted path; None for no environment.
        arguments: Keyword arguments that are passed to it after the row.

    Returns:
        The factory; None without an environment.

    Raises:
        ConfigError: If it cannot be imported, is not callable, or rejects its arguments.
    """
    if environment is None:
        if arguments:
            raise ConfigError("model.environment_args is set, but model.environment is not")
        return None
    found = imported(environment, "model.environment") if isinstance(environment, str) else environment
    if not callable(found):
        raise ConfigError(f"model.environment {environment!r} is not a class or function")
    if check := getattr(found, "check", None):
        check(**(arguments or {}))
    return partial(found, **(arguments or {}))


def checked_messages(value: list[Message]) -> list[Message]:
    """The result of `reset`, after checking that it is a list of messages."""
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(message, dict) and message.get("role") for message in value)
    ):
        raise TypeError(f"reset() returned {short(value)}; it must return a list of messages, each {{role, content}}")
    return _messages(list(value), "reset() returned")


def checked_result(value: StepResult) -> StepResult:
    """The result of `step`, after checking that it is a `StepResult` of finite numbers and messages."""
    if not isinstance(value, StepResult):
        raise TypeError(f"step() returned {short(value)}; it must return a StepResult")
    for name, number in (("reward", value.reward), *((f"metrics[{key!r}]", n) for key, n in value.metrics.items())):
        if not hasattr(number, "__float__") or not -LARGEST <= number <= LARGEST:
            raise ValueError(f"step() returned {name} {number!r}; it must be a finite number")
    if not all(isinstance(message, dict) and message.get("role") for message in value.next_messages):
        raise TypeError(f"step() returned next_messages {short(value.next_messages)}; each must be {{role, content}}")
    if value.next_messages:
        value.next_messages = _messages(list(value.next_messages), "step() returned next_messages:")
    return value


def _messages(value: list[Message], what: str) -> list[Message]:
    """Convert messages to the form of those read from rows, including tool calls and results that are objects."""
    try:
        return to_messages(value)
    except RowError as error:
        raise TypeError(f"{what} {error}") from None
