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
            columns["kl"].append(sum(_sequence_kl(segment) for segment in episode.segments))
    columns["zero_signal_groups"] = _zero_signal(episodes)
    return {name: (float(sum(values)), len(values)) for name, values in columns.items()}


def _sequence_kl(segment: Segment) -> float:
    if not segment.reference_logprobs:
        return 0.0
    drawn: Tensor = torch.tensor(segment.mask, dtype=torch.float64)
    difference = k1(torch.tensor(segment.logprobs), torch.tensor(segment.reference_logprobs))
    return float((difference * drawn).sum())


def _zero_signal(episodes: Sequence[Episode]) -> list[float]:
    """For each group whether all its rewards are equal: then it teaches nothing."""
    groups: dict[int, set[float]] = defaultdict(set)
    for episode in episodes:
        if not episode.failed:
            groups[episode.group].add(episode.reward)
    return [float(len(rewards) == 1) for rewards in groups.values()]


def means(parts: Sequence[Sums]) -> dict[str, float]:
    """The means over the episodes of all ranks."""
    names = sorted({name for part in parts for name in part})
    found = {name: [part[name] for part in parts if name in part] for name in names}
    totals = {name: (sum(total for total, _ in sums), sum(n for _, n in sums)) for name, sums in found.items()}
    return {name: total / count for name, (total, count) in totals.items() if count}
