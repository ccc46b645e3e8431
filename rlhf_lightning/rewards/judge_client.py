"""A judge: a language model behind an OpenAI-compatible endpoint, asked with the package openai (extra `judge`)."""

import asyncio
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import urlsplit

from rlhf_lightning.environments.user_calls import Call, check_limit, run_calls
from rlhf_lightning.errors import ConfigError, UserError, check_whole, cut, missing_package, short
from rlhf_lightning.files import read_object, replacing, visible
from rlhf_lightning.rewards.base import check_finite
from rlhf_lightning.settings import plain
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0
"""Longest wait before a request is repeated, in seconds."""
_TRANSIENT = (408, 409, 429)
"""Status codes after which a request is repeated, apart from those of 500 and above."""
_CACHE_FORMAT = 1
"""Part of the key of a cached answer; to be raised when equal keys would mean different questions."""


@plain
@dataclass(frozen=True)
class Judge:
    """A language model behind an endpoint that speaks OpenAI's chat completions: vLLM, llama.cpp, a hosted model.

    The key is read from an environment variable when the judge is asked. It is part of no setting, log, checkpoint or
    cached answer.

    Args:
        url: Base URL of the endpoint, for example `http://127.0.0.1:8000/v1`.
        model: Name of the model, as the endpoint lists it.
        key_variable: Environment variable that contains the key; empty for an endpoint without keys.
        temperature: Temperature of the answers; None for the endpoint's default.
        max_tokens: Token budget of an answer, including what a reasoning model thinks.
        votes: Number of answers to each question; the numbers are averaged.
        structured: Ask for structured output with a JSON schema. An endpoint that refuses schemas is asked for JSON in
            words only, after a warning.
        concurrency: Largest number of requests at the same time, per process.
        timeout: Seconds that a request may take.
        retries: How often a request is repeated after a timeout, a lost connection, a malformed reply, or a status of
            408, 409, 429, or 500 and above.
        backoff: Seconds before the first repetition; doubled for each further one, up to 60 s, with a random factor
            from 0.5 to 1. A `Retry-After` header in seconds replaces it.
        max_calls: Budget of requests of this process, including repeated ones; None for no limit.
        max_total_tokens: Budget of tokens of this process, of questions and answers, as the endpoint reports them. The
            requests that are under way when it is reached are finished, so it can be exceeded by as many.
        cache: Folder with the answers so far, which are not asked for again; None for no cache.

    Raises:
        ConfigError: If a value is out of range, or the URL contains a password.

    Example:
        >>> judge = Judge("http://127.0.0.1:8000/v1", "Qwen/Qwen3-8B", key_variable="", cache="runs/judge")
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int = 1024
    votes: int = 1
    structured: bool = True
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    max_calls: int | None = None
    max_total_tokens: int | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"judge.url is {short(self.url)}; it must be a URL such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "judge.url contains a user name, a password or a query, which would be logged; give the key in an "
                "environment variable, and its name as judge.key_variable"
            )
        if self.key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # Without the value, which may be the key itself.
            raise ConfigError(
                "judge.key_variable is not the name of an environment variable; put the key into a variable, and give "
                "its name"
            )
        if not self.model:
            raise ConfigError("judge.model is empty; name the model as the endpoint lists it")
        if self.temperature is not None:
            check_finite("judge.temperature", self.temperature)
            if self.temperature < 0:
                raise ConfigError(f"judge.temperature is {self.temperature}; it must be at least 0")
        check_finite("judge.backoff", self.backoff)
        if self.backoff < 0:
            raise ConfigError(f"judge.backoff is {self.backoff}; it must be at least 0 (seconds)")
        check_limit("judge.timeout", self.timeout)
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("votes", self.votes, 1),
            ("concurrency", self.concurrency, 1),
            ("retries", self.retries, 0),
            ("max_calls", self.max_calls, 1),
            ("max_total_tokens", self.max_total_tokens, 1),
        ):
            if value is not None:
                check_whole(f"judge.{name}", value, least)
        if self.votes > 1 and self.temperature == 0:
            raise ConfigError(
                f"judge.votes is {self.votes} and judge.temperature is 0, so all votes would be the same; set a "
                "temperature such as 0.7, or votes: 1"
            )

    def build(self) -> "JudgeClient":
        """Check the key and the package openai, and return what asks the questions; sends nothing.

        Raises:
            ConfigError: If the package or the key is missing.
        """
        return JudgeClient(self)


T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[T]):
    """A question to a judge, which it answers with a JSON object.

    Args:
        system: System message: the task, which is the same for many questions.
        user: User message.
        schema: JSON schema of the answer, an object.
        read: Returns what is wanted of an answer, such as a grade; None if the answer does not follow the schema.
        label: What is judged, for error messages.
    """

    system: str
    user: str
    schema: Mapping[str, JSON]
    read: Callable[[Mapping[str, JSON]], T | None]
    label: str


@dataclass(frozen=True)
class Vote(Generic[T]):
    """An answer of the judge: what `Question.read` returned, or the reason why there is nothing."""

    value: T | None
    failure: str = ""


@dataclass(frozen=True)
class _Reply:
    """What the endpoint returned for a request."""

    text: str
    failure: str
    tokens: int | None


class _MalformedReply(Exception):
    """A successful status with a body that is no chat completion."""


class _Stop(UserError):
    """No further question is asked: the budget is used up, or the endpoint refuses every request."""


@dataclass
class JudgeClient:
    """Asks a judge: concurrently, with repetitions, within the budget, and nothing that the cache has.

    Args:
        judge: The settings.
    """

    judge: Judge
    calls: int = field(default=0, init=False)
    """Number of requests so far, including repeated ones."""
    tokens: int = field(default=0, init=False)
    """Number of tokens so far, as the endpoint reported them."""

    def __post_init__(self) -> None:
        try:
            import openai  # noqa: F401 - a missing package is reported before the first round
        except ModuleNotFoundError as error:
            raise missing_package(error, "a judge", "judge") from None
        self._structured = self.judge.structured
        self._stop: _Stop | None = None
        self._secret()

    def ask(self, questions: Sequence[Question[T]], votes: int | None = None) -> list[list[Vote[T]]]:
        """Ask questions.

        Args:
            questions: The questions; equal ones are asked once.
            votes: Number of answers to each; None for `judge.votes`.

        Returns:
            The answers to each question.

        Raises:
            UserError: If the budget is used up, the endpoint refuses every request (401, 403, 404), or the cache cannot
                be read or written. Answers that arrived before are in the cache.
        """
        count = votes or self.judge.votes
        keys = [[self._key(question, vote) for vote in range(count)] for question in questions]
        asked = {key: question for row, question in zip(keys, questions, strict=True) for key in row}
        found = {key: vote for key, question in asked.items() if (vote := self._cached(key, question)) is not None}
        open_questions = {key: question for key, question in asked.items() if key not in found}
        if open_questions:
            self._stop = None
            call: Call[dict[str, Vote[T]]] = partial(self._ask_all, open_questions)
            (outcome,) = run_calls([call])
            found |= outcome.result()
        return [[found[key] for key in row] for row in keys]

    def _secret(self) -> str:
        """The key; the package requires one also for an endpoint without keys."""
        if not self.judge.key_variable:
            return "none"
        secret = os.environ.get(self.judge.key_variable, "").strip()
        if not secret:
            raise ConfigError(
                f"the environment variable {self.judge.key_variable} has no key for the judge at {self.judge.url}; set "
                "it, or set judge.key_variable: '' for an endpoint without keys"
            )
        return secret

    # -- requests -----------------------------------------------------------------------------------------------------

    async def _ask_all(self, asked: Mapping[str, Question[T]]) -> dict[str, Vote[T]]:
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.judge.concurrency)
        # The package's own retries are off, because the budget could not count them.
        options = {"base_url": self.judge.url, "max_retries": 0, "timeout": self.judge.timeout}
        async with AsyncOpenAI(api_key=self._secret(), **options) as client:
            votes = await asyncio.gather(*(self._vote(client, gate, *one) for one in asked.items()))
        if self._stop is not None:
            raise self._stop
        return dict(zip(asked, votes, strict=True))

    async def _vote(self, client: "AsyncOpenAI", gate: asyncio.Semaphore, key: str, question: Question[T]) -> Vote[T]:
        """The answer to a question. An error that ends the run waits in `_stop` until open requests are finished."""
        async with gate:
            try:
                reply = await self._reply(client, question)
                if reply.failure:
                    return Vote(None, reply.failure)
                vote = _read(question, reply.text)
                if vote.value is not None:
                    self._store(key, reply)
                return vote
            except _Stop as stop:
                self._stop = self._stop or stop
                return Vote(None, str(stop))

    async def _reply(self, client: "AsyncOpenAI", question: Question[T]) -> _Reply:
        """Send a request, and repeat it after transient errors; an error is part of the reply."""
        import openai

        structured, attempt = self._structured, 0
        refused: APIStatusError | None = None
        while True:
            try:
                reply = await self._send(client, question, structured)
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    raise _Stop(
                        f"the judge at {self.judge.url} refuses the request: {self._words(error)}. Check judge.url, "
                        f"judge.model ({self.judge.model}) and the key in {self.judge.key_variable or 'no variable'}"
                    ) from None
                if structured and error.status_code in (400, 422):
                    structured, refused = False, error
                    continue
                if error.status_code not in _TRANSIENT and error.status_code < 500:
                    return _Reply("", f"the request failed: {self._words(refused or error)}", None)
                reason, wait = self._words(error), _retry_after(error.response.headers.get("retry-after"))
            except (openai.APIConnectionError, _MalformedReply) as error:
                reason, wait = self._words(error), None
            except TimeoutError:
                reason, wait = f"no reply within {self.judge.timeout:g} s", None
            else:
                if refused is not None and self._structured:
                    self._structured = False
                    log.warning(
                        "The judge at %s refuses structured output (%s). It is asked for JSON in words from now on, so "
                        "more answers may be unusable. judge.structured: false avoids this warning.",
                        self.judge.url,
                        self._words(refused),
                    )
                return reply
            if attempt == self.judge.retries:
                return _Reply("", f"the request failed {attempt + 1} times, the last time with: {reason}", None)
            if wait is None:
                wait = self.judge.backoff * 2**attempt * random.uniform(0.5, 1)
            await asyncio.sleep(min(wait, LONGEST_WAIT))
            attempt += 1

    async def _send(self, client: "AsyncOpenAI", question: Question[T], structured: bool) -> _Reply:
        """Send a request once, within the budget."""
        from openai import omit

        self._check_budget()
        self.calls += 1
        schema = {"name": "verdict", "strict": True, "schema": question.schema}
        async with asyncio.timeout(self.judge.timeout):
            # The body is read here, because the package does not validate it.
            raw = await client.chat.completions.with_raw_response.create(
                model=self.judge.model,
                messages=[{"role": "system", "content": question.system}, {"role": "user", "content": question.user}],
                max_completion_tokens=self.judge.max_tokens,
                temperature=omit if self.judge.temperature is None else self.judge.temperature,
                response_format={"type": "json_schema", "json_schema": schema} if structured else omit,
            )
        reply = _parsed(raw.text)
        if reply.tokens is not None:
            self.tokens += reply.tokens
        elif self.judge.max_total_tokens is not None:
            raise _Stop(
                f"the judge at {self.judge.url} does not report how many tokens it used, so judge.max_total_tokens "
                "cannot be kept; set judge.max_calls instead"
            )
        return reply

    def _check_budget(self) -> None:
        if self._stop is not None:
            raise self._stop
        for name, unit, used, most in (
            ("max_calls", "calls", self.calls, self.judge.max_calls),
            ("max_total_tokens", "tokens", self.tokens, self.judge.max_total_tokens),
        ):
            if most is not None and used >= most:
                kept = f"; the answers so far are in {self.judge.cache}" if self.judge.cache else ""
                raise _Stop(
                    f"the judge's budget of {most} {unit} (judge.{name}) is used up. Raise it, and run the same "
                    f"command again{kept}"
                )

    def _words(self, error: Exception) -> str:
        """An error in one line, without the key."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cut(visible(text.replace(self._secret(), "***") if self.judge.key_variable else text), 300)

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _key(self, question: Question[T], vote: int) -> str:
        """Key of a cached answer: everything that the answer depends on, and the number of the vote.

        The URL is not part of it, because a server often gets another port or host.
        """
        asked: dict[str, JSON] = {
            "format": _CACHE_FORMAT,
            "model": self.judge.model,
            "system": question.system,
            "user": question.user,
            "schema": dict(question.schema) if self.judge.structured else None,
            "temperature": self.judge.temperature,
            "max_tokens": self.judge.max_tokens,
            "vote": vote,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return Path(self.judge.cache).expanduser() / key[:2] / f"{key}.json" if self.judge.cache else None

    def _cached(self, key: str, question: Question[T]) -> Vote[T] | None:
        path = self._path(key)
        if path is None or not path.exists():
            return None
        vote = _read(question, str(read_object(path).get("answer")))
        if vote.value is None:
            raise ConfigError(f"{path}: {vote.failure}; delete this file, and the question is asked again")
        return vote

    def _store(self, key: str, reply: _Reply) -> None:
        """Write a usable answer. Others are not kept, so that a resumed run asks again."""
        path = self._path(key)
        if path is None:
            return
        entry = {"model": self.judge.model, "answer": reply.text, "total_tokens": reply.tokens}
        try:
            with replacing(path, f"{os.getpid()}.partial") as scratch:
                scratch.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise _Stop(
                f"{path}: an answer of the judge cannot be written ({error.strerror}); free disk space, or set "
                "judge.cache to another folder"
            ) from None


def _parsed(body: str) -> _Reply:
    """The body of a chat completion."""
    try:
        reply = json.loads(body)
        (choice,) = reply["choices"]
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        finish, usage = choice.get("finish_reason"), reply.get("usage") or {}
        tokens = usage.get("total_tokens")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _MalformedReply(f"the reply is no chat completion: {short(body)}") from None
    failure = ""
    if refusal:
        failure = f"the judge refuses to answer: {short(refusal)}"
    elif finish == "length":
        failure = "the judge's answer is cut off; raise judge.max_tokens"
    elif not isinstance(text, str) or not text.strip():
        failure = "the judge's answer is empty"
    return _Reply(text if isinstance(text, str) else "", failure, tokens if isinstance(tokens, int) else None)


def _read(question: Question[T], text: str) -> Vote[T]:
    """What is wanted of the last JSON object of an answer that has it."""
    for found in reversed(_objects(text)):
        if (value := question.read(found)) is not None:
            return Vote(value)
    return Vote(None, f"the judge's answer has no JSON object as the schema describes it: {short(text)}")


def _objects(text: str) -> list[dict[str, JSON]]:
    """The JSON objects in a text, without those inside others."""
    found, position, decoder = [], 0, json.JSONDecoder()
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
            found.append(value)
        except (ValueError, RecursionError):
            position = start + 1
    return found


def _retry_after(header: str | None) -> float | None:
    """Seconds in a `Retry-After` header; None if it has a date or is absent."""
    return float(header) if header is not None and re.fullmatch(r"\d{1,6}(\.\d+)?", header) else None
