"""Learning-rate schedules with warm-up. Any torch scheduler can be used instead."""

import logging
import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)
SHAPES = ("constant", "linear", "cosine")


class Warmup(LRScheduler):
    """Linear warm-up, then a constant rate, or linear or cosine decay to `floor` times the rate.

    It is stepped after every optimizer step.

    Args:
        optimizer: The optimizer.
        shape: Shape after the warm-up: `constant`, `linear` or `cosine`.
        warmup_steps: Number of steps until the full rate; a value below 1 is a fraction of all steps.
        floor: Final rate as a fraction of the full rate, 0 to 1.
        total_steps: Number of steps of the run; the module sets it from the Trainer.

    Raises:
        ValueError: If `shape` is unknown, or a number is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> Warmup(optimizer, shape="linear", warmup_steps=1, total_steps=11).get_last_lr()
        [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shape: str = "cosine",
        warmup_steps: float = 0,
        floor: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; it must be one of {', '.join(SHAPES)}")
        if not 0 <= warmup_steps < math.inf or not 0 <= floor <= 1:
            raise ValueError(
                f"warmup_steps is {warmup_steps} and floor is {floor}; warmup_steps must be at least 0, and floor a "
                "fraction of the learning rate in [0, 1]"
            )
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; it must be at least 1")
        self.shape, self.warmup_steps, self.floor, self.total_steps = shape, warmup_steps, floor, total_steps
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Set the number of steps of the run, and apply the rate of the current step."""
        self.total_steps = total_steps
        if self.warmup_steps >= max(total_steps, 1):
            log.warning(
                "lr_scheduler: warmup_steps is %g, but the run has only %d steps, so the full learning rate is never "
                "reached",
                self.warmup_steps,
                total_steps,
            )
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at the current step."""
        factor = self._factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    def _factor(self, step: int) -> float:
        total = self.total_steps
        warmup = self.warmup_steps
        if 0 < warmup < 1:
            warmup = math.ceil(warmup * total) if total else 1
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.shape == "constant" or not total:
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        decay = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.floor + (1 - self.floor) * decay
