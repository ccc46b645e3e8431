"""Collection of a round of rollouts: training samples with advantages, and the statistics of the round."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import gather
from rlhf_lightning.environments.base import EnvironmentFactory, Limits
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scorers import padded_batches
from rlhf_lightning.rewards import RewardTerm, total_rewards
from rlhf_lightning.rollout.advantages import Advantage, compute_token_advantages, critic_explained_variance
from rlhf_lightning.rollout.kl import KLController, KLState
from rlhf_lightning.rollout.policy_snapshot import PolicySnapshot
from rlhf_lightning.rollout.recorded import Recorded
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.rollout.statistics import Sums, statistics, zero_variance_groups
from rlhf_lightning.sampling.sampler import ModelSampler
from rlhf_lightning.types import Answer, Episode, TrainingSample

SampleScorer = Callable[[Tensor, Tensor], Tensor]
"""Computes a number per token, `[B, T]`, from `input_ids` and `loss_mask`, both `[B, T]`."""
CHUNK = 256
"""Number of training samples that are scored at once."""


@dataclass(frozen=True)
class SampleScorers:
    """Numbers to compute for the training samples of a round, with the weights at its start.

    Each scorer fills the column of `TrainingSample` with its name. With None, the column stays empty.

    Attributes:
        reference_logprobs: Log-probabilities under the reference, in nats.
        recomputed_logprobs: Log-probabilities under the policy as the trainer computes them, in nats.
        values: The critic's values, in reward units.

    Example:
        >>> scorers = SampleScorers(values=lambda input_ids, loss_mask: torch.zeros(input_ids.shape))
    """

    reference_logprobs: SampleScorer | None = None
    recomputed_logprobs: SampleScorer | None = None
    values: SampleScorer | None = None


class RolloutCollector:
    """Collects rounds: samples and rewards episodes, and turns them into training samples with advantages.

    It also holds the state that changes from round to round and that a checkpoint must keep: the KL coefficient, a
    moving reference, and the weights that a stale policy samples with.

    Args:
        sampler: Generates responses.
        renderer: Turns messages into tokens.
        terms: Terms of the reward, weighted and added.
        advantage: Turns rewards into advantages.
        seed: Seed of all sampled tokens.
        kl: The KL penalty, whose coefficient may adapt between rounds.
        reference: The model that the KL penalty compares with; refreshed between rounds if `kl.refresh_every` is set.
        scorers: Numbers to compute for the training samples.
        environment: Makes the environment of an episode; see `PolicyRLModule`.
        limits: Limits of an episode.
        truncated_reward: Replaces the reward of a truncated response.
        mask_truncated: Leave truncated responses out of the loss.
        resample_groups: Number of times that groups with equal rewards are sampled again.
        sequence_level: True if the objective treats a response as one action; see `PolicyObjective`.
        snapshot: Weights of the previous round to sample with, if the policy samples one round late.
        context: Context in which models run, the same as in training.

    Example:
        >>> collector = RolloutCollector(sampler, renderer, terms, GroupCentered(), seed=0)  # doctest: +SKIP
        >>> samples, sums = collector.collect(prompts, number=0, group_size=8)  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: ModelSampler,
        renderer: Renderer,
        terms: Sequence[RewardTerm],
        advantage: Advantage,
        seed: int,
        kl: KLController | None = None,
        reference: Reference | None = None,
        scorers: SampleScorers | None = None,
        environment: EnvironmentFactory | None = None,
        limits: Limits | None = None,
        truncated_reward: float | None = None,
        mask_truncated: bool = False,
        resample_groups: int = 0,
        sequence_level: bool = False,
        snapshot: PolicySnapshot | None = None,
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.sampler, self.renderer, self.terms, self.advantage = sampler, renderer, terms, advantage
        self.seed, self.kl, self.reference, self.scorers = seed, kl, reference, scorers or SampleScorers()
        self.environment, self.limits = environment, limits or Limits()
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated
        self.resample_groups, self.sequence_level = resample_groups, sequence_level
        self.snapshot, self.context = snapshot, context
        self.resampled = 0
        """Number of times that a group of the last round was sampled again."""
        self.started = 0
        """Number of rounds started. The round numbers, which are part of seeds, may skip some."""
        self.episodes: list[Episode] = []
        """Episodes of the last round, on this rank."""

    # -- a round --------------------------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[Prompt], number: int, group_size: int) -> tuple[list[TrainingSample], Sums]:
        """Collect a round. All ranks must call this together.

        Args:
            prompts: Prompts of this rank.
            number: Index of the round, part of the seed.
            group_size: Episodes per prompt.

        Returns:
            The training samples of this rank, and the sums of the round's statistics.
        """
        self._begin_round()
        with torch.no_grad(), self.context():
            self.episodes = self._sample(prompts, number, group_size)
            samples = self.training_samples(self.episodes)
        return samples, self._statistics(samples)

    def collect_recorded(self, groups: Sequence[Sequence[Recorded]], number: int) -> tuple[list[TrainingSample], Sums]:
        """Collect a round of recorded episodes. All ranks must call this together.

        Args:
            groups: Recorded episodes of this rank, by group.
            number: Index of the round.

        Returns:
            See `collect`.
        """
        self._begin_round()
        with torch.no_grad(), self.context():
            self.episodes = [one.episode(group[0].index) for group in groups for one in group]
            samples = self.training_samples(self.episodes)
        return samples, self._statistics(samples)

    @torch.no_grad()
    def _begin_round(self) -> None:
        """Adapt the KL coefficient to the last round, and refresh a moving reference."""
        if self.kl is not None and self.reference is not None:
            self.kl.adapt()
            every = self.kl.penalty.refresh_every
            if every and self.started and self.started % every == 0:
                self.reference.refresh()
        self.started += 1

    def _statistics(self, samples: list[TrainingSample]) -> Sums:
        """Sums of the round's statistics on this rank."""
        sums = statistics(self.episodes, kl=self.scorers.reference_logprobs is not None)
        if self.resample_groups:
            sums["resampled_groups"] = (float(self.resampled), sums["zero_variance_groups"][1])
        if self.kl is not None:
            sums["kl_coefficient"] = (self.kl.penalty.coefficient, 1)
        if self.advantage.needs_values:
            sums["explained_variance"] = (critic_explained_variance(samples), 1)
        return sums

    def _sample(self, prompts: Sequence[Prompt], number: int, group_size: int) -> list[Episode]:
        """Sample and reward the episodes of a round, in the order of the prompts.

        A group whose rewards are all equal has no gradient. It is sampled again, at most `resample_groups` times
        (dynamic sampling of DAPO, arXiv 2503.14476 sec. 3.2, but with the same prompts).
        """
        with self.snapshot.stale() if self.snapshot else nullcontext():
            self.sampler.sync(number)
            episodes = self.rollout(prompts, group_size, (number,), running="update")
            self.resampled = 0
            for attempt in range(1, self.resample_groups + 1):
                zero_variance = zero_variance_groups(episodes)
                # Every rank takes part in every attempt, because rewards may gather statistics over ranks.
                if not any(gather(bool(zero_variance))):
                    break
                self.resampled += len(zero_variance)
                again = [prompt for prompt in prompts if prompt.index in zero_variance]
                # Running statistics count a round once; otherwise they would be biased toward groups sampled again.
                fresh = iter(self.rollout(again, group_size, (number, attempt), running="use"))
                episodes = [next(fresh) if episode.group in zero_variance else episode for episode in episodes]
            return episodes

    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed: Sequence[int],
        temperature: float | None = None,
        running: str = "off",
    ) -> list[Episode]:
        """Sample and reward `group_size` episodes for each prompt, in order.

        Args:
            prompts: Prompts of this rank.
            group_size: Episodes per prompt.
            seed: Numbers that distinguish these rollouts from others of the run.
            temperature: Replaces the sampler's temperature.
            running: What rewards with running statistics do; see `total_rewards`. With `update`, all ranks must call
                this together, with or without prompts.

        Returns:
            The episodes, `len(prompts) * group_size` of them.
        """
        tasks = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        episodes = EpisodeRunner(
            self.sampler, self.renderer, (self.seed, *seed), self.environment, self.limits, temperature
        ).run(tasks)
        total_rewards(episodes, self.terms, self.truncated_reward, running)
        for episode in episodes:
            episode.masked = episode.failed or (self.mask_truncated and episode.truncated)
        return episodes

    def training_samples(self, episodes: Sequence[Episode]) -> list[TrainingSample]:
        """Score episodes, compute advantages, and return the samples to train on. All ranks must call this together."""
        self.score(episodes, self.scorers)
        played = [episode for episode in episodes if not episode.failed]
        compute_token_advantages(
            played, self.advantage, None if self.kl is None else self.kl.penalty, self.sequence_level
        )
        for episode in episodes:
            for sample in episode.training_samples:
                sample.group = episode.group
        return _sampled([episode for episode in episodes if not episode.masked])

    def score(self, episodes: Sequence[Episode], scorers: SampleScorers) -> None:
        """Fill the columns that the scorers compute. All ranks must call this together.

        Args:
            episodes: Episodes of this rank.
            scorers: The scorers; a column without one is not changed.
        """
        samples = _sampled(episodes)
        if scorers.reference_logprobs is not None:
            for sample, numbers in self._scored(samples, scorers.reference_logprobs):
                sample.reference_logprobs = numbers
        if scorers.recomputed_logprobs is not None:
            for sample, numbers in self._scored(samples, scorers.recomputed_logprobs):
                sample.recomputed_logprobs = numbers
        if scorers.values is not None:
            for sample, numbers in self._scored(samples, scorers.values):
                sample.values = numbers

    def _scored(
        self, samples: Sequence[TrainingSample], scorer: SampleScorer
    ) -> Iterator[tuple[TrainingSample, list[float]]]:
        device = next(self.sampler.model.parameters()).device
        ids, masks = [sample.ids for sample in samples], [sample.loss_mask for sample in samples]
        for rows, tokens in padded_batches(ids, masks, CHUNK, device, range(len(samples)), even=True):
            numbers = scorer(tokens["input_ids"], tokens["loss_mask"]).float().tolist()
            for i, row in zip(rows, numbers, strict=bool(rows)):
                yield samples[i], row[: len(ids[i])]

    # -- between rounds -------------------------------------------------------------------------------------------

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Pass the statistics of a round, over all ranks, to an adaptive KL coefficient."""
        if self.kl is not None and "kl" in statistics:
            self.kl.observe(statistics["kl"], round(statistics["episodes"]))

    @property
    def counters(self) -> "RoundCounters":
        """State that a round changes before its first update: the number of rounds started and the KL controller.

        It is small enough to save when a round is left early. The reference is not part of it: it is refreshed again on
        resume.
        """
        return {"started": self.started, "kl": self.kl.state_dict() if self.kl else None}

    @counters.setter
    def counters(self, found: "RoundCounters") -> None:
        self.started = found["started"]
        if self.kl is not None and found["kl"] is not None:
            self.kl.load_state_dict(found["kl"])

    def state_dict(self) -> "CollectorState":
        """State of the KL controller, of a moving reference, and of the weights to sample with."""
        moves = self.kl is not None and self.kl.penalty.refresh_every is not None
        return {
            **self.counters,
            "reference": self.reference.weights() if moves and self.reference is not None else None,
            "snapshot": self.snapshot.state_dict() if self.snapshot else None,
        }

    def load_state_dict(self, state: "CollectorState") -> None:
        """Restore a `state_dict`."""
        self.counters = {"started": state["started"], "kl": state["kl"]}
        if self.reference is not None and state["reference"]:
            self.reference.load_weights(state["reference"])
        if self.snapshot is not None:
            self.snapshot.load_state_dict(state["snapshot"])


class RoundCounters(TypedDict):
    """What a round changes before its first update."""

    started: int
    """Number of rounds started."""
    kl: KLState | None


class CollectorState(RoundCounters):
    """What a checkpoint keeps of a collector."""

    reference: dict[str, Tensor] | None
    """Weights of a moving reference."""
    snapshot: dict[str, Tensor] | None
    """Weights of the previous round, with which the next one is sampled."""


def _sampled(episodes: Sequence[Episode]) -> list[TrainingSample]:
    """Training samples with at least one sampled token."""
    return [sample for episode in episodes for sample in episode.training_samples if sample.actions]


def answers(sampler: ModelSampler, renderer: Renderer, prompts: Sequence[Prompt], seed: int) -> list[Answer]:
    """Sample one response to each prompt, for `predict`.

    Args:
        sampler: Generates the responses.
        renderer: Turns messages into tokens.
        prompts: The prompts.
        seed: Seed of the sampled tokens.

    Returns:
        A dict per prompt with `index`, `prompt`, `response`, `stop_reason` and `response_tokens`.
    """
    episodes = EpisodeRunner(sampler, renderer, (seed, 0)).run([(prompt, 0) for prompt in prompts])
    return [episode.answer() for episode in episodes]
