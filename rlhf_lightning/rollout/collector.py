"""Rounds: what happens between two sets of mini-batches, and what of it a checkpoint has to keep."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.rollout.collect import Collector
from rlhf_lightning.rollout.credit import critic_quality
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.policy_snapshot import PolicySnapshot
from rlhf_lightning.rollout.recorded import Recorded
from rlhf_lightning.rollout.statistics import Sums
from rlhf_lightning.types import Episode, TrainingSample


class Rounds:
    """Makes the rows of a round, from prompts or from recorded episodes.

    Args:
        collector: plays and scores episodes.
        context: in which models run, that of training.
        kl, reference: moved between rounds, where they are adaptive.
        snapshot: the weights to sample with, where they are a round old.
    """

    def __init__(
        self,
        collector: Collector,
        context: Callable[[], AbstractContextManager[Any]],
        kl: KLPenalty | None = None,
        reference: Reference | None = None,
        snapshot: PolicySnapshot | None = None,
    ) -> None:
        self.collector, self.context = collector, context
        self.kl, self.reference, self.snapshot = kl, reference, snapshot
        self.group_size, self.recorded = 1, False
        self.played = 0
        """How many rounds have begun; their numbers, which seeds are made of, may leave some out."""
        self.episodes: list[Episode] = []
        """Of the last round, on this rank."""

    @torch.no_grad()
    def collect(
        self, items: Sequence[Prompt] | Sequence[list[Recorded]], number: int
    ) -> tuple[list[TrainingSample], Sums]:
        """The rows of round `number`, and its statistics. All ranks call it together."""
        self._move_reference()
        self.played += 1
        with self.context():
            self.episodes = self._episodes(items, number)
            rows = self.collector.rows(self.episodes)
        sums = self.collector.statistics(self.episodes)
        if self.kl is not None:
            sums["kl_coefficient"] = (self.kl.coefficient, 1)
        if self.collector.advantage.needs_values:
            sums["explained_variance"] = (critic_quality(rows), 1)
        return rows, sums

    def _episodes(self, items: Any, number: int) -> list[Episode]:
        if self.recorded:
            return [one.episode(group[0].index) for group in items for one in group]
        with self.snapshot.stale() if self.snapshot else nullcontext():
            self.collector.sampler.sync(number)
            return self.collector.round(items, self.group_size, number)

    def _move_reference(self) -> None:
        if self.kl is None or self.reference is None:
            return
        self.kl.adapt()
        if self.kl.refresh_every and self.played and self.played % self.kl.refresh_every == 0:
            self.reference.refresh()

    def observe(self, statistics: Mapping[str, float]) -> None:
        """Take the numbers of a round, over all ranks: an adaptive KL coefficient goes by them."""
        if self.kl is not None and "kl" in statistics:
            self.kl.observe(statistics["kl"], round(statistics["episodes"]))

    @property
    def counters(self) -> dict[str, Any]:
        """What a round changes before the weights do; a reference that is due to move moves again."""
        return {"played": self.played, "kl": self.kl.state_dict() if self.kl else None}

    @counters.setter
    def counters(self, found: Mapping[str, Any]) -> None:
        self.played = found["played"]
        if self.kl is not None:
            self.kl.load_state_dict(found["kl"])

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient, a reference that moves, the weights to sample with."""
        moves = self.kl is not None and self.kl.refresh_every and self.reference is not None
        return {
            "played": self.played,
            "kl": self.kl.state_dict() if self.kl else None,
            "reference": self.reference.weights() if moves and self.reference else None,
            "snapshot": self.snapshot.state_dict() if self.snapshot else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.played = state["played"]
        if self.kl is not None and state["kl"]:
            self.kl.load_state_dict(state["kl"])
        if self.reference is not None and state["reference"]:
            self.reference.load_weights(state["reference"])
        if self.snapshot is not None:
            self.snapshot.load_state_dict(state["snapshot"])
