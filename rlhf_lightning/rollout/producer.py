"""Sampling while training: a thread samples rounds ahead of the round that the policy is trained on."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.distributed import gather, safe_point, safe_points
from rlhf_lightning.generation.sampler import ModelSampler
from rlhf_lightning.rollout.policy_copy import PolicyCopy
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.types import Episode, TrainingSample

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
POLL = 0.05
"""Seconds after which a waiting main thread looks for a stop signal again."""
PATIENCE = 10.0
"""Seconds to wait for the thread when it is stopped; an external engine may not return earlier."""


@dataclass
class SampledRound:
    """A round that was sampled, and not yet rewarded.

    Attributes:
        index: Index of the round over all epochs.
        version: Index of the round at whose start the policy had the weights that sampled it.
        episodes: Its episodes, on this rank.

    Example:
        >>> SampledRound(index=3, version=2, episodes=[]).index
        3
    """

    index: int
    version: int
    episodes: list[Episode]


class ProducerState(TypedDict):
    """State of a `RolloutProducer` in a checkpoint."""

    rounds: list[list[dict[str, Any]]]
    """The rounds of every rank that were sampled and not yet trained on, as plain values."""
    version: int | None
    """Version of `weights`."""
    weights: dict[str, Tensor] | None
    """Trained weights that the next round is sampled with; None if it waits for newer ones."""


class RolloutProducer:
    """Samples rounds in a thread, up to `max_staleness` rounds ahead of training.

    Rounds are sampled one at a time, in their order, each with the newest weights that were passed on. Round r may be
    sampled with the weights from the start of round r - `max_staleness` or later. The thread only samples and steps
    environments; rewards, advantages and everything that involves other ranks or the trained model run in the main
    thread.

    The thread lives for one epoch: the first round of an epoch is sampled with the current weights.

    Args:
        policy: The policy, which is trained in the main thread.
        build_sampler: Creates the sampler of a model.
        make_runner: Creates the runner of a round from a sampler and the integers that seed the round.
        group_size: Episodes per prompt.
        max_staleness: Largest difference in rounds, at least 1.
        shares_engine: True if sampler and validation use the same external engine, so that they must take turns.
        context: Context manager in which a round is sampled, for example autocast.

    Example:
        ```python
        producer = RolloutProducer(model, build_sampler, make_runner, group_size=8, max_staleness=1)
        with producer.running([(0, first_prompts), (1, second_prompts)]):
            episodes = producer.take(0).episodes
        ```
    """

    def __init__(
        self,
        policy: "PreTrainedModel | PeftModel",
        build_sampler: Callable[["PreTrainedModel | PeftModel"], ModelSampler],
        make_runner: Callable[[ModelSampler, Sequence[int]], EpisodeRunner],
        group_size: int,
        max_staleness: int,
        shares_engine: bool = False,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.copy = PolicyCopy(policy)
        self.sampler = build_sampler(self.copy.model)
        self.make_runner, self.group_size, self.max_staleness = make_runner, group_size, max_staleness
        self.shares_engine, self.context = shares_engine, context
        self._restored: ProducerState | None = None
        self._rank = 0
        self._thread: _Thread | None = None

    @contextmanager
    def running(self, rounds: Sequence[tuple[int, Sequence[Prompt]]]) -> Iterator[None]:
        """Context manager in which the thread samples.

        Args:
            rounds: Index and prompts (of this rank) of each remaining round of the epoch, in order.
        """
        thread = _Thread(self, rounds, self._restored, self._rank)
        self._restored, self._thread = None, thread
        thread.start()
        try:
            yield
        finally:
            thread.stop()
            self._thread = None

    def take(self, index: int) -> SampledRound:
        """Wait for a round.

        Called at the start of the round, when the policy's weights do not change. They are passed to the thread.

        Args:
            index: Index of the round.

        Raises:
            Exception: What sampling this round has raised, with its traceback.
        """
        assert self._thread is not None, "rounds are taken within `running`"
        return self._thread.take(index)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager in which the main thread may use the engine that it shares with the thread.

        Waits until the round that is being sampled is complete. Does nothing if each has its own engine.
        """
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Enter `paused`."""
        if self.shares_engine and self._thread is not None:
            self._thread.pause()

    def resume(self) -> None:
        """Leave `paused`."""
        if self.shares_engine and self._thread is not None:
            self._thread.resume()

    def state_dict(self, first: int) -> ProducerState:
        """The sampled rounds, and the weights that an unfinished one is sampled with.

        All ranks must call this together.

        Args:
            first: Index of the first round that has not been trained on.
        """
        thread = self._thread
        rounds, is_unfinished = ([], False) if thread is None else thread.state(first)
        # The first rank writes the checkpoint, also if only another one has an unfinished round.
        keeps = any(gather(is_unfinished))
        version, weights = thread.loaded() if thread and keeps else (None, None)
        return {"rounds": gather(rounds), "version": version, "weights": weights}

    def load_state_dict(self, state: ProducerState, rank: int, world: int) -> None:
        """Restore a `state_dict`. With another number of ranks, the rounds are sampled again.

        Args:
            state: The state.
            rank: Index of this rank.
            world: Number of ranks.
        """
        self._restored, self._rank = (state if len(state["rounds"]) == world else None), rank


class _Stopped(BaseException):
    """The main thread stops the thread. Not an `Exception`, so that user code does not catch it."""


class _Thread:
    """The thread of an epoch, and what it shares with the main thread under the lock of `changed`.

    Args:
        producer: Its settings, and the copy that it samples from.
        rounds: See `RolloutProducer.running`.
        restored: State of a checkpoint, if the run continues from one.
        rank: Index of this rank.
    """

    def __init__(
        self,
        producer: RolloutProducer,
        rounds: Sequence[tuple[int, Sequence[Prompt]]],
        restored: ProducerState | None,
        rank: int,
    ) -> None:
        self.producer = producer
        self.changed = threading.Condition()
        kept = [_from_plain(value) for value in restored["rounds"][rank]] if restored else []
        # The run before the interruption may have had a larger maximum.
        self.finished = {one.index: one for one in kept if self._may_sample(one.index, one.version)}
        self.waiting = deque((index, prompts) for index, prompts in rounds if index not in self.finished)
        self.sampling: int | None = None
        """Index of the round that is being sampled."""
        self.version: int | None = None
        """Version of the weights in the copy."""
        self.at_rest: int | None = None
        """Version of the policy's own weights, while the main thread waits and does not change them."""
        self.pending: tuple[int, dict[str, Tensor]] | None = None
        """Version and copy of weights that are to be loaded before the next round."""
        self.keeps = False
        """True if the next round must be sampled with the weights in the copy, even if there are newer ones."""
        if restored and restored["weights"] is not None and restored["version"] is not None and self.waiting:
            producer.copy.load(restored["weights"])
            self.version = restored["version"]
            self.keeps = self._may_sample(self.waiting[0][0], self.version)
        self.is_paused = self.is_stopped = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="rollouts")

    # -- called by the main thread --------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning(
                "sampling has not ended %.0f s after it was asked to; its thread ends with the call of the engine or "
                "environment that it waits for, or with the process",
                PATIENCE,
            )

    def take(self, index: int) -> SampledRound:
        """See `RolloutProducer.take`."""
        with self.changed:
            self.at_rest = index
            self.changed.notify_all()
        while True:
            safe_point()
            with self.changed:
                if self.changed.wait_for(lambda: index in self.finished or self.error is not None, POLL):
                    if index not in self.finished:
                        assert self.error is not None
                        raise self.error
                    self._publish(index)
                    self.at_rest = None
                    # The round itself is kept until the next one, because an interrupted run goes back to its start.
                    self.finished = {one: value for one, value in self.finished.items() if one >= index}
                    return self.finished[index]

    def _publish(self, version: int) -> None:
        """Pass on the policy's weights, which will change once the main thread continues."""
        if not self.waiting:
            return
        if self.sampling is None and not self.keeps:
            if self.version != version:
                self._load(version, None)
            # The thread may wake up late, when there are newer weights. With a maximum of 1 these would be chance.
            self.keeps = self._may_sample(self.waiting[0][0], version)
            self.changed.notify_all()
        elif self.version != version:
            self.pending = version, self.producer.copy.current()

    def pause(self) -> None:
        """See `RolloutProducer.paused`."""
        with self.changed:
            self.is_paused = True
        while True:
            safe_point()
            with self.changed:
                if self.changed.wait_for(lambda: self.sampling is None, POLL):
                    return

    def resume(self) -> None:
        with self.changed:
            self.is_paused = False
            self.changed.notify_all()

    def state(self, first: int) -> tuple[list[dict[str, Any]], bool]:
        """The rounds that were sampled and not yet trained on, and whether the loaded weights sample another one."""
        with self.changed:
            rounds = [asdict(_unrewarded(self.finished[index])) for index in sorted(self.finished) if index >= first]
            begun = self.sampling if self.sampling is not None else self.waiting[0][0] if self.waiting else None
            is_unfinished = begun is not None and self.version is not None and self._may_sample(begun, self.version)
            return rounds, is_unfinished

    def loaded(self) -> tuple[int | None, dict[str, Tensor]]:
        """Version of the weights in the copy, and a copy of them."""
        with self.changed:
            return self.version, self.producer.copy.loaded()

    # -- called by either thread, with the lock -------------------------------------------------------------------

    def _load(self, version: int, weights: dict[str, Tensor] | None) -> None:
        self.producer.copy.load(weights)
        self.version, self.pending = version, None

    def _may_sample(self, index: int, version: int) -> bool:
        return index - version <= self.producer.max_staleness

    def _newest(self) -> int | None:
        """Version of the newest weights that were passed on."""
        if self.keeps:
            return self.version
        if self.at_rest is not None:
            return self.at_rest
        return self.version if self.pending is None else self.pending[0]

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with safe_points(self._stop_if_asked), torch.no_grad(), _stream(self.producer.copy.device):
                while (task := self._next()) is not None:
                    self._sample(*task)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it, in `take`
            with self.changed:
                self.error, self.sampling = error, None
                self.changed.notify_all()

    def _stop_if_asked(self) -> None:
        if self.is_stopped:
            raise _Stopped

    def _next(self) -> tuple[int, int, Sequence[Prompt]] | None:
        """Wait until another round may be sampled, and load its weights.

        Returns:
            Index, version of the weights, and prompts; None if no round is left or the thread is stopped.
        """
        with self.changed:
            self.changed.wait_for(self._is_ready)
            if self.is_stopped or not self.waiting:
                return None
            newest = self._newest()
            assert newest is not None
            if newest != self.version:
                self._load(newest, None if newest == self.at_rest or self.pending is None else self.pending[1])
            self.keeps = False
            self.sampling, prompts = self.waiting.popleft()
            return self.sampling, newest, prompts

    def _is_ready(self) -> bool:
        if self.is_stopped or not self.waiting:
            return True
        newest = self._newest()
        return not self.is_paused and newest is not None and self._may_sample(self.waiting[0][0], newest)

    def _sample(self, index: int, version: int, prompts: Sequence[Prompt]) -> None:
        producer = self.producer
        with producer.context():  # of one round, because autocast caches weights until its end
            producer.sampler.sync(version)
            runner = producer.make_runner(producer.sampler, (index,))
            episodes = runner.run_groups(prompts, producer.group_size, version)
        with self.changed:
            self.finished[index], self.sampling = SampledRound(index, version, episodes), None
            self.changed.notify_all()


def _stream(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, a stream beside the one that trains, so that both run at the same time."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _unrewarded(sampled: SampledRound) -> SampledRound:
    """The round without what the main thread adds to its episodes: rewards, advantages, and log-probabilities."""
    episodes = [
        Episode(
            prompt=one.prompt,
            row=one.row,
            group=one.group,
            sample_index=one.sample_index,
            tools=one.tools,
            responses=one.responses,
            training_samples=[
                TrainingSample(
                    sample.ids, sample.loss_mask, sample.sampling_logprobs, policy_version=sample.policy_version
                )
                for sample in one.training_samples
            ],
            stop_reason=one.stop_reason,
            stopped_by_text=one.stopped_by_text,
            environment_reward=one.environment_reward,
            metrics=dict(one.metrics),
            where=one.where,
            error=one.error,
        )
        for one in sampled.episodes
    ]
    return replace(sampled, episodes=episodes)


def _from_plain(value: dict[str, Any]) -> SampledRound:
    """The inverse of `asdict`."""
    episodes = [
        Episode(**{**one, "training_samples": [TrainingSample(**sample) for sample in one["training_samples"]]})
        for one in value["episodes"]
    ]
    return SampledRound(value["index"], value["version"], episodes)
