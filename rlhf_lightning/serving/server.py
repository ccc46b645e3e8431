"""The web server of `rlhf serve`: OpenAI's chat completions, completions and models, and who may use them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rlhf_lightning.errors import UserError
from rlhf_lightning.filtering import Filter, FilterText
from rlhf_lightning.filtering.rows import row_texts
from rlhf_lightning.serving.fields import RequestError, json_of
from rlhf_lightning.serving.replies import Reply, error_response, event, json_response
from rlhf_lightning.serving.requests import Asked, RequestReader
from rlhf_lightning.serving.sampling import ResponseSampler, Sampled
from rlhf_lightning.serving.shutdown import EndAtShutdown, Shutdown
from rlhf_lightning.types import JSON, FilterDecision
from rlhf_lightning.web import Access, Guard, read_body

log = logging.getLogger(__name__)
BODY = 4 * 2**20
"""Largest request body in bytes."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
T = TypeVar("T")


@dataclass
class ApiServer:
    """Answers requests to a model in the form of OpenAI's API.

    Args:
        reader: Reads requests.
        sampler: Samples the responses.
        access: Who may use the server.
        filter: Checks requests and responses; None to pass everything.
        shutdown: How requests end when the server does.

    Example:
        >>> app = ApiServer(reader, sampler).app()  # doctest: +SKIP
    """

    reader: RequestReader
    sampler: ResponseSampler
    access: Access = field(default_factory=Access)
    filter: Filter | None = None
    shutdown: Shutdown = field(default_factory=Shutdown)

    def __post_init__(self) -> None:
        self._checking = asyncio.Lock()
        """The filter checks one request at a time, because judges and classifiers are not made for several threads."""

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(
                    Guard, access=self.access, refusal=_refusal, headers=HEADERS, command="rlhf serve", is_page=False
                ),
                Middleware(EndAtShutdown, shutdown=self.shutdown),
            ],
            exception_handlers={HTTPException: _on_http_error, RequestError: _on_request_error, Exception: _on_error},
        )

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        load = self.sampler.load
        return json_response({"status": "ok", "sampling": load.sampling, "waiting": load.waiting})

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._authorize(request)
        self.reader.check_name(request.path_params["name"])
        return json_response(self._card())

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion)

    def _card(self) -> dict[str, JSON]:
        """The model as `/v1/models` shows it; `max_model_len` is vLLM's word."""
        card: dict[str, JSON] = {"id": self.reader.name, "object": "model", "created": 0, "owned_by": "rlhf-lightning"}
        return {**card, "max_model_len": self.reader.max_length}

    def _authorize(self, request: Request) -> None:
        """Raise `RequestError` for a request without the token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else ""
        if not self.access.allows_token(given):
            said = "the API key is wrong" if given else "this server needs an API key (Authorization: Bearer KEY)"
            raise RequestError(said, code="invalid_api_key", status=401, kind="authentication_error")

    # -- answers ------------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, read: Callable[[JSON], Asked]) -> Response:
        self._authorize(request)
        body = await read_body(request, "application/json", BODY)
        value = json_of(body)
        asked = read(value)
        reply = Reply(asked, self.reader.name, self.reader.renderer)
        if self.filter is not None:
            return await _unless_gone(request, self._filtered(self.filter, _texts(value, asked, reply), reply))
        tokens = self.sampler.sample(asked.rows())
        if not asked.stream:
            return await _unless_gone(request, _whole(reply, tokens))
        # Errors before the first token have a status of their own.
        first = await _unless_gone(request, anext(tokens))
        return _EventStream(_events(reply, first, tokens))

    async def _filtered(self, filter: Filter, texts: list[FilterText], reply: Reply) -> Response:
        """A reply of which a filter withholds responses. A stream has each response in one piece, once all have ended.

        Args:
            filter: The filter.
            texts: Texts of the request.
            reply: The reply.

        Raises:
            RequestError: If the filter withholds the request.
        """
        [decision] = await self._decisions(filter, [texts], "request")
        if decision.withheld:
            field = "messages" if reply.asked.is_chat else "prompt"
            raise RequestError("the request was withheld by the filter of this server", field, "content_filter")
        async with aclosing(self.sampler.sample(reply.asked.rows())) as tokens:
            async for sampled in tokens:
                reply.take(sampled)
        messages: list[list[JSON]] = [
            [{"role": "assistant", "content": choice.text, "tool_calls": choice.calls}] for choice in reply.choices
        ]
        rows = [row_texts({"messages": message}, "a response") for message in messages]
        for choice, found in zip(reply.choices, await self._decisions(filter, rows, "response"), strict=True):
            if found.withheld:
                choice.withhold(filter.refusal)
        return _EventStream(_replayed(reply)) if reply.asked.stream else json_response(reply.body())

    async def _decisions(self, filter: Filter, rows: list[list[FilterText]], what: str) -> list[FilterDecision]:
        """Decisions about requests or responses. The log has the rules that match, but no texts of clients."""
        async with self._checking:
            try:
                decisions = await asyncio.to_thread(filter.check_rows, rows)
            except UserError as error:
                log.error("the filter failed: %s", error)
                raise RequestError(
                    "the filter of this server failed; its log has the reason", status=500, kind="server_error"
                ) from None
        for decision in decisions:
            if decision.matches:
                log.warning("filter: %s of a %s (%s)", decision.action, what, ", ".join(decision.rules))
        return decisions


def _texts(value: JSON, asked: Asked, reply: Reply) -> list[FilterText]:
    """The texts of a request."""
    if asked.is_chat and isinstance(value, dict):
        return row_texts({key: value.get(key) for key in ("messages", "tools")}, "a request")
    return [FilterText(reply.renderer.tokenizer.decode(ids), "user", label="a request") for ids in asked.prompts]


async def _replayed(reply: Reply) -> AsyncGenerator[bytes, None]:
    """The events of a stream about responses that have all ended."""
    for one in (*reply.begin(), *reply.whole(), *reply.end()):
        yield one


class _EventStream(StreamingResponse):
    """Sends events, and stops their generator when the client is gone."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _whole(reply: Reply, tokens: AsyncGenerator[Sampled, None]) -> Response:
    """The reply, once all responses have ended."""
    async with aclosing(tokens):
        async for sampled in tokens:
            reply.take(sampled)
    return json_response(reply.body())


async def _events(reply: Reply, first: Sampled, tokens: AsyncGenerator[Sampled, None]) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error after its beginning is its last event."""
    async with aclosing(tokens):
        for one in (*reply.begin(), *reply.events(first)):
            yield one
        try:
            async for sampled in tokens:
                for one in reply.events(sampled):
                    yield one
        except RequestError as error:
            yield event(error.body())
            return
        for one in reply.end():
            yield one


async def _unless_gone(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of some work, which is cancelled if the client closes the connection.

    Raises:
        HTTPException: If it does; nobody reads the response.
    """
    answer, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(499, "the client closed the connection")
        return await answer
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- errors -----------------------------------------------------------------------------------------------------------


def _refusal(status: int, problem: str) -> Response:
    return error_response(RequestError(problem, status=status))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refusal(error.status_code, error.detail)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_error(request: Request, error: Exception) -> Response:
    """An error of this program; uvicorn logs it."""
    return error_response(RequestError("the server failed; its log has the reason", status=500, kind="server_error"))
