"""Metrics of a whole optimizer step over micro-batches and ranks, and handling of steps without trained tokens."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.modules.trainer_state import callbacks_of

if TYPE_CHECKING:
    from rlhf_lightning.types import StepBatch

log = logging.getLogger(__name__)

MetricSums = Mapping[str, tuple[Tensor, Tensor | None]]
"""For each metric: its sum over a micro-batch, and the count to divide by; None if the sum itself is the metric."""
Reduce = Callable[[Tensor, str], Tensor]
"""Reduces a tensor over data ranks, by `sum` or `max`."""
TRAINED = "trained"


class StepNumbers:
    """Sums the metrics of an optimizer step on the device, without synchronization per micro-batch.

    Args:
        names: Metrics to sum; the same on all ranks, so that one collective reduces all of them.
        largest: Metrics to take the maximum of.

    Example:
        >>> numbers = StepNumbers(["nll"])
        >>> numbers.add(torch.tensor(2), {"nll": (torch.tensor(3.0), torch.tensor(2))})
        >>> numbers.take(lambda value, operation: value)
        {'nll': 1.5, 'trained': 2.0}
    """

    def __init__(self, names: Sequence[str], largest: Sequence[str] = ()) -> None:
        self.names, self.largest = (*names, TRAINED), tuple(largest)
        self.clear()

    def clear(self) -> None:
        """Start a new step."""
        self._sums: Tensor | None = None
        self._most: Tensor | None = None
        self._given: dict[str, bool] = {}

    def add(self, trained_count: Tensor, sums: MetricSums, largest: Mapping[str, Tensor] | None = None) -> None:
        """Add a micro-batch.

        Args:
            trained_count: Number of tokens or rows that contribute a gradient.
            sums: Sums and counts by name; a metric without a value for this micro-batch may be missing.
            largest: Values of all metrics in `largest`.
        """
        sums = {**sums, TRAINED: (trained_count, None)}
        self._given |= {name: count is not None for name, (_, count) in sums.items()}
        nothing = trained_count.new_zeros(())
        parts = [sums.get(name, (nothing, None)) for name in self.names]
        row = _stacked([*(total for total, _ in parts), *(nothing if count is None else count for _, count in parts)])
        self._sums = row if self._sums is None else self._sums + row
        if self.largest:
            most = _stacked([(largest or {})[name] for name in self.largest])
            self._most = most if self._most is None else torch.maximum(self._most, most)

    def take(self, reduce: Reduce) -> dict[str, float | None]:
        """Return the metrics of the step, over all ranks, and start a new one. All ranks must call this together.

        Args:
            reduce: Reduces a tensor over ranks.

        Returns:
            The metrics by name; None for a mean over no elements.
        """
        if self._sums is None:
            return {}
        found = reduce(self._sums, "sum")
        if self._most is not None:
            found = torch.cat([found, reduce(self._most, "max")])
        values = found.tolist()  # the only device synchronization
        means, count = self._given, len(self.names)
        numbers: dict[str, float | None] = dict(zip(self.largest, values[2 * count :], strict=True))
        for name, total, weight in zip(self.names, values[:count], values[count : 2 * count], strict=True):
            if name in means:
                numbers[name] = total if not means[name] else total / weight if weight else None
        self.clear()
        return numbers


def _stacked(values: Sequence[Tensor]) -> Tensor:
    device = values[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([value.detach().to(dtype) for value in values])


class StepEnd(pl.Callback):
    """Logs the metrics of each optimizer step, and prevents updates in steps without trained tokens.

    The modules add it in `configure_callbacks`. In a step without trained tokens, all gradients are removed, so that
    the optimizer neither updates nor decays a weight. The step still counts for `global_step`, `max_steps` and the
    schedule.

    Args:
        numbers: The module's metrics of the current step.
        why_empty: Returns why a step may have had no trained token, and what to change.
        on_bar: Metrics that the progress bar shows.
        limit: Number of consecutive steps without a trained token after which the run stops; None for no limit.

    Example:
        >>> StepEnd(StepNumbers(["nll"]), why_empty=lambda: "All masks are 0.", limit=50).empty
        0
    """

    def __init__(
        self,
        numbers: StepNumbers,
        why_empty: Callable[[], str],
        on_bar: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        self.numbers, self.why_empty, self.on_bar, self.limit = numbers, why_empty, on_bar, limit
        self.empty = self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"empty": self.empty, "in_a_row": self._in_a_row} if self.empty else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.empty, self._in_a_row = state_dict["empty"], state_dict["in_a_row"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A user's dataloader may have a different length on each rank; ranks with more batches would wait forever.
        counts = gather((trainer.num_training_batches, trainer.num_val_batches), every=True)
        for rank, found in enumerate(counts):
            if found != counts[0]:
                raise ConfigError(
                    f"rank {rank} of {len(counts)} has {found[0]} training batches and {found[1]} validation batches, "
                    f"but rank 0 has {counts[0][0]} and {counts[0][1]}. Every rank needs the same number of batches"
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: "StepBatch", batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.numbers.clear()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        numbers = self.numbers.take(_reduce(trainer, pl_module))
        if not numbers:
            return  # the user overrides training_step
        empty = not numbers.pop(TRAINED) and not _has_gradient(trainer, pl_module)
        self._in_a_row = self._in_a_row + 1 if empty else 0
        self.empty += empty
        if empty:
            drop_gradients(trainer, optimizer)
            self._report_empty_step(trainer)
        if self.empty:
            numbers["empty_steps"] = float(self.empty)
        self._log(trainer, pl_module, numbers)

    def _report_empty_step(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step + 1
        if self.limit is not None and self._in_a_row >= self.limit:
            raise UserError(
                f"step {step}: no token was trained in {self._in_a_row} consecutive optimizer steps "
                f"(model.max_empty_steps). {self.why_empty()}"
            )
        if self.empty == 1 and trainer.is_global_zero:
            log.warning(
                "step %d: no token was trained, so the weights do not change. train/empty_steps counts such steps. %s",
                step,
                self.why_empty(),
            )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, numbers: Mapping[str, float | None]) -> None:
        results = trainer._results
        assert results is not None
        for name, number in numbers.items():
            full = f"train/{name}"
            theirs = results.get(f"training_step.{full}")
            if theirs is not None and not theirs.has_reset:
                continue  # a subclass logs its own metric under this name
            if number is not None:
                # On the CPU, because the progress bar reads it at every batch.
                value = torch.tensor(number, dtype=torch.float32)
                pl_module.log(full, value, on_step=True, on_epoch=False, prog_bar=name in self.on_bar)
            elif (old := results.get(f"on_before_optimizer_step.{full}")) is not None:
                old.reset()  # otherwise Lightning would log the last value again


def remove_step_end(trainer: pl.Trainer) -> None:
    """Remove the `StepEnd` of an earlier run from a trainer, because Lightning warns when it replaces a callback."""
    callbacks = callbacks_of(trainer)
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, StepEnd)]


def _reduce(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Reduce:
    # Ranks of one tensor-parallel group compute the same rows, which must count once.
    mesh = pl_module._device_mesh
    group = None if mesh is None else mesh["data_parallel"].get_group()
    return lambda value, operation: trainer.strategy.reduce(value, group=group, reduce_op=operation)


def _has_gradient(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """True if any rank has a nonzero gradient, which comes from a loss that the user added.

    Only called if the module's own loss trained no token.
    """
    gradients = local_gradients(trainer, pl_module)
    nonzero = bool(torch.stack([gradient.count_nonzero() for gradient in gradients]).any()) if gradients else False
    return trainer.strategy.reduce_boolean_decision(nonzero, all=False)


@runtime_checkable
class HoldsGradients(Protocol):
    """A strategy that keeps gradients outside of the parameters' `grad`."""

    def local_gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients."""

    def drop_gradients(self) -> None:
        """Make the optimizer step that follows change neither weights nor optimizer state."""


def local_gradients(trainer: pl.Trainer, module: nn.Module) -> list[Tensor]:
    """The gradients of a module's weights; if they are sharded, this rank's shards, which may be empty.

    Args:
        trainer: The Trainer, before an optimizer step.
        module: The module.
    """
    if isinstance(trainer.strategy, HoldsGradients):
        return trainer.strategy.local_gradients()
    return [getattr(p.grad, "_local_tensor", p.grad) for p in module.parameters() if p.grad is not None]


def drop_gradients(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Remove all gradients, so that the optimizer step changes neither weights nor optimizer state.

    Args:
        trainer: The Trainer.
        optimizer: The optimizer, before its step.
    """
    if isinstance(trainer.strategy, HoldsGradients):
        trainer.strategy.drop_gradients()
        return
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # this optimizer unscales in its step, and the scaler checks afterwards that it did
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
