"""What the web servers of `rlhf label`, `rlhf serve` and `rlhf tinker` share: access, and limits of requests."""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_lightning.errors import ConfigError

PATIENCE = 30
"""Seconds in which a request body must arrive."""
WEAKEST = 16
"""Smallest number of characters of a token."""


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Args:
        token: Token that users must give; None for none.
        hosts: Host names under which the server may be reached, beside addresses and `localhost`.
        variable: Environment variable of the token, for messages.

    Raises:
        ConfigError: If the token is too short.

    Example:
        >>> Access().allows_host("localhost:8765"), Access().allows_host("evil.example")
        (True, False)
    """

    token: str | None = None
    hosts: tuple[str, ...] = ()
    variable: str = "the token"

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < WEAKEST:
            raise ConfigError(f"{self.variable} has {len(self.token)} characters; it must have at least {WEAKEST}")

    def allows_host(self, host: str) -> bool:
        """True if a `Host` header names this server.

        Under DNS rebinding, a page of another site reaches this server by a name of that site. Addresses cannot be
        rebound.

        Args:
            host: The header.
        """
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port
        except ValueError:  # a malformed address or port
            return False
        return name == "localhost" or _is_address(name) or name in {known.lower() for known in self.hosts}

    def allows_token(self, token: str) -> bool:
        """True if a token is the right one, or none is needed.

        Args:
            token: What a user gives.
        """
        return self.token is None or equal(token, self.token)


class Guard:
    """Middleware that refuses foreign hosts and requests from pages of other sites, and adds headers to every response.

    Browsers name the page's site in the `Origin` header of every form that is sent by POST, and of every request to
    another site that a script may read.

    Args:
        app: The application.
        access: Who may use the server.
        refusal: Makes a response from a status and a message.
        headers: Headers of every response.
        command: The command that started the server, for messages.
        is_page: True if only browsers send POST requests, so that each of them must have an `Origin`.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        refusal: Callable[[int, str], Response],
        headers: Mapping[str, str],
        command: str,
        is_page: bool,
    ) -> None:
        self.app, self.access, self.refusal, self.headers = app, access, refusal, headers
        self.command, self.is_page = command, is_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if scope["type"] != "http":
            return
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        has_origin = request.method == "POST" if self.is_page else bool(origin)
        if not self.access.allows_host(host):
            problem = f"this server is not known as {host!r}; start {self.command} with --allowed_host NAME"
            await self.refusal(421, problem)(scope, receive, send_guarded)
        elif has_origin and urlsplit(origin).netloc.lower() != host.lower():
            await self.refusal(403, "the request was sent from a page of another site")(scope, receive, send_guarded)
        else:
            await self.app(scope, receive, send_guarded)


def equal(one: str, other: str) -> bool:
    """Compare secrets in a time that does not depend on where they differ.

    Args:
        one: A text.
        other: Another text.
    """
    return hmac.compare_digest(one.encode(), other.encode())


async def read_body(request: Request, kind: str, limit: int) -> bytes:
    """The body of a request.

    Args:
        request: The request.
        kind: The content type that it must have.
        limit: Largest number of bytes.

    Raises:
        HTTPException: If it is of another type, too large, or does not arrive within `PATIENCE` seconds.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise HTTPException(415, f"the request must be sent as {kind}")
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for block in request.stream():
                body += block
                if len(body) > limit:
                    raise HTTPException(413, f"the request has more than {limit} bytes")
    except TimeoutError:
        raise HTTPException(408, "the request did not arrive in time") from None
    return bytes(body)


def is_local(host: str) -> bool:
    """True if only this machine reaches a server that is bound to a host.

    Args:
        host: Name or address.
    """
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on a host and port.

    Args:
        host: Name or address.
        port: The port; 0 for any free one.

    Raises:
        ConfigError: If it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(f"--host {host}: {reason}; give a name or address of this machine") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()  # so that a second server on this port is refused, and early visitors wait
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror}; give another port, or an address of this machine"
        ) from None
    return found


def address_of(place: socket.socket) -> str:
    """The web address of a socket.

    Args:
        place: The socket.
    """
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def server_config(app: Starlette, connections: int = 256) -> uvicorn.Config:
    """Settings of a web server for an application.

    Args:
        app: The application.
        connections: Largest number of connections; further requests get status 503.
    """
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=5,
    )


def web_server(app: Starlette) -> uvicorn.Server:
    """A server for an application; `run(sockets=[…])` serves until a stop signal.

    Args:
        app: The application.
    """
    return uvicorn.Server(server_config(app))
