"""Warnings when the curves of policy RL show a known failure."""

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from rlhf_lightning.checkpointing.jsonl import JsonLines
from rlhf_lightning.diagnostics.check import Check
from rlhf_lightning.diagnostics.critic import UselessCritic
from rlhf_lightning.diagnostics.kl import GrowingKL, HighKL, NegativeKL
from rlhf_lightning.diagnostics.numbers import NotFinite
from rlhf_lightning.diagnostics.ratios import ClampedRatios, Clipping, LogprobGap, WildRatios
from rlhf_lightning.diagnostics.responses import (
    EntropyCollapse,
    LengthCollapse,
    LengthHacking,
    RepeatedText,
    Truncation,
)
from rlhf_lightning.diagnostics.reward import NoSignal, OverOptimized, RewardCollapse
from rlhf_lightning.diagnostics.round_callback import RoundCallback
from rlhf_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule
    from rlhf_lightning.types import JSON, StateDict

log = logging.getLogger(__name__)
DEFAULT = (
    NotFinite,
    HighKL,
    GrowingKL,
    NegativeKL,
    OverOptimized,
    RewardCollapse,
    LengthHacking,
    LengthCollapse,
    NoSignal,
    EntropyCollapse,
    RepeatedText,
    Truncation,
    LogprobGap,
    WildRatios,
    ClampedRatios,
    Clipping,
    UselessCritic,
)
RECOVERED = 0.8


class Diagnostics(RoundCallback):
    """Checks the curves after each round, and warns once about each failure, and again if it recurs after it was over.

    A warning is logged, and written with its step and numbers to `warnings.jsonl` in the stage's folder. A check warns
    at severity 1, and its failure is over when the severity falls below 0.8. `docs/diagnostics.md` lists the checks.

    Args:
        checks: Additional checks. A check with the name of a default check replaces it, for example to change its
            thresholds.
        disabled: Names of checks to leave out.

    Raises:
        ConfigError: If `disabled` names an unknown check.

    Example:
        >>> from rlhf_lightning.diagnostics import HighKL
        >>> diagnostics = Diagnostics(checks=[HighKL(limit=20.0)], disabled=["clipping"])
    """

    def __init__(self, checks: list[Check] | None = None, disabled: list[str] | None = None) -> None:
        super().__init__()
        found = {check.name: check for check in [*(make() for make in DEFAULT), *(checks or [])]}
        if unknown := sorted(set(disabled or []) - set(found)):
            raise ConfigError(
                f"Diagnostics.disabled contains {unknown[0]!r}, which is not a check; the checks are {', '.join(found)}"
            )
        self.checks = [check for name, check in found.items() if name not in (disabled or [])]
        self._warned: list[str] = []
        self._file = JsonLines("warnings.jsonl")

    @property
    def watched(self) -> Iterable[str]:
        """Names of all curves that the checks read."""
        return sorted({name for check in self.checks for name in check.watched})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._file.start(trainer)

    def reset(self) -> None:
        super().reset()
        self._warned = []

    def round_ended(self, trainer: pl.Trainer, pl_module: "PolicyRLModule") -> None:
        rows = []
        for check in (check.fitted(pl_module) for check in self.checks):
            severity = check.severity(self.curves) if check.applies(pl_module) else None
            if severity is None:
                continue
            if check.name in self._warned:
                if severity < RECOVERED:
                    self._warned.remove(check.name)
            elif severity >= 1:
                self._warned.append(check.name)
                rows.append(self._warn(trainer, check))
        if rows:
            self._file.append(trainer, rows)

    def _warn(self, trainer: pl.Trainer, check: Check) -> "dict[str, JSON]":
        message = check.message(self.curves)
        if trainer.is_global_zero:
            log.warning("step %d: %s", trainer.global_step, message)
        # JSON has no NaN and no infinity.
        shown: dict[str, JSON] = {k: v if math.isfinite(v) else str(v) for k, v in check.numbers(self.curves).items()}
        return {"step": trainer.global_step, "name": check.name, "message": message, "numbers": shown}

    def state_dict(self) -> "StateDict":
        return {**super().state_dict(), "warned": list(self._warned), "file": self._file.state}

    def load_state_dict(self, state_dict: "StateDict") -> None:
        super().load_state_dict(state_dict)
        self._warned = list(state_dict["warned"])
        self._file.load(state_dict["file"])
