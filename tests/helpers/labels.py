"""Labeling sessions for the tests: comparisons, stores, a running server, and a client without a browser."""

import http.client
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from rlhf_lightning.labeling.comparisons import Candidate, Comparison, Question
from rlhf_lightning.labeling.queue import Assignment, LabelQueue
from rlhf_lightning.labeling.server import LabelServer
from rlhf_lightning.labeling.store import LabelStore
from rlhf_lightning.web import Access
from tests.helpers.web import running


def comparison(
    index: int = 0, answers: tuple[str, str] = ("one", "two"), disagreement: float | None = None
) -> Comparison:
    """A comparison of two answers by the models `m0` and `m1`."""
    first, second = (
        Candidate([{"role": "assistant", "content": text}], {"model": f"m{number}", "stop_reason": "stop"})
        for number, text in enumerate(answers)
    )
    return Comparison(Question([{"role": "user", "content": f"Count {index}"}]), (first, second), disagreement)


def new_queue(folder: Path, count: int = 4, **assignment: object) -> LabelQueue:
    """A queue with comparisons; `pairs.jsonl` is in the folder."""
    queue = LabelQueue(LabelStore(folder / "pairs.jsonl", {"seed": 0}), Assignment(**assignment))  # type: ignore[arg-type]
    queue.add([comparison(index) for index in range(count)])
    return queue


@contextmanager
def serving(queue: LabelQueue, access: Access | None = None, **options: Callable[[], bool]) -> Iterator[str]:
    """Serve a queue in a thread; yields the address."""
    with running(LabelServer(queue, access or Access(), **options).app()) as address:
        yield address


@dataclass
class Reply:
    """A response of the server."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def csrf(self) -> str:
        """The token that a form of the page sends."""
        found = re.search(r'name="csrf" value="(\w+)"', self.text)
        assert found, self.text
        return found[1]

    @property
    def comparison(self) -> str | None:
        """Id of the comparison that the page shows."""
        found = re.search(r'name="comparison" value="(\w+)"', self.text)
        return found[1] if found else None


@dataclass
class Client:
    """Sends requests as a browser would: with cookies, and with the site that a form is sent from."""

    address: str
    cookie: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def request(self, method: str, path: str = "/", body: bytes | None = None, **headers: str) -> Reply:
        """Send a request; `headers` are added, with `_` for `-`."""
        place = urlsplit(self.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
        own = {"Host": place.netloc, "Cookie": self.cookie, "Origin": f"http://{place.netloc}"}
        if method == "POST":
            own["Content-Type"] = "application/x-www-form-urlencoded"
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in own.items() if value})
        response = connection.getresponse()
        text, found = response.read().decode(), dict(response.getheaders())
        connection.close()
        if "set-cookie" in found:
            self.cookie = found["set-cookie"].partition(";")[0]
        return Reply(response.status, text, found)

    def get(self, path: str = "/", **headers: str) -> Reply:
        """Open a page."""
        return self.request("GET", path, **headers)

    def post(self, path: str, fields: dict[str, str], **headers: str) -> Reply:
        """Send a form."""
        return self.request("POST", path, urlencode(fields).encode(), **headers)

    def sign_in(self, name: str, **fields: str) -> Reply:
        """Sign in."""
        return self.post("/sign-in", {"name": name, **fields})

    def decide(self, choice: str, note: str = "") -> Reply:
        """Decide about the comparison that is shown."""
        shown = self.get()
        assert shown.comparison, shown.text
        fields = {"csrf": shown.csrf, "comparison": shown.comparison, "choice": choice, "note": note}
        return self.post("/decide", fields)
