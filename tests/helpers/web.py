"""A web application that runs in a thread of the test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from rlhf_lightning.web import address_of, bound, web_server


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve an application on a free port; yields the address."""
    with started(web_server(app)) as address:
        yield address


@contextmanager
def started(server: uvicorn.Server) -> Iterator[str]:
    """Start a server on a free port; yields the address."""
    with bound("127.0.0.1", 0) as place:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield address_of(place)
        finally:
            server.should_exit = True
            thread.join()
