"""Environments of the package verifiers: they run the episode and score it, the policy answers their requests.

An environment of verifiers asks a model through an endpoint in OpenAI's form. Here the endpoint is a server on this
machine that passes each request on as messages of an episode, and the policy's response back as the answer:

    rollout of verifiers → its harness → endpoint → `VerifiersEnv.step` returns → policy → `VerifiersEnv.step` is called

All of it runs on the event loop of `environments.user_calls`.
"""

import asyncio
import atexit
import json
import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlhf_lightning.data.verifiers import Task, loaded_task, taskset_config, verifiers
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.environments.tools import TOOL_CALL, read_call
from rlhf_lightning.errors import ConfigError, short
from rlhf_lightning.types import JSON, Message, Row, ToolSchema

if TYPE_CHECKING:
    from aiohttp import web

HARNESS: dict[str, JSON] = {"harness": {"id": "null"}}
"""Default of an agent whose taskset brings no harness: requests and calls of the taskset's tools, and no other tools.
The default of verifiers would let the policy run shell commands."""
RUNTIME: dict[str, JSON] = {"runtime": {"type": "subprocess"}}
"""Default of an agent: its harness is a process of this machine."""
WireMessage = dict[str, JSON]
"""A message in OpenAI's form."""


class TraceError(Protocol):
    """An error that verifiers recorded."""

    type: str
    message: str


class Score(Protocol):
    """A reward of a trace."""

    score: float


class TraceAgent(Protocol):
    """Who acted in a trace."""

    trainable: bool


class Trace(Protocol):
    """What one agent did in an episode, with its score."""

    agent: TraceAgent
    reward: float
    rewards: Mapping[str, Score | None]
    metrics: Mapping[str, float | None]
    errors: Sequence[TraceError]


class Rollout(Protocol):
    """A finished episode of verifiers."""

    ok: bool
    errors: Sequence[TraceError]
    traces: Sequence[Trace]


class ModelContext(Protocol):
    """Which model answers, and where."""


class Environment(Protocol):
    """An environment of verifiers."""

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Run what the environment's episodes share."""

    async def run_episode(self, task: Task, ctx: ModelContext) -> Rollout:
        """Run and score an episode."""


@dataclass
class _Request:
    """A request to the model: the conversation so far, the tools, and the answer that it waits for."""

    messages: list[WireMessage]
    tools: list[ToolSchema]
    answer: asyncio.Future[WireMessage]


class _Channel:
    """Connects an episode's requests at the endpoint with its `VerifiersEnv`."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[_Request] = asyncio.Queue()
        self.waiting: list[asyncio.Future[WireMessage]] = []

    def close(self) -> None:
        """End the requests that wait for an answer."""
        for answer in self.waiting:
            answer.cancel()


class VerifiersEnv:
    """An episode of an environment of the package verifiers (from 0.4 on): single turn, several turns, tools.

    Rows come from a data source `verifiers:TASKSET`. The environment's own code decides what follows a response, calls
    the tools, ends the episode and scores it; its reward is the episode's, and its metrics and each of its rewards are
    logged as `env_NAME` and `env_reward_NAME`.

    A conversation must only grow: an environment that shortens or rewrites earlier messages fails. The sampling
    settings of its requests are ignored, since the policy's sampler answers.

    Args:
        row: The data row.
        config: The config of the environment without its taskset, as in verifiers' TOML files: `id` (another
            environment than the taskset's own), and settings of each agent. Defaults of an `agent` are `HARNESS` and
            `RUNTIME`.
        pattern: Regular expression that finds tool calls in a response; see `ToolEnv`. A response in which one is
            malformed is passed on as text.

    Example:
        ```yaml
        model:
          environment: rlhf_lightning.environments.verifiers.VerifiersEnv
          environment_args: {config: {agent: {max_turns: 4}}}
        data:
          train: verifiers:my_taskset?limit=100
        ```
    """

    def __init__(self, row: Row, config: Mapping[str, JSON] | None = None, pattern: str = TOOL_CALL) -> None:
        self.task, self.pattern = loaded_task(row), re.compile(pattern, re.DOTALL)
        self.config: dict[str, JSON] = {**(config or {}), "taskset": taskset_config(row)}
        self.tools: list[ToolSchema] = []
        self.turns = 0
        self._known: list[WireMessage] = []

    @classmethod
    def check(cls, config: Mapping[str, JSON] | None = None, pattern: str = TOOL_CALL) -> None:
        """Check the arguments when the configuration is read.

        Raises:
            ConfigError: If the package is missing, or an argument is invalid.
        """
        verifiers()
        if config is not None and "taskset" in config:
            raise ConfigError("VerifiersEnv.config has a taskset; name it in data.train instead: verifiers:TASKSET")
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"VerifiersEnv.pattern {pattern!r} is not a valid regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(f"VerifiersEnv.pattern {pattern!r} has no group; it must match the JSON of a call")

    async def reset(self) -> list[Message]:
        """Start the episode; the messages are those of its first request."""
        service = await _service(self.config)
        name = secrets.token_urlsafe(16)
        self._channel = service.channels[name] = _Channel()
        self._rollout = asyncio.create_task(service.run(self.task, name))
        # An episode that is given up, for example at `limits.max_turns`, has no other sign of its end.
        weakref.finalize(self, _cancel, asyncio.get_running_loop(), self._rollout).atexit = False
        request = await self._next()
        if request is None:
            self._scored()
            raise RuntimeError("the environment of verifiers ended the episode before it asked the policy")
        self.tools, self._known = request.tools, request.messages
        return [_message(message) for message in request.messages]

    async def step(self, message: Message) -> StepResult:
        """Answer the request, and wait for the next one or the end of the episode."""
        self.turns += 1
        self._request.answer.set_result(self._answer(message["content"] or ""))
        request = await self._next()
        if request is None:
            return self._scored()
        return StepResult(done=False, next_messages=self._added(request))

    async def _next(self) -> _Request | None:
        """The next request; None if the episode has ended."""
        getting = asyncio.ensure_future(self._channel.requests.get())
        await asyncio.wait({getting, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()
            return None
        self._request = getting.result()
        return self._request

    def _answer(self, text: str) -> WireMessage:
        """The response in OpenAI's form."""
        try:
            calls = [read_call(match.group(1) or "") for match in self.pattern.finditer(text)]
        except ValueError:
            calls = []
        if not calls:
            return {"role": "assistant", "content": text}
        said = self.pattern.sub("", text).strip()
        return {
            "role": "assistant",
            "content": said or None,
            "tool_calls": [
                {
                    "id": f"call_{self.turns}_{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
                }
                for number, (name, arguments) in enumerate(calls)
            ],
        }

    def _added(self, request: _Request) -> list[Message]:
        """The messages of a request after the policy's response."""
        known, messages = [_message(one) for one in self._known], [_message(one) for one in request.messages]
        size = len(known)
        added = messages[size + 1 :]
        if (
            messages[:size] != known
            or [one["role"] for one in messages[size : size + 1]] != ["assistant"]
            or not added
            or any(one["role"] == "assistant" for one in added)
        ):
            raise RuntimeError(
                "the environment of verifiers asked for something else than the continuation of its conversation with "
                "the policy; environments that rewrite earlier messages, or in which the policy plays several parts, "
                "are not supported"
            )
        if request.tools != self.tools:
            raise RuntimeError(
                "the environment of verifiers changed its tools within an episode; this is not supported"
            )
        self._known = request.messages
        return added

    def _scored(self) -> StepResult:
        """The result of the episode that has ended."""
        rollout = self._rollout.result()
        errors = [*rollout.errors, *(error for trace in rollout.traces for error in trace.errors)]
        if not rollout.ok:
            what = f"{errors[-1].type}: {errors[-1].message}" if errors else "no reason is recorded"
            raise RuntimeError(f"the environment of verifiers failed: {what}")
        trained = [trace for trace in rollout.traces if trace.agent.trainable]
        if len(trained) != 1:
            raise RuntimeError(f"the episode of verifiers has {len(trained)} traces to train on; it must have one")
        (trace,) = trained
        scores = {f"reward_{name}": reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        return StepResult(trace.reward, True, [], {**metrics, **scores})


def _message(wire: WireMessage) -> Message:
    """A message in the form of rows; calls stay in the text that the policy wrote."""
    content = wire.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        if any(part.get("type") != "text" for part in parts):
            raise RuntimeError("a message of verifiers has content other than text, which is not supported")
        content = "".join(str(part.get("text", "")) for part in parts)
    message: Message = {"role": str(wire["role"]), "content": "" if content is None else str(content)}
    if wire.get("name"):
        message["name"] = str(wire["name"])
    return message


# -- the endpoint -----------------------------------------------------------------------------------------------------


class _Service:
    """An environment with an endpoint that its episodes ask.

    The name of the model in a request is that of an episode.

    Args:
        config: The environment's config.
    """

    def __init__(self, config: dict[str, JSON]) -> None:
        vf = verifiers()
        self.env: Environment = vf.load_environment(vf.resolve_env_config(_with_agent(config)))
        self.channels: dict[str, _Channel] = {}
        self.loop = asyncio.get_running_loop()
        self.url: asyncio.Future[str] = self.loop.create_future()
        self._stopped = asyncio.Event()
        self._serving = asyncio.create_task(self._serve())
        atexit.register(self.close)

    async def run(self, task: Task, name: str) -> Rollout:
        """Run an episode, in which the model of that name answers."""
        vf = verifiers()
        client = vf.EvalClientConfig(base_url=await self.url, api_key_var="RLHF_LIGHTNING_NO_KEY")
        try:
            return await self.env.run_episode(task, vf.ModelContext(model=name, client=client))
        finally:
            self.channels.pop(name).close()

    def close(self) -> None:
        """Stop the servers of the environment, some of which are processes."""
        if not self.loop.is_closed() and self.loop.is_running():

            async def stop() -> None:
                self._stopped.set()
                await asyncio.wait({self._serving}, timeout=10)

            asyncio.run_coroutine_threadsafe(stop(), self.loop).result(15)

    async def _serve(self) -> None:
        # In one task from beginning to end, because context managers of the environment must be left where they were
        # entered.
        from aiohttp import web

        application = web.Application(client_max_size=2**30)
        application.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(application)
        try:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with self.env.serving():
                self.url.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
                await self._stopped.wait()
        except Exception as error:
            if self.url.done():
                raise
            self.url.set_exception(error)
        finally:
            await runner.cleanup()

    async def _complete(self, request: "web.Request") -> "web.StreamResponse":
        """Answer a request, as a stream of one chunk if it asks for a stream."""
        from aiohttp import web

        body = await request.json()
        if (channel := self.channels.get(body["model"])) is None:
            return web.json_response({"error": {"message": "there is no such episode"}}, status=404)
        asked = _Request(body["messages"], body.get("tools") or [], self.loop.create_future())
        channel.waiting.append(asked.answer)
        channel.requests.put_nowait(asked)
        answer = await asked.answer
        streamed = bool(body.get("stream"))
        completion = _completion(body["model"], answer, streamed)
        if not streamed:
            return web.json_response(completion)
        text = f"data: {json.dumps(completion)}\n\ndata: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")


def _completion(model: str, answer: WireMessage, streamed: bool) -> dict[str, JSON]:
    """A response of OpenAI's API with one choice."""
    calls = answer.get("tool_calls")
    if streamed and isinstance(calls, list):
        numbered = [{"index": i, **call} for i, call in enumerate(calls) if isinstance(call, dict)]
        answer = {**answer, "tool_calls": list[JSON](numbered)}
    choice: dict[str, JSON] = {
        "index": 0,
        "delta" if streamed else "message": answer,
        "finish_reason": "tool_calls" if calls else "stop",
    }
    kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {"id": secrets.token_hex(8), "object": kind, "created": 0, "model": model, "choices": [choice]}


def _with_agent(config: dict[str, JSON]) -> dict[str, JSON]:
    """A config with the default harness and runtime of its `agent`."""
    vf, taskset, agent = verifiers(), config["taskset"], config.get("agent", {})
    assert isinstance(taskset, dict)
    if not isinstance(agent, dict):
        raise ConfigError(f"VerifiersEnv.config: agent is {short(agent)}; it must have settings by name")
    if "agent" not in vf.env_config_type(taskset["id"], config.get("id", "")).model_fields:
        return config
    # A taskset may bring a harness of its own, which it then needs.
    own = vf.default_harness_id(taskset["id"]) == taskset["id"]
    return {**config, "agent": {**(RUNTIME if own else {**RUNTIME, **HARNESS}), **agent}}


_SERVICES: dict[tuple[asyncio.AbstractEventLoop, str], _Service] = {}


async def _service(config: dict[str, JSON]) -> _Service:
    """The service of an environment on the running event loop, which is started once."""
    key = (asyncio.get_running_loop(), json.dumps(config, sort_keys=True))
    if key not in _SERVICES:
        _SERVICES[key] = _Service(config)
    service = _SERVICES[key]
    await asyncio.shield(service.url)
    return service


def _cancel(loop: asyncio.AbstractEventLoop, rollout: "asyncio.Task[Rollout]") -> None:
    """Cancel an episode from any thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(rollout.cancel)
