"""Requests to one vLLM server, over HTTP with the standard library. Failures become messages, or `Unavailable`."""

import json
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Literal
from urllib.parse import urlsplit

from rlhf_lightning.errors import ConfigError, cut, first_line
from rlhf_lightning.files import visible
from rlhf_lightning.types import JSON

REPEATABLE = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed later."""
CONNECT = 10.0
"""Seconds to wait for a connection."""


class Unavailable(Exception):
    """The server did not answer, or answered that it failed. The same request may succeed later.

    Args:
        message: What happened.
        began: True if the server may have begun to work on the request, so that the request may be the reason.
    """

    def __init__(self, message: str, began: bool) -> None:
        super().__init__(message)
        self.began = began


class NotFound(Exception):
    """The server has no such path, or no model of that name."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a server.

    Args:
        url: `http://HOST:PORT`, or with `https` and a path.
        key_variable: Environment variable with the key that the server requires. It is read for each request, and
            neither kept nor shown.
        timeout: Seconds that a request may take.
        setting: The setting that names this server, for messages.

    Raises:
        ConfigError: If the URL is invalid.
    """

    url: str
    key_variable: str
    timeout: float
    setting: str = "sampler.engine"
    _open: set[HTTPConnection] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        if "@" in self.url:
            # The message must not show the password.
            raise ConfigError(
                f"{self.setting}: the address of {self.url.rpartition('@')[2]} has a user name or password; put the "
                f"server's key into the environment variable {self.key_variable}"
            )
        if not _is_address(self.url):
            raise ConfigError(
                f"{self.setting}: the address is {self.url!r}; it must be http://HOST:PORT or https://HOST:PORT"
            )

    def send(self, method: Literal["GET", "POST"], path: str, body: Mapping[str, JSON] | None = None) -> bytes:
        """Send a request and return the body of the answer.

        Args:
            method: HTTP method.
            path: Path below the URL.
            body: Sent as JSON.

        Raises:
            Unavailable: If the server does not answer, or answers with one of `REPEATABLE`.
            NotFound: If it answers 404.
            ConfigError: If it refuses the request.
        """
        parts = urlsplit(self.url)
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"the environment variable {self.key_variable} has characters that no HTTP header can have"
            )
        if key:
            headers["Authorization"] = f"Bearer {key}"
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=min(CONNECT, self.timeout))
        self._open.add(connection)
        began = False
        try:
            connection.connect()
            connection.sock.settimeout(self.timeout)
            began = True
            connection.request(method, parts.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(f"{self.setting}: the certificate of {self.url} is not valid ({error.reason})") from None
        except TimeoutError:
            what = f"did not answer {path} within {self.timeout:g} s" if began else "cannot be reached (no connection)"
            raise Unavailable(f"{self.url} {what}", began) from None
        except (OSError, HTTPException, UnicodeError) as error:
            raise Unavailable(f"{self.url} cannot be reached ({first_line(error)})", began) from None
        finally:
            self._open.discard(connection)
            connection.close()
        if 200 <= status < 300:
            return text
        reason = f"{self.url}{path} answers {status}: {_reason(text)}"
        if status == 401:
            wrong = "the key in it is refused" if key else "it is empty"
            raise ConfigError(
                f"{self.setting}: {self.url} requires a key in the environment variable {self.key_variable}, but "
                f"{wrong}; set it to the key that `vllm serve` was started with (--api-key)"
            )
        if status == 404:
            raise NotFound(reason)
        if status in REPEATABLE:
            raise Unavailable(reason, began=status not in (429, 503))
        raise ConfigError(f"{self.setting}: {reason}")

    def read(
        self, method: Literal["GET", "POST"], path: str, body: Mapping[str, JSON] | None = None
    ) -> dict[str, JSON]:
        """Send a request and return the JSON object of the answer; for the errors see `send`.

        Args:
            method: HTTP method.
            path: Path below the URL.
            body: Sent as JSON.
        """
        text = self.send(method, path, body)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{self.setting}: {self.url}{path} does not answer with a JSON object; is it vLLM?")
        return found

    def abort(self) -> None:
        """Close all connections, so that threads that wait for an answer stop; vLLM then drops their requests."""
        for connection in list(self._open):
            if isinstance(connection.sock, socket.socket):
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    rest = parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not rest


def _reason(text: bytes) -> str:
    """The message in an answer with an error, in any of the forms that vLLM uses."""
    words = text.decode(errors="replace").strip()
    with suppress(ValueError, RecursionError):
        found = json.loads(words)
        while isinstance(found, dict) and (
            inner := next((found[k] for k in ("error", "message", "detail") if k in found), None)
        ):
            found = inner
        words = found if isinstance(found, str) else json.dumps(found)
    return cut(visible(" ".join(words.split())), 300) or "no message"
