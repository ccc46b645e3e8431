"""Stops the training of a policy that has collapsed."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from rlhf_lightning.diagnostics.check import Check
from rlhf_lightning.diagnostics.kl import HighKL
from rlhf_lightning.diagnostics.numbers import NotFinite
from rlhf_lightning.diagnostics.responses import EntropyCollapse
from rlhf_lightning.diagnostics.reward import RewardCollapse
from rlhf_lightning.diagnostics.round_callback import RoundCallback
from rlhf_lightning.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule
    from rlhf_lightning.types import JSON, StateDict

log = logging.getLogger(__name__)


class StopOnCollapse(RoundCallback):
    """Stops training when reward, entropy or KL have shown for several rounds that the policy has collapsed.

    The stage then counts as finished. The model that `--export` names is exported (with `best`, the best checkpoint),
    and `stage.json` has `stopped` with the step and the reason, and `stopped_on_collapse: 1` among its metrics.
    `trainer.min_steps` and `min_epochs` take precedence, as for every early stop of Lightning. A reward, loss, KL or
    entropy that is not finite raises an error immediately, and nothing is exported, because the weights may be
    unusable.

    Args:
        reward_lost: Fraction of the reward's gain since the first 10 rounds that must be lost; None to ignore the
            reward.
        entropy_fraction: Fraction of the mean entropy of the first 5 rounds that the entropy must fall to; None to
            ignore the entropy.
        kl_limit: KL that must be reached, in nats per episode; None to ignore the KL.
        patience: Number of consecutive rounds in which a check must fail.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> len(StopOnCollapse(kl_limit=None).checks)
        2
    """

    def __init__(
        self,
        reward_lost: float | None = 0.8,
        entropy_fraction: float | None = 0.05,
        kl_limit: float | None = 200.0,
        patience: int = 3,
    ) -> None:
        super().__init__()
        if patience < 1:
            raise ConfigError(f"StopOnCollapse.patience is {patience}; it must be at least 1 round")
        self.patience = patience
        self.checks: list[Check] = []
        if reward_lost is not None:
            self.checks.append(RewardCollapse(reward_lost))
        if entropy_fraction is not None:
            self.checks.append(EntropyCollapse(entropy_fraction))
        if kl_limit is not None:
            self.checks.append(HighKL(kl_limit))
        self._finite = NotFinite()
        self._streaks: dict[str, int] = {}
        self.stopped: dict[str, JSON] | None = None
        """The step and the reason; None unless training was stopped."""

    @property
    def watched(self) -> Iterable[str]:
        """Names of all curves that the checks read."""
        return sorted({name for check in [self._finite, *self.checks] for name in check.watched})

    def reset(self) -> None:
        super().reset()
        self._streaks = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.should_stop:  # a resumed run that was stopped has nothing left to do
            self.stopped = None

    def round_ended(self, trainer: pl.Trainer, pl_module: "PolicyRLModule") -> None:
        if not_finite := self._finite(self.curves):
            raise UserError(f"step {trainer.global_step}: stopped, {not_finite}")
        for check in self.checks:
            fails = (check.severity(self.curves) or 0.0) >= 1
            self._streaks[check.name] = self._streaks.get(check.name, 0) + 1 if fails else 0
            if self._streaks[check.name] >= self.patience and self.stopped is None:
                self._stop(trainer, pl_module, check)

    def _stop(self, trainer: pl.Trainer, pl_module: "PolicyRLModule", check: Check) -> None:
        self.stopped = {"step": trainer.global_step, "reason": check.message(self.curves)}
        trainer.should_stop = True
        pl_module.log("stopped_on_collapse", 1.0, on_step=True, on_epoch=False)
        if trainer.is_global_zero:
            log.warning("step %d: stopping training, %s", trainer.global_step, self.stopped["reason"])

    def state_dict(self) -> "StateDict":
        return {**super().state_dict(), "streaks": dict(self._streaks), "stopped": self.stopped}

    def load_state_dict(self, state_dict: "StateDict") -> None:
        super().load_state_dict(state_dict)
        self._streaks = dict(state_dict["streaks"])
        self.stopped = state_dict.get("stopped")
