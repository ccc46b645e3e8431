"""Flags of the commands that serve on a port, and who may use such a server."""

import argparse
import os
import secrets
import socket
from typing import TYPE_CHECKING

from rlhf_lightning.errors import check_whole

if TYPE_CHECKING:
    from rlhf_lightning.web import Access


def add_web_flags(parser: argparse.ArgumentParser, title: str, port: int, users: str, variable: str) -> None:
    """Add `--host`, `--port` and `--allowed_host`.

    Args:
        parser: The parser.
        title: Title of the group of flags.
        port: The default port.
        users: Who sends requests.
        variable: Environment variable with the token that they must give.
    """
    group = parser.add_argument_group(title)
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"address to serve on; beyond this machine, {users} need a token, which is printed, or taken from "
        f"{variable} (default: 127.0.0.1)",
    )
    group.add_argument("--port", type=int, default=port, help=f"port to serve on, 0 for a free one (default: {port})")
    group.add_argument(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help=f"name under which {users} may reach the server, for example of a proxy; may be repeated",
    )


def check_port(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for a `--port` that does not exist."""
    check_whole("--port", options.port, 0, 65535)


def access_of(options: argparse.Namespace, variable: str, prefix: str = "") -> "Access":
    """Who may use the server: anyone on this machine; beyond it, whoever has the token.

    Args:
        options: The parsed flags.
        variable: Environment variable of the token. A flag would be visible in the list of processes.
        prefix: What a generated token begins with.

    Raises:
        ConfigError: If the token is too short.
    """
    from rlhf_lightning.web import Access, is_local

    local = is_local(options.host)
    token = os.environ.get(variable) or (None if local else prefix + secrets.token_urlsafe(16))
    return Access(token, (*options.allowed_host, *(() if local else (socket.gethostname(), options.host))), variable)


def reachable(address: str, host: str) -> str:
    """The address at which other machines reach a server that is bound to all addresses of this one.

    Args:
        address: The server's own address.
        host: What it is bound to.
    """
    if host not in ("0.0.0.0", "::"):
        return address
    return address.replace(host if host != "::" else "[::]", socket.gethostname())
