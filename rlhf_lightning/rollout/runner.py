"""Runs episodes side by side, one turn of all of them at a time; each response has a seed of its own."""

import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import run_on_leader, safe_point
from rlhf_lightning.environments.base import (
    EnvironmentFactory,
    EpisodeError,
    Limits,
    MessageEnv,
    StepResult,
    checked_messages,
    checked_result,
)
from rlhf_lightning.environments.user_calls import Call, Outcome, run_calls
from rlhf_lightning.errors import UserError
from rlhf_lightning.rollout.episode_state import EpisodeState, reason
from rlhf_lightning.sampling.sampler import ModelSampler
from rlhf_lightning.sys_exit import user_line
from rlhf_lightning.types import Completion, Episode, Message, ToolSchema

T = TypeVar("T")
log = logging.getLogger(__name__)


class NoRoomError(UserError):
    """The first messages of an environment leave no room for a response in the model's context."""


@dataclass
class _Elsewhere:
    """Stands for an environment that another rank holds; see `distributed.run_on_leader`."""

    tools: list[ToolSchema] | None

    def reset(self) -> list[Message]:
        raise RuntimeError("only the rank that holds an environment may reset it")

    def step(self, message: Message) -> StepResult:
        raise RuntimeError("only the rank that holds an environment may step it")


@dataclass
class _Made:
    """An environment and its first messages. When sent to other ranks, the environment itself is left out."""

    env: MessageEnv
    messages: list[Message]

    def __getstate__(self) -> "dict[str, _Elsewhere | list[Message]]":
        return {"env": _Elsewhere(getattr(self.env, "tools", None)), "messages": self.messages}


class EpisodeRunner:
    """Runs episodes together, one turn of all of them at a time.

    A response is seeded by `seed`, the prompt's index, the sample index, the turn and, if the episode is run again, the
    attempt. It does not depend on its position in a batch.

    Args:
        sampler: Generates responses.
        renderer: Turns messages into tokens.
        seed: Numbers that seed the episodes.
        environment: Makes an episode's environment; None for a single turn, where the response ends the episode.
        limits: Limits of an episode.
        temperature: Replaces the sampler's temperature.

    Example:
        >>> runner = EpisodeRunner(sampler, renderer, seed=(0,))  # doctest: +SKIP
        >>> (episode,) = runner.run([(prompt, 0)])  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: ModelSampler,
        renderer: Renderer,
        seed: Sequence[int],
        environment: EnvironmentFactory | None = None,
        limits: Limits | None = None,
        temperature: float | None = None,
    ) -> None:
        self.sampler, self.renderer, self.seed = sampler, renderer, seed
        self.environment, self.limits, self.params = environment, limits or Limits(), sampler.params.at(temperature)
        self.retried: list[str] = []

    def run(self, prompts: Sequence[tuple[Prompt, int]]) -> list[Episode]:
        """Run one episode for each pair of prompt and sample index, in order.

        Args:
            prompts: Pairs of a prompt and the index of the episode in its group.

        Raises:
            EpisodeError: If an environment failed and `limits.on_error` does not allow it.
        """
        states = [EpisodeState(prompt, sample) for prompt, sample in prompts]
        active = self._reset(states) if self.environment else states
        with self.sampler.engine.session():
            while active:
                active = self._turn(active)
        self._report(states)
        return [state.episode for state in states]

    def _reset(self, starting: list[EpisodeState]) -> list[EpisodeState]:
        """Create and reset the environments of episodes.

        Returns:
            The episodes that are ready for a turn.
        """
        ready: list[EpisodeState] = []
        while starting:
            outcomes = self._called([partial(self._made, state) for state in starting])
            again = []
            for state, outcome in zip(starting, outcomes, strict=True):
                try:
                    made = outcome.result()
                    state.env = made.env
                    state.episode.prompt = checked_messages(made.messages)
                    state.episode.tools = getattr(state.env, "tools", None) or state.prompt.tools
                    ready.append(state)
                except Exception as error:  # noqa: BLE001 - `limits.on_error` decides
                    again += self._failed(state, error)
            starting = again
        return ready

    def _made(self, state: EpisodeState) -> _Made | Awaitable[_Made]:
        assert self.environment is not None
        env = self.environment(state.prompt.row)
        messages = env.reset()
        if not isinstance(messages, Awaitable):
            return _Made(env, messages)

        async def settled() -> _Made:
            return _Made(env, await messages)

        return settled()

    def _called(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        outcomes: list[Outcome[T]] = run_on_leader(partial(run_calls, calls, self.limits.step_timeout))
        return outcomes

    def _turn(self, active: list[EpisodeState]) -> list[EpisodeState]:
        """Run one turn: sample a response for each episode and pass it to its environment.

        Returns:
            The episodes that have another turn.
        """
        safe_point()
        prompts, ready, again = [], [], []
        for state in active:
            try:
                ids = self._prompt(state)
            except (RowError, NoRoomError) as error:
                again += self._failed(state, error)
                continue
            if ids is not None:
                ready.append(state)
                prompts.append(ids)
        seeds = [state.seed(self.seed) for state in ready]
        completions = self.sampler.engine.generate(prompts, self.params, seeds) if ready else []
        messages = [
            state.act(self._cut(state, completion), self.renderer, self.sampler.stop)
            for state, completion in zip(ready, completions, strict=True)
        ]
        if self.environment is None:
            return []
        calls = [partial(state.env.step, said) for state, said in zip(ready, messages, strict=True) if state.env]
        going = []
        for state, outcome in zip(ready, self._called(calls), strict=True):
            try:
                if self._goes_on(state, checked_result(outcome.result())):
                    going.append(state)
            except Exception as error:  # noqa: BLE001 - `limits.on_error` decides
                again += self._failed(state, error)
        return going + self._reset(again)

    def _prompt(self, state: EpisodeState) -> list[int] | None:
        """Token ids to sample after; None if the episode ends because its token budget or the context is used up."""
        episode, budget = state.episode, self.limits.max_tokens
        if budget is not None and episode.response_tokens >= budget:
            episode.stop_reason = "tokens"
            return None
        ids, goes_on = state.next_prompt(self.renderer)
        length = len(ids) + (len(episode.training_samples[-1].ids) if goes_on else 0)
        if self.sampler.context is not None and length + self.params.max_tokens > self.sampler.context:
            if state.env is not None and not state.turn:
                raise NoRoomError(
                    f"no room for a response: the prompt has {length} tokens, sampler.max_tokens is "
                    f"{self.params.max_tokens}, and the model has {self.sampler.context} positions"
                )
            episode.stop_reason = "context"
            return None
        return state.feed(ids, goes_on)

    def _cut(self, state: EpisodeState, sample: Completion) -> Completion:
        """Truncate a response to the episode's token budget.

        Tokens do not depend on later ones, so this equals sampling with a smaller budget.
        """
        budget = self.limits.max_tokens
        left = len(sample.ids) if budget is None else budget - state.episode.response_tokens
        if len(sample.ids) <= left:
            return sample
        return Completion(sample.ids[:left], sample.logprobs[:left], "length")

    def _goes_on(self, state: EpisodeState, result: StepResult) -> bool:
        episode = state.episode
        episode.environment_reward += float(result.reward)
        episode.metrics.update(result.metrics)
        # A truncated turn is unfinished. A message after it would follow a turn that the model never ended.
        if result.done or episode.truncated:
            return False
        episode.responses += result.next_messages
        if state.turn >= self.limits.max_turns:
            episode.stop_reason = "turns"
            return False
        return True

    def _failed(self, state: EpisodeState, error: Exception) -> list[EpisodeState]:
        """Handle a failure by `limits.on_error`: return the episode to run again, return nothing, or raise."""
        where = f"{state.episode.label}, turn {state.turn + 1}"
        what = f"{where}: the environment failed: {reason(error)}{user_line(error)}"
        if self.limits.on_error == "drop":
            state.drop(error)
            return []
        if self.limits.on_error == "retry" and state.attempt < self.limits.retries:
            self.retried.append(what)
            state.attempt += 1
            state.begin()
            return [state]
        tries = f" (tried {state.attempt + 1} times)" if state.attempt else ""
        raise EpisodeError(
            f"{what}{tries}. limits.on_error: retry runs such episodes again, drop leaves them out"
        ) from error

    def _report(self, everyone: list[EpisodeState]) -> None:
        """Log a warning about episodes that failed or were run again."""
        failed = [state.episode for state in everyone if state.episode.failed]
        if failed:
            log.warning(
                "%d of %d episodes failed and were dropped; the first: %s: %s",
                len(failed),
                len(everyone),
                failed[0].label,
                failed[0].error,
            )
        if self.retried:
            log.warning("%d failed episodes were run again; the first: %s", len(self.retried), self.retried[0])
