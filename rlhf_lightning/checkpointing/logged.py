"""Lightning's state of logged values, which its checkpoints omit."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import Metric

from rlhf_lightning.data.base import data_ranks
from rlhf_lightning.distributed import gather


def logged_state(trainer: pl.Trainer, pl_module: Any, first: bool | None) -> dict[str, Any]:
    """Collect the logging state of this rank for a checkpoint, without synchronizing the device; see `shared`.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        first: Lightning's flag for the first logged batch of the epoch.

    Returns:
        A dict with

        - `callback`: the last value of each metric, which checkpoint callbacks and early stopping use,
        - `sticky`: values that are logged occasionally, and repeated in the rows in between,
        - `metrics`: states of the metrics that are accumulated over the epoch,
        - `epoch`: the names under which the module logs those,
        - `first`: the argument.
    """
    callback = {name: value.detach() for name, value in trainer.callback_metrics.items()}
    progress: Any = trainer.fit_loop.epoch_progress.current
    if progress.processed != progress.completed:  # the epoch is over, and the next one resets the metrics
        return {"callback": callback, "sticky": {}, "epoch": [], "metrics": None, "first": None}
    results = trainer.fit_loop.epoch_loop._results
    tensors = {key: item for key, item in results.items() if item.is_tensor and not item.has_reset}
    sticky = {
        key: [item.meta.fx, item.meta.name, item.meta.prog_bar, item.meta.logger, item._forward_cache.detach()]
        for key, item in tensors.items()
        if _is_plain(item.meta)
    }
    named = {id(metric): name for name, metric in pl_module.named_modules() if isinstance(metric, Metric)}
    epoch = [
        [item.meta.fx, item.meta.name, item.meta.prog_bar, item.meta.logger, item.meta.metric_attribute, name]
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


def shared(state: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `logged_state` as stored in the checkpoint, with the metrics of all ranks.

    All ranks must call this together.
    """
    metrics = [] if state["metrics"] is None else gather(_on_cpu(state["metrics"]))
    return {**_on_cpu(state), "metrics": metrics}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value


def restore_last_values(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Restore the last values of metrics, which are needed even if no step is left."""
    device = trainer.strategy.root_device
    for name, value in state["callback"].items():
        trainer._logger_connector._callback_metrics[name] = value.to(device)


def restore_logged(trainer: pl.Trainer, pl_module: Any, state: Mapping[str, Any]) -> None:
    """Restore the logging state within an epoch, before its next batch.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        state: What `shared` returned.
    """
    device = trainer.strategy.root_device
    results = trainer.fit_loop.epoch_loop._results
    # With the arguments that `LightningModule.log` passes on; it refuses to log a name again with others.
    same: Any = {"on_step": True, "on_epoch": False, "sync_dist_fn": trainer.strategy.reduce}
    for fx, name, bar, logger, value in state["sticky"].values():
        results.log(fx, name, value.to(device), prog_bar=bar, logger=logger, **same)
    # Needed because no batch that would log them may be left in this epoch.
    modules = dict(pl_module.named_modules())
    for fx, name, bar, logger, attribute, metric in state.get("epoch", []):
        results.log(
            fx,
            name,
            modules[metric],
            prog_bar=bar,
            logger=logger,
            metric_attribute=attribute,
            **{**same, "on_step": False, "on_epoch": True},
        )
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


def _is_plain(meta: Any) -> bool:
    """True if `self.log` was called per step, with no option that a later call could contradict."""
    step = meta.on_step and not meta.on_epoch and meta.is_mean_reduction and not meta.enable_graph
    return step and _is_alike(meta) and meta.metric_attribute is None


def _is_alike(meta: Any) -> bool:
    alike = not meta.sync.should and not meta.sync.rank_zero_only and meta.sync._group is None
    return alike and meta.add_dataloader_idx and meta.dataloader_idx is None
