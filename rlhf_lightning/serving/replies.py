"""Replies in the form of OpenAI's API."""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from starlette.responses import Response

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.tools import TOOL_CALL, read_call
from rlhf_lightning.files import as_json
from rlhf_lightning.generation.text_stream import TextStream
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.serving.requests import Asked
from rlhf_lightning.serving.sampling import Sampled
from rlhf_lightning.types import JSON

_CALL = re.compile(TOOL_CALL, re.DOTALL)
_CALL_START = "<tool_call>"
ERROR_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"x-should-retry": "false"},  # OpenAI's client would hide the error by asking a server that is gone
}
"""Headers of errors by their status."""


class Choice:
    """One response, as it grows.

    Args:
        index: Number of the response within its request.
        asked: The request.
        renderer: The model's renderer.

    Attributes:
        tokens: Number of tokens so far.
        finish_reason: Why it ended; None before.
        calls: Its tool calls, once it has ended.
        logprobs: Log-probabilities of its tokens in OpenAI's form, if the request asks for them.

    Example:
        >>> choice = Choice(0, asked, renderer)  # doctest: +SKIP
        >>> choice.take(Sampled(0, [5], [-0.1]))  # doctest: +SKIP
        'Hello'
    """

    def __init__(self, index: int, asked: Asked, renderer: Renderer) -> None:
        self.index, self._asked, self._tokenizer = index, asked, renderer.tokenizer
        stops = asked.params[index // asked.n].stop_strings
        self._stream = TextStream(renderer, stops, strip=asked.is_chat)
        self._shown = 0
        self._withheld: str | None = None
        self.tokens = 0
        self.finish_reason: str | None = None
        self.calls: list[JSON] = []
        self.logprobs: list[JSON] = []

    def take(self, sampled: Sampled) -> str:
        """Add tokens.

        Args:
            sampled: The tokens.

        Returns:
            The text that is now final. Text that may be a tool call is held back until the response ends.
        """
        for token in sampled.ids:
            self._stream.add(token)
        self.tokens += len(sampled.ids)
        if self._asked.logprobs:
            self.logprobs += [self._logprob(*pair) for pair in zip(sampled.ids, sampled.logprobs, strict=True)]
        if sampled.finish_reason is not None:
            self._stream.finish()
            self.finish_reason = sampled.finish_reason
            return self._end()
        text = self._stream.text
        end = len(text)
        if self._asked.has_tools:
            found = text.find(_CALL_START)
            starts = (n for n in range(1, len(_CALL_START)) if text.endswith(_CALL_START[:n]))
            end = found if found >= 0 else len(text) - max(starts, default=0)
            end = len(text[:end].rstrip())  # white space before a call is not shown
        return self._show(end)

    def _end(self) -> str:
        """The rest of the text of the ended response, without its tool calls."""
        text = self._stream.text
        if self._asked.has_tools and self.finish_reason == "stop":
            self.calls = list(_tool_calls(text))
        if not self.calls:
            return self._show(len(text))
        self.finish_reason = "tool_calls"
        return self._show(len(text[: text.index(_CALL_START)].rstrip()))

    def _show(self, end: int) -> str:
        piece = self._stream.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    @property
    def text(self) -> str:
        """The text so far, without tool calls; the refusal if the response is withheld."""
        return self._stream.text[: self._shown] if self._withheld is None else self._withheld

    def withhold(self, refusal: str) -> None:
        """Replace the ended response, with its calls and log-probabilities, by the refusal of a filter.

        Args:
            refusal: The text.
        """
        self._withheld = refusal
        self.calls, self.logprobs, self.finish_reason = [], [], "content_filter"

    def _logprob(self, token: int, logprob: float) -> JSON:
        text = self._tokenizer.decode([token])
        is_whole = "\ufffd" not in text  # the bytes of a part of a character are not known
        return {
            "token": text,
            "logprob": logprob,
            "bytes": [*text.encode()] if is_whole else None,
            "top_logprobs": [],
        }


def _tool_calls(text: str) -> Iterator[JSON]:
    """The tool calls in a response, in OpenAI's form; none if one of them is malformed."""
    try:
        calls = [read_call(match.group(1)) for match in _CALL.finditer(text)]
    except ValueError:  # the client gets the text
        return
    for name, arguments in calls:
        function: JSON = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        yield {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


@dataclass
class Reply:
    """The reply to a request.

    Args:
        asked: The request.
        model: Name of the model.
        renderer: The model's renderer.

    Attributes:
        choices: The responses.

    Example:
        >>> reply = Reply(asked, "policy", renderer)  # doctest: +SKIP
        >>> chunks = [chunk for sampled in tokens for chunk in reply.chunks(sampled)]  # doctest: +SKIP
        >>> reply.body()["choices"][0]["finish_reason"]  # doctest: +SKIP
        'stop'
    """

    asked: Asked
    model: str
    renderer: Renderer = field(repr=False)

    def __post_init__(self) -> None:
        count = len(self.asked.prompts) * self.asked.n
        self.choices = [Choice(index, self.asked, self.renderer) for index in range(count)]
        self._id = f"{'chatcmpl' if self.asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._sent_logprobs = [0] * count

    def take(self, sampled: Sampled) -> str:
        """Add tokens to their response; returns its text that is now final."""
        return self.choices[sampled.index].take(sampled)

    def body(self) -> dict[str, JSON]:
        """The reply as a whole, once all responses have ended."""
        choices = [self._chat_choice(choice) if self.asked.is_chat else _text_choice(choice) for choice in self.choices]
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": [*choices], "usage": self._usage()}

    # -- streams ------------------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[bytes]:
        """The first events of a stream: the role of each response."""
        if self.asked.is_chat:
            for choice in self.choices:
                yield self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def events(self, sampled: Sampled) -> Iterator[bytes]:
        """Add tokens to their response; yields the events of a stream about them."""
        yield from self._grown(self.choices[sampled.index], self.take(sampled))

    def whole(self) -> Iterator[bytes]:
        """The events of a stream about responses that have all ended: each has its text in one piece."""
        for choice in self.choices:
            yield from self._grown(choice, choice.text)

    def _grown(self, choice: Choice, piece: str) -> Iterator[bytes]:
        if piece:
            yield self._chunk(choice, {"content": piece} if self.asked.is_chat else piece, None)
        if choice.finish_reason is None:
            return
        if choice.calls:
            calls: list[JSON] = [{"index": i, **call} for i, call in enumerate(choice.calls) if isinstance(call, dict)]
            yield self._chunk(choice, {"tool_calls": calls}, None)
        yield self._chunk(choice, {} if self.asked.is_chat else "", choice.finish_reason)

    def end(self) -> Iterator[bytes]:
        """The last events of a stream."""
        if self.asked.include_usage:
            yield event({**self._head(self._chunk_kind), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.is_chat else "text_completion"

    def _chunk(self, choice: Choice, content: dict[str, JSON] | str, finish_reason: str | None) -> bytes:
        one: dict[str, JSON] = {"index": choice.index, "finish_reason": finish_reason, "logprobs": None}
        one["delta" if isinstance(content, dict) else "text"] = content
        if new := choice.logprobs[self._sent_logprobs[choice.index] :]:
            self._sent_logprobs[choice.index] += len(new)
            one["logprobs"] = {"content": [*new], "refusal": None}
        usage: dict[str, JSON] = {"usage": None} if self.asked.include_usage else {}
        return event({**self._head(self._chunk_kind), "choices": [one], **usage})

    # -- parts --------------------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, JSON]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _usage(self) -> JSON:
        prompt, completion = sum(map(len, self.asked.prompts)), sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chat_choice(self, choice: Choice) -> JSON:
        message: dict[str, JSON] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        logprobs: JSON = {"content": choice.logprobs, "refusal": None} if self.asked.logprobs else None
        return {"index": choice.index, "message": message, "finish_reason": choice.finish_reason, "logprobs": logprobs}


def _text_choice(choice: Choice) -> JSON:
    return {"index": choice.index, "text": choice.text, "finish_reason": choice.finish_reason, "logprobs": None}


def event(body: dict[str, JSON]) -> bytes:
    """A server-sent event.

    Args:
        body: Its data.
    """
    return f"data: {as_json(body)}\n\n".encode()


def json_response(body: dict[str, JSON], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with an object.

    Args:
        body: The object.
        status: Status of the response.
        headers: Headers of the response.
    """
    return Response(as_json(body), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    """The response to a request that is refused or fails.

    Args:
        error: The error.
    """
    return json_response(error.body(), error.status, ERROR_HEADERS.get(error.status))
