"""A frozen model behind a vLLM server as the reference of the KL, or as the teacher of `recipe: distill_pg`.

model:
  recipe: distill_pg
  kl: {reference: http://10.0.0.2:8000}
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from rlhf_lightning.distributed import run_on_leader, safe_point
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.vllm_http import Endpoint, NotFound, Unavailable
from rlhf_lightning.generation.vllm_requests import (
    Served,
    check_logprobs,
    prompt_logprobs,
    served_model,
    token_logprobs,
)
from rlhf_lightning.generation.vllm_server import ATTEMPTS, ServerError, retry
from rlhf_lightning.models.loading import text_tokens
from rlhf_lightning.types import JSON, Tokenizer

log = logging.getLogger(__name__)
IN_FLIGHT = 32
"""Number of rows that the server computes at the same time for each process of the run."""
TIMEOUT = 600.0
"""Seconds that a request may take."""
PATIENCE = 600.0
"""Seconds to wait for the server if it does not answer, for example while it is restarted."""
PAUSE = 1.0
"""Seconds until a request that failed is sent again; twice as many after the second failure, and so on."""
IDS = 4096
"""Number of token ids whose texts are compared at once."""


def endpoint(url: str) -> Endpoint:
    """The server that `kl.reference` names.

    Args:
        url: `http://HOST:PORT`.

    Raises:
        ConfigError: If it is invalid.
    """
    return Endpoint(url.rstrip("/"), "VLLM_API_KEY", TIMEOUT, "kl.reference")


class ServerReference:
    """Log-probabilities of given tokens under the model of a vLLM server.

    It has the part of `Reference`'s interface that policy RL needs. Each row is a prompt whose log-probabilities the
    server reports.

    Args:
        url: `http://HOST:PORT`.
        tokenizer: The policy's tokenizer.

    Attributes:
        copy: None, since there is no model in this process.
        modules_to_shard: Empty for the same reason.
        served: The model of the server.

    Raises:
        ConfigError: If it is not a vLLM server, or its model has another vocabulary.
        ServerError: If it does not answer.

    Example:
        ```python
        reference = ServerReference("http://10.0.0.2:8000", tokenizer)
        logprobs = reference.logprobs(input_ids, loss_mask)  # [B, T], nats
        ```
    """

    def __init__(self, url: str, tokenizer: Tokenizer) -> None:
        self.copy: nn.Module | None = None
        self.modules_to_shard: list[nn.Module] = []
        self.endpoint = endpoint(url)
        self.served = Served("", "", 0)
        self._weights: JSON = None
        self._lock, self._returns = threading.Lock(), 0
        stop = threading.Event()
        self._confirm(stop)
        self._check_ids(tokenizer, stop)
        rank_zero_only(log.info)("the reference is %s at %s", self.served.root, self.endpoint.url)

    @torch.no_grad()
    def logprobs(self, input_ids: Tensor, loss_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the tokens with mask 1; see `Reference.logprobs`.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to compute, `[B, T]`.
            temperature: Must be 1, the temperature at which vLLM computes those of a prompt.

        Returns:
            In nats, `[B, T]`, 0 where the mask is 0.

        Raises:
            ConfigError: If a row is too long for the server, or the server has other weights than before.
            ServerError: If it does not answer.
        """
        if temperature != 1:
            raise ValueError(f"the temperature is {temperature}, but vLLM computes log-probabilities of prompts at 1")
        ends = [max(positions, default=-1) + 1 for positions in map(_positions, loss_mask.tolist())]
        rows = {i: input_ids[i, :end].tolist() for i, end in enumerate(ends) if end > 1}
        self.check_length(max(ends))
        found = run_on_leader(lambda: self._scores(list(rows.values())))
        logprobs = torch.zeros(input_ids.shape, dtype=torch.float32)
        for i, numbers in zip(rows, found, strict=True):
            logprobs[i, 1 : ends[i]] = torch.tensor(numbers)
        return logprobs.to(input_ids.device).where(loss_mask.bool(), 0.0)

    def check_length(self, tokens: int) -> None:
        """Refuse rows that the server has no room for.

        Args:
            tokens: Number of tokens of the longest row.

        Raises:
            ConfigError: If it is too long.
        """
        room = self.served.context - 1  # vLLM samples a token, too
        if tokens > room:
            raise ConfigError(
                f"kl.reference: a prompt with its response may have {tokens} tokens, but {self.endpoint.url} has room "
                f"for {room}; restart it with a larger --max-model-len, or lower sampler.max_tokens, limits.max_tokens "
                "or data.max_prompt_tokens"
            )

    def _scores(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability of each token after the first, for each row."""
        if not rows:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(IN_FLIGHT, len(rows)))
        futures = [pool.submit(self._score, row, stop) for row in rows]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, 0.5, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                safe_point()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while wait(futures, 0.05).not_done:
                self.endpoint.abort()
        self._confirm(threading.Event())
        return [future.result() for future in futures]

    def _score(self, row: list[int], stop: threading.Event) -> list[float]:
        reply = self._post("/v1/completions", {"prompt": list(row), "max_tokens": 1, "prompt_logprobs": 0}, stop)
        return prompt_logprobs(_steps(reply), row, self.endpoint)

    def _post(self, path: str, body: dict[str, JSON], stop: threading.Event) -> dict[str, JSON]:
        """Send a request, again after failures that may pass."""
        failures = 0
        while True:
            returns = self._returns
            try:
                return self.endpoint.read("POST", path, {"model": self.served.name, **body})
            except (Unavailable, NotFound) as error:
                if stop.is_set():
                    raise
                failures += 1
                if failures == ATTEMPTS:
                    raise ServerError(
                        f"kl.reference: a request failed {ATTEMPTS} times, the last time because {error}; see the "
                        "server's log. With --enable-lora, vLLM 0.32 may fail at log-probabilities of prompts"
                    ) from None
                self._await(str(error), returns, stop)
            stop.wait(PAUSE * failures)

    def _confirm(self, stop: threading.Event) -> None:
        """Check that the server still has the same model, and wait for it if it does not answer."""
        returns = self._returns
        try:
            self._identify()
        except Unavailable as error:
            self._await(str(error), returns, stop)

    def _await(self, reason: str, returns: int, stop: threading.Event) -> None:
        """Wait until the server answers.

        Args:
            reason: Why, for the log.
            returns: `_returns` before the failure: one of several threads waits for all of them.
            stop: Ends the wait.
        """
        with self._lock:
            if self._returns > returns or stop.is_set():
                return
            log.warning("kl.reference: %s; waiting up to %g s for the server", reason, PATIENCE)
            try:
                retry(self._identify, time.monotonic() + PATIENCE, stop)
            except Unavailable as error:
                raise ServerError(
                    f"kl.reference: no answer for {PATIENCE:g} s: {error}; check the address, and that `vllm serve` "
                    "runs. The run can be resumed, also with another address"
                ) from None
            if not stop.is_set():
                self._returns += 1
                log.warning("kl.reference: %s answers again", self.endpoint.url)

    def _identify(self) -> None:
        """Note the served model and the version of its weights, and refuse others than before."""
        self.endpoint.send("GET", "/health")
        self.served = served_model(self.endpoint, self.served.root)
        try:
            version = self.endpoint.read("GET", "/weight_info").get("weight_version")
        except NotFound:
            version = "default"  # as after a start: outside of development mode, nobody can change the weights
        if self._weights not in (None, version):
            raise ConfigError(
                f"kl.reference: the weights of {self.endpoint.url} were changed from version {self._weights} to "
                f"{version}, but a reference must keep its weights; serve it apart from the policy"
            )
        self._weights = version

    # -- the vocabulary -------------------------------------------------------------------------------------------

    def _check_ids(self, tokenizer: Tokenizer, stop: threading.Event) -> None:
        """Check that every id of the policy's tokenizer means the same to the server; raises `ConfigError`.

        Ids that have no text there are allowed, and logged, since a tokenizer may have been given further tokens.
        """
        ids = sorted(set(text_tokens(tokenizer).values()))
        probe: dict[str, JSON] = {"prompt": [ids[-1]] * 2, "max_tokens": 1, "prompt_logprobs": 1}
        try:
            reply = self._post("/v1/completions", probe, stop)
        except ConfigError as error:
            if "vocabulary" not in str(error):
                raise
            raise ConfigError(
                f"kl.reference: the vocabulary of {self.served.root} at {self.endpoint.url} is smaller than the "
                f"policy's, which has ids up to {ids[-1]}; serve a model with the policy's tokenizer"
            ) from None
        # The most likely token of each position, too: where logits are reported, that is most often positive.
        check_logprobs([number for step in _steps(reply) for number in token_logprobs(step).values()], self.endpoint)
        absent: list[int] = []
        for start in range(0, len(ids), IDS):
            for some, ours, theirs in self._differing(ids[start : start + IDS], tokenizer, stop):
                if theirs:
                    raise ConfigError(
                        f"kl.reference: {self.served.root} at {self.endpoint.url} has another vocabulary than the "
                        f"policy: the token ids {some} are {ours!r} here and {theirs!r} there. Serve a model with the "
                        "policy's tokenizer"
                    )
                absent += some
        if absent:
            rank_zero_only(log.warning)(
                "%d tokens of the policy (for example the id %d) are not in the vocabulary of %s at %s, which has no "
                "trained probability for them",
                len(absent),
                absent[0],
                self.served.root,
                self.endpoint.url,
            )

    def _differing(
        self, ids: list[int], tokenizer: Tokenizer, stop: threading.Event
    ) -> Iterator[tuple[list[int], str, str]]:
        """The fewest ids with different texts, found by bisection, and their texts here and on the server.

        Spaces are ignored: whether `decode` keeps one before a full stop is an option of the tokenizer.
        """
        reply = self._post("/detokenize", {"tokens": list(ids)}, stop)
        ours, theirs = ("".join(str(text).split()) for text in (tokenizer.decode(ids), reply.get("prompt")))
        if ours == theirs:
            return
        found = False
        if len(ids) > 1 and theirs:
            for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
                for one in self._differing(half, tokenizer, stop):
                    found = True
                    yield one
        if not found:  # bytes that are a character only together
            yield ids, ours, theirs


def _positions(mask: list[int]) -> list[int]:
    return [position for position, trained in enumerate(mask) if trained]


def _steps(reply: dict[str, JSON]) -> list[JSON]:
    """The log-probabilities of the prompt in an answer of `/v1/completions`, by position."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    steps = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    return steps if isinstance(steps, list) else []
