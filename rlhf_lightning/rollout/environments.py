"""Environments: who answers the policy. One object per episode, one or many turns, sync or async."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rollout.episodes import Episode, Segment
from rlhf_lightning.rollout.sampler import Sample, Sampler


@dataclass
class StepResult:
    """What an environment answers to a message."""

    reward: float = 0.0
    """Added to the episode's reward."""
    done: bool = True
    next_messages: list[Message] = field(default_factory=list)
    """Appended to the conversation before the policy's next turn."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged as means over episodes."""


class MessageEnv(Protocol):
    """An environment made of messages. Both methods may be async; then all episodes' steps run concurrently."""

    def reset(self) -> list[Message] | Awaitable[list[Message]]:
        """The messages that the policy first sees."""

    def step(self, message: Message) -> StepResult | Awaitable[StepResult]:
        """Take the policy's message."""


EnvironmentFactory = Callable[[dict[str, Any]], MessageEnv]
"""Makes the environment of one episode from its row of data."""


def environment_factory(
    environment: str | Callable[..., MessageEnv] | None, arguments: dict[str, Any] | None = None
) -> EnvironmentFactory | None:
    """A factory from a class or function, or its dotted path; `arguments` are given to it after the row, by name.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    if environment is None:
        return None
    found: Any = environment
    if isinstance(environment, str):
        module, _, name = environment.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"model.environment {environment!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"model.environment {environment!r} is no class or function")
    return partial(found, **(arguments or {}))


class _Running:
    """An episode under way."""

    def __init__(self, prompt: Prompt, sample: int, env: MessageEnv | None) -> None:
        self.prompt, self.env = prompt, env
        self.episode = Episode(prompt.messages, prompt.row, prompt.index, sample, prompt.tools)
        self.text = ""

    def next_prompt(self, renderer: Renderer, turn: int) -> list[int]:
        """Token ids to go on from. What was drawn stays as it was drawn: only what is new is tokenised."""
        if self.env is None:
            return self._open(self.prompt.ids)
        text = renderer.prompt_text(self.episode.prompt + self.episode.responses, self.prompt.tools)
        previous, self.text = self.text, text
        if turn and text.startswith(previous):
            segment = self.episode.segments[-1]
            added = renderer.tokenizer(text[len(previous) :], add_special_tokens=False)["input_ids"]
            return self._extend(segment, added, [0.0] * len(added), drawn=0).ids
        return self._open(renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _open(self, ids: list[int]) -> list[int]:
        self.episode.segments.append(Segment(list(ids), [0] * len(ids), [0.0] * len(ids)))
        return list(ids)

    @staticmethod
    def _extend(segment: Segment, ids: list[int], logprobs: list[float], drawn: int) -> Segment:
        segment.ids += ids
        segment.mask += [drawn] * len(ids)
        segment.logprobs += logprobs
        return segment

    def act(self, sample: Sample, renderer: Renderer) -> Message:
        """Take a response; its text as a message."""
        self._extend(self.episode.segments[-1], sample.ids, sample.logprobs, drawn=1)
        self.text += renderer.tokenizer.decode(sample.ids, skip_special_tokens=False)
        message = {"role": "assistant", "content": renderer.decode(sample.ids)}
        self.episode.responses.append(message)
        self.episode.stop_reason = sample.stop_reason
        return message


def run_episodes(
    prompts: Sequence[tuple[Prompt, int]],
    sampler: Sampler,
    renderer: Renderer,
    seed: Sequence[int],
    environment: EnvironmentFactory | None = None,
    max_turns: int = 8,
    temperature: float | None = None,
) -> list[Episode]:
    """Play one episode for each (prompt, sample number), in order.

    A draw is seeded by (seed, the prompt's index, sample number, turn): never by its place in a batch.

    Args:
        environment: none for a single turn, where the response ends the episode.
    """
    everyone = [
        _Running(prompt, sample, environment(prompt.row) if environment else None) for prompt, sample in prompts
    ]
    if environment:
        for running, messages in zip(everyone, _all([r.env.reset() for r in everyone if r.env]), strict=True):
            running.episode.prompt = list(messages)
    active = everyone
    for turn in range(max_turns if environment else 1):
        ids = [running.next_prompt(renderer, turn) for running in active]
        room = [sampler.context is None or len(row) + sampler.max_tokens <= sampler.context for row in ids]
        for running, fits in zip(active, room, strict=True):
            if not fits:
                running.episode.stop_reason = "context"
        active, ids = (
            [r for r, fits in zip(active, room, strict=True) if fits],
            [i for i, f in zip(ids, room, strict=True) if f],
        )
        seeds = [mix_seeds(*seed, r.prompt.index, r.episode.sample, turn) for r in active]
        samples = sampler.generate(ids, seeds, temperature)
        messages = [running.act(sample, renderer) for running, sample in zip(active, samples, strict=True)]
        active = _step(active, messages)
        if not active:
            break
    for running in active if environment else []:
        running.episode.stop_reason = "turns"
    return [running.episode for running in everyone]


def _step(active: list[_Running], messages: list[Message]) -> list[_Running]:
    """Hand each message to its environment; who goes on."""
    results = _all([r.env.step(message) for r, message in zip(active, messages, strict=True) if r.env])
    going = []
    for running, result in zip(active, results, strict=False):
        episode = running.episode
        episode.environment_reward += result.reward
        episode.metrics.update(result.metrics)
        # Out of tokens, the turn is unfinished: another message after it would be one the model never ended.
        if not result.done and not episode.truncated:
            episode.responses += result.next_messages
            going.append(running)
    return going


def _all(values: list[Any]) -> list[Any]:
    """Results of calls, the awaitable ones awaited together."""
    if not any(inspect.isawaitable(value) for value in values):
        return values

    async def gather() -> list[Any]:
        async def settle(value: Any) -> Any:
            return await value if inspect.isawaitable(value) else value

        return list(await asyncio.gather(*(settle(value) for value in values)))

    return asyncio.run(gather())
