"""The web server of `rlhf tinker`: the HTTP calls of Tinker's client, and who may use them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlhf_lightning.serving.fields import RequestError, json_of
from rlhf_lightning.serving.replies import json_response
from rlhf_lightning.serving.server import BODY, HEADERS
from rlhf_lightning.serving.shutdown import Shutdown
from rlhf_lightning.tinker.replies import Failure, Reply
from rlhf_lightning.tinker.requests import forward_backward_of_json, forward_backward_of_message
from rlhf_lightning.tinker.service import Body, TinkerService
from rlhf_lightning.types import JSON
from rlhf_lightning.web import Access, Guard, read_body

log = logging.getLogger(__name__)
TRAINING_BODY = 16 * 2**20
"""Largest body of `forward_backward` in bytes. The client splits larger requests as `CLIENT_CONFIG` says."""
POLL = 3.0
"""Seconds for which a request for a result waits until it is there; the client asks again after them."""
ENDED = Failure("the server was stopped before this request was done; start it again, and load a checkpoint", "server")
CONNECTIONS = 768
"""Largest number of connections. A client has one for each of its samples; processes often may open 1,024 files."""
PROTOBUF = "application/x-protobuf"
CLIENT_CONFIG: dict[str, JSON] = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": False,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "sample_max_concurrent_requests": 128,
    "sample_use_retrieve_futures": False,
    "sample_join_sampling_session": False,
    "custom_loss_server_side": False,
}
"""What the client is told to do: no calls that this server does not have, and requests in order."""
DYNAMIC_CONFIG: dict[str, JSON] = {"refresh_interval_sec": 3600, "sample_cancel_enabled": False}


@dataclass
class TinkerServer:
    """Answers Tinker's client.

    Args:
        service: What computes.
        access: Who may use the server.
        shutdown: How requests end when the server does.

    Example:
        >>> app = TinkerServer(service).app()  # doctest: +SKIP
    """

    service: TinkerService
    access: Access = field(default_factory=Access)
    shutdown: Shutdown = field(default_factory=Shutdown)

    def app(self) -> Starlette:
        """The application."""
        service = self.service
        calls: dict[str, Callable[[Body], dict[str, JSON]]] = {
            "create_model": service.create_model,
            "get_info": service.get_info,
            "unload_model": service.unload_model,
            "optim_step": service.optim_step,
            "save_weights": service.save_weights,
            "save_weights_for_sampler": service.save_weights_for_sampler,
            "load_weights": service.load_weights,
            "weights_info": service.weights_info,
            "create_sampling_session": service.create_sampling_session,
            "asample": service.asample,
            "session_heartbeat": self._heartbeat,
            "create_session": lambda body: {"type": "create_session", "session_id": service.create_session()},
            "client/config": lambda body: CLIENT_CONFIG,
            "client/dynamic_config": lambda body: DYNAMIC_CONFIG,
            "telemetry": lambda body: {"status": "accepted"},  # which is not kept
        }
        routes = [Route(f"/api/v1/{name}", self._call(call), methods=["POST"]) for name, call in calls.items()]
        run = "/api/v1/training_runs/{run}"
        routes += [
            Route("/api/v1/healthz", self._health),
            Route("/api/v1/get_server_capabilities", self._capabilities),
            Route("/api/v1/forward_backward", self._forward_backward, methods=["POST"]),
            Route("/api/v1/forward", self._forward_backward, methods=["POST"]),
            Route("/api/v1/retrieve_future", self._retrieve, methods=["POST"]),
            Route("/api/v1/sessions/{session}/finish", self._finish, methods=["POST"]),
            Route("/api/v1/samplers/{sampler}", self._sampler),
            Route(run, self._training_run),
            Route(f"{run}/checkpoints", self._checkpoints),
            Route(f"{run}/checkpoints/{{checkpoint:path}}", self._delete, methods=["DELETE"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(
                    Guard, access=self.access, refusal=_refusal, headers=HEADERS, command="rlhf tinker", is_page=False
                )
            ],
            exception_handlers={HTTPException: _on_http_error, RequestError: _on_request_error, Exception: _on_error},
        )

    def _authorize(self, request: Request) -> None:
        """Raise `RequestError` for a request without the token."""
        given = request.headers.get("x-api-key", "")
        if not self.access.allows_token(given):
            said = "the API key is wrong" if given else "this server needs an API key"
            raise RequestError(f"{said}; set TINKER_API_KEY to the key that rlhf tinker printed", status=401)

    def _call(self, call: Callable[[Body], dict[str, JSON]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler of a call whose request and reply are JSON."""

        async def handle(request: Request) -> Response:
            body = await self._body(request, BODY)
            self._check_running()
            return json_response(call(body))

        return handle

    def _check_running(self) -> None:
        """Raise `RequestError` during a shutdown, after which no client could ask for the result."""
        if self.shutdown.begun.is_set():
            raise RequestError("the server is shutting down", status=503)

    async def _body(self, request: Request, limit: int) -> Body:
        self._authorize(request)
        content = await read_body(request, "application/json", limit)
        return Body(json_of(content), content)

    # -- calls --------------------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _capabilities(self, request: Request) -> Response:
        self._authorize(request)
        model: dict[str, JSON] = {
            "model_name": self.service.name,
            "max_context_length": self.service.limits.context,
            "trainable": True,
            "sampleable": True,
        }
        return json_response({"supported_models": [model]})

    def _heartbeat(self, body: Body) -> dict[str, JSON]:
        self.service.check_session(body.text("session_id"))
        return {"type": "session_heartbeat"}

    async def _forward_backward(self, request: Request) -> Response:
        """Training data as protobuf (SDKs of 2026), or as JSON (earlier ones)."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RequestError("the request is compressed; this server reads requests that are not", status=415)
        if request.headers.get("content-type", "").startswith("application/json"):
            body, forward_only = await self._body(request, TRAINING_BODY), request.url.path.endswith("/forward")
            asked, content = forward_backward_of_json(body, self.service.limits, forward_only), body.content
            body.finish()
        else:
            self._authorize(request)
            content = await read_body(request, PROTOBUF, TRAINING_BODY)
            asked = forward_backward_of_message(content, self.service.limits)
        self._check_running()
        return json_response(self.service.forward_backward(asked, content))

    async def _retrieve(self, request: Request) -> Response:
        """The result of a request, once it is there."""
        body = await self._body(request, BODY)
        request_id = body.text("request_id") or ""
        body.flag("allow_metadata_only")
        body.text("model_id")
        body.finish()
        reply = await self._reply(self.service.result(request_id))
        if reply is None:
            # The client takes status 408 as: ask again.
            return json_response({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        self.service.result(request_id)
        message = reply.message() if PROTOBUF in request.headers.get("accept", "") else None
        return json_response(reply.json()) if message is None else Response(message, media_type=PROTOBUF)

    async def _reply(self, future: Future[Reply]) -> Reply | None:
        """The result of a request, or None if it is not there after `POLL` seconds.

        During a shutdown no client can ask again, so requests wait until they are done or the shutdown is over.
        """
        done, over = asyncio.wrap_future(future), asyncio.ensure_future(self.shutdown.over.wait())
        await asyncio.wait((done,), timeout=POLL)
        if self.shutdown.begun.is_set():
            await asyncio.wait((done, over), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if done.done():
            return done.result()
        return ENDED if self.shutdown.begun.is_set() else None

    async def _finish(self, request: Request) -> Response:
        await self._body(request, BODY)  # says why, which is not kept
        # If requests still wait, the runs end later.
        await self._reply(self.service.finish_session(request.path_params["session"]))
        return Response(status_code=204)

    async def _sampler(self, request: Request) -> Response:
        self._authorize(request)
        return json_response(self.service.get_sampler(request.path_params["sampler"]))

    async def _training_run(self, request: Request) -> Response:
        self._authorize(request)
        return json_response(self.service.training_run(request.path_params["run"]))

    async def _checkpoints(self, request: Request) -> Response:
        self._authorize(request)
        found = self.service.list_checkpoints(request.path_params["run"])
        return json_response({"checkpoints": [*found], "cursor": None})

    async def _delete(self, request: Request) -> Response:
        self._authorize(request)
        self.service.delete_checkpoint(request.path_params["run"], request.path_params["checkpoint"])
        return Response(status_code=204)


# -- errors -----------------------------------------------------------------------------------------------------------


def _refusal(status: int, problem: str) -> Response:
    """An error as the client shows it. It tries again after status 429, and for minutes after 5xx."""
    return json_response({"detail": problem}, status, {"Retry-After": "1"} if status == 429 else None)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        path = request.url.path
        return _refusal(404, f"this server has no call {request.method} {path[:200]}; docs/tinker.md lists its calls")
    return _refusal(error.status_code, error.detail)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _refusal(error.status, error.message)


async def _on_error(request: Request, error: Exception) -> Response:
    """An error of this program; uvicorn logs it."""
    return _refusal(500, "the server failed; its log has the reason")
