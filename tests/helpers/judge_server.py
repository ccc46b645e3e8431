"""A local server that speaks OpenAI's chat completions, for tests of judges."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Asked = Mapping[str, Any]


@dataclass
class Refusal:
    """A reply other than a chat completion."""

    status: int
    body: str = '{"error": {"message": "no"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class JudgeServer:
    """Answers each request with the text or the refusal that `answer` returns, and keeps what it was asked."""

    answer: Callable[[Asked], str | Refusal]
    usage: bool = True
    finish: str = "stop"
    requests: list[Any] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    most_at_once: int = 0
    port: int = 0
    _active: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reply(self, asked: Asked, key: str) -> Refusal:
        with self._lock:
            self.requests.append(asked)
            self.keys.append(key)
            self._active += 1
            self.most_at_once = max(self.most_at_once, self._active)
        try:
            found = self.answer(asked)
            if isinstance(found, Refusal):
                time.sleep(found.delay)
                return found
            choice = {"index": 0, "finish_reason": self.finish, "message": {"role": "assistant", "content": found}}
            usage = {"usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}} if self.usage else {}
            head = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
            return Refusal(200, json.dumps({**head, "choices": [choice], **usage}))
        finally:
            with self._lock:
                self._active -= 1


@contextmanager
def serving(
    answer: Callable[[Asked], str | Refusal], usage: bool = True, finish: str = "stop"
) -> Iterator[JudgeServer]:
    """Run a `JudgeServer` on a free port."""
    state = JudgeServer(answer, usage, finish)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            found = state.reply(asked, self.headers["authorization"])
            body = found.body.encode()
            if self.path != "/v1/chat/completions":
                found, body = Refusal(404), b"{}"
            try:
                self.send_response(found.status)
                for name, value in {"content-type": "application/json", **found.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
