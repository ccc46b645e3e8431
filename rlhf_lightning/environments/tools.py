"""A tool environment: Python functions that the policy calls in its messages."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

from rlhf_lightning.data.prompts import prompt_messages
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.environments.user_calls import TimeLimitError, check_limit, within
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.imports import imported
from rlhf_lightning.types import JSON, Message, Row, ToolSchema

TOOL_CALL = r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)"
"""Tool calls of Qwen and Hermes models. The closing tag may be missing if it is the sampler's stop text."""
ToolFunction: TypeAlias = Callable[..., object]
"""A tool function. The policy receives its result unchanged (text), as JSON, or as its `str`."""


@dataclass(frozen=True)
class Tool:
    """A function that the policy can call, and the schema that describes it.

    Example:
        >>> tool = Tool("add", lambda a, b: a + b, schema={"type": "function", "function": {"name": "add"}})
        >>> tool.function(2, 3)
        5
    """

    name: str
    function: ToolFunction
    schema: ToolSchema


class ToolEnv:
    """Runs the tool calls in a message and answers with their results; a message without a call ends the episode.

    The row's prompt starts the conversation, and the schemas of the tools are passed to the chat template. Each result
    is a message with role `tool`. The result of a call that fails (unknown tool, invalid arguments, an exception, a
    timeout) is `Error: …`, so that the policy can correct it. The environment gives no reward; `model.rewards` score
    the episode.

    Logs `env_tool_calls` and `env_tool_errors`.

    Args:
        row: The data row.
        tools: Functions with typed arguments and a Google-style docstring, or their dotted paths; sync or async.
        pattern: Regular expression that finds calls in a message. Its first group is the JSON of a call,
            `{"name": …, "arguments": {…}}`. The default finds `<tool_call>…</tool_call>`.
        timeout: Seconds that one call may take; None for no limit.
        max_calls: Maximum number of calls in a message; further calls are answered with an error.

    Example:
        >>> def add(a: int, b: int) -> int:
        ...     '''Add two numbers.
        ...
        ...     Args:
        ...         a: The first.
        ...         b: The second.
        ...     '''
        ...     return a + b
        >>> env = ToolEnv({"prompt": "What is 2 + 3?"}, tools=[add])
        >>> env.reset()
        [{'role': 'user', 'content': 'What is 2 + 3?'}]
    """

    def __init__(
        self,
        row: Row,
        tools: Sequence[str | ToolFunction],
        pattern: str = TOOL_CALL,
        timeout: float | None = 30.0,
        max_calls: int = 16,
    ) -> None:
        self.row, self.timeout, self.max_calls = row, timeout, max_calls
        self.available = {tool.name: tool for tool in _tools(tuple(tools))}
        self.tools = [tool.schema for tool in self.available.values()]
        self.pattern = re.compile(pattern, re.DOTALL)
        self.calls = self.errors = 0

    @classmethod
    def check(
        cls,
        tools: Sequence[str | ToolFunction] = (),
        pattern: str = TOOL_CALL,
        timeout: float | None = 30.0,
        max_calls: int = 16,
    ) -> None:
        """Check the arguments when the configuration is read.

        Raises:
            ConfigError: If there are no tools, two have the same name, or another argument is invalid.
        """
        if isinstance(tools, str) or not tools:
            raise ConfigError("ToolEnv needs tools: a list of functions or of their dotted paths")
        names = [tool.name for tool in _tools(tuple(tools))]
        if len(set(names)) < len(names):
            raise ConfigError(f"ToolEnv: two tools have the same name ({', '.join(names)})")
        check_limit("ToolEnv.timeout", timeout)
        if max_calls < 1:
            raise ConfigError(f"ToolEnv.max_calls is {max_calls}; it must be at least 1")
        if not isinstance(pattern, str):  # jsonargparse reads a text that begins with # as a comment
            raise ConfigError(f"ToolEnv.pattern is {pattern!r}; it must be text (write \\# for an initial #)")
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"ToolEnv.pattern {pattern!r} is not a valid regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(
                f"ToolEnv.pattern {pattern!r} has no group; its first group must match the JSON of a call"
            )

    def reset(self) -> list[Message]:
        """The row's prompt."""
        return prompt_messages(self.row)

    async def step(self, message: Message) -> StepResult:
        """Run the calls in a message, one after the other."""
        found = [match.group(1) or "" for match in self.pattern.finditer(message["content"] or "")]
        answers = [await self._run(text, i) for i, text in enumerate(found)]
        metrics = {"tool_calls": float(self.calls), "tool_errors": float(self.errors)}
        return StepResult(done=not found, next_messages=answers, metrics=metrics)

    async def _run(self, text: str, number: int) -> Message:
        """Run one call; returns the message that answers it."""
        self.calls += 1
        name = "unknown"
        try:
            if number >= self.max_calls:
                raise ValueError(f"a message may make at most {self.max_calls} calls")
            name, arguments = read_call(text)
            if name not in self.available:
                raise ValueError(f"there is no tool {name!r}; available tools are {', '.join(self.available)}")
            result = await within(partial(self.available[name].function, **arguments), self.timeout)
            content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:  # noqa: BLE001 - the error is the answer to the policy's call
            self.errors += 1
            kind = "" if isinstance(error, ValueError | TimeLimitError) else f"{type(error).__name__}: "
            content = f"Error: {kind}{error}"
        return {"role": "tool", "name": name, "content": content}


def read_call(text: str) -> tuple[str, dict[str, JSON]]:
    """Parse a tool call.

    Args:
        text: The JSON of the call.

    Returns:
        Name and arguments.

    Raises:
        ValueError: If the call is malformed.

    Example:
        >>> read_call('{"name": "add", "arguments": {"a": 2, "b": 3}}')
        ('add', {'a': 2, 'b': 3})
    """
    try:
        call = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the call is not valid JSON ({error})") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError('a call must have the form {"name": …, "arguments": {…}}')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the arguments are not valid JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError("the arguments must be an object")
    return call["name"], arguments


@lru_cache(maxsize=64)
def _tools(functions: tuple[str | ToolFunction, ...]) -> tuple[Tool, ...]:
    """Tools from functions or dotted paths, cached."""
    return tuple(_tool(function) for function in functions)


def _tool(function: str | ToolFunction) -> Tool:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    found = imported(function, "ToolEnv.tools:") if isinstance(function, str) else function
    if not callable(found):
        raise ConfigError(f"ToolEnv.tools: {function!r} is not a function")
    try:
        schema = get_json_schema(found)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ConfigError(f"ToolEnv.tools: {function!r} has no usable schema: {error}") from error
    return Tool(schema["function"]["name"], found, schema)
