"""Playing episodes: the turns of all of them side by side, each drawn with its own seeds."""

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.calls import run_calls
from rlhf_lightning.rollout.draw import Sample
from rlhf_lightning.rollout.environments import (
    EnvironmentFactory,
    EpisodeError,
    Limits,
    MessageEnv,
    StepResult,
    checked_messages,
    checked_result,
)
from rlhf_lightning.rollout.episodes import Episode, Segment
from rlhf_lightning.rollout.sampler import Sampler

log = logging.getLogger(__name__)


def run_episodes(
    prompts: Sequence[tuple[Prompt, int]],
    sampler: Sampler,
    renderer: Renderer,
    seed: Sequence[int],
    environment: EnvironmentFactory | None = None,
    limits: Limits | None = None,
    temperature: float | None = None,
) -> list[Episode]:
    """Play one episode for each (prompt, sample number), in order.

    A draw is seeded by (seed, the prompt's index, sample number, turn, and the attempt where the episode is played
    again): never by its place in a batch.

    Args:
        environment: none for a single turn, where the response ends the episode.

    Raises:
        EpisodeError: an environment failed, and `limits.on_error` does not put up with it.
    """
    everyone = [_Running(prompt, sample) for prompt, sample in prompts]
    play = _Play(sampler, renderer, seed, environment, limits or Limits(), temperature)
    active = play.reset(everyone) if environment else everyone
    while active:
        active = play.turn(active)
    play.report(everyone)
    return [running.episode for running in everyone]


class NoRoomError(UserError):
    """An environment's first messages leave no room for a response."""


class _Running:
    """An episode under way."""

    def __init__(self, prompt: Prompt, sample: int) -> None:
        self.prompt, self.sample, self.attempt = prompt, sample, 0
        self.begin()

    def begin(self) -> None:
        """From the start."""
        prompt = self.prompt
        self.env: MessageEnv | None = None
        self.episode = Episode(prompt.messages, prompt.row, prompt.index, self.sample, prompt.tools, where=prompt.where)
        self.turn = 0
        self.text = ""
        """What the template rendered for the last turn, its generation prompt included."""
        self.body, self.ending = "", ""
        """The text of the last response, and what ended it."""
        self.last = -1
        """The last token drawn."""

    def seed(self, parts: Sequence[int]) -> int:
        """Of the next draw."""
        place = (self.prompt.index, self.sample, self.turn)
        return mix_seeds(*parts, *place, self.attempt) if self.attempt else mix_seeds(*parts, *place)

    def next_prompt(self, renderer: Renderer) -> tuple[list[int], bool]:
        """Token ids that come next, and whether they go on from the row in hand or begin another.

        What was drawn stays as it was drawn: only what is new is tokenised.
        """
        if self.env is None:
            return list(self.prompt.ids), False
        text = renderer.prompt_text(self.episode.prompt + self.episode.responses, self.episode.tools)
        previous, self.text = self.text, text
        added = _added(text, previous, self.body, self.ending) if self.turn else None
        if added is None:
            return list(renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), False
        return _tokens_after(renderer, self.ending, self.last, added), True

    def feed(self, ids: list[int], goes_on: bool) -> list[int]:
        """Put what comes next into the rows; the whole prompt of the next draw."""
        if not goes_on:
            self.episode.segments.append(Segment([], [], []))
        return list(_extend(self.episode.segments[-1], ids, [0.0] * len(ids), drawn=0).ids)

    def act(self, sample: Sample, renderer: Renderer, stops: Sequence[str]) -> Message:
        """Take a response; its text as a message."""
        _extend(self.episode.segments[-1], sample.ids, sample.logprobs, drawn=1)
        if self.env is not None:
            self.body, self.ending = _split_ending(sample, renderer, stops)
            self.last = sample.ids[-1]
        content = renderer.decode(sample.ids)
        for stop in stops:
            content = content.partition(stop)[0].strip()
        message = {"role": "assistant", "content": content}
        self.episode.responses.append(message)
        self.episode.stop_reason = sample.stop_reason
        self.episode.stopped_by_text = bool(stops) and _by_own_text(sample, renderer)
        self.turn += 1
        return message

    def drop(self, error: Exception) -> None:
        """It failed, and counts for nothing but that."""
        episode = self.episode
        episode.stop_reason, episode.error = "failed", _reason(error)
        episode.segments, episode.environment_reward, episode.metrics = [], 0.0, {}


class _Play:
    """What the episodes of one call have in common."""

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        seed: Sequence[int],
        environment: EnvironmentFactory | None,
        limits: Limits,
        temperature: float | None,
    ) -> None:
        self.sampler, self.renderer, self.seed = sampler, renderer, seed
        self.environment, self.limits, self.temperature = environment, limits, temperature
        self.retried: list[str] = []

    def reset(self, starting: list[_Running]) -> list[_Running]:
        """Make and reset their environments; who is ready for a turn."""
        ready: list[_Running] = []
        while starting:
            made = run_calls([partial(self._made, running) for running in starting], self.limits.step_timeout)
            again = []
            for running, outcome in zip(starting, made, strict=True):
                try:
                    if outcome.error is not None:
                        raise outcome.error
                    running.env, messages = outcome.value
                    running.episode.prompt = checked_messages(messages)
                    running.episode.tools = getattr(running.env, "tools", None) or running.prompt.tools
                    ready.append(running)
                except Exception as error:  # noqa: BLE001 - the policy of the limits decides
                    again += self._failed(running, error)
            starting = again
        return ready

    def _made(self, running: _Running) -> Any:
        assert self.environment is not None
        env = self.environment(running.prompt.row)
        messages: Any = env.reset()
        if not inspect.isawaitable(messages):
            return env, messages

        async def settled() -> Any:
            return env, await messages

        return settled()

    def turn(self, active: list[_Running]) -> list[_Running]:
        """A response of each, and what their environments answer; who goes on."""
        prompts, ready, again = [], [], []
        for running in active:
            try:
                ids = self._prompt(running)
            except (RowError, NoRoomError) as error:
                again += self._failed(running, error)
                continue
            if ids is not None:
                ready.append(running)
                prompts.append(ids)
        samples = (
            self.sampler.generate(prompts, [running.seed(self.seed) for running in ready], self.temperature)
            if ready
            else []
        )
        stops = getattr(self.sampler, "stop", ())
        messages = [
            running.act(self._cut(running, sample), self.renderer, stops)
            for running, sample in zip(ready, samples, strict=True)
        ]
        if self.environment is None:
            return []
        calls: list[Any] = [partial(r.env.step, message) for r, message in zip(ready, messages, strict=True) if r.env]
        going = []
        for running, outcome in zip(ready, run_calls(calls, self.limits.step_timeout), strict=True):
            try:
                if outcome.error is not None:
                    raise outcome.error
                if self._goes_on(running, checked_result(outcome.value)):
                    going.append(running)
            except Exception as error:  # noqa: BLE001 - the policy of the limits decides
                again += self._failed(running, error)
        return going + self.reset(again)

    def _prompt(self, running: _Running) -> list[int] | None:
        """The ids to draw after; None where the episode ends for want of tokens or of room."""
        episode, budget = running.episode, self.limits.max_tokens
        if budget is not None and episode.response_tokens >= budget:
            episode.stop_reason = "tokens"
            return None
        ids, goes_on = running.next_prompt(self.renderer)
        length = len(ids) + (len(episode.segments[-1].ids) if goes_on else 0)
        if self.sampler.context is not None and length + self.sampler.max_tokens > self.sampler.context:
            if running.env is not None and not running.turn:
                raise NoRoomError(
                    f"no room for a response: the prompt has {length} tokens, sampler.max_tokens is "
                    f"{self.sampler.max_tokens}, and the model has {self.sampler.context} positions"
                )
            episode.stop_reason = "context"
            return None
        return running.feed(ids, goes_on)

    def _cut(self, running: _Running, sample: Sample) -> Sample:
        """Within the budget of the episode. A draw does not depend on later ones: a smaller budget draws the same."""
        budget = self.limits.max_tokens
        left = len(sample.ids) if budget is None else budget - running.episode.response_tokens
        if len(sample.ids) <= left:
            return sample
        return Sample(sample.ids[:left], sample.logprobs[:left], "length")

    def _goes_on(self, running: _Running, result: StepResult) -> bool:
        episode = running.episode
        episode.environment_reward += float(result.reward)
        episode.metrics.update(result.metrics)
        # Out of tokens, the turn is unfinished: another message after it would be one the model never ended.
        if result.done or episode.truncated:
            return False
        episode.responses += result.next_messages
        if running.turn >= self.limits.max_turns:
            episode.stop_reason = "turns"
            return False
        return True

    def _failed(self, running: _Running, error: Exception) -> list[_Running]:
        """By the policy: the episode to begin again, or nothing; or raise."""
        what = f"{running.episode.label}, turn {running.turn + 1}: the environment failed: {_reason(error)}"
        if self.limits.on_error == "drop":
            running.drop(error)
            return []
        if self.limits.on_error == "retry" and running.attempt < self.limits.retries:
            self.retried.append(what)
            running.attempt += 1
            running.begin()
            return [running]
        tries = f" (tried {running.attempt + 1} times)" if running.attempt else ""
        raise EpisodeError(
            f"{what}{tries}. limits.on_error: retry plays such episodes again, drop leaves them out"
        ) from error

    def report(self, everyone: list[_Running]) -> None:
        """Say what failed."""
        failed = [running.episode for running in everyone if running.episode.failed]
        if failed:
            log.warning(
                "%d of %d episodes failed and were dropped; the first: %s: %s",
                len(failed),
                len(everyone),
                failed[0].label,
                failed[0].error,
            )
        if self.retried:
            log.warning("%d times an episode was played again; the first: %s", len(self.retried), self.retried[0])


def _extend(segment: Segment, ids: list[int], logprobs: list[float], drawn: int) -> Segment:
    segment.ids += ids
    segment.mask += [drawn] * len(ids)
    segment.logprobs += logprobs
    return segment


def _split_ending(sample: Sample, renderer: Renderer, stops: Sequence[str]) -> tuple[str, str]:
    """The text of a response, and what ended it: a stop token, or a stop text with what its last token has beyond."""
    decode = partial(renderer.tokenizer.decode, skip_special_tokens=False)
    if sample.ids and sample.ids[-1] in renderer.stop_token_ids:
        return decode(sample.ids[:-1]), decode(sample.ids[-1:])
    text = decode(sample.ids)
    places = [place for stop in (*renderer.stop_strings, *stops) if (place := text.find(stop)) >= 0]
    cut = min(places, default=len(text))
    return text[:cut], text[cut:]


def _added(text: str, previous: str, body: str, ending: str) -> str | None:
    """What a rendering adds to the one before it and a response, or None where it shows either of them anew.

    White space around the response does not count: messages are stripped, and the policy goes on from what it drew.
    """
    if not ending or not text.startswith(previous):
        return None
    rest, body = text[len(previous) :].lstrip(), body.strip()
    if not rest.startswith(body):
        return None
    rest = rest[len(body) :]
    for after in (rest, rest.lstrip()):
        if after.startswith(ending):
            return after[len(ending) :]
    return None


def _by_own_text(sample: Sample, renderer: Renderer) -> bool:
    """Whether one of the sampler's stop texts ended a response, not the end that its template gives a turn."""
    if sample.stop_reason != "stop" or sample.ids[-1] in renderer.stop_token_ids:
        return False
    text = renderer.tokenizer.decode(sample.ids)
    return not any(stop in text for stop in renderer.stop_strings)


def _tokens_after(renderer: Renderer, ending: str, last: int, added: str) -> list[int]:
    """Ids of a text as they are after what ended the response: a stop token, `last`, or a text.

    By itself its first token might differ: some tokenizers put a space before a text, some end tokens swallow one.
    """
    tokenizer = renderer.tokenizer
    stopped = last in renderer.stop_token_ids
    lead = [last] if stopped else tokenizer(ending, add_special_tokens=False)["input_ids"]
    whole = tokenizer(ending + added, add_special_tokens=False, verbose=False)["input_ids"]
    if whole[: len(lead)] == lead:
        return list(whole[len(lead) :])
    return list(tokenizer(added, add_special_tokens=False, verbose=False)["input_ids"])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
