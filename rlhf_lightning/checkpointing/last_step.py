"""Going back to the end of the last optimizer step, to write its checkpoint in the middle of the next."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from torch import Tensor, nn

from rlhf_lightning.checkpointing.logged import logged_state, shared
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.data.batching import RowLoader
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.rollout.dataloader import RolloutLoader


class LastStep:
    """What a checkpoint of the step has beside weights and optimizer, which stay as they are until the next one.

    Kept at the end of each step that something may be left after; taking it is not to be felt there, so that it waits
    for no device and for no rank, and copies nothing large.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: Any, first: bool | None, validates: bool = False) -> None:
        loop = trainer.fit_loop
        self.step, self._epoch = trainer.global_step, trainer.current_epoch
        self._loops = loop.epoch_loop.state_dict(prefix="epoch_loop.")
        self._loops["epoch_progress"] = loop.epoch_progress.state_dict()
        if validates:
            _begin_validation(self._loops["epoch_loop.val_loop.batch_progress"])
        self._rows = [one.rows for one in trainer.loggers if isinstance(one, MetricsCSV)] if validates else None
        self._callbacks = _copied(_call_callbacks_state_dict(trainer))
        self._logged = logged_state(trainer, pl_module, first)
        self._at_round = any(getattr(loader, "at_round", False) for loader in loaders(trainer))
        self._positions = [loader.position for loader in loaders(trainer)]
        self._buffers = [(module, name, value.clone()) for module, name, value in _buffers(pl_module)]
        rounds = getattr(pl_module, "collector", None)
        self._rounds = None if rounds is None else deepcopy(rounds.counters)

    def is_whole(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Whether it is of the last step, and nothing else has changed since then, a round once sampled included."""
        # Weights one round old are replaced by those of the next round when it has been sampled.
        stale = getattr(getattr(pl_module, "collector", None), "snapshot", None) is not None
        return self.step == trainer.global_step and not (stale and self._at_round)

    def go_back(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Put back what the run has in hand."""
        for loader, position in zip(loaders(trainer), self._positions, strict=True):
            loader.position = position
        for module, name, value in self._buffers:
            getattr(module, name).copy_(value)
        if self._rounds is not None:
            pl_module.collector.counters = self._rounds

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint say where the run was then."""
        checkpoint["epoch"] = self._epoch
        checkpoint["loops"]["fit_loop"] |= self._loops
        checkpoint["callbacks"] = self._callbacks
        checkpoint["logged"] = shared(self._logged)
        if self._rows is not None:
            checkpoint["metrics_rows"] = self._rows


def loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders of training."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def can_leave_steps(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether all is known that changes between the micro-batches of an optimizer step."""
    known = all(type(loader) in (RowLoader, RolloutLoader) for loader in loaders(trainer))
    others: list[Any] = [(callback, pl.Callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    extra = any(_saves_more(one, base) for one, base in [(pl_module, RLHFModule), *others])
    return _ranks_are_whole(trainer, pl_module) and known and not extra


def can_leave_validation(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether a resumed run would come to this validation again, and all ranks have as many batches of it."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    rows = combined is not None and all(type(loader) is RowLoader for loader in combined.flattened)
    over = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    return rows and not over and not timed and can_leave_steps(trainer, pl_module)


def can_leave_rounds(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether what training gets are rounds of ours."""
    return _ranks_are_whole(trainer, pl_module) and all(type(one) is RolloutLoader for one in loaders(trainer))


def _ranks_are_whole(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether each rank runs a module of ours by itself, so that it may leave where it is."""
    if not isinstance(pl_module, RLHFModule) or is_sharded(pl_module.model):
        return False
    return type(trainer.strategy) is DDPStrategy or trainer.world_size == 1


def _begin_validation(progress: dict[str, Any]) -> None:
    """Have Lightning take a checkpoint for one from the first batch of a validation, which it then begins again."""
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}
    progress["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False


def _saves_more(one: Any, base: Any) -> bool:
    """Whether a hook of the user's own puts into checkpoints what nobody else knows of."""
    hook: Any = type(one).on_save_checkpoint
    return hook is not base.on_save_checkpoint and hook.__module__.split(".")[0] not in ("rlhf_lightning", "lightning")


def _buffers(pl_module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Those that are saved: running statistics of rewards, for one."""
    for module in pl_module.modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                yield module, name, value


def _copied(value: Any) -> Any:
    """A copy of plain values. Tensors, which may be large, are not copied: the weights of an average move by steps."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value if isinstance(value, Tensor) else deepcopy(value)
