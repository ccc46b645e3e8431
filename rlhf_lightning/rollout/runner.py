"""Runs episodes in parallel, one turn at a time; each response has its own seed."""

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
from rlhf_lightning.generation.sampler import ModelSampler
from rlhf_lightning.rollout.episode_state import EpisodeState, reason
from rlhf_lightning.sys_exit import user_line
from rlhf_lightning.types import Completion, Episode, Message, ToolSchema

T = TypeVar("T")
log = logging.getLogger(__name__)


class NoRoomError(UserError):
    """The first messages of an environment leave no room for a response in the model's context."""


@dataclass
class _RemoteEnvironment:
    """Stands in for an environment on the ranks of a tensor-parallel group other than its leader.

    Those need its `tools` to render the same prompts, but never call `reset` or `step`; see
    `distributed.run_on_leader`.
    """

    tools: list[ToolSchema] | None

    def reset(self) -> list[Message]:
        raise RuntimeError("an environment can only be reset on the rank that created it")

    def step(self, message: Message) -> StepResult:
        raise RuntimeError("an environment can only be stepped on the rank that created it")


@dataclass
class _NewEnvironment:
    """An environment and its first messages.

    `run_on_leader` pickles it for the other ranks, and `__getstate__` then replaces the environment; the leader keeps
    it.
    """

    env: MessageEnv
    messages: list[Message]

    def __getstate__(self) -> "dict[str, _RemoteEnvironment | list[Message]]":
        return {"env": _RemoteEnvironment(getattr(self.env, "tools", None)), "messages": self.messages}


class EpisodeRunner:
    """Runs episodes in parallel, one turn at a time.

    A response is seeded by `seed`, the prompt's index, the sample index, the turn and, if the episode is run again, the
    attempt. It does not depend on its position in a batch.

    Args:
        sampler: Generates responses.
        renderer: Turns messages into tokens.
        seed: Integers that seed the episodes.
        environment: Creates the environment of an episode; None if the first response ends the episode.
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

    def run(self, tasks: Sequence[tuple[Prompt, int]]) -> list[Episode]:
        """Run one episode for each pair of a prompt and a sample index.

        Args:
            tasks: Pairs of a prompt and the index of the episode in its group.

        Returns:
            The episodes, in the order of the pairs.

        Raises:
            EpisodeError: If an environment failed, and `limits.on_error` is `fail` or the retries are used up.
        """
        states = [EpisodeState(prompt, sample_index) for prompt, sample_index in tasks]
        active = self._reset(states) if self.environment else states
        with self.sampler.engine.session():
            while active:
                active = self._turn(active)
        self._report(states)
        return [state.episode for state in states]

    def run_groups(self, prompts: Sequence[Prompt], group_size: int, version: int | None = None) -> list[Episode]:
        """Run `group_size` episodes for each prompt.

        Args:
            prompts: The prompts.
            group_size: Episodes per prompt.
            version: Version of the sampling weights; see `TrainingSample.policy_version`.

        Returns:
            `len(prompts) * group_size` episodes, in the order of the prompts.
        """
        episodes = self.run([(prompt, sample_index) for prompt in prompts for sample_index in range(group_size)])
        for training_sample in (one for episode in episodes for one in episode.training_samples):
            training_sample.policy_version = version
        return episodes

    def _reset(self, starting: list[EpisodeState]) -> list[EpisodeState]:
        """Create and reset the environments of episodes.

        Returns:
            The episodes that are ready for a turn.
        """
        ready: list[EpisodeState] = []
        while starting:
            outcomes = self._run_calls([partial(self._create_environment, state) for state in starting])
            restarted = []
            for state, outcome in zip(starting, outcomes, strict=True):
                try:
                    new = outcome.result()
                    state.env = new.env
                    state.episode.prompt = checked_messages(new.messages)
                    state.episode.tools = getattr(state.env, "tools", None) or state.prompt.tools
                    ready.append(state)
                except Exception as error:  # noqa: BLE001 - handled as `limits.on_error` says
                    restarted += self._handle_failure(state, error)
            starting = restarted
        return ready

    def _create_environment(self, state: EpisodeState) -> _NewEnvironment | Awaitable[_NewEnvironment]:
        assert self.environment is not None
        env = self.environment(state.prompt.row)
        messages = env.reset()
        if not isinstance(messages, Awaitable):
            return _NewEnvironment(env, messages)

        async def awaited() -> _NewEnvironment:
            return _NewEnvironment(env, await messages)

        return awaited()

    def _run_calls(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        outcomes: list[Outcome[T]] = run_on_leader(partial(run_calls, calls, self.limits.step_timeout))
        return outcomes

    def _turn(self, active: list[EpisodeState]) -> list[EpisodeState]:
        """Run one turn: sample a response for each episode, and pass it to its environment.

        Returns:
            The episodes that have another turn.
        """
        safe_point()
        prompts, ready, restarted = [], [], []
        for state in active:
            try:
                ids = self._add_prompt(state)
            except (RowError, NoRoomError) as error:
                restarted += self._handle_failure(state, error)
                continue
            if ids is not None:
                ready.append(state)
                prompts.append(ids)
        seeds = [state.seed(self.seed) for state in ready]
        completions = self.sampler.engine.generate(prompts, self.params, seeds) if ready else []
        messages = [
            state.add_response(self._truncate(state, completion), self.renderer, self.sampler.stop)
            for state, completion in zip(ready, completions, strict=True)
        ]
        # Without an environment the first response ends the episode; nothing can have failed, so `restarted` is empty.
        if self.environment is None:
            return []
        steps = [
            partial(state.env.step, message)
            for state, message in zip(ready, messages, strict=True)
            if state.env is not None
        ]
        continuing = []
        for state, outcome in zip(ready, self._run_calls(steps), strict=True):
            try:
                if self._add_result(state, checked_result(outcome.result())):
                    continuing.append(state)
            except Exception as error:  # noqa: BLE001 - handled as `limits.on_error` says
                restarted += self._handle_failure(state, error)
        return continuing + self._reset(restarted)

    def _add_prompt(self, state: EpisodeState) -> list[int] | None:
        """Add the new tokens of the next prompt to the episode, and return the ids of the whole prompt.

        Returns None, with `stop_reason` set, if the token budget or the context is used up.
        """
        episode, budget = state.episode, self.limits.max_tokens
        if budget is not None and episode.response_tokens >= budget:
            episode.stop_reason = "tokens"
            return None
        # `ids` are only the new tokens. They extend the last training sample if `continues`; otherwise they begin
        # another one.
        ids, continues = state.next_prompt(self.renderer)
        length = len(ids) + (len(episode.training_samples[-1].ids) if continues else 0)
        if self.sampler.context is not None and length + self.params.max_tokens > self.sampler.context:
            if state.env is not None and not state.turn:
                raise NoRoomError(
                    f"no room for a response: the prompt has {length} tokens and sampler.max_tokens is "
                    f"{self.params.max_tokens}, but the model has only {self.sampler.context} positions"
                )
            episode.stop_reason = "context"
            return None
        return state.add_prompt(ids, continues)

    def _truncate(self, state: EpisodeState, completion: Completion) -> Completion:
        """Truncate a response to the episode's token budget.

        Tokens do not depend on later ones, so this equals sampling with a smaller budget.
        """
        budget = self.limits.max_tokens
        left = len(completion.ids) if budget is None else budget - state.episode.response_tokens
        if len(completion.ids) <= left:
            return completion
        return Completion(completion.ids[:left], completion.logprobs[:left], "length")

    def _add_result(self, state: EpisodeState, result: StepResult) -> bool:
        """Add the result of a step to the episode; True if another turn follows."""
        episode = state.episode
        episode.environment_reward += float(result.reward)
        episode.metrics.update(result.metrics)
        # A truncated turn has no end, so no message can follow it.
        if result.done or episode.truncated:
            return False
        episode.responses += result.next_messages
        if state.turn >= self.limits.max_turns:
            episode.stop_reason = "turns"
            return False
        return True

    def _handle_failure(self, state: EpisodeState, error: Exception) -> list[EpisodeState]:
        """Handle a failure as `limits.on_error` says: return the episode to run again, return nothing, or raise."""
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
            f"{what}{tries}. To run such episodes again, set limits.on_error: retry; to leave them out, set it to drop"
        ) from error

    def _report(self, states: list[EpisodeState]) -> None:
        """Log a warning about episodes that failed or were run again."""
        failed = [state.episode for state in states if state.episode.failed]
        if failed:
            log.warning(
                "%d of %d episodes failed and were dropped. The first: %s: %s",
                len(failed),
                len(states),
                failed[0].label,
                failed[0].error,
            )
        if self.retried:
            log.warning("%d episodes failed and were run again. The first: %s", len(self.retried), self.retried[0])
