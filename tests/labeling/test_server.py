"""The web server: what it shows, stores and refuses."""

import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.labeling.page import markdown
from rlhf_lightning.labeling.queue import LabelQueue
from rlhf_lightning.labeling.server import BODY
from rlhf_lightning.web import Access, bound, is_local
from tests.helpers.labels import Client, comparison, new_queue, serving

TOKEN = "correct-horse-battery"


@pytest.fixture
def queue(tmp_path: Path) -> LabelQueue:
    return new_queue(tmp_path, 3, overlap=0.0)


@pytest.fixture
def client(queue: LabelQueue) -> Iterator[Client]:
    with serving(queue) as address:
        client = Client(address)
        assert client.sign_in("Ann").status == 303
        yield client


def test_annotator_decides_undoes_and_finishes(client: Client, queue: LabelQueue) -> None:
    assert "0 decided, 3 ready" in client.get().text
    for choice in ("A", "both_bad", "skip"):
        reply = client.decide(choice, note=" häßlich & <b> ")
        assert (reply.status, reply.headers["location"]) == (303, "/")
    assert "Nothing is left" in client.get().text
    assert [made.choice for made in queue.store.decisions["Ann"].values()] == ["A", "both_bad", "skip"]
    assert {made.note for made in queue.store.decisions["Ann"].values()} == {"häßlich & <b>"}
    client.post("/undo", {"csrf": client.get().csrf})
    assert "2 decided, 1 ready" in client.get().text


def test_page_is_blind(client: Client) -> None:
    page = client.get()
    assert "Count" in page.text
    for word in ("m0", "m1", "source", "shown_first"):
        assert word not in page.text


def test_form_that_is_sent_twice_counts_once(client: Client, queue: LabelQueue) -> None:
    page = client.get()
    fields = {"csrf": page.csrf, "comparison": str(page.comparison), "choice": "A"}
    assert [client.post("/decide", fields).status for _ in range(2)] == [303, 303]
    assert len(queue.store.decisions["Ann"]) == 1


def test_decision_that_cannot_be_stored_is_asked_for_again(
    client: Client, queue: LabelQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = client.get().comparison

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = client.decide("A")
    assert reply.status == 507
    assert "was not stored (No space left on device)" in reply.text
    assert reply.comparison == before
    assert not queue.store.decisions.get("Ann")
    assert client.decide("A").status == 303


def test_forms_need_the_session_and_its_token(client: Client, queue: LabelQueue) -> None:
    page = client.get()
    fields = {"comparison": str(page.comparison), "choice": "A"}
    assert client.post("/decide", fields).status == 403
    assert client.post("/decide", {**fields, "csrf": page.csrf[:-1]}).status == 403
    stranger = Client(client.address)
    assert stranger.post("/decide", {**fields, "csrf": page.csrf}).status == 403
    other = Client(client.address)
    other.sign_in("Ben")
    assert other.post("/decide", {**fields, "csrf": page.csrf}).status == 403
    assert not queue.store.decisions


def test_altered_cookie_is_no_session(client: Client) -> None:
    name, _, value = client.cookie.partition("=")
    encoded, nonce, signature = value.split(".")
    client.cookie = f"{name}={b'Ben'.hex()}.{nonce}.{signature}"
    assert "Your name" in client.get().text
    client.cookie = f"{name}={encoded}.{nonce}.é"
    assert client.get(Cookie=client.cookie.encode().decode("latin1")).status == 200


@pytest.mark.parametrize("origin", ["", "null", "http://evil.example", "http://127.0.0.1:1", "http://localhost"])
def test_forms_of_other_sites_are_refused(origin: str, client: Client, queue: LabelQueue) -> None:
    page = client.get()
    fields = {"csrf": page.csrf, "comparison": str(page.comparison), "choice": "A"}
    for path in ("/decide", "/undo", "/sign-in", "/sign-out"):
        assert client.post(path, fields, Origin=origin).status == 403
    assert not queue.store.decisions


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "[::1", "localhost.evil", "localhost:x"]
)
def test_foreign_host_names_are_refused(host: str, client: Client) -> None:
    """As after DNS rebinding: the browser asks this server for a page of another site."""
    assert client.get(Host=host).status == 421


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1:8765", "[::1]:8765", "192.168.1.5", "label.example:443"])
def test_known_host_names_are_served(host: str, tmp_path: Path) -> None:
    with serving(new_queue(tmp_path), Access(hosts=("Label.example",))) as address:
        assert Client(address).get(Host=host).status == 200


def test_token_is_needed(tmp_path: Path) -> None:
    with serving(new_queue(tmp_path), Access(TOKEN)) as address:
        client = Client(address)
        assert 'name="token"' in client.get().text
        for token in ("", TOKEN[:-1], f"{TOKEN} "):
            reply = client.sign_in("Ann", token=token)
            assert reply.status == 403
            assert "The token is wrong." in reply.text
        assert not client.cookie
        assert client.sign_in("Ann", token=TOKEN).status == 303
        assert "Answer A" in client.get().text
    with pytest.raises(ConfigError, match="RLHF_LABEL_TOKEN has 5 characters; it must have at least 16"):
        Access("short", variable="RLHF_LABEL_TOKEN")


def test_names(tmp_path: Path) -> None:
    with serving(new_queue(tmp_path / "any")) as address:
        for name in ("", "  ", "a" * 41, "Ann\x00", "Ann\u202e"):
            assert Client(address).sign_in(name).status == 403
        client = Client(address)
        client.sign_in(" Zoë  O'<b> ")
        assert "Zoë O&#x27;&lt;b&gt;" in client.get().text
        client.post("/sign-out", {"csrf": client.get().csrf})
        assert "Your name" in client.get().text
    with serving(new_queue(tmp_path / "listed", annotators=("Ann", "Ben"))) as address:
        assert "<option>Ben</option>" in Client(address).get().text
        assert Client(address).sign_in("Cleo").status == 403
        assert Client(address).sign_in("Ben").status == 303


def test_requests_have_limits(client: Client, queue: LabelQueue) -> None:
    page = client.get()
    fields = {"csrf": page.csrf, "comparison": str(page.comparison), "choice": "A"}
    assert client.post("/decide", {**fields, "note": "x" * BODY}).status == 413
    assert client.request("POST", "/decide", b"a=1&" * 17).status == 400
    assert client.request("POST", "/decide", b"\xff").status == 400
    assert client.post("/decide", fields, Content_Type="application/json").status == 415
    assert client.post("/decide", {**fields, "choice": "C"}).status == 400
    assert client.get("/nothing").status == 404
    assert client.request("PUT", "/decide").status == 405
    assert not queue.store.decisions
    # The longest note that the page sends fits, whatever its characters are.
    assert client.post("/decide", {**fields, "note": "\U0001f600" * 2000}).status == 303
    assert len(queue.store.decisions["Ann"][fields["comparison"]].note) == 2000


def test_request_whose_body_does_not_arrive_ends(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.web.PATIENCE", 0.1)
    place = urlsplit(client.address)
    with socket.create_connection((place.hostname, place.port or 0), timeout=10) as connection:
        head = f"POST /sign-in HTTP/1.1\r\nHost: {place.netloc}\r\nOrigin: http://{place.netloc}\r\n"
        head += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\nname="
        connection.sendall(head.encode())
        started = time.monotonic()
        assert b" 408 " in connection.recv(1000)
        assert time.monotonic() - started < 5


def test_every_response_forbids_foreign_content(client: Client) -> None:
    pages = [client.get(path) for path in ("/", "/label.js", "/label.css", "/favicon.ico", "/nothing")]
    pages += [client.get(Host="evil.example"), client.post("/decide", {})]
    for reply in pages:
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
    # Nothing is loaded from elsewhere.
    assert set(re.findall(r'(?:src|href)="([^"]*)"', pages[0].text)) == {"/label.css", "/label.js"}


HOSTILE = """<script>alert(1)</script> <img src=x onerror=alert(1)> <style>*{display:none}</style>
[a](javascript:alert(1)) [b](data:text/html;base64,PHNjcmlwdD4=) [c](vbscript:x) <javascript:alert(1)>
![d](https://evil.example/seen.png) [e](https://ok.example "t\\" onclick=alert(1)")

```"><script>alert(1)</script>
</code></pre><script>alert(1)</script>
```

<form action="https://evil.example"><button name=choice value=A>

[f]: javascript:alert(1)
[f]"""


def test_answers_cannot_bring_markup() -> None:
    html = markdown(HOSTILE)
    assert set(re.findall(r"<([a-z0-9]+)", html)) <= {"p", "br", "a", "pre", "code"}
    assert set(re.findall(r'href="([^"]*)"', html)) == {"https://evil.example/seen.png", "https://ok.example"}
    assert re.findall(r"<[^>]*\son\w+=", html) == []
    assert set(re.findall(r'rel="([^"]*)"', html)) == {"noopener noreferrer"}
    assert "\\u202e" in markdown("a\u202eb")


def test_answer_is_shown_as_text_and_cut_answers_are_marked(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 0, overlap=1.0)
    given = comparison(0, (HOSTILE, "**bold**"))
    given.candidates[0].source["stop_reason"] = "length"
    queue.add([given])
    with serving(queue) as address:
        client = Client(address)
        client.sign_in("Ann")
        page = client.get().text
    assert page.count("<script") == 1
    assert "<strong>bold</strong>" in page
    assert page.count("cut off at the token limit") == 1


def test_addresses() -> None:
    assert [is_local(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "192.168.1.5", "example.org")] == [False] * 4
    taken = r"--port \d+: Address already in use; give another port"
    with bound("127.0.0.1", 0) as place, pytest.raises(ConfigError, match=taken):
        bound("127.0.0.1", place.getsockname()[1])
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 "):
        bound("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"--host a+: not a host name"):
        bound("a" * 64, 0)
