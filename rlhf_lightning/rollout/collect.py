"""One round: from prompts to rows with advantages, and the numbers that describe it."""

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_lightning.data.batching import pad_right, pad_tokens
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.rollout.advantages import Advantage
from rlhf_lightning.rollout.environments import EnvironmentFactory, Limits
from rlhf_lightning.rollout.episodes import Episode, Segment
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.rewards import Reward, total_rewards
from rlhf_lightning.rollout.runner import run_episodes
from rlhf_lightning.rollout.sampler import Sampler
from rlhf_lightning.rollout.statistics import Sums, statistics


class Collector:
    """Plays episodes, rewards them, and turns them into rows.

    Args:
        sampler, renderer, rewards, advantage, kl, reference, environment: the parts, as `PolicyRLModule` names them.
        seed: of every draw. limits, truncated_reward, mask_truncated: see `PolicyRLModule`.
    """

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        rewards: Sequence[Reward],
        advantage: Advantage,
        seed: int,
        kl: KLPenalty | None = None,
        reference: Reference | None = None,
        environment: EnvironmentFactory | None = None,
        limits: Limits | None = None,
        truncated_reward: float | None = None,
        mask_truncated: bool = False,
    ) -> None:
        self.sampler, self.renderer, self.rewards, self.advantage = sampler, renderer, rewards, advantage
        self.kl, self.reference, self.environment = kl, reference, environment
        self.seed, self.limits = seed, limits or Limits()
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated

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

    def rows(self, episodes: Sequence[Episode]) -> list[Segment]:
        """The rows of episodes, with reference log-probabilities and per-token advantages."""
        self._advantages(episodes)
        trained = [episode for episode in episodes if not episode.masked]
        segments = [segment for episode in trained for segment in episode.segments if segment.actions]
        if self.reference is not None:
            self._reference_logprobs(segments)
        if self.kl is not None and self.kl.place == "reward" and segments:
            self._fold_kl(segments)
        return segments

    def _advantages(self, episodes: Sequence[Episode]) -> None:
        scored = [episode for episode in episodes if episode.advantage is None and not episode.failed]
        if scored:
            rewards = torch.tensor([episode.reward for episode in scored], dtype=torch.float64)
            groups = torch.tensor([episode.group for episode in scored])
            for episode, value in zip(scored, self.advantage(rewards, groups).tolist(), strict=True):
                episode.advantage = value
        for episode in episodes:
            for segment in episode.segments:
                segment.group = episode.group
                segment.advantages = [(episode.advantage or 0.0) * flag for flag in segment.mask]

    def _reference_logprobs(self, segments: list[Segment], batch_size: int = 256) -> None:
        assert self.reference is not None
        device = next(self.sampler.model.parameters()).device
        for start in range(0, len(segments), batch_size):
            part = segments[start : start + batch_size]
            batch = pad_tokens([row.ids for row in part], [row.mask for row in part], pad_id=0)
            logprobs = self.reference.logprobs(
                batch["input_ids"].to(device), batch["mask"].to(device), self.sampler.temperature
            )
            for row, values in zip(part, logprobs.float().tolist(), strict=True):
                row.reference_logprobs = values[: len(row.ids)]

    def _fold_kl(self, segments: list[Segment]) -> None:
        assert self.kl is not None
        mask = pad_right([row.mask for row in segments], 0, torch.float64)
        added = self.kl.fold(
            pad_right([row.logprobs for row in segments], 0, torch.float64),
            pad_right([row.reference_logprobs for row in segments], 0, torch.float64),
            mask,
        )
        for row, values in zip(segments, added.tolist(), strict=True):
            row.advantages = [a + b for a, b in zip(row.advantages, values, strict=False)]

    def statistics(self, episodes: Sequence[Episode]) -> Sums:
        """See `rollout.statistics`."""
        return statistics(episodes, kl=self.reference is not None)


def answers(sampler: Sampler, renderer: Renderer, prompts: Sequence[Prompt], seed: int) -> list[dict[str, Any]]:
    """A response to each prompt, for `predict`: prompt, response, stop reason, tokens."""
    episodes = run_episodes([(prompt, 0) for prompt in prompts], sampler, renderer, (seed, 0))
    keys = ("prompt", "response", "stop_reason", "response_tokens")
    return [{"index": episode.group, **{key: episode.record()[key] for key in keys}} for episode in episodes]
