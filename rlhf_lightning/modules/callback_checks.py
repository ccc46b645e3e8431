"""Rejects Lightning callbacks that would have no effect on a module, or an effect other than the documented one."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.modules.trainer_state import callbacks_of, row_data_of
from rlhf_lightning.modules.usage_checks import CheckedModule


def check_callbacks(module: CheckedModule, trainer: pl.Trainer) -> None:
    """Check the trainer's callbacks before any of them is set up.

    Args:
        module: The module.
        trainer: Its trainer.

    Raises:
        ConfigError: If a callback does not work with this module; the message says what to use instead.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            _check_swa(trainer)
        if isinstance(callback, WeightAveraging):
            _check_averaging(callback, module, trainer)
        if isinstance(callback, LearningRateFinder):
            _check_rate_finder(callback, module, trainer)
        if isinstance(callback, BatchSizeFinder):
            _check_batch_finder(callback, module, trainer)
        if isinstance(callback, BackboneFinetuning):
            _check_backbone(module)


def check_accumulation(scheduler: LRScheduler, trainer: pl.Trainer) -> None:
    """Raise `ConfigError` if `scheduler` needs the run's number of steps and Lightning cannot compute it."""
    changing = any(
        isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
        for callback in callbacks_of(trainer)
    )
    if changing and isinstance(scheduler, Warmup) and scheduler.total_steps is None:
        raise ConfigError(
            "Warmup needs the number of optimizer steps, which is unknown in advance with "
            "GradientAccumulationScheduler. Set total_steps of model.lr_scheduler, or set "
            "trainer.accumulate_grad_batches instead of using the callback"
        )


def _check_swa(trainer: pl.Trainer) -> None:
    # It copies the module in setup, before the model is loaded, so the average would have no parameters.
    if trainer.state.fn == "fit":
        raise ConfigError(
            "StochasticWeightAveraging would average nothing, because it copies the module before the model is loaded, "
            "and it would replace model.lr_scheduler. Use lightning.pytorch.callbacks.WeightAveraging (equal weights) "
            "or EMAWeightAveraging instead"
        )


def _check_averaging(callback: WeightAveraging, module: CheckedModule, trainer: pl.Trainer) -> None:
    name = type(callback).__name__
    if trainer.state.fn != "fit":
        return
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise ConfigError(
            f"{name} averages unsharded weights, but trainer.strategy {type(trainer.strategy).__name__} shards them. "
            "Use ddp, or leave the callback out"
        )
    # The statistics of normalized rewards are integer buffers that are created when the model is loaded.
    normalized = any(reward.normalize is not None for reward in getattr(module, "rewards", ()))
    integers = normalized or any(not buffer.is_floating_point() for buffer in module.buffers())
    if callback._use_buffers and integers:
        raise ConfigError(
            f"{name} would average integer buffers, such as the statistics of a normalized reward. Set its use_buffers "
            "to False"
        )
    # The averaged copy is paired with the module parameter by parameter.
    if getattr(getattr(module, "scorer", None), "store", False):
        raise ConfigError(
            f"{name} copies the module together with the reference model, which scorer.store removes before training. "
            "Set scorer.store to false"
        )


def _check_rate_finder(callback: LearningRateFinder, module: CheckedModule, trainer: pl.Trainer) -> None:
    if trainer.state.fn != "fit":
        return
    if module.stage_kind == "policy":
        raise ConfigError(
            "LearningRateFinder chooses the learning rate at which the loss falls fastest, but the loss of policy RL "
            "does not measure progress. Compare train/reward in short runs with several learning rates instead"
        )
    names = [callback._attr_name] if callback._attr_name else ["lr", "learning_rate"]
    if callback._update_attr and not any(lightning_hasattr(module, name) for name in names):
        raise ConfigError(
            f"LearningRateFinder sets {names[0]} of the module, but {type(module).__name__} creates its optimizer with "
            "model.optimizer. Set update_attr to False, and pass an optimizer with the learning rate "
            "optimal_lr.suggestion()"
        )


def _check_batch_finder(callback: BatchSizeFinder, module: CheckedModule, trainer: pl.Trainer) -> None:
    if module.stage_kind == "policy":
        raise ConfigError(
            "BatchSizeFinder changes data.batch_size, which a policy stage does not have. Set "
            "model.max_tokens_per_batch to bound the memory of a step, and data.prompts_per_round and data.group_size "
            "to set its number of rows"
        )
    command = trainer.state.fn
    name = "batch_size" if command == "fit" else "eval_batch_size"
    if row_data_of(trainer) is not None and callback._batch_arg_name != name:
        raise ConfigError(
            f"BatchSizeFinder changes data.{callback._batch_arg_name}, but {command} uses data.{name}. Set its "
            f"batch_arg_name to {name}"
        )


def _check_backbone(module: CheckedModule) -> None:
    if not hasattr(module, "backbone"):
        raise ConfigError(
            f"BackboneFinetuning freezes module.backbone, which {type(module).__name__} does not have. Use "
            "PreferenceModule(freeze_backbone=True) to train only the reward head, or model.lora to train adapters"
        )
