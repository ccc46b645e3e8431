"""Base class of callbacks that run after each round of policy RL."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rlhf_lightning.diagnostics.curves import Curves
from rlhf_lightning.modules.policy_metrics import LARGEST, NUMBERS
from rlhf_lightning.modules.policy_rl import PolicyRLModule

if TYPE_CHECKING:
    from rlhf_lightning.types import RolloutBatch, StateDict


class RoundSums(TypedDict):
    """Metrics of an unfinished round."""

    statistics: dict[str, float]
    sums: dict[str, tuple[float, float]]
    """For each of `NUMBERS`: its sum over the sampled tokens, and their number."""
    largest: dict[str, float]


class RoundCallback(pl.Callback):
    """Collects the metrics of each round, and calls `round_ended` after the last mini-batch of the round.

    The metrics are the statistics of the round, and the metrics that the module logs for each optimizer step, as an
    average over the round's sampled tokens or as a maximum. They cover all ranks and are equal on every rank. The state
    includes an unfinished round, so that a checkpoint can be written within a round.

    Example:
        >>> class PrintReward(RoundCallback):
        ...     watched = ("reward",)
        ...     def round_ended(self, trainer, pl_module):
        ...         print(self.curves.level("reward", 1))
        >>> callback = PrintReward()
    """

    def __init__(self) -> None:
        self.curves = Curves()
        self._round: RoundSums | None = None
        self._resumed = False

    @property
    @abstractmethod
    def watched(self) -> Iterable[str]:
        """Names of the metrics whose curves are recorded."""

    @abstractmethod
    def round_ended(self, trainer: pl.Trainer, pl_module: PolicyRLModule) -> None:
        """Called on all ranks after a round; `curves` includes the round.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """

    def state_dict(self) -> "StateDict":
        return {"round": self._round, "curves": self.curves.state}

    def load_state_dict(self, state_dict: "StateDict") -> None:
        self._round = state_dict["round"] or None
        self.curves.load(state_dict["curves"])
        self._resumed = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._resumed and not trainer.global_step:
            self.reset()
        self._resumed = False

    def reset(self) -> None:
        """Discard the rounds of an earlier `fit`."""
        self._round = None
        self.curves.clear()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: "RolloutBatch",
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, PolicyRLModule) or "statistics" not in batch:
            return  # not a batch of the rollout loader
        if batch["statistics"] is not None:
            self._round = {"statistics": dict(batch["statistics"]), "sums": {}, "largest": {}}
        if self._round is None:
            return  # resumed within a round, from a checkpoint without this callback
        if not trainer.fit_loop._should_accumulate():
            _add(self._round, trainer, batch)
        if (batch_idx + 1) % pl_module.rollouts.per_round == 0:
            means = {name: total / weight for name, (total, weight) in self._round["sums"].items()}
            self.curves.record({**self._round["statistics"], **means, **self._round["largest"]}, self.watched)
            self._round = None
            self.round_ended(trainer, pl_module)


def _add(sums: RoundSums, trainer: pl.Trainer, batch: "RolloutBatch") -> None:
    """Add the logged metrics of an optimizer step."""
    tokens = batch["denominators"]["tokens"]
    if not tokens:
        return  # nothing was trained, so the logged metrics are those of an earlier step
    logged = trainer.callback_metrics
    names = [name for name in (*NUMBERS, *LARGEST) if f"train/{name}" in logged]
    for name in names if batch.get("first") else [name for name in names if name != "logprob_gap"]:
        value = float(logged[f"train/{name}"])
        if name in LARGEST:
            sums["largest"][name] = max(sums["largest"].get(name, value), value)
        else:
            total, weight = sums["sums"].get(name, (0.0, 0.0))
            sums["sums"][name] = (total + tokens * value, weight + tokens)
