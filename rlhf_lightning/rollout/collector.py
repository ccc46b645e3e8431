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
from rlhf_lightning.generation.sampler import ModelSampler
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scorers import padded_batches
from rlhf_lightning.rewards import RewardTerm, total_rewards
from rlhf_lightning.rollout.advantages import Advantage, compute_token_advantages, critic_explained_variance
from rlhf_lightning.rollout.kl import KLController, KLState
from rlhf_lightning.rollout.producer import RolloutProducer
from rlhf_lightning.rollout.recorded import Recorded
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.rollout.statistics import Sums, statistics, zero_variance_groups
from rlhf_lightning.types import Answer, Episode, TrainingSample

TokenFunction = Callable[[Tensor, Tensor], Tensor]
"""Computes a number for each token, `[B, T]`, from `input_ids` and `loss_mask`, both `[B, T]`."""
CHUNK = 256
"""Number of training samples that a token function computes at once."""


@dataclass(frozen=True)
class TokenFunctions:
    """Functions of the tokens of a round's training samples, called with the weights at its start.

    Each fills the field of `TrainingSample` that has its name. With None, the field stays empty.

    Attributes:
        reference_logprobs: Log-probabilities under the reference, in nats.
        recomputed_logprobs: Log-probabilities under the policy as the trainer computes them, in nats. If present, they
            are the sample's `old_logprobs` (the ratio's denominator); otherwise `old_logprobs` are those that the
            sampler recorded.
        values: The critic's values, in reward units.

    Example:
        >>> functions = TokenFunctions(values=lambda input_ids, loss_mask: torch.zeros(input_ids.shape))
    """

    reference_logprobs: TokenFunction | None = None
    recomputed_logprobs: TokenFunction | None = None
    values: TokenFunction | None = None


class RolloutCollector:
    """Collects rounds: samples and rewards episodes, and turns them into training samples with advantages.

    It also holds the state that changes between rounds and is saved in checkpoints: the KL coefficient and the weights
    of a moving reference.

    Args:
        sampler: Generates responses.
        renderer: Turns messages into tokens.
        terms: Terms of the reward, to be weighted and added.
        advantage: Turns rewards into advantages.
        seed: Seed of all sampled tokens.
        kl_controller: The KL penalty with its current coefficient, which may adapt between rounds.
        reference: The reference of the KL penalty, for `KLPenalty.refresh_every`: it is refreshed between rounds, and
            its weights are saved. None if it is a server.
        token_functions: Fill fields of the training samples, such as the reference's log-probabilities.
        environment: Creates the environment of an episode; see `PolicyRLModule`.
        limits: Limits of an episode.
        truncated_reward: Replaces the reward of an episode whose last response was truncated.
        mask_truncated: True to leave such episodes out of the loss.
        resample_groups: Maximum number of times that a zero-variance group is sampled again.
        sequence_level: True if the objective treats a sequence as one action; see `PolicyObjective`.
        sampling_context: Context manager in which models run, the same as in training.

    Example:
        >>> collector = RolloutCollector(sampler, renderer, terms, GroupCentered(), seed=0)  # doctest: +SKIP
        >>> samples, sums = collector.collect(prompts, round_index=0, group_size=8)  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: ModelSampler,
        renderer: Renderer,
        terms: Sequence[RewardTerm],
        advantage: Advantage,
        seed: int,
        kl_controller: KLController | None = None,
        reference: Reference | None = None,
        token_functions: TokenFunctions | None = None,
        environment: EnvironmentFactory | None = None,
        limits: Limits | None = None,
        truncated_reward: float | None = None,
        mask_truncated: bool = False,
        resample_groups: int = 0,
        sequence_level: bool = False,
        sampling_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.sampler, self.renderer, self.terms, self.advantage = sampler, renderer, terms, advantage
        self.seed, self.kl_controller, self.reference = seed, kl_controller, reference
        self.token_functions = token_functions or TokenFunctions()
        self.environment, self.limits = environment, limits or Limits()
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated
        self.resample_groups, self.sequence_level = resample_groups, sequence_level
        self.sampling_context = sampling_context
        self.resampled = 0
        """Number of times that a group of the last round was sampled again."""
        self.started = 0
        """Number of rounds started. Round indices, which are part of seeds, may skip numbers, because
        `limit_train_batches` can end an epoch before its last round."""
        self.episodes: list[Episode] = []
        """Episodes of the last round, on this rank."""

    # -- a round --------------------------------------------------------------------------------------------------

    def collect(
        self, prompts: Sequence[Prompt], round_index: int, group_size: int, producer: RolloutProducer | None = None
    ) -> tuple[list[TrainingSample], Sums]:
        """Collect a round. All ranks must call this together.

        Args:
            prompts: Prompts of this rank.
            round_index: Index of the round over all epochs; part of the seed.
            group_size: Episodes per prompt.
            producer: Samples the episodes of these prompts ahead of training; None to sample them now.

        Returns:
            The training samples of this rank, and each statistic of the round as sum and count.
        """
        self._begin_round()
        with torch.no_grad(), self.sampling_context():
            self.episodes = self._sample(prompts, round_index, group_size, producer)
            samples = self.training_samples(self.episodes)
        sums = self._statistics(samples)
        return samples, sums if producer is None else sums | _staleness(samples, round_index)

    def collect_recorded(
        self, groups: Sequence[Sequence[Recorded]], round_index: int
    ) -> tuple[list[TrainingSample], Sums]:
        """Collect a round of recorded episodes. All ranks must call this together.

        Args:
            groups: Recorded episodes of this rank, by group.
            round_index: Index of the round over all epochs; unused, because nothing is sampled.

        Returns:
            See `collect`.
        """
        self._begin_round()
        with torch.no_grad(), self.sampling_context():
            self.episodes = [recorded.episode(group[0].index) for group in groups for recorded in group]
            samples = self.training_samples(self.episodes)
        return samples, self._statistics(samples)

    @torch.no_grad()
    def _begin_round(self) -> None:
        """Adapt the KL coefficient to the last round's KL (see `observe`), and refresh a moving reference when due."""
        if self.kl_controller is not None:
            self.kl_controller.adapt()
            every = self.kl_controller.penalty.refresh_every
            if self.reference is not None and every and self.started and self.started % every == 0:
                self.reference.refresh()
        self.started += 1

    def _statistics(self, samples: list[TrainingSample]) -> Sums:
        """Sum and count of each statistic on this rank; the loader divides them after adding those of all ranks."""
        sums = statistics(self.episodes, kl=self.token_functions.reference_logprobs is not None)
        if self.resample_groups:
            # How often a group was sampled again, on average: divided by the same number of groups, those of several
            # episodes, as the statistic zero_variance_groups.
            sums["resampled_groups"] = (float(self.resampled), sums["zero_variance_groups"][1])
        # These are numbers of all ranks, equal on each rank, so that their mean over ranks is the number itself.
        if self.kl_controller is not None:
            sums["kl_coefficient"] = (self.kl_controller.penalty.coefficient, 1)
        if self.advantage.needs_values:
            sums["explained_variance"] = (critic_explained_variance(samples), 1)
        return sums

    def _sample(
        self, prompts: Sequence[Prompt], round_index: int, group_size: int, producer: RolloutProducer | None
    ) -> list[Episode]:
        """Sample and reward the episodes of a round, in the order of the prompts."""
        if producer is None:
            self.sampler.sync(round_index)
            episodes = self._runner((round_index,)).run_groups(prompts, group_size, round_index)
        else:
            episodes = producer.take(round_index).episodes
        self._reward(episodes, running_normalization="update")
        self.resampled = 0
        if not self.resample_groups:
            return episodes
        with producer.paused() if producer else nullcontext():
            if producer:
                self.sampler.sync(round_index)
            return self._resample(episodes, prompts, round_index, group_size)

    def _resample(
        self, episodes: list[Episode], prompts: Sequence[Prompt], round_index: int, group_size: int
    ) -> list[Episode]:
        """Sample zero-variance groups again, at most `resample_groups` times, with the current weights.

        Relative to their group, equal rewards say nothing. DAPO (arXiv 2503.14476 sec. 3.2) does the same with other
        prompts.
        """
        for attempt in range(1, self.resample_groups + 1):
            zero_variance = zero_variance_groups(episodes)
            # All ranks take part in every attempt, because rewards may gather statistics over ranks.
            if not any(gather(bool(zero_variance))):
                break
            self.resampled += len(zero_variance)
            again = [prompt for prompt in prompts if prompt.index in zero_variance]
            found = self._runner((round_index, attempt)).run_groups(again, group_size, round_index)
            # Running statistics count each group once; otherwise groups sampled again would bias them.
            self._reward(found, running_normalization="use")
            replacements = iter(found)
            episodes = [next(replacements) if episode.group in zero_variance else episode for episode in episodes]
        return episodes

    def _runner(self, seed: Sequence[int], temperature: float | None = None) -> EpisodeRunner:
        seeds = (self.seed, *seed)
        return EpisodeRunner(self.sampler, self.renderer, seeds, self.environment, self.limits, temperature)

    def _reward(self, episodes: Sequence[Episode], running_normalization: str) -> None:
        """Reward episodes.

        Args:
            episodes: Episodes of this rank.
            running_normalization: What rewards with running normalization do: `update` their statistics with these
                rewards (all ranks must then call this together, even without episodes), `use` them unchanged, or `off`
                for rewards without normalization.
        """
        total_rewards(episodes, self.terms, self.truncated_reward, running_normalization)
        for episode in episodes:
            episode.masked = episode.failed or (self.mask_truncated and episode.truncated)

    def rollout(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed: Sequence[int],
        temperature: float | None = None,
    ) -> list[Episode]:
        """Sample and reward `group_size` episodes for each prompt outside of training, in order.

        Args:
            prompts: Prompts of this rank.
            group_size: Episodes per prompt.
            seed: Integers that distinguish these rollouts from others of the run.
            temperature: Replaces the sampler's temperature.

        Returns:
            `len(prompts) * group_size` episodes.
        """
        episodes = self._runner(seed, temperature).run_groups(prompts, group_size)
        self._reward(episodes, running_normalization="off")
        return episodes

    def training_samples(self, episodes: Sequence[Episode]) -> list[TrainingSample]:
        """Complete the training samples of rewarded episodes, and return those to train on.

        Computes the fields of `token_functions` and the advantages. All ranks must call this together.
        """
        self.fill(episodes, self.token_functions)
        completed = [episode for episode in episodes if not episode.failed]
        penalty = None if self.kl_controller is None else self.kl_controller.penalty
        compute_token_advantages(completed, self.advantage, penalty, self.sequence_level)
        for episode in episodes:
            for sample in episode.training_samples:
                sample.group = episode.group
        return _with_actions([episode for episode in episodes if not episode.masked])

    def fill(self, episodes: Sequence[Episode], functions: TokenFunctions) -> None:
        """Fill the fields of the training samples that the functions compute. All ranks must call this together.

        Args:
            episodes: Episodes of this rank.
            functions: The functions; a field without one is not changed.
        """
        samples = _with_actions(episodes)
        if functions.reference_logprobs is not None:
            for sample, numbers in self._computed(samples, functions.reference_logprobs):
                sample.reference_logprobs = numbers
        if functions.recomputed_logprobs is not None:
            for sample, numbers in self._computed(samples, functions.recomputed_logprobs):
                sample.recomputed_logprobs = numbers
        if functions.values is not None:
            for sample, numbers in self._computed(samples, functions.values):
                sample.values = numbers

    def _computed(
        self, samples: Sequence[TrainingSample], function: TokenFunction
    ) -> Iterator[tuple[TrainingSample, list[float]]]:
        """Each sample, in order, with what the function computes for its tokens."""
        device = next(self.sampler.model.parameters()).device
        ids, masks = [sample.ids for sample in samples], [sample.loss_mask for sample in samples]
        # Every rank gets equally many batches, since a function may be collective. An empty one has no indices but a
        # dummy row, hence not strict.
        for indices, tokens in padded_batches(ids, masks, CHUNK, device, range(len(samples)), even=True):
            numbers = function(tokens["input_ids"], tokens["loss_mask"]).float().tolist()
            for i, row in zip(indices, numbers, strict=bool(indices)):
                yield samples[i], row[: len(ids[i])]

    # -- between rounds -------------------------------------------------------------------------------------------

    def observe(self, round_means: Mapping[str, float]) -> None:
        """Note the KL of a round, to which `_begin_round` of the next round adapts the coefficient.

        `PolicyRLModule.on_train_batch_start` calls this with the first mini-batch of a round.

        Args:
            round_means: Means of the round's statistics, over all ranks.
        """
        if self.kl_controller is not None and "kl" in round_means:
            self.kl_controller.observe(round_means["kl"], round(round_means["episodes"]))

    @property
    def counters(self) -> "RoundCounters":
        """The part of the state that `collect` changes: the number of rounds started and the KL controller.

        If a signal interrupts `collect`, `checkpointing.last_step.LastStep` sets it back to its values before the
        round. A refreshed reference is not set back: the resumed run refreshes it again, from the same weights.
        """
        return {"started": self.started, "kl": self.kl_controller.state_dict() if self.kl_controller else None}

    @counters.setter
    def counters(self, counters: "RoundCounters") -> None:
        self.started = counters["started"]
        if self.kl_controller is not None and counters["kl"] is not None:
            self.kl_controller.load_state_dict(counters["kl"])

    def state_dict(self) -> "CollectorState":
        """State of the KL controller and of a moving reference."""
        moves = self.kl_controller is not None and self.kl_controller.penalty.refresh_every is not None
        return {
            **self.counters,
            "reference": self.reference.weights() if moves and self.reference is not None else None,
        }

    def load_state_dict(self, state: "CollectorState") -> None:
        """Restore a `state_dict`."""
        self.counters = {"started": state["started"], "kl": state["kl"]}
        if self.reference is not None and state["reference"]:
            self.reference.load_weights(state["reference"])


class RoundCounters(TypedDict):
    """The part of a collector's state that `collect` changes; see `RolloutCollector.counters`."""

    started: int
    """Number of rounds started."""
    kl: KLState | None


class CollectorState(RoundCounters):
    """State of a `RolloutCollector` in a checkpoint."""

    reference: dict[str, Tensor] | None
    """Weights of a moving reference."""


def _staleness(samples: Sequence[TrainingSample], round_index: int) -> Sums:
    """Mean and, over all ranks, maximum age in rounds of the weights that sampled these samples."""
    ages = [round_index - sample.policy_version for sample in samples if sample.policy_version is not None]
    # `means` divides the sum over ranks by their number.
    return {"staleness": (float(sum(ages)), len(ages)), "staleness_max": (float(max(gather(max(ages, default=0)))), 1)}


def _with_actions(episodes: Sequence[Episode]) -> list[TrainingSample]:
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
        One `Answer` per prompt.
    """
    episodes = EpisodeRunner(sampler, renderer, (seed, 0)).run([(prompt, 0) for prompt in prompts])
    return [episode.answer() for episode in episodes]
