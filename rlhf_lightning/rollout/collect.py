"""One round: from prompts to rows with advantages, and the numbers that describe it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import even_chunks, gather
from rlhf_lightning.environments.base import EnvironmentFactory, Limits
from rlhf_lightning.rewards import Reward, total_rewards
from rlhf_lightning.rollout.advantages import Advantage
from rlhf_lightning.rollout.credit import compute_token_advantages
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.runner import run_episodes
from rlhf_lightning.rollout.statistics import Sums, statistics, zero_variance_groups
from rlhf_lightning.safe_points import safe_point
from rlhf_lightning.sampling.sampler import Sampler
from rlhf_lightning.types import Episode, TrainingSample

RowScorer = Callable[[Tensor, Tensor], Tensor]
"""From `input_ids` and `loss_mask`, `[B, T]`, to a number for each token, `[B, T]`."""


class Collector:
    """Plays episodes, rewards them, and turns them into rows.

    Args:
        sampler, renderer, rewards, advantage, kl, environment: the parts, as `PolicyRLModule` names them.
        row_scorers: what else is computed for the rows of a round, by the name of its column in `TrainingSample`.
        seed: of every sample. limits, truncated_reward, mask_truncated, resample: see `PolicyRLModule`.
        sequence_level: of the objective, see `PolicyObjective`.
    """

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        rewards: Sequence[Reward],
        advantage: Advantage,
        seed: int,
        kl: KLPenalty | None = None,
        row_scorers: Mapping[str, RowScorer] | None = None,
        environment: EnvironmentFactory | None = None,
        limits: Limits | None = None,
        truncated_reward: float | None = None,
        mask_truncated: bool = False,
        resample: int = 0,
        sequence_level: bool = False,
    ) -> None:
        self.sampler, self.renderer, self.rewards, self.advantage = sampler, renderer, rewards, advantage
        self.kl, self.row_scorers, self.environment = kl, dict(row_scorers or {}), environment
        self.seed, self.limits, self.resample = seed, limits or Limits(), resample
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated
        self.resampled, self.sequence_level = 0, sequence_level

    def round(self, prompts: Sequence[Prompt], group_size: int, number: int) -> list[Episode]:
        """The episodes of a round, `group_size` for each prompt, in order.

        A group whose rewards are all equal teaches nothing: it is sampled again, `resample` times at most (DAPO's dynamic
        sampling, arXiv 2503.14476 sec. 3.2, with the same prompts). All ranks call it together.
        """
        episodes = self.play(prompts, group_size, (number,), running="update")
        self.resampled = 0
        for attempt in range(1, self.resample + 1):
            zero_variance = zero_variance_groups(episodes)
            # Asked of all: what a reward keeps over ranks must be told of every attempt by all of them.
            if not any(gather(bool(zero_variance))):
                break
            self.resampled += len(zero_variance)
            zero_variance_prompts = [prompt for prompt in prompts if prompt.index in zero_variance]
            # Running statistics take a round in once: else they would lean to what is sampled again.
            again = self.play(zero_variance_prompts, group_size, (number, attempt), running="use")
            fresh = iter(again)
            episodes = [next(fresh) if episode.group in zero_variance else episode for episode in episodes]
        return episodes

    def play(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        seed: Sequence[int],
        temperature: float | None = None,
        running: str = "off",
    ) -> list[Episode]:
        """Rewarded episodes, `group_size` for each prompt, in order.

        Args:
            running: what rewards with running statistics do, see `total_rewards`. With `update` all ranks must call
                this together, whether they have prompts or not.
        """
        tasks = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        episodes = run_episodes(
            tasks, self.sampler, self.renderer, (self.seed, *seed), self.environment, self.limits, temperature
        )
        total_rewards(episodes, self.rewards, self.truncated_reward, running)
        for episode in episodes:
            episode.masked = episode.failed or (self.mask_truncated and episode.truncated)
        return episodes

    def rows(self, episodes: Sequence[Episode]) -> list[TrainingSample]:
        """The rows of episodes, with what is scored of them and per-token advantages. All ranks call it together."""
        self.score(episodes, self.row_scorers)
        compute_token_advantages(
            [episode for episode in episodes if not episode.failed], self.advantage, self.kl, self.sequence_level
        )
        for episode in episodes:
            for training_sample in episode.training_samples:
                training_sample.group = episode.group
        trained = [episode for episode in episodes if not episode.masked]
        return [
            training_sample
            for episode in trained
            for training_sample in episode.training_samples
            if training_sample.actions
        ]

    def score(self, episodes: Sequence[Episode], names: Iterable[str]) -> list[TrainingSample]:
        """The rows of episodes in which something was sampled, with these columns filled in."""
        training_samples = [
            training_sample
            for episode in episodes
            for training_sample in episode.training_samples
            if training_sample.actions
        ]
        for name in names:
            self._fill(training_samples, name)
        return training_samples

    def _fill(self, training_samples: list[TrainingSample], name: str, batch_size: int = 256) -> None:
        scorer = self.row_scorers[name]
        device = next(self.sampler.model.parameters()).device
        for part in even_chunks(training_samples, batch_size):
            safe_point()
            ids, masks = ([row.ids for row in part], [row.loss_mask for row in part]) if part else ([[0, 0]], [[0, 0]])
            batch = pad_tokens(ids, masks, pad_id=0)
            numbers = scorer(batch["input_ids"].to(device), batch["loss_mask"].to(device)).float().tolist()
            for row, values in zip(part, numbers, strict=bool(part)):
                setattr(row, name, values[: len(row.ids)])

    def statistics(self, episodes: Sequence[Episode]) -> Sums:
        """See `rollout.statistics`."""
        sums = statistics(episodes, kl="reference_logprobs" in self.row_scorers)
        if self.resample:
            sums["resampled_groups"] = (float(self.resampled), sums["zero_variance_groups"][1])
        return sums


def answers(sampler: Sampler, renderer: Renderer, prompts: Sequence[Prompt], seed: int) -> list[dict[str, Any]]:
    """A response to each prompt, for `predict`: prompt, response, stop reason, tokens."""
    episodes = run_episodes([(prompt, 0) for prompt in prompts], sampler, renderer, (seed, 0))
    keys = ("prompt", "response", "stop_reason", "response_tokens")
    return [{"index": episode.group, **{key: episode.record()[key] for key in keys}} for episode in episodes]
