"""Records the state after an optimizer step, so that its checkpoint can be written in the middle of the next step."""

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.call import _call_callbacks_state_dict
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlhf_lightning.checkpointing.logged import logged_state, shared
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.data.batching import RowLoader
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.trainer_state import callbacks_of
from rlhf_lightning.rollout.dataloader import RolloutDataLoader

if TYPE_CHECKING:
    from rlhf_lightning.types import StateDict


class _BatchProgress(TypedDict):
    """The state of Lightning's progress tracker of batches."""

    total: dict[str, int]
    current: dict[str, int]
    is_last_batch: bool


class LastStep:
    """State of the run at the end of an optimizer step, except for weights and optimizer state.

    Weights and optimizer state do not change before the end of the next step, so they need no copy.

    The state is recorded after each step that may be followed by an interruption. Recording is cheap: it synchronizes
    neither the device nor the ranks, and copies no large tensors.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        first: Lightning's flag for the first logged batch of the epoch.
        validates: True if a validation follows that a resumed run must restart.

    Example:
        >>> last = LastStep(trainer, module, first=None)  # doctest: +SKIP
        >>> last.go_back(trainer, module)  # doctest: +SKIP
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, first: bool | None, validates: bool = False
    ) -> None:
        loop = trainer.fit_loop
        self.step, self._epoch = trainer.global_step, trainer.current_epoch
        self._loops = loop.epoch_loop.state_dict(prefix="epoch_loop.")
        self._loops["epoch_progress"] = loop.epoch_progress.state_dict()
        if validates:
            _begin_validation(self._loops["epoch_loop.val_loop.batch_progress"])
        self._rows = [one.rows for one in trainer.loggers if isinstance(one, MetricsCSV)] if validates else None
        # Tensors are not copied, because they may be large; averaged weights change only at steps.
        self._callbacks = tree_map(
            lambda value: value if isinstance(value, Tensor) else deepcopy(value), _call_callbacks_state_dict(trainer)
        )
        self._logged = logged_state(trainer, pl_module, first)
        self._positions = [loader.position for loader in _loaders(trainer)]
        self._buffers = [(module, name, value.clone()) for module, name, value in _buffers(pl_module)]
        self._rounds = deepcopy(pl_module.collector.counters) if isinstance(pl_module, PolicyRLModule) else None

    def go_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the state of the dataloaders, buffers and collector."""
        for loader, position in zip(_loaders(trainer), self._positions, strict=True):
            loader.position = position
        for module, name, value in self._buffers:
            getattr(module, name).copy_(value)
        if isinstance(pl_module, PolicyRLModule) and self._rounds is not None:
            pl_module.collector.counters = self._rounds

    def put_into(self, checkpoint: "StateDict") -> None:
        """Write the recorded state into a checkpoint."""
        checkpoint["epoch"] = self._epoch
        checkpoint["loops"]["fit_loop"] |= self._loops
        checkpoint["callbacks"] = self._callbacks
        checkpoint["logged"] = shared(self._logged)
        if self._rows is not None:
            checkpoint["metrics_rows"] = self._rows


def _loaders(trainer: pl.Trainer) -> list[RowLoader | RolloutDataLoader]:
    """The training dataloaders of the package."""
    combined = trainer.fit_loop._combined_loader
    found = [] if combined is None else combined.flattened
    return [loader for loader in found if isinstance(loader, RowLoader | RolloutDataLoader)]


def rollout_loaders(trainer: pl.Trainer) -> list[RolloutDataLoader]:
    """The training dataloaders that collect rollouts."""
    return [loader for loader in _loaders(trainer) if isinstance(loader, RolloutDataLoader)]


def _are_all(combined: CombinedLoader | None, *kinds: type) -> bool:
    """True if all dataloaders are exactly of these classes."""
    return combined is None or all(type(loader) in kinds for loader in combined.flattened)


def can_leave_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """True if all state that changes between the micro-batches of an optimizer step can be restored."""
    known = _are_all(trainer.fit_loop._combined_loader, RowLoader, RolloutDataLoader)
    extra = _saves_more(pl_module, RLHFModule) or any(_saves_more(one, pl.Callback) for one in callbacks_of(trainer))
    return _ranks_are_whole(trainer, pl_module) and known and not extra


def can_leave_validation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """True if a resumed run would repeat this validation, and all ranks have the same number of batches."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    rows = combined is not None and _are_all(combined, RowLoader)
    over = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    return rows and not over and not timed and can_leave_steps(trainer, pl_module)


def can_leave_rounds(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """True if all training dataloaders are rollout loaders."""
    return _ranks_are_whole(trainer, pl_module) and _are_all(trainer.fit_loop._combined_loader, RolloutDataLoader)


def _ranks_are_whole(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """True if the module is one of the package's and is not sharded, so that a rank can stop at any point."""
    if not isinstance(pl_module, RLHFModule) or is_sharded(pl_module.model):
        return False
    return type(trainer.strategy) is DDPStrategy or trainer.world_size == 1


def _begin_validation(progress: _BatchProgress) -> None:
    """Set the progress to the start of a validation, so that Lightning repeats the validation."""
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}
    progress["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False


def _saves_more(one: pl.LightningModule | pl.Callback, base: type[pl.LightningModule] | type[pl.Callback]) -> bool:
    """True if a user's hook adds state to checkpoints that cannot be recorded here."""
    hook = type(one).on_save_checkpoint
    return hook is not base.on_save_checkpoint and hook.__module__.split(".")[0] not in ("rlhf_lightning", "lightning")


def _buffers(pl_module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Persistent buffers, such as running statistics of rewards."""
    for module in pl_module.modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                yield module, name, value
