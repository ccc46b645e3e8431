"""A server in this process that speaks the protocol of `vllm serve` 0.32, and samples with the built-in engine."""

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.generation.vllm_server import VLLMServer
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.rewards import FunctionReward
from tests.helpers.modules import vowels
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer


class Drop(Exception):
    """Raised by `FakeServer.before` to close the connection without an answer."""


class Answer(Exception):
    """Raised by `FakeServer.before` to answer with a status and an object."""

    def __init__(self, status: int, body: Any) -> None:
        self.status, self.body = status, body


class FakeServer:
    """Serves a model, and the adapters that are loaded.

    Args:
        model: The served model.
        decode: Maps token ids to text.
        port: Port; 0 for a free one.
        key: Key that `/v1` and `/inference` require, as with `--api-key`.
        raw: As with `--logprobs-mode raw_logprobs`.
        context: As with `--max-model-len`.
        version: Version that it reports; None for a server that is not vLLM.
        probed: Numbers that it reports for the two most likely tokens if only one token is allowed.

    Attributes:
        before: Called with path and body before a request is answered; may raise `Drop` or `Answer`, or wait.
        differing: What its worker answers to the loading of all weights: names of those that it does not hold.
        logits: As with `--logprobs-mode raw_logits`, for prompts.
        requests: Number of requests of each path.
        most: Largest number of responses that were sampled at the same time.
    """

    def __init__(
        self,
        model: Any,
        decode: Any,
        port: int = 0,
        key: str | None = None,
        raw: bool = False,
        context: int = 64,
        version: str | None = "0.32.0",
        probed: tuple[float, float] | None = None,
    ) -> None:
        self.model, self.decode, self.key, self.raw, self.context = copy.deepcopy(model), decode, key, raw, context
        self.probed, self.version, self.adapters, self.paths, self.weights = probed, version, {}, {}, "default"
        self.differing: list[str] | None = []
        self.logits = False
        self.before: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        self.requests: Counter[str] = Counter()
        self.engines: dict[str, LocalEngine] = {}
        self.now = self.most = 0
        self.lock, self.sampling = threading.Lock(), threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.answer(self)

            do_POST = do_GET  # noqa: N815 - the name that the base class calls

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.dead = False
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """Stop at once: open connections get no answer, new ones are refused."""
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or "{}")
        with self.lock:
            self.requests[handler.path] += 1
        try:
            guarded = handler.path.startswith(("/v1", "/inference"))
            if self.key and guarded and handler.headers.get("Authorization") != f"Bearer {self.key}":
                raise Answer(401, {"error": "Unauthorized"})
            self.before(handler.path, body)
            status, found = 200, self.reply(handler.path, body)
        except Answer as answer:
            status, found = answer.status, answer.body
        except Drop:
            return
        if self.dead:
            return
        text = found.encode() if isinstance(found, str) else json.dumps(found).encode()
        with suppress(ConnectionError):  # the client has stopped waiting
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/version" and self.version:
            return {"version": self.version}
        if path == "/v1/models":
            base = {"id": "base", "owned_by": "vllm" if self.version else "other", "root": "base", "parent": None}
            loaded = [{"id": name, "root": self.paths[name], "parent": "base"} for name in self.adapters]
            return {"data": [{**base, "max_model_len": self.context}, *loaded]}
        if path == "/v1/load_lora_adapter":
            name, folder = body["lora_name"], body["lora_path"]
            if name in self.adapters:
                raise Answer(400, _error(f"The lora adapter '{name}' has already been loaded."))
            if not Path(folder).is_dir():
                raise Answer(404, _error(f"No adapter found for {folder}"))
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
            self.adapters[name], self.paths[name] = adapted, folder
            return f"Success: LoRA adapter '{name}' added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return "Success"
        if path == "/collective_rpc":
            if body["method"] != "load_policy":
                raise Answer(500, {"error": "AttributeError"})
            for file in Path(body["args"][0]).glob("*.safetensors"):
                self.model.load_state_dict(load_file(file), strict=False)
            return {"results": [self.differing]}
        if path == "/weight_info":
            return {"weight_version": self.weights}
        if path == "/health":
            return ""
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.weights = body["new_version"]
            return {"success": True}
        if path == "/detokenize":
            return {"prompt": self.decode(body["tokens"])}
        if path in ("/inference/v1/generate", "/v1/completions"):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            try:
                return self.sample(body) if path.endswith("generate") else self.score(body)
            finally:
                with self.lock:
                    self.now -= 1
        raise Answer(404, {"detail": "Not Found"})

    def sample(self, body: dict[str, Any]) -> Any:
        name, ids, given = body["model"], body["token_ids"], body["sampling_params"]
        self.check(name, ids)
        params = SamplingParams(
            max_tokens=given["max_tokens"],
            min_tokens=given.get("min_tokens", 0),
            temperature=given.get("temperature", 1.0),
            top_p=given.get("top_p", 1.0),
            top_k=given.get("top_k", 0),
            min_p=given.get("min_p", 0.0),
            stop_token_ids=tuple(given.get("stop_token_ids") or ()),
            stop_strings=tuple(given.get("stop") or ()),
        )
        model = self.adapters.get(name, self.model)
        with self.sampling:
            # Built once, because an engine first checks the model's cache.
            engine = self.engines.setdefault(name, LocalEngine(model, self.decode))
            (found,) = engine.generate([ids], params, [given.get("seed") or 0])
        time.sleep(0.002)  # so that requests overlap
        content = [
            {"token_id": token, "logprob": logprob, "top_logprobs": [{"token_id": token, "logprob": logprob}]}
            for token, logprob in zip(found.ids, found.logprobs, strict=True)
        ]
        if given.get("allowed_token_ids"):
            numbers = self.probed or ([-5.0, -4.0] if self.raw else [0.0, -9999.0])
            content[0]["top_logprobs"] = [{"token_id": 0, "logprob": number} for number in numbers]
        choice = {
            "index": 0,
            "token_ids": found.ids,
            "logprobs": {"content": content},
            "finish_reason": found.stop_reason,
            "weight_versions": [{"version": self.weights, "start": 0, "end": len(found.ids)}],
        }
        return {"model": name, "choices": [choice], "prompt_logprobs": self.prompt_logprobs(model, ids, given)}

    def score(self, body: dict[str, Any]) -> Any:
        """An answer of `/v1/completions` to a request for the log-probabilities of its prompt."""
        self.check(body["model"], body["prompt"])
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            raise Answer(400, _error("max_tokens must be at least 1, got 0."))
        time.sleep(0.002)  # so that requests overlap
        return {"choices": [{"prompt_logprobs": self.prompt_logprobs(self.model, body["prompt"], body)}]}

    def check(self, name: str, ids: list[int]) -> None:
        if name not in ("base", *self.adapters):
            raise Answer(404, _error(f"The model `{name}` does not exist."))
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise Answer(400, _error(f"Token id {max(ids)} is out of vocabulary"))

    @torch.no_grad()
    def prompt_logprobs(self, model: Any, ids: list[int], given: dict[str, Any]) -> Any:
        if (most := given.get("prompt_logprobs")) is None:
            return None
        scores = model(torch.tensor([ids])).logits[0]
        rows = scores if self.logits else scores.log_softmax(-1)
        return [
            None,
            *(
                {str(one): {"logprob": float(row[one])} for one in {token, *row.topk(most).indices.tolist()}}
                for token, row in zip(ids[1:], rows, strict=False)
            ),
        ]


def _error(message: str) -> Any:
    return {"error": {"message": message, "type": "BadRequestError"}}


def train_with_server(model: str, url: str, folder: Path) -> list[float]:
    """Train an adapter in three rounds that a server samples, and return `train/logprob_gap` after each."""
    module = PolicyRLModule(
        model,
        lora=LoRA(rank=4),
        rewards=[FunctionReward(vowels)],
        sampler=Sampler(max_tokens=6, engine=VLLMServer(url, str(folder / "weights"), "float32")),
        optimizer=sgd(1.0),
    )
    gaps: list[float] = []
    module.on_train_batch_end = lambda *_: gaps.append(float(fit.callback_metrics["train/logprob_gap"]))
    fit = trainer(folder)
    fit.fit(module, PromptDataModule(prompts(6), prompts_per_round=2, group_size=3, seed=1))
    return gaps
