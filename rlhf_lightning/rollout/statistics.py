"""Statistics of a round of episodes, exact over ranks."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.objectives.kl import k1
from rlhf_lightning.types import Episode, TrainingSample

Sums = dict[str, tuple[float, int]]
"""For each statistic of a round: the sum of its values on a rank, and their number (of episodes, groups or n-grams)."""

NGRAM = 4
# Moments of length and reward, from which `means` computes their correlation. "~" marks names that are not logged.
LENGTH, REWARD, LENGTH2, REWARD2, PRODUCT = "~length", "~reward", "~length²", "~reward²", "~length·reward"


def statistics(episodes: Sequence[Episode], kl: bool = False) -> Sums:
    """Sum and count of each statistic over the episodes of this rank.

    Covers the reward and its terms, length, truncation, turns, the environment's metrics, zero-variance groups and
    repeated n-grams.

    Args:
        episodes: Episodes of this rank.
        kl: Include the KL from the reference, in nats per episode.

    Returns:
        Sums and counts by the names that are logged, and those of `_moments`; `means` divides them.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, flag in episode.end_indicators().items():
            columns[name].append(flag)
        if episode.failed:
            continue
        columns["reward"].append(episode.reward)
        columns["response_tokens"].append(episode.response_tokens)
        columns["truncated"].append(episode.truncated)
        columns["turns"].append(sum(message["role"] == "assistant" for message in episode.responses))
        for name, value in episode.terms.items():
            if value is not None:
                columns[f"reward_{name}"].append(value)
        for name, value in episode.details.items():
            columns[f"reward_{name}"].append(value)
        for name, value in episode.metrics.items():
            columns[f"env_{name}"].append(value)
        if kl:
            columns["kl"].append(episode_kl(episode))
        for name, value in _moments(float(episode.response_tokens), episode.reward).items():
            columns[name].append(value)
    zero_variance = zero_variance_groups(episodes)
    # Groups with a single episode are not counted: their rewards are equal by definition.
    sizes = Counter(episode.group for episode in episodes)
    columns["zero_variance_groups"] = [float(group in zero_variance) for group, size in sizes.items() if size > 1]
    repeats = [repeated_ngrams(episode) for episode in episodes]
    return {
        **{name: (float(sum(values)), len(values)) for name, values in columns.items()},
        "repeated_ngrams": (float(sum(repeated for repeated, _ in repeats)), sum(count for _, count in repeats)),
    }


def episode_kl(episode: Episode) -> float:
    """KL estimate k1, summed over the sampled tokens, in nats; 0 without reference log-probabilities."""
    return sum(_training_sample_kl(training_sample) for training_sample in episode.training_samples)


def _training_sample_kl(training_sample: TrainingSample) -> float:
    """`episode_kl` of one training sample."""
    if not training_sample.reference_logprobs:
        return 0.0
    sampled: Tensor = torch.tensor(training_sample.loss_mask, dtype=torch.float64)
    difference = k1(torch.tensor(training_sample.old_logprobs), torch.tensor(training_sample.reference_logprobs))
    return float((difference * sampled).sum())


def repeated_ngrams(episode: Episode, n: int = NGRAM) -> tuple[int, int]:
    """Count the n-grams of sampled tokens that repeat an earlier one of the episode.

    repeated / all = 1 - distinct / all is seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood
    Training" (arXiv 1908.04319).

    Args:
        episode: The episode.
        n: Length of an n-gram.

    Returns:
        The number of repeated n-grams, and of all n-grams.
    """
    seen: set[tuple[int, ...]] = set()
    count = 0
    for training_sample in episode.training_samples:
        sampled: list[int] = []
        for token, flag in zip(training_sample.ids, training_sample.loss_mask, strict=True):
            # No n-gram spans the environment's messages between two turns.
            sampled = [*sampled[1 - n :], token] if flag else []
            if len(sampled) == n:
                count += 1
                seen.add(tuple(sampled))
    return count - len(seen), count


def _moments(length: float, reward: float) -> dict[str, float]:
    """An episode's contribution to the moments of which `means` makes the correlation of length and reward."""
    return {
        LENGTH: length,
        REWARD: reward,
        LENGTH2: length * length,
        REWARD2: reward * reward,
        PRODUCT: length * reward,
    }


def zero_variance_groups(episodes: Sequence[Episode]) -> set[int]:
    """Indices of the groups in which all rewards are equal, so that relative to the group they say nothing.

    Failed episodes are left out, and a group with one other episode counts as equal.
    """
    rewards: dict[int, set[float]] = defaultdict(set)
    for episode in (episode for episode in episodes if not episode.failed):
        rewards[episode.group].add(episode.reward)
    return {group for group, values in rewards.items() if len(values) == 1}


def means(sums_of_ranks: Sequence[Sums]) -> dict[str, float]:
    """Means of a round's statistics over all ranks.

    Args:
        sums_of_ranks: The sums of each rank, as `statistics` returns them.

    Returns:
        The means by name, the number of `episodes`, and `length_reward_correlation` if length and reward vary.
    """
    names = sorted({name for sums in sums_of_ranks for name in sums})
    by_name = {name: [sums[name] for sums in sums_of_ranks if name in sums] for name in names}
    totals = {name: (sum(total for total, _ in sums), sum(n for _, n in sums)) for name, sums in by_name.items()}
    averages = {name: total / count for name, (total, count) in totals.items() if count}
    result = {name: value for name, value in averages.items() if not name.startswith("~")}
    if "reward" in totals:
        result["episodes"] = totals["reward"][1]
    correlation = _correlation(averages) if LENGTH in averages else None
    return result if correlation is None else {**result, "length_reward_correlation": correlation}


def _correlation(mean: dict[str, float]) -> float | None:
    """Pearson's r of length and reward from their moments; None if one of them is constant within rounding error."""
    length_variance = mean[LENGTH2] - mean[LENGTH] ** 2
    reward_variance = mean[REWARD2] - mean[REWARD] ** 2
    if length_variance <= 1e-12 * mean[LENGTH2] or reward_variance <= 1e-12 * mean[REWARD2]:
        return None
    covariance = mean[PRODUCT] - mean[LENGTH] * mean[REWARD]
    return max(-1.0, min(1.0, covariance / math.sqrt(length_variance * reward_variance)))
