"""Detects losses, gradients and weights that are not finite before they are used, saved or exported."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.modules.step import drop_gradients, local_gradients

if TYPE_CHECKING:
    from rlhf_lightning.types import StepBatch

log = logging.getLogger(__name__)
ACTIONS = ("stop", "skip")
SHOWN = 5


class NonFiniteError(UserError):
    """A loss, a gradient or a weight is NaN or infinite."""


class NonFiniteGuard(pl.Callback):
    """Checks the loss and the gradient before each optimizer step; all ranks make the same decision.

    With `stop`, the run ends with an error that names the step, the rows and the likely cause; weights and checkpoints
    are those of the previous step. With `skip`, the step is skipped on all ranks and counted. In `16-mixed` only the
    loss is checked, because the gradient scaler skips steps with infinite gradients itself.

    Args:
        action: `stop` the run, or `skip` the step.
        limit: With `skip`, the largest number of consecutive skipped steps; after that the run stops.

    Raises:
        ConfigError: If `action` is unknown or `limit` below 1.

    Example:
        >>> NonFiniteGuard(action="skip").skipped
        0
    """

    def __init__(self, action: str = "stop", limit: int = 10) -> None:
        if action not in ACTIONS or limit < 1:
            raise ConfigError(
                f"NonFiniteGuard: action is {action!r} (must be {' or '.join(ACTIONS)}), limit is {limit} (must be at "
                "least 1)"
            )
        self.action, self.limit = action, limit
        self.skipped = self._in_a_row = 0
        self._window: list[tuple[list[str], Tensor]] = []
        self._batch: StepBatch | None = None

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: "StepBatch", batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window = []
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # The value is read only before the optimizer step, so that the device is synchronized once per step.
        self._window.append((_rows(self._batch), loss.detach()))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [gradient for gradient in local_gradients(trainer, pl_module) if gradient.numel()]
        losses = torch.stack([loss.float() for _, loss in self._window])
        largest = _largest(gradients).to(losses.device)
        fine = bool(torch.isfinite(losses).all() & torch.isfinite(largest))
        if trainer.strategy.reduce_boolean_decision(fine, all=True):
            self._in_a_row = 0
            return
        what = self._describe(losses, largest)
        self._in_a_row += 1
        if self.action == "stop" or self._in_a_row > self.limit:
            raise NonFiniteError(self._message(trainer, pl_module, what))
        self.skipped += 1
        drop_gradients(trainer, optimizer)
        log.warning("optimizer step %d skipped (%d so far): %s", trainer.global_step + 1, self.skipped, what[0])

    def _describe(self, losses: Tensor, largest: Tensor) -> tuple[str, bool, list[str]]:
        """Describe what is not finite on any rank; return also whether it is a loss, and the rows."""
        bad = [i for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        mine = (
            [losses[i].item() for i in bad],
            [row for i in bad or range(len(self._window)) for row in self._window[i][0]],
        )
        ranks = gather(mine)
        values = [value for found, _ in ranks for value in found]
        rows = [row for found, rows in ranks if found or not values for row in rows]
        what = f"the loss is {values[0]}" if values else f"the gradient is not finite (largest {largest.item()})"
        return what, bool(values), rows

    def _message(self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: tuple[str, bool, list[str]]) -> str:
        what, is_loss, rows = found
        where = f" Rows: {', '.join(rows[:SHOWN])}{f' and {len(rows) - SHOWN} more' if len(rows) > SHOWN else ''}."
        if names := non_finite(pl_module):
            cause = (
                f"Weights were not finite before this step (for example {names[0]}): the model that the stage started "
                "from is damaged, or the previous step was too large. Lower the learning rate (model.optimizer), set "
                "trainer.gradient_clip_val: 1.0, and start over with --fresh."
            )
            if torch.float16 in {p.dtype for p in pl_module.parameters() if p.requires_grad}:
                cause = (
                    f"The weights are float16 (trainer.precision 16-true, or model.dtype), for example {names[0]}: the "
                    "epsilon that optimizers divide by rounds to 0 in float16. Train in bf16-mixed, bf16-true or "
                    "16-mixed, and start over with --fresh."
                )
        elif is_loss:
            cause = (
                "The weights are finite, so these rows cause an overflow. Check them; train in bf16-mixed or 32-true "
                "instead of float16; lower the learning rate if the loss was growing."
            )
        else:
            cause = (
                "The loss is finite, so the backward pass overflowed. Lower the learning rate, set "
                "trainer.gradient_clip_val: 1.0 to limit earlier steps, or train in bf16-mixed or 32-true."
            )
        if self.action == "skip":
            after = f" The {self.limit} steps before it were skipped as well."
        else:
            after = " --on_nonfinite skip skips such steps and counts them."
        return f"step {trainer.global_step + 1}: {what}.{where if rows else ''} {cause}{after}"


def _largest(gradients: list[Tensor]) -> Tensor:
    """Largest absolute value; NaN if any value is NaN. A sum could overflow even if all values are finite."""
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")).float()


def _rows(batch: "StepBatch | None") -> list[str]:
    where = batch.get("where") if isinstance(batch, Mapping) else None
    return list(dict.fromkeys(name for name in where if name)) if where else []


def non_finite(module: nn.Module) -> list[str]:
    """Names of the trained weights that contain NaN or infinity."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
    if not named:
        return []
    device = named[0][1].device
    # One flag per weight, copied to the host in one transfer.
    flags = torch.stack([torch.isfinite(_local(p)).all().to(device) for _, p in named]).tolist()
    return [name for (name, _), fine in zip(named, flags, strict=True) if not fine]


def _local(weight: nn.Parameter) -> Tensor:
    """This rank's shard of a weight that is sharded by FSDP2 or DeepSpeed; otherwise all of it."""
    shard = getattr(weight.detach(), "_local_tensor", getattr(weight, "ds_tensor", weight))
    assert isinstance(shard, Tensor)
    return shard.detach()


def require_finite(module: nn.Module, when: str, consequence: str) -> None:
    """Raise `NonFiniteError` on all ranks if a trained weight on any rank is not finite.

    Args:
        module: The module.
        when: When the weights were checked, for the message.
        consequence: What is not done as a result, for the message.
    """
    names = [name for part in gather(non_finite(module), every=True) for name in part]
    if names:
        raise NonFiniteError(
            f"{when}, {len(names)} weights are NaN or infinite (for example {names[0]}): {consequence}. The last steps "
            "were too large: lower the learning rate (model.optimizer) or set trainer.gradient_clip_val: 1.0, and "
            "start over with --fresh, or from an earlier checkpoint with --ckpt_path."
        )
