"""Clear errors for misuse of a module that Lightning or torch would report less clearly."""

import logging
import pickle
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.errors import ConfigError, check_object, check_whole
from rlhf_lightning.files import is_model_folder
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.memory import OptimizerFactory
from rlhf_lightning.modules.step import HoldsGradients
from rlhf_lightning.modules.trainer_state import is_trial, row_data_of
from rlhf_lightning.settings import NotPlain, Settings, UnknownClass, describe, rebuild

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _MAP_LOCATION_TYPE, _PATH

    from rlhf_lightning.types import JSON, StateDict

log = logging.getLogger(__name__)
SchedulerFactory = Callable[[Optimizer], LRScheduler]
DATA = {"sft": "SFTDataModule", "preference": "PreferenceDataModule", "policy": "PromptDataModule"}
ABSENT = {
    "generate": "use trainer.predict(module, data) with data.predict, or rlhf generate with the saved model folder",
    "push_to_hub": "module.save_pretrained(FOLDER), then rlhf export FOLDER DIR --push ID",
    "score": "a PreferenceModule scores",
    "token_logprobs": "the model is not loaded yet; trainer.fit or module.configure_model() loads it",
    "model_scorer": "the model is not loaded yet; trainer.fit or module.configure_model() loads it",
    "scorer": "only a PreferenceModule has one",
}
"""Attributes that users look for on a module, and what to use instead."""


UNUSED_BY_INFERENCE = ("optimizer", "lr_scheduler", "rewards", "environment", "environment_args", "limits")
"""Arguments that do not change what a loaded module computes."""


class CheckedModule(Settings, pl.LightningModule):
    """Base class of `RLHFModule` that reports misuse, and saves its settings as plain values.

    Example:
        >>> class MyModule(CheckedModule):
        ...     stage_kind = "sft"  # `fit` without data then names SFTDataModule
    """

    stage_kind = ""

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name in ABSENT:
                raise AttributeError(f"{error}: {ABSENT[name]}") from None
            raise

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Refuse `fit` without data."""
        raise self._no_data("fit", "train")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Refuse `test` without data."""
        raise self._no_data("test", "test")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Refuse `predict` without data."""
        raise self._no_data("predict", "predict")

    def _no_data(self, command: str, source: str) -> ConfigError:
        data = DATA.get(self.stage_kind, "a data module")
        return ConfigError(f"trainer.{command} has no data: pass it {data}({source}=…), or a DataLoader")

    def _arguments_given(self, given: dict[str, Any]) -> dict[str, Any]:
        try:
            return {name: rebuild(value) if name != "model_options" else value for name, value in given.items()}
        except UnknownClass as error:
            raise ConfigError(
                f"the checkpoint's settings cannot be restored: {error}. Import the module that defines it first, or "
                f"pass the argument to {type(self).__name__}.load_from_checkpoint"
            ) from None

    def _constructed(self, given: Mapping[str, Any]) -> None:
        """Save the arguments as plain values for loggers and checkpoints.

        Of arguments that are not plain, only the names are kept.
        """
        plain: dict[str, JSON] = {}
        self.unsaved_arguments: list[str] = []
        for name, value in given.items():
            try:
                plain[name] = describe(value)
            except NotPlain:
                self.unsaved_arguments.append(name)
        self.__dict__["_given"] = None  # do not keep a second reference to the objects
        if plain:
            self.save_hyperparameters(plain)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: "_PATH | IO",
        map_location: "_MAP_LOCATION_TYPE" = None,
        hparams_file: "_PATH | None" = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Load a module with its trained weights and the settings in the checkpoint, as Lightning does.

        Frozen weights are not in a checkpoint; they are loaded from the base model. Arguments that are not plain values
        (a function, a model in memory) are not in it either; if such an argument is needed, an error names it.

        Args:
            checkpoint_path: A `.ckpt` file of this class.
            map_location: See Lightning.
            hparams_file: See Lightning.
            strict: See Lightning.
            weights_only: See Lightning.
            **kwargs: Arguments of the constructor, which replace those in the checkpoint.

        Raises:
            ConfigError: If the file is missing or not a checkpoint, or if a needed argument is not in it.

        Example:
            >>> SFTModule.load_from_checkpoint("runs/sft/checkpoints/step=10.ckpt")  # doctest: +SKIP
        """
        name = f"{cls.__name__}.load_from_checkpoint"
        place = Path(str(checkpoint_path))
        if "://" not in str(checkpoint_path) and not place.exists():
            raise ConfigError(f"{name}: {place}: no such file (seen from {Path.cwd()})")
        if is_model_folder(place):
            raise ConfigError(
                f"{name}: {place} is a model folder, not a checkpoint; start from it with "
                f"{cls.__name__}({str(place)!r})"
            )
        if place.is_file():
            _check_unsaved(place, name, kwargs)
        try:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
        except TypeError as error:
            if "missing" not in str(error) or "'model'" not in str(error):
                raise
        raise ConfigError(
            f"{name} needs model=… and the other arguments of the module (lora=…, scorer=…): this checkpoint has no "
            f"settings. To use a trained model, load the model folder of its stage: {cls.__name__}('runs/NAME/model')"
        )

    def on_save_checkpoint(self, checkpoint: "StateDict") -> None:
        """Store the names of the arguments that the checkpoint does not contain."""
        checkpoint["unsaved_arguments"] = list(self.unsaved_arguments)

    def check_trainer(self, stage: str) -> None:
        """Raise `ConfigError` for data of another stage, or for Trainer settings that would fail later."""
        data, wanted = row_data_of(self.trainer), DATA.get(self.stage_kind)
        if stage == "fit" and wanted and data and data.stage_kind not in ("", self.stage_kind):
            raise ConfigError(f"{type(data).__name__} is for another stage; {type(self).__name__} needs {wanted}")
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, HoldsGradients):
            raise ConfigError(
                f"trainer.strategy is Lightning's {type(strategy).__name__}, with which skipped steps and incomplete "
                "windows of accumulate_grad_batches would change the weights; use zero2 or zero3 (docs/many-gpus.md)"
            )
        every = self.trainer.val_check_interval
        if stage == "fit" and isinstance(every, int | float) and every <= 0:
            raise ConfigError(
                f"trainer.val_check_interval is {every}; it must be a fraction of the epoch or a number of batches, "
                "above 0. To turn validation off, set trainer.limit_val_batches: 0"
            )

    def warn_unseen_validation(self) -> None:
        """Warn if there are validation rows but the run ended before any validation."""
        trainer, data = self.trainer, row_data_of(self.trainer)
        missed = data is not None and "validation" in data.prepared and bool(trainer.limit_val_batches)
        missed = missed and not trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed
        if missed and trainer.is_global_zero and not is_trial(trainer):
            log.warning(
                "data.validation was never used, because the run ended before the first validation, which follows an "
                "epoch. Set trainer.val_check_interval to a number of batches, or lower trainer.check_val_every_n_epoch"
            )


def _check_unsaved(path: Path, name: str, given: Container[str]) -> None:
    """Raise `ConfigError` if a checkpoint lacks arguments that the module cannot be created without."""
    try:
        facts = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError):
        return  # loading the file reports the error
    unsaved = facts.get("unsaved_arguments", []) if isinstance(facts, dict) else []
    missing = [argument for argument in unsaved if argument not in given]
    if wanted := [argument for argument in missing if argument not in UNUSED_BY_INFERENCE]:
        raise ConfigError(
            f"{name} needs {', '.join(f'{argument}=…' for argument in wanted)}, because a checkpoint stores only plain "
            "values"
        )
    if missing:
        log.warning("%s: loaded without %s, because a checkpoint stores only plain values", name, ", ".join(missing))


def check_arguments(
    model: str | Path | nn.Module,
    lora: LoRA | None,
    optimizer: OptimizerFactory | None,
    lr_scheduler: SchedulerFactory | None,
    model_options: "Mapping[str, JSON] | None",
    max_tokens_per_batch: int | None,
) -> None:
    """Raise `ConfigError` for unusable arguments of `RLHFModule`."""
    if not isinstance(model, str | Path | nn.Module) or not str(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise ConfigError(f"model.model is {got}; it must be a folder, a Hub id, or a loaded model")
    if isinstance(model, nn.Module) and not hasattr(model, "get_input_embeddings"):
        raise ConfigError(f"model.model is a {type(model).__name__}, which is not a transformers model")
    check_object("model.lora", lora, "LoRA(rank=16)")
    if lora is not None and not isinstance(lora, LoRA):
        got = f"{type(lora).__module__.partition('.')[0]}'s {type(lora).__name__}"
        raise ConfigError(f"model.lora is {got}; pass rlhf_lightning.LoRA(rank, alpha) instead")
    for name, factory, example in (
        ("optimizer", optimizer, "lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)"),
        ("lr_scheduler", lr_scheduler, "lambda optimizer: Warmup(optimizer, warmup_steps=10)"),
    ):
        if factory is not None and not callable(factory):
            shown = repr(factory).partition("\n")[0]
            raise ConfigError(f"model.{name} is {shown}; it must be a function that returns one, for example {example}")
    if not isinstance(options := model_options or {}, Mapping):
        raise ConfigError(f"model.model_options is {options!r}; it must be a mapping of from_pretrained's arguments")
    for name in ("dtype", "torch_dtype"):
        if name in options:
            raise ConfigError(f"model.model_options: {name} has its own setting: write model.dtype: {options[name]}")
    for name in ("num_labels", "id2label", "label2id"):
        if name in options and options[name] != 1:
            raise ConfigError(
                f"model.model_options: {name} is fixed, because a preference model has one score per response; leave "
                "it out"
            )
    if not isinstance(trust := options.get("trust_remote_code", False), bool):
        raise ConfigError(
            f"model.model_options: trust_remote_code is {trust!r}; it must be true or false, without quotes (any text, "
            "also 'false', would run the code)"
        )
    if isinstance(options.get("device_map"), str):
        raise ConfigError(
            "model.model_options: leave out device_map; the Trainer places the model (trainer.devices, "
            "trainer.strategy)"
        )
    if max_tokens_per_batch is not None:
        check_whole("model.max_tokens_per_batch", max_tokens_per_batch)
