"""Saves and restores Lightning's state of logged values, which its checkpoints omit."""

from functools import partial
from typing import TYPE_CHECKING, TypedDict

import lightning.pytorch as pl
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.distributed import gather

if TYPE_CHECKING:
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata


class _Logs(TypedDict):
    callback: dict[str, Tensor]
    """The last value of each metric, as used by checkpoint callbacks and early stopping."""
    sticky: dict[str, tuple[str, str, bool, bool, Tensor]]
    """Values that are logged occasionally and repeated in the rows in between: hook, name, whether on the progress bar,
    whether in the loggers, value."""
    epoch: list[tuple[str, str, bool, bool, str | None, str]]
    """Metrics that are accumulated over the epoch: hook, name, whether on the progress bar, whether in the loggers,
    attribute, module."""
    first: bool | None
    """Lightning's flag for the first logged batch of the epoch."""


class RankLogs(_Logs):
    """Logging state of one rank."""

    metrics: dict[str, dict[str, Tensor]] | None
    """States of the metrics of `epoch` by module and name; None at the end of the epoch."""


class StoredLogs(_Logs):
    """Logging state in a checkpoint."""

    metrics: list[dict[str, dict[str, Tensor]]]
    """States of the metrics of all data ranks; empty at the end of the epoch."""


def logged_state(trainer: pl.Trainer, pl_module: pl.LightningModule, first: bool | None) -> RankLogs:
    """Collect the logging state of this rank for a checkpoint, without synchronizing the device; see `shared`.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        first: Lightning's flag for the first logged batch of the epoch.
    """
    callback = {name: value.detach() for name, value in trainer.callback_metrics.items()}
    progress = trainer.fit_loop.epoch_progress.current
    assert isinstance(progress, _ProcessedTracker)
    if progress.processed != progress.completed:  # the epoch is over, and the next one resets the metrics
        return {"callback": callback, "sticky": {}, "epoch": [], "metrics": None, "first": None}
    results = trainer.fit_loop.epoch_loop._results
    tensors = {key: item for key, item in results.items() if item.is_tensor and not item.has_reset}
    sticky = {
        key: (item.meta.fx, item.meta.name, item.meta.prog_bar, item.meta.logger, item._forward_cache.detach())
        for key, item in tensors.items()
        if _is_plain(item.meta)
    }
    named = {id(metric): name for name, metric in pl_module.named_modules() if isinstance(metric, Metric)}
    epoch = [
        (item.meta.fx, item.meta.name, item.meta.prog_bar, item.meta.logger, item.meta.metric_attribute, name)
        for item in results.values()
        if not item.is_tensor and not item.meta.on_step and _is_alike(item.meta) and (name := named.get(id(item.value)))
    ]
    summed = {id(item.value) for item in results.values() if not item.is_tensor and item.meta.on_epoch}
    mine = {
        name: {
            key: value.detach().clone() for key in metric._defaults if isinstance(value := getattr(metric, key), Tensor)
        }
        for name, metric in pl_module.named_modules()
        if isinstance(metric, Metric) and id(metric) in summed
    }
    return {"callback": callback, "sticky": sticky, "epoch": epoch, "metrics": mine, "first": first}


def shared(state: RankLogs) -> StoredLogs:
    """Gather the results of `logged_state` of all ranks for the checkpoint.

    All ranks must call this together.
    """
    found: RankLogs = tree_map_only(Tensor, Tensor.cpu, state)
    metrics = [] if found["metrics"] is None else gather(found["metrics"])
    return {**found, "metrics": metrics}


def restore_last_values(trainer: pl.Trainer, state: StoredLogs) -> None:
    """Restore the last values of metrics, which are needed even if no step is left."""
    device = trainer.strategy.root_device
    for name, value in state["callback"].items():
        trainer._logger_connector._callback_metrics[name] = value.to(device)


def restore_logged(trainer: pl.Trainer, pl_module: pl.LightningModule, state: StoredLogs) -> None:
    """Restore the logging state within an epoch, before its next batch.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        state: What `shared` returned.
    """
    device = trainer.strategy.root_device
    results = trainer.fit_loop.epoch_loop._results
    # The arguments must be those of `LightningModule.log`; a name cannot be logged again with other arguments.
    log = partial(results.log, sync_dist_fn=trainer.strategy.reduce)
    for fx, name, bar, logger, value in state["sticky"].values():
        log(fx, name, value.to(device), prog_bar=bar, logger=logger, on_step=True, on_epoch=False)
    # Needed because there may be no batch left in this epoch that would log them.
    modules = dict(pl_module.named_modules())
    for fx, name, bar, logger, attribute, metric in state["epoch"]:
        options = {"prog_bar": bar, "logger": logger, "on_step": False, "on_epoch": True}
        log(fx, name, modules[metric], metric_attribute=attribute, **options)
    trainer._logger_connector._first_loop_iter = state["first"]
    rank, world = data_ranks(trainer)
    if len(state["metrics"]) != world:
        return
    mine = state["metrics"][rank]
    for name, metric in pl_module.named_modules():
        if name in mine and isinstance(metric, Metric):
            for key, value in mine[name].items():
                setattr(metric, key, value.to(metric.device))
            metric._update_count, metric._computed = 1, None


def _is_plain(meta: "_Metadata") -> bool:
    """True if `self.log` was called per step, without options that a later call could contradict."""
    step = meta.on_step and not meta.on_epoch and meta.is_mean_reduction and not meta.enable_graph
    return step and _is_alike(meta) and meta.metric_attribute is None


def _is_alike(meta: "_Metadata") -> bool:
    alike = not meta.sync.should and not meta.sync.rank_zero_only and meta.sync._group is None
    return alike and meta.add_dataloader_idx and meta.dataloader_idx is None
