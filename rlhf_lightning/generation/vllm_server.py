"""`vllm serve` as the sampling engine: one or several servers, on this machine or others. See docs/engines.md.

model:
  sampler:
    max_tokens: 1024
    engine:
      class_path: rlhf_lightning.generation.vllm_server.VLLMServer
      init_args: {url: [http://10.0.0.2:8000, http://10.0.0.3:8000], folder: /shared/run1/weights}
"""

import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.distributed import gather, is_distributed, rank_count, safe_point
from rlhf_lightning.errors import ConfigError, SyncError, UserError, check_whole, first_line
from rlhf_lightning.files import real_path, scratch_of
from rlhf_lightning.generation.policy_weights import PolicyWeights, write_adapter
from rlhf_lightning.generation.sampler import EngineSettings
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts
from rlhf_lightning.generation.vllm_http import Endpoint, NotFound, Unavailable
from rlhf_lightning.generation.vllm_requests import (
    UNKNOWN,
    check_logprobs,
    check_settings,
    completion,
    prompt_logprobs,
    request_settings,
    served_model,
)
from rlhf_lightning.models.lora import base_of, is_adapted
from rlhf_lightning.run_folder import claim
from rlhf_lightning.types import JSON, Completion, Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
PREFIX = "rlhf-policy-"
"""Begins the name of each folder of weights; folders with such names are deleted when they are no longer needed."""
ATTEMPTS = 4
"""Times that a request is sent if servers fail while they work on it."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between attempts to reach a server; the last one repeats."""
SYNCS = ("adapter", "merged")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RAW, PROCESSED = "--logprobs-mode raw_logprobs", "--logprobs-mode processed_logprobs"
WORKER = "rlhf_lightning.generation.vllm_worker.PolicyWorker"
"""The methods that full weights need on a server."""
SHARD = 4 * 2**30
"""Bytes per file of full weights."""


class ServerError(UserError):
    """The servers do not answer, or fail."""


class VLLMServer(EngineSettings):
    """Samples with one or several servers started with `vllm serve`.

    Before a round, the weights are written to `folder`, and each server loads them from there. Each response is
    accepted only from a server that confirms that it sampled with these weights, so a server that was restarted gets
    them again before it is used. Requests of a server that fails go to the others.

    Args:
        url: Address of a server, or a list of addresses: `http://HOST:PORT`.
        folder: Folder that the trainer and all servers see under this path. Only one run may use it.
        dtype: The precision in which the servers compute (`--dtype`).
        lora_sync: How a policy with LoRA is passed: `adapter` passes only the adapter; `merged` passes all weights,
            with the adapter merged.
        max_in_flight: Number of requests that each server gets at the same time, from each process of the run.
        timeout: Seconds that a request may take.
        patience: Seconds to wait for servers if none of them answers, for example while they are restarted.
        key_variable: Environment variable with the servers' key (`vllm serve --api-key`).

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        >>> server = VLLMServer(url="http://127.0.0.1:8000", folder="/shared/weights")
        >>> server.max_in_flight
        128
    """

    def __init__(
        self,
        url: list[str] | str,
        folder: str,
        dtype: str = "bfloat16",
        lora_sync: str = "adapter",
        max_in_flight: int = 128,
        timeout: float = 600.0,
        patience: float = 600.0,
        key_variable: str = "VLLM_API_KEY",
    ) -> None:
        check_whole("sampler.engine.max_in_flight", max_in_flight)
        for name, value in (("timeout", timeout), ("patience", patience)):
            if not 0 < value < math.inf:
                raise ConfigError(f"sampler.engine.{name} is {value}; it must be above 0 and finite")
        if lora_sync not in SYNCS:
            raise ConfigError(f"sampler.engine.lora_sync is {lora_sync!r}; it must be one of {', '.join(SYNCS)}")
        self.urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise ConfigError(f"sampler.engine.url is {url!r}; it must name at least one server, and none twice")
        if dtype not in PRECISIONS:
            raise ConfigError(f"sampler.engine.dtype is {dtype!r}; it must be one of {', '.join(PRECISIONS)}")
        self.folder, self.dtype, self.lora_sync, self.max_in_flight = folder, dtype, lora_sync, max_in_flight
        self.timeout, self.patience, self.key_variable = timeout, patience, key_variable
        self.endpoints()

    @property
    def low_precision(self) -> bool:
        """True unless the servers compute in float32."""
        return self.dtype != "float32"

    def endpoints(self) -> list[Endpoint]:
        """The servers' addresses.

        Raises:
            ConfigError: If one is invalid.
        """
        return [Endpoint(url, self.key_variable, self.timeout) for url in self.urls]

    def build(self, model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer) -> "VLLMServerEngine":
        """Connect to the servers.

        Args:
            model: The policy.
            tokenizer: Its tokenizer.

        Raises:
            ConfigError: If a server does not fit the policy.
            ServerError: If no server answers.
        """
        return VLLMServerEngine(self, model, tokenizer)


@dataclass(frozen=True)
class Weights:
    """Weights in the shared folder.

    Args:
        name: Their name, unique in the run.
        folder: Their folder.
        adapter: True for an adapter, False for all weights of the model.
    """

    name: str
    folder: str
    adapter: bool


class Server:
    """One server, and the weights that it holds.

    Args:
        endpoint: Its address.
        vocabulary: Number of token ids of the policy.

    Attributes:
        holds: Name of the weights that it was seen to hold; None if it has to be asked.
        context: Its maximum number of tokens of a prompt with its response.
        raw_logprobs: See `check_settings`.
    """

    def __init__(self, endpoint: Endpoint, vocabulary: int) -> None:
        self.endpoint, self.vocabulary = endpoint, vocabulary
        self.url = endpoint.url
        self.holds: str | None = None
        self.model, self.root, self.context = "", "", 0
        self.raw_logprobs: bool | None = None
        self._lock = threading.Lock()
        self._lost_at: float | None = None

    def inspect(self) -> None:
        """Check that this is a vLLM server whose model fits the policy.

        Raises:
            ConfigError: If it is not.
            Unavailable: If it does not answer.
        """
        self.model, self.root, self.context = served_model(self.endpoint, self.root)
        self._check_vocabulary()
        raw = self._probe_logprobs()
        if self.raw_logprobs not in (None, raw):
            raise ConfigError(
                f"sampler.engine: {self.url} was restarted with another --logprobs-mode; restart it with "
                f"{RAW if self.raw_logprobs else PROCESSED}"
            )
        self.raw_logprobs = raw

    def _check_vocabulary(self) -> None:
        """vLLM does not say the size of its vocabulary, but refuses ids outside of it."""
        one: dict[str, JSON] = {"max_tokens": 1, "logprobs": 0}
        for token, inside in ((self.vocabulary - 1, True), (self.vocabulary, False)):
            try:
                self._request([token], one, self.model)
                accepted = True
            except ConfigError as error:
                if "vocabulary" not in str(error):
                    raise
                accepted = False
            if accepted != inside:
                size = "smaller" if inside else "larger"
                raise ConfigError(
                    f"sampler.engine: the vocabulary of {self.model} at {self.url} is {size} than the policy's, which "
                    f"has {self.vocabulary} token ids; serve the model that the policy starts from"
                )

    def _probe_logprobs(self) -> bool:
        """True if log-probabilities are computed before tokens are excluded, False if after it.

        Only one token is allowed. Computed afterwards, its log-probability is 0, and those of all others are minus
        infinity.
        """
        probe: dict[str, JSON] = {"max_tokens": 1, "allowed_token_ids": [0], "logprobs": 2, "seed": 0}
        (content,) = _contents(self._request([0], probe, self.model), self.url)
        ranks = content.get("top_logprobs")
        found = [one.get("logprob") for one in ranks if isinstance(one, dict)] if isinstance(ranks, list) else []
        numbers = [float(number) for number in found if isinstance(number, int | float)]
        if len(numbers) < 2:
            raise ConfigError(f"sampler.engine: {self.url} does not report log-probabilities")
        raw = min(numbers) > UNKNOWN
        if max(numbers) > 0 or not (raw or max(numbers) == 0):
            raise ConfigError(
                f"sampler.engine: {self.url} reports logits in place of log-probabilities; start it with {PROCESSED}"
            )
        return raw

    def _request(self, ids: Sequence[int], settings: dict[str, JSON], model: str) -> dict[str, JSON]:
        body: dict[str, JSON] = {"model": model, "token_ids": list(ids), "sampling_params": settings}
        return self.endpoint.read("POST", "/inference/v1/generate", body)

    def _confirmed(self, ids: Sequence[int], settings: dict[str, JSON], weights: Weights) -> dict[str, JSON]:
        """The answer to a request, if it was computed with these weights."""
        try:
            reply = self._request(ids, settings, weights.name if weights.adapter else self.model)
        except NotFound as error:
            self.holds = None
            raise Unavailable(f"{error}; it was probably restarted", began=False) from None
        except Unavailable:
            self.holds = None
            raise
        versions = {reply.get("model")} if weights.adapter else _versions(reply)
        if versions != {weights.name}:
            self.holds = None
            raise Unavailable(f"{self.url} sampled with other weights ({versions}); it was probably restarted", False)
        return reply

    def sample(self, prompt: Sequence[int], params: SamplingParams, seed: int, weights: Weights) -> "Sampled":
        """Sample a response.

        Args:
            prompt: Token ids.
            params: How to sample.
            seed: The response's seed.
            weights: The weights that must be used.

        Raises:
            Unavailable: If the server does not answer, or does not hold these weights.
            ConfigError: If it refuses the request.
        """
        reply = self._confirmed(prompt, request_settings(params, seed), weights)
        reason = _choice(reply, self.url).get("finish_reason")
        if reason not in ("stop", "length"):  # a server that is shut down aborts its requests
            raise Unavailable(f"{self.url} ended a response with {reason!r}", began=True)
        contents = _contents(reply, self.url)
        ids = [content.get("token_id") for content in contents]
        logprobs = [content.get("logprob") for content in contents]
        whole = [token for token in ids if isinstance(token, int) and 0 <= token < self.vocabulary]
        numbers = [float(number) for number in logprobs if isinstance(number, int | float)]
        if not len(whole) == len(numbers) == len(contents) > 0:
            raise ConfigError(f"sampler.engine: {self.url} answered without token ids or log-probabilities")
        check_logprobs(numbers, self.endpoint)
        return Sampled(whole, numbers, str(reason))

    def score(self, rows: Sequence[Sequence[int]], weights: Weights) -> list[list[float]]:
        """Compute log-probabilities of given tokens; see `ScoringEngine.score`.

        Args:
            rows: Token ids of each row.
            weights: The weights that must be used.

        Raises:
            Unavailable: If the server does not answer, or does not hold these weights.
        """
        found = []
        for row in rows:
            reply = self._confirmed(row, {"max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}, weights)
            found.append(prompt_logprobs(reply.get("prompt_logprobs"), row, self.endpoint))
        return found

    def restore(self, weights: Weights, patience: float, stop: threading.Event, reason: str) -> None:
        """Wait until the server answers, and load the weights unless it holds them.

        Args:
            weights: The weights.
            patience: Seconds to wait.
            stop: Ends the wait.
            reason: Why it has to be restored, for the log.

        Raises:
            Unavailable: If it does not answer in time.
            ConfigError: If it cannot load them, or its model does not fit.
        """
        with self._lock:  # all threads of this server wait here while the first of them restores it
            if self._lost_at is None and self.holds != weights.name:
                self._lost_at = time.monotonic()
                log.warning("%s; its requests go to the other servers until it has the weights again", reason)
            retry(partial(self.ensure, weights), (self._lost_at or time.monotonic()) + patience, stop)
            if self.holds == weights.name:
                self._lost_at = None

    def ensure(self, weights: Weights) -> None:
        """Load the weights unless the server was seen to hold them.

        Args:
            weights: The weights.

        Raises:
            Unavailable: If the server does not answer.
            ConfigError: If it cannot load them, or its model does not fit.
        """
        if self.holds != weights.name:
            self.inspect()
            self.load(weights)
            log.warning("%s answers again, and has loaded the weights %s", self.url, weights.name)

    def load(self, weights: Weights) -> None:
        """Load weights, unless the server holds them, and unload those of earlier rounds.

        Args:
            weights: The weights.

        Raises:
            Unavailable: If the server does not answer.
            ConfigError: If it cannot load them.
        """
        self.holds = None
        try:
            if weights.adapter:
                self._load_adapter(weights)
            else:
                self._load_all(weights)
        except NotFound as error:
            how = (
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, and check that the server sees the folder "
                f"{weights.folder}"
                if weights.adapter
                else "VLLM_SERVER_DEV_MODE=1, in a network that only the trainer reaches"
            )
            raise ConfigError(f"sampler.engine: {error}; start `vllm serve` with {how}") from None
        self.holds = weights.name

    def _load_adapter(self, weights: Weights) -> None:
        loaded = self.adapters()
        for name, folder in loaded.items():
            if name != weights.name and Path(folder).parent == Path(weights.folder).parent:
                with suppress(NotFound):  # another process of this run has unloaded it meanwhile
                    self.endpoint.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if weights.name in loaded:
            return
        try:
            self.endpoint.send(
                "POST", "/v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": weights.folder}
            )
        except (Unavailable, ConfigError) as error:
            # Another process of this run may have loaded it meanwhile. vLLM answers 500 to an adapter that it cannot
            # use; if it still answers other requests, the adapter is the reason.
            if weights.name not in self.adapters():
                raise ConfigError(f"sampler.engine: the policy's adapter cannot be loaded: {error}") from None

    def adapters(self) -> dict[str, str]:
        """Folder of each adapter that the server has loaded, by name."""
        cards = self.endpoint.read("GET", "/v1/models").get("data")
        rows = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        return {str(card.get("id")): str(card.get("root")) for card in rows if card.get("parent") is not None}

    def _load_all(self, weights: Weights) -> None:
        if self.endpoint.read("GET", "/weight_info").get("weight_version") == weights.name:
            return  # another process of this run has loaded them
        try:
            reply = self.endpoint.read("POST", "/collective_rpc", {"method": "load_policy", "args": [weights.folder]})
        except Unavailable as error:
            # vLLM answers 500 to a method that it does not know and to weights that it cannot load; if it still answers
            # other requests, one of these is the reason.
            self.endpoint.send("GET", "/health")
            raise ConfigError(
                f"sampler.engine: the policy's weights cannot be loaded: {error}; check that the served model has the "
                f"policy's architecture and sees the folder {weights.folder}, and that `vllm serve` was started with "
                f"--worker-extension-cls {WORKER}"
            ) from None
        self._confirm(reply.get("results"), weights)
        if not self.endpoint.read("POST", "/reset_prefix_cache").get("success"):
            raise Unavailable(
                f"{self.url} did not drop its cached prompts, whose keys belong to the old weights", False
            )
        # Last, so that a server that holds this version has loaded the weights completely.
        self.endpoint.send("POST", "/update_weight_version", {"new_version": weights.name})

    def _confirm(self, workers: JSON, weights: Weights) -> None:
        """Check what each worker answered to `load_policy`: the names of weights that it holds otherwise."""
        lists = workers if isinstance(workers, list) else [workers]
        for names in lists:
            if not isinstance(names, list):
                raise ConfigError(
                    f"sampler.engine: {self.url} does not say whether it holds the weights; install the trainer's "
                    "version of rlhf-lightning on the servers"
                )
            if names:
                raise SyncError(
                    f"sampler.engine: {self.url} has loaded {weights.folder}, but {len(names)} of its weights are not "
                    f"those in the folder, for example {names[0]}. vLLM loads this model in another way than the "
                    "engine expects; use the built-in engine"
                )


@dataclass(frozen=True)
class Sampled:
    """A response as a server reports it.

    Args:
        ids: Token ids.
        logprobs: Their log-probabilities, in nats.
        finish_reason: Why it ended.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


def _choice(reply: dict[str, JSON], url: str) -> dict[str, JSON]:
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict):
        raise ConfigError(f"sampler.engine: {url} answered without a response")
    return choice


def _contents(reply: dict[str, JSON], url: str) -> list[dict[str, JSON]]:
    """The tokens of a response with their log-probabilities, as vLLM reports them."""
    logprobs = _choice(reply, url).get("logprobs")
    contents = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [one for one in contents if isinstance(one, dict)] if isinstance(contents, list) else []


def _versions(reply: dict[str, JSON]) -> set[JSON]:
    """The versions of the weights that a response was sampled with."""
    choices = reply.get("choices")
    found: set[JSON] = set()
    for choice in choices if isinstance(choices, list) else []:
        spans = choice.get("weight_versions") if isinstance(choice, dict) else None
        found |= (
            {str(span.get("version")) for span in spans if isinstance(span, dict)} if isinstance(spans, list) else set()
        )
    return found


def retry(call: Callable[[], None], deadline: float, stop: threading.Event) -> None:
    """Repeat a call with growing delays until the server answers.

    Args:
        call: Raises `Unavailable` if the server does not answer.
        deadline: Value of `time.monotonic()` at which to give up.
        stop: Ends the attempts.

    Raises:
        Unavailable: The last one, if the time is over.
    """
    number = 0
    while not stop.is_set():
        try:
            call()
            return
        except Unavailable:
            delay = DELAYS[min(number, len(DELAYS) - 1)]
            if time.monotonic() + delay > deadline:
                raise
        over = time.monotonic() + delay
        while not stop.wait(min(0.5, delay)) and time.monotonic() < over:
            if rank_count() == 1:  # the other ranks wait in a collective operation, which this one must reach
                safe_point()
        number += 1


class Requests:
    """The requests of a call of `generate`, spread over the servers.

    Each server has threads that take the next request. A request that fails goes back to the queue, and the thread
    waits until the server has the weights again, while the other servers go on.

    Args:
        servers: The servers.
        prompts: Token ids of each prompt.
        params: How to sample.
        seeds: One seed per prompt.
        weights: The weights to sample with.
        patience: Seconds to wait for a server that does not answer.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int],
        weights: Weights,
        patience: float,
    ) -> None:
        self.servers, self.prompts, self.params, self.seeds = servers, prompts, params, seeds
        self.weights, self.patience = weights, patience
        self.waiting = deque(range(len(prompts)))
        self.failures = [0] * len(prompts)
        self.results: dict[int, Sampled] = {}
        self.error: Exception | None = None
        self.lost = 0
        self.changed = threading.Condition()
        self.stop = threading.Event()

    def run(self, in_flight: int) -> list[Sampled]:
        """Send the requests and return the responses, in order.

        Args:
            in_flight: Number of requests per server at the same time.

        Raises:
            ConfigError: If a server refuses a request, or does not fit the policy any more.
            ServerError: If no server answers, or a request fails repeatedly.
        """
        count = min(in_flight, len(self.prompts))
        threads = [
            threading.Thread(target=self._work, args=(server, count), daemon=True)
            for _ in range(count)
            for server in self.servers  # in turns, so that each server gets its share of a few requests
        ]
        for thread in threads:
            thread.start()
        try:
            with self.changed:
                while len(self.results) < len(self.prompts) and self.error is None:
                    self.changed.wait(0.5)
                    safe_point()
        finally:
            self.stop.set()
            with self.changed:
                self.changed.notify_all()
            while any(thread.is_alive() for thread in threads):
                for server in self.servers:
                    server.endpoint.abort()
                threads[0].join(0.05)
                threads = [thread for thread in threads if thread.is_alive()]
        if self.error is not None:
            raise self.error
        return [self.results[index] for index in range(len(self.prompts))]

    def _work(self, server: Server, count: int) -> None:
        try:
            while (index := self._next()) is not None:
                self._send(server, index)
        except Unavailable as error:
            with self.changed:
                self.lost += 1
                if self.lost == count * len(self.servers):
                    self._fail(ServerError(f"sampler.engine: no server answers: {error}"))
        except Exception as error:  # noqa: BLE001 - raised in the thread that called `run`
            with self.changed:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.changed.notify_all()

    def _next(self) -> int | None:
        """The next request; waits while others are in flight, which may come back. None if there is nothing to do."""
        with self.changed:
            while not self.stop.is_set():
                if self.waiting:
                    return self.waiting.popleft()
                self.changed.wait()
        return None

    def _send(self, server: Server, index: int) -> None:
        try:
            if server.holds != self.weights.name:
                raise Unavailable(f"{server.url} does not have the weights {self.weights.name} yet", began=False)
            found = server.sample(self.prompts[index], self.params, self.seeds[index], self.weights)
        except Unavailable as error:
            if self.stop.is_set():
                return
            with self.changed:
                self.failures[index] += error.began
                if self.failures[index] == ATTEMPTS:
                    raise ServerError(
                        f"sampler.engine: a prompt of {len(self.prompts[index])} tokens failed {ATTEMPTS} times, the "
                        f"last time because {error}; see the server's log, and raise sampler.engine.timeout if it is "
                        "only slow"
                    ) from None
                self.waiting.appendleft(index)
                self.changed.notify_all()
            server.restore(self.weights, self.patience, self.stop, str(error))
            return
        with self.changed:
            self.results[index] = found
            if len(self.results) == len(self.prompts):
                self.changed.notify_all()


class VLLMServerEngine:
    """The servers of a `VLLMServer`, connected; created by `VLLMServer.build`.

    Args:
        settings: The settings.
        model: The policy.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If a server does not fit the policy.
        ServerError: If no server answers.
    """

    def __init__(self, settings: VLLMServer, model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer) -> None:
        self.settings = settings
        self.dtype = PRECISIONS[settings.dtype]
        self.decode, self.eos = tokenizer.decode, tokenizer.eos_token_id
        self.vocabulary = base_of(model).get_input_embeddings().weight.shape[0]
        self.adapter = settings.lora_sync == "adapter" and is_adapted(model)
        if self.adapter and (obstacles := PolicyWeights(model).obstacles()):
            raise ConfigError(
                f"sampler.engine: vLLM cannot hold {' and '.join(obstacles)} as an adapter; set "
                "sampler.engine.lora_sync: merged"
            )
        self.servers = [Server(endpoint, self.vocabulary) for endpoint in settings.endpoints()]
        self.weights: Weights | None = None
        self.run, self.syncs = uuid.uuid4().hex[:8], 0
        self._each(Server.inspect)
        modes = {server.raw_logprobs for server in self.servers} - {None}
        if len(modes) > 1:
            raise ConfigError(f"sampler.engine: the servers differ in --logprobs-mode; start all with {PROCESSED}")
        self.raw_logprobs = bool(modes.pop())
        for server in self.servers:
            server.raw_logprobs = self.raw_logprobs  # also of a server that does not answer yet

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt with its response, on every server."""
        return min(server.context for server in self.servers if server.context)

    def check(self, params: SamplingParams) -> None:
        """Refuse settings that the servers cannot follow.

        Args:
            params: How to sample.

        Raises:
            ConfigError: If there are any.
        """
        check_settings(params, self.raw_logprobs, self.eos, f"{RAW} for the servers", f"{PROCESSED} for the servers")
        if params.max_tokens >= self.context:
            raise ConfigError(
                f"sampler.max_tokens is {params.max_tokens}, but the servers have room for {self.context} tokens with "
                "the prompt; start them with a larger --max-model-len, or lower sampler.max_tokens"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt, see `Engine.generate`.

        Args:
            prompts: Token ids of each prompt.
            params: How to sample.
            seeds: One seed per prompt.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ConfigError: If a prompt is empty, too long, or has ids outside the vocabulary, or a server refuses it.
            ServerError: If no server answers, or a request fails repeatedly.
        """
        if self.weights is None:
            raise RuntimeError("VLLMServerEngine.generate was called before sync")
        self.check(params)
        check_prompts(prompts, params.max_tokens, self.vocabulary, self.context)
        if not prompts:
            return []
        requests = Requests(self.servers, prompts, params, seeds, self.weights, self.settings.patience)
        return [
            completion(found.ids, found.logprobs, found.finish_reason, params, self.decode)
            for found in requests.run(self.settings.max_in_flight)
        ]

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Compute log-probabilities of given tokens on one server, see `ScoringEngine.score`.

        Args:
            rows: Token ids of each row.
        """
        return self.score_each(rows)[0]

    def score_each(self, rows: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Compute them on each server that holds the weights, see `SeveralCopies.score_each`.

        Args:
            rows: Token ids of each row.

        Raises:
            ServerError: If no server answers.
        """
        if self.weights is None:
            raise RuntimeError("VLLMServerEngine.score_each was called before sync")
        weights, found = self.weights, {}

        def score(server: Server) -> None:
            server.ensure(weights)
            found[server.url] = server.score(rows, weights)

        self._each(score)
        return [found[server.url] for server in self.servers if server.url in found]

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the weights to the shared folder and have the servers load them, see `Engine.sync`.

        The first rank does both for all ranks. A server that does not answer gets them when it answers again.

        Args:
            named_tensors: See `Engine.sync`.
            version: See `Engine.sync`.

        Raises:
            ConfigError: If the folder cannot be written, or a server cannot load the weights.
            ServerError: If no server answers.
        """
        if rank_count() > 1 and threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "model.max_staleness: with sampler.engine VLLMServer, sampling while training works only with one "
                "process (devices: 1), because all ranks share the servers' weights; set model.max_staleness: 0"
            )
        self.syncs += 1
        name = f"{PREFIX}{self.run}-{self.syncs}-round-{version}"
        failure: UserError | None = None
        root = real_path(self.settings.folder)
        writer = None
        if _is_first_rank():
            try:
                claim(root, ())
                writer = Writer(root / name)
            except UserError as error:
                failure = error
        # All ranks iterate over the weights, because a tensor may be gathered from all of them.
        if self.adapter:
            assert isinstance(named_tensors, PolicyWeights), "the adapter alone is in PolicyWeights only"
            adapter = dict(named_tensors.adapter())
            if writer is not None:
                writer.write(partial(write_adapter, writer.scratch, adapter))
        else:
            for key, tensor in named_tensors:
                if writer is not None:
                    writer.add(key, tensor.detach())
        weights = Weights(name, str(root / name), self.adapter)
        if writer is not None:
            try:
                writer.finish()
                self._each(partial(Server.load, weights=weights))
            except UserError as error:
                failure = error
        # The name is that of the first rank.
        (weights, message), *_ = gather((weights, str(failure) if failure else None), every=True)
        if message is not None:
            raise failure or UserError(message)
        if not _is_first_rank():
            for server in self.servers:
                server.holds = weights.name
        self.weights = weights
        if writer is not None:
            _delete_others(root, name)

    def _each(self, call: Callable[[Server], None]) -> None:
        """Call `call` for each server. Those that do not answer are left for later, unless no server answers."""

        def attempt(server: Server) -> Unavailable | None:
            try:
                call(server)
            except Unavailable as error:
                return error
            return None

        def attempts() -> None:
            with ThreadPoolExecutor(len(self.servers)) as pool:
                missing = [error for error in pool.map(attempt, self.servers) if error is not None]
            if len(missing) == len(self.servers):
                raise missing[0]
            for error in missing:
                log.warning("%s; it gets the weights when it answers again", error)

        try:
            retry(attempts, time.monotonic() + self.settings.patience, threading.Event())
        except Unavailable as error:
            raise ServerError(
                f"sampler.engine: no server has answered for {self.settings.patience:g} s: {error}; check the address, "
                "and that `vllm serve` runs"
            ) from None


class Writer:
    """Writes weights into a folder that appears under its name when it is complete.

    Errors are raised by `finish`, when all ranks have gathered all tensors.

    Args:
        folder: The folder.

    Attributes:
        scratch: The folder until it is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch = folder, scratch_of(folder)
        self.tensors: dict[str, Tensor] = {}
        self.bytes = self.files = 0
        self.error: OSError | SafetensorError | None = None
        self.write(self.scratch.mkdir)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of all weights. Files are written as soon as they have `SHARD` bytes.

        Args:
            name: Its name.
            tensor: The tensor.
        """
        self.tensors[name] = tensor.cpu().contiguous()
        self.bytes += tensor.nbytes
        if self.bytes > SHARD:
            self._flush()

    def write(self, call: Callable[[], None]) -> None:
        """Write something, unless an error came before.

        Args:
            call: Writes it into `scratch`.
        """
        if self.error is None:
            try:
                call()
            except (OSError, SafetensorError) as error:
                self.error = error

    def finish(self) -> None:
        """Write what is left, and rename the folder.

        Raises:
            ConfigError: If something could not be written.
        """
        if self.tensors:
            self._flush()
        self.write(partial(os.replace, self.scratch, self.folder))
        if self.error is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise ConfigError(
                f"sampler.engine.folder: the policy's weights cannot be written to {self.folder} "
                f"({first_line(self.error)}); free disk space, or choose another folder"
            )

    def _flush(self) -> None:
        self.write(partial(save_file, self.tensors, self.scratch / f"model-{self.files:05d}.safetensors"))
        self.tensors, self.bytes, self.files = {}, 0, self.files + 1


def _delete_others(root: Path, name: str) -> None:
    """Delete the weights of earlier rounds, and those that an interrupted run has left."""
    for folder in (*root.glob(f"{PREFIX}*"), *root.glob(f".{PREFIX}*")):
        if folder.name != name and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _is_first_rank() -> bool:
    return not is_distributed() or torch.distributed.get_rank() == 0
