"""Metrics of the quickstart's models on held-out prompts."""

from collections.abc import Callable, Sequence

from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.types import Episode, Row

Gold = Callable[[str, Row], float]


def figures(
    episodes: Sequence[Episode], judge: RewardModel, kl: float | None, gold: Gold | None
) -> dict[str, float | None]:
    """The row of the final table for one model.

    Args:
        episodes: Its responses.
        judge: The trained preference model.
        kl: KL from the SFT model in nats per response, if measured.
        gold: The gold reward of a response and its data row, if there is one.
    """
    rewards = [gold(episode.response, episode.row) for episode in episodes] if gold else []
    # Scores the sampled tokens, not their text, so that empty and truncated answers have a score too.
    training_samples = [episode.training_samples[-1] for episode in episodes]
    scores = judge.score_tokens(
        [training_sample.ids for training_sample in training_samples],
        [training_sample.loss_mask for training_sample in training_samples],
    )
    return {
        "gold_reward": sum(rewards) / len(rewards) if gold else None,
        "reward_model_score": float(scores.mean()),
        "kl": kl,
        "response_tokens": sum(episode.response_tokens for episode in episodes) / len(episodes),
        "truncated_fraction": sum(episode.truncated for episode in episodes) / len(episodes),
    }
