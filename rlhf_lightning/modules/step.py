"""The numbers of a whole optimizer step, over its micro-batches and ranks, and steps in which nothing is trained."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError, UserError

log = logging.getLogger(__name__)

Sums = Mapping[str, tuple[Tensor, Tensor | None]]
"""For each number: its sum over a micro-batch, and the count it is divided by; None for one that is the sum itself."""
Reduce = Callable[[Tensor, str], Tensor]
"""A tensor with those of the other data ranks, by `sum` or `max`."""
TRAINED = "trained"


class StepNumbers:
    """Adds up the numbers of an optimizer step on the device: no micro-batch waits for it, and no rank.

    Args:
        names: what is added up, the same on all ranks, so that one collective takes all of it.
        largest: what the maximum is taken of.
    """

    def __init__(self, names: Sequence[str], largest: Sequence[str] = ()) -> None:
        self.names, self.largest = (*names, TRAINED), tuple(largest)
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self._sums: Tensor | None = None
        self._most: Tensor | None = None
        self._given: dict[str, bool] = {}

    def add(self, trained: Tensor, sums: Sums, largest: Mapping[str, Tensor] | None = None) -> None:
        """Take a micro-batch.

        Args:
            trained: how many of its tokens or rows have something to teach.
            sums: of some of the names; one that has nothing to say of this micro-batch may be missing.
            largest: of all that the maximum is taken of.
        """
        sums = {**sums, TRAINED: (trained, None)}
        self._given |= {name: count is not None for name, (_, count) in sums.items()}
        nothing = trained.new_zeros(())
        parts = [sums.get(name, (nothing, None)) for name in self.names]
        row = _stacked([*(total for total, _ in parts), *(nothing if count is None else count for _, count in parts)])
        self._sums = row if self._sums is None else self._sums + row
        if self.largest:
            most = _stacked([(largest or {})[name] for name in self.largest])
            self._most = most if self._most is None else torch.maximum(self._most, most)

    def take(self, reduce: Reduce) -> dict[str, float | None]:
        """The numbers of the step that ends, over all ranks, which call it together; None for a mean over nothing."""
        if self._sums is None:
            return {}
        found = reduce(self._sums, "sum")
        if self._most is not None:
            found = torch.cat([found, reduce(self._most, "max")])
        values = found.tolist()  # the one place where the device is waited for
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
    """At the end of each optimizer step: logs its numbers, and lets it move nothing where no token was trained.

    The modules bring it (`configure_callbacks`). A step without a trained token has no gradients, so that no optimizer
    moves or decays a weight by it; it counts for `global_step`, `max_steps` and the schedule.

    Args:
        limit: steps without a trained token in a row at which the run is stopped; None for never.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.empty = self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"empty": self.empty, "in_a_row": self._in_a_row} if self.empty else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.empty, self._in_a_row = state_dict["empty"], state_dict["in_a_row"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # A loader of the user's own may have another length on each rank: the longer one would wait for ever.
        counts = gather((trainer.num_training_batches, trainer.num_val_batches), every=True)
        for rank, found in enumerate(counts):
            if found != counts[0]:
                raise ConfigError(
                    f"rank {rank} of {len(counts)} has {found[0]} batches to train on and {found[1]} to validate on, "
                    f"rank 0 {counts[0][0]} and {counts[0][1]}: the rows must be shared out evenly"
                )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            pl_module.step_numbers.clear()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        numbers = pl_module.step_numbers.take(_reduce(trainer, pl_module))
        if not numbers:
            return  # the training step is the user's own
        empty = not numbers.pop(TRAINED) and not _has_gradient(trainer, pl_module)
        self._in_a_row = self._in_a_row + 1 if empty else 0
        self.empty += empty
        if empty:
            drop_gradients(trainer, optimizer)
            self._tell(trainer, pl_module)
        if self.empty:
            numbers["empty_steps"] = float(self.empty)
        _log(trainer, pl_module, numbers)

    def _tell(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step + 1
        if self.limit is not None and self._in_a_row >= self.limit:
            raise UserError(
                f"step {step}: no token was trained in {self._in_a_row} optimizer steps in a row "
                f"(model.max_empty_steps). {pl_module.why_empty()}"
            )
        if self.empty == 1 and trainer.is_global_zero:
            log.warning(
                "step %d: no token is trained, so the weights stay; train/empty_steps counts such steps. %s",
                step,
                pl_module.why_empty(),
            )


def forget(trainer: Any) -> None:
    """Take the `StepEnd` of an earlier run from a trainer; in place of it Lightning would say that it is replaced."""
    if trainer is not None:
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, StepEnd)]


def _reduce(trainer: pl.Trainer, pl_module: Any) -> Reduce:
    # Ranks of one tensor-parallel group compute the same rows: these count once.
    mesh = pl_module._device_mesh
    group = None if mesh is None else mesh["data_parallel"].get_group()
    return lambda value, operation: trainer.strategy.reduce(value, group=group, reduce_op=operation)


def _has_gradient(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether a loss of the user's has something to teach where ours has not: asked only there, and of all ranks."""
    found = [getattr(p.grad, "_local_tensor", p.grad) for p in pl_module.parameters() if p.grad is not None]
    mine = bool(torch.stack([gradient.count_nonzero() for gradient in found]).any()) if found else False
    return trainer.strategy.reduce_boolean_decision(mine, all=False)


def drop_gradients(trainer: pl.Trainer, optimizer: Any) -> None:
    """Let an optimizer step move nothing: without gradients no optimizer of torch touches a weight or its state."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # which such an optimizer does in its step; the scaler asks for it afterwards
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _log(trainer: pl.Trainer, pl_module: Any, numbers: Mapping[str, float | None]) -> None:
    results: Any = trainer._results
    for name, number in numbers.items():
        full = f"train/{name}"
        theirs = results.get(f"training_step.{full}")
        if theirs is not None and not theirs.has_reset:
            continue  # a subclass logs a number of its own by this name
        if number is not None:
            # On the CPU, where the progress bar wants it at every batch.
            value = torch.tensor(number, dtype=torch.float32)
            pl_module.log(full, value, on_step=True, on_epoch=False, prog_bar=name in pl_module.on_bar)
        elif (old := results.get(f"on_before_optimizer_step.{full}")) is not None:
            old.reset()  # Lightning would repeat the last one
