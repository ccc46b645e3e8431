"""The numbers that describe a round of episodes, exact over ranks."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.objectives.kl import k1
from rlhf_lightning.rollout.episodes import Episode, Segment

Sums = dict[str, tuple[float, int]]
"""For each number of a round: its sum over episodes, and over how many."""


def statistics(episodes: Sequence[Episode], kl: bool = False) -> Sums:
    """Sums and counts over episodes: reward and its parts, length, truncation, KL (nats a response), …"""
    columns: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, flag in episode.counted().items():
            columns[name].append(flag)
        if episode.failed:
            continue
        columns["reward"].append(episode.reward)
        columns["response_tokens"].append(episode.response_tokens)
        columns["truncated"].append(episode.truncated)
        columns["turns"].append(sum(message["role"] == "assistant" for message in episode.responses))
        for name, value in episode.parts.items():
            if value is not None:
                columns[f"reward_{name}"].append(value)
        for name, value in episode.details.items():
            columns[f"reward_{name}"].append(value)
        for name, value in episode.metrics.items():
            columns[f"env_{name}"].append(value)
        if kl:
            columns["kl"].append(episode_kl(episode))
    dull = groups_without_signal(episodes)
    columns["zero_signal_groups"] = [float(group in dull) for group in {episode.group for episode in episodes}]
    return {name: (float(sum(values)), len(values)) for name, values in columns.items()}


def episode_kl(episode: Episode) -> float:
    """k1 of all that the policy drew, in nats; 0 where no reference has scored it."""
    return sum(_sequence_kl(segment) for segment in episode.segments)


def _sequence_kl(segment: Segment) -> float:
    if not segment.reference_logprobs:
        return 0.0
    drawn: Tensor = torch.tensor(segment.mask, dtype=torch.float64)
    difference = k1(torch.tensor(segment.logprobs), torch.tensor(segment.reference_logprobs))
    return float((difference * drawn).sum())


def groups_without_signal(episodes: Sequence[Episode]) -> set[int]:
    """The groups whose rewards are all equal: they teach nothing."""
    rewards: dict[int, set[float]] = defaultdict(set)
    for episode in (episode for episode in episodes if not episode.failed):
        rewards[episode.group].add(episode.reward)
    return {group for group, values in rewards.items() if len(values) == 1}


def means(parts: Sequence[Sums]) -> dict[str, float]:
    """The means over the episodes of all ranks."""
    names = sorted({name for part in parts for name in part})
    found = {name: [part[name] for part in parts if name in part] for name in names}
    totals = {name: (sum(total for total, _ in sums), sum(n for _, n in sums)) for name, sums in found.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}
