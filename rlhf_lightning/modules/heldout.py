"""What a policy earns on prompts that it is not trained on."""

from collections.abc import Iterator, Sequence

from torch import nn
from torchmetrics import MeanMetric, Metric

from rlhf_lightning.rollout.statistics import episode_kl
from rlhf_lightning.types import Episode


class HeldOut(nn.Module):
    """Means over prompts, exact over ranks: reward of the greedy and of a sampled answer, its length, truncation, KL."""

    def __init__(self) -> None:
        super().__init__()
        self.reward_greedy, self.reward_sampled = MeanMetric(), MeanMetric()
        self.response_tokens, self.truncated, self.kl = MeanMetric(), MeanMetric(), MeanMetric()

    def add(self, greedy: Sequence[Episode], sampled_episodes: Sequence[Episode]) -> None:
        """Take the episodes of a batch of prompts."""
        for episode in (episode for episode in greedy if not episode.failed):
            self.reward_greedy.update(episode.reward)
        for episode in (episode for episode in sampled_episodes if not episode.failed):
            self.reward_sampled.update(episode.reward)
            self.response_tokens.update(float(episode.response_tokens))
            self.truncated.update(float(episode.truncated))
            self.kl.update(episode_kl(episode))

    def logged(self, kl: bool) -> Iterator[tuple[str, Metric]]:
        """Names and metrics; `kl` (nats a response) where there is a reference."""
        for name, metric in self.named_children():
            if isinstance(metric, Metric) and (kl or name != "kl"):
                yield name, metric
