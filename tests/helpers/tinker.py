"""A server with Tinker's API in a thread, and calls of it without Tinker's client."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.serving.shutdown import ApiHttpServer, Shutdown
from rlhf_lightning.tinker.server import CONNECTIONS, TinkerServer
from rlhf_lightning.tinker.service import TinkerService
from rlhf_lightning.web import Access, server_config
from tests.helpers.web import started


class Refused(Exception):
    """A call that the server refuses, with the status, the message and the headers."""

    def __init__(self, status: int, message: str, headers: Message) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Asked:
    """Calls of a server, as Tinker's client sends them in JSON's form."""

    def __init__(self, url: str, service: TinkerService, http: ApiHttpServer, key: str) -> None:
        self.url, self.service, self.http, self.key = url, service, http, key
        self.session = ""

    def send(self, path: str, data: bytes | None = None, method: str | None = None, **headers: str) -> Any:
        """Send a request; returns the reply."""
        given = {"X-API-Key": self.key, "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(f"{self.url}api/v1/{path}", data, given, method=method)
        try:
            with urlopen(request, timeout=60) as reply:
                content = reply.read()
        except HTTPError as error:
            raise Refused(error.code, str(json.loads(error.read()).get("detail")), error.headers) from None
        return json.loads(content) if content[:1] in (b"{", b"") and content else content

    def post(self, call: str, /, **fields: Any) -> Any:
        return self.send(call, json.dumps(fields).encode())

    def result(self, request_id: str, **headers: str) -> Any:
        """The result of a request that is computed."""
        return self.send("retrieve_future", json.dumps({"request_id": request_id}).encode(), **headers)

    def done(self, call: str, /, **fields: Any) -> Any:
        """Send a request, and wait for its result."""
        return self.result(self.post(call, **fields)["request_id"])

    def model(self, number: int = 0, rank: int = 4, seed: int | None = 0, **lora: Any) -> str:
        """Create a training run; returns its id."""
        self.session = self.session or self.post("create_session", tags=[], sdk_version="0")["session_id"]
        config = {"rank": rank, "seed": seed, **lora}
        fields = {"session_id": self.session, "model_seq_id": number, "base_model": "tiny", "lora_config": config}
        found: str = self.done("create_model", **fields)["model_id"]
        return found

    def train(self, model_id: str, data: list[Any], loss: str = "cross_entropy", **fields: Any) -> Any:
        given = {"data": data, "loss_fn": loss, "loss_fn_config": fields.pop("config", None)}
        return self.done("forward_backward", model_id=model_id, forward_backward_input=given, **fields)

    def step(self, model_id: str, **params: Any) -> Any:
        return self.done("optim_step", model_id=model_id, adam_params={"learning_rate": 1e-2, **params})

    def sample(self, prompt: list[int], **fields: Any) -> Any:
        params = {"max_tokens": 6, "seed": 3, **fields.pop("params", {})}
        return self.done("asample", prompt=model_input(prompt), sampling_params=params, **fields)


def model_input(ids: list[int]) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": ids}]}


def tensor(values: list[Any]) -> dict[str, Any]:
    dtype = "int64" if all(isinstance(value, int) for value in values) else "float32"
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


def datum(ids: list[int], **inputs: list[Any]) -> dict[str, Any]:
    """A datum whose targets are the next tokens, unless they are given."""
    inputs = {"target_tokens": ids[1:], **inputs}
    return {
        "model_input": model_input(ids[:-1]),
        "loss_fn_inputs": {name: tensor(values) for name, values in inputs.items()},
    }


@contextmanager
def asking(
    base: str,
    folder: Path,
    access: Access | None = None,
    key: str = "tml-local",
    name: str = "tiny",
    grace: float = 5,
    **options: int,
) -> Iterator[Asked]:
    """Serve a model in a thread."""
    service = TinkerService(LanguageModel(base), name, folder, **options)
    service.start()
    try:
        api = TinkerServer(service, access or Access(), Shutdown(grace))
        http = ApiHttpServer(server_config(api.app(), CONNECTIONS), api.shutdown)
        with started(http) as url:
            yield Asked(url, service, http, key)
    finally:
        service.stop()
