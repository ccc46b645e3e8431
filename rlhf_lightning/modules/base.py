"""What the three modules share: building the model, optimizer, normalising a loss, checkpoints, saving."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric

from rlhf_lightning.data.asked import Asking, recorded
from rlhf_lightning.data.base import data_ranks
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.files import FORMAT, check_format
from rlhf_lightning.models.base_weights import check_trainable
from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.loading import Start, check_source, check_vocabulary, compile_layers
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.offload import ActivationOffload
from rlhf_lightning.models.precision import cast_weights_only, weights_alone
from rlhf_lightning.models.saving import save_model
from rlhf_lightning.models.sharding import split, whole_weights
from rlhf_lightning.modules.epochs import end_restored_epoch
from rlhf_lightning.modules.foreign import fitted, refuse_other_names
from rlhf_lightning.modules.module_checks import check_batch, check_content
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.modules.step import StepEnd, StepNumbers, forget
from rlhf_lightning.modules.told import Told, check_arguments

log = logging.getLogger(__name__)

WHERE = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Options of `from_pretrained` that say where a model is found, and its tokenizer with it."""
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class RLHFModule(Told):
    """Base of the modules.

    Args:
        model: folder, Hub id or `PreTrainedModel` to start from.
        lora: train adapters of these settings; all weights by default.
        optimizer: called with the trainable parameters; AdamW at 1e-4 for adapters, 1e-5 for all weights, by default.
        lr_scheduler: called with the optimizer, stepped every optimizer step; `modules.schedules.Warmup` learns the
            number of steps from the Trainer.
        tokenizer: object, folder or Hub id where it is not the model's.
        chat_template: file or text of a template to use in place of the tokenizer's.
        dtype: of the weights as loaded.
        model_options: further arguments of `from_pretrained`.
        max_tokens_per_batch: tokens that the model computes at once. A step's rows run in groups under this budget
            inside one graph; by default what was measured to be fast, 2,048 on a CPU and 16,384 elsewhere.
        gradient_checkpointing: compute each layer's activations again in backward instead of keeping them.
        activation_offload: keep what backward needs in the memory of the CPU, where the model is on a GPU; with
            gradient_checkpointing that is only the input of each layer.
        compile: compile the layers of the model with `torch.compile`.
        max_empty_steps: optimizer steps in a row in which no token is trained (all masked, or of no advantage, or of
            no weight) at which the run is stopped; null for never. Such a step moves no weight.
    """

    task = "CAUSAL_LM"
    stage_kind = ""
    takes: tuple[str, ...] = ("input_ids", "mask")
    """What a batch of training must have."""
    measures_batches = True
    """Whether the batches of validation and test are as those of training."""
    on_bar: tuple[str, ...] = ()
    """The numbers of a step that the progress bar shows."""

    def __init__(
        self,
        model: Any,
        lora: LoRA | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        model_options: dict[str, Any] | None = None,
        max_tokens_per_batch: int | None = None,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        compile: bool = False,
        max_empty_steps: int | None = 50,
    ) -> None:
        super().__init__()
        dtype = str(dtype).removeprefix("torch.")  # torch.bfloat16 is what it is called in Python
        check_arguments(
            model,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            model_options=model_options,
            max_tokens_per_batch=max_tokens_per_batch,
        )
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"model.dtype is {dtype!r}; for example float32 or bfloat16")
        # In a tuple, so that a model given as an object is not registered a second time beside `self.model`.
        self._start = (model,)
        self.lora, self.dtype_name, self.model_options = lora, dtype, model_options or {}
        self.max_tokens_per_batch, self.gradient_checkpointing = max_tokens_per_batch, gradient_checkpointing
        self.activation_offload, self.compiles_layers = activation_offload, compile
        if max_empty_steps is not None:
            check_whole("model.max_empty_steps", max_empty_steps)
        self.max_empty_steps, self.step_numbers = max_empty_steps, StepNumbers(())
        self.optimizer_factory, self.scheduler_factory = optimizer or self._default_optimizer, lr_scheduler
        self._tokenizer_source, self._chat_template = tokenizer, chat_template
        self._tokenizer: Any = None
        self._renderer: Renderer | None = None
        self._renderer_is_open = True
        """Whether that of a data module still takes the place of what was made without one."""
        self._trained_with: dict[str, Any] | None = None
        self.model: Any = None
        # Frozen weights are not in the checkpoint; what is missing is checked in on_load_checkpoint.
        self.strict_loading = False

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def start_source(self) -> Any:
        """The folder, Hub id or model that the stage starts from."""
        return self._start[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model, with its chat template."""
        if self._tokenizer is None:
            if isinstance(self.start_source, str):
                check_source(self.start_source)
            own = WHERE if self._tokenizer_source is None else WHERE[:1]  # another tokenizer has another revision
            place = {k: v for k, v in self.model_options.items() if k in own}
            self._tokenizer = load_tokenizer(self.start_source, self._tokenizer_source, self._chat_template, **place)
            if self._chat_template is not None and self._tokenizer_source is None and recorded(self.start_source):
                before = load_tokenizer(self.start_source, **place).chat_template
                if before != self._tokenizer.chat_template:
                    warn = "model.chat_template is not the template that %s was trained with: the setting is used"
                    rank_zero_only(log.warning)(warn, self.start_source)
        return self._tokenizer

    @property
    def renderer(self) -> Renderer:
        """How this module turns messages into tokens: that of its data module, else as its start was trained."""
        if self._renderer is not None and not self._renderer_is_open:
            return self._renderer
        shared = getattr(getattr(self._trainer, "datamodule", None), "renderer", None)
        if shared is not None:
            self._renderer, self._renderer_is_open = shared, False
        elif self._renderer is None:
            asking = Asking.of(self.start_source)
            rank_zero_only(asking.log)()
            self._renderer = asking.renderer(self.tokenizer, own_tokenizer=self.own_tokenizer)
        else:
            return self._renderer
        self._renderer.also_stop_at(self.end_token_ids)
        return self._renderer

    @property
    def end_token_ids(self) -> list[int]:
        """The ids that end a response by the generation config of the model that the stage starts from."""
        return end_token_ids(self.start_source, self.tokenizer)

    @property
    def own_tokenizer(self) -> bool:
        """Whether the tokenizer is the model's."""
        return self._tokenizer_source is None or isinstance(self.start_source, nn.Module)

    def rendering(self) -> dict[str, Any]:
        """How the model was asked in training, for `stage.json`: what asks it again later does it so."""
        if self._trained_with is not None:
            return self._trained_with
        shared = getattr(getattr(self._trainer, "datamodule", None), "shared", {})
        sampler = getattr(self, "sampler", None)
        own_stop = getattr(sampler, "own_stop", None)
        stop = {} if own_stop is None else {"stop": list(own_stop)}
        return {**self.renderer.settings(), **shared, **stop}

    def setup(self, stage: str) -> None:
        self.check_trainer(stage)
        # True with any data module: that the hook here is used is what is meant.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation
        weights_alone(self.trainer.precision_plugin)

    def heads(self) -> list[nn.Module]:
        """Score and value heads, which stay in float32 under any precision."""
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RLHFModule":
        return super()._apply(cast_weights_only(fn, self, self.heads()), recurse)

    def configure_model(self) -> None:
        """Load the model, once: Lightning calls this before every command and when loading a checkpoint."""
        if self.model is not None:
            return
        workdir = Path(self._trainer.default_root_dir) if self._trainer is not None else None
        start = self.start()
        self.model = start.load(workdir)
        self.fresh_adapter = start.fresh_adapter
        self._below = start.base_kept, self.model.get_input_embeddings().weight.shape[0]
        check_vocabulary(self.model, self.tokenizer)
        self.build()
        for part in self.forward_passes():
            if self.gradient_checkpointing:
                part.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.activation_offload:
                part.saving = ActivationOffload
        if self.compiles_layers:
            if self._device_mesh is not None and self._device_mesh["tensor_parallel"].size() > 1:
                raise ConfigError("model.compile was never tried with tensor parallel: set one of them off")
            compile_layers(self.model)
        if self._device_mesh is not None:
            # Heads first: each is a group of its own, since the weights of a group have one type.
            for model in (*self.heads(), *self.parts_to_split()):
                split(model, self._device_mesh)
            for metric in self.modules():
                if isinstance(metric, Metric):  # which counts each row once
                    metric.process_group = self._device_mesh["data_parallel"].get_group()
        self.train(self.training)

    def parts_to_split(self) -> list[nn.Module]:
        """Beside `heads`, what is split over ranks under `ModelParallelStrategy`: what is trained or as large."""
        return [self.model]

    def start(self) -> Start:
        """What to load."""
        return Start(self.start_source, self.task, self.lora, self.dtype_name, self.model_options)

    @abstractmethod
    def build(self) -> None:
        """Make what stands on the model; called once after it is loaded."""

    @property
    @abstractmethod
    def forward_pass(self) -> Forward:
        """What runs the trained model."""

    def forward_passes(self) -> list[Forward]:
        """What runs each model that is trained."""
        return [self.forward_pass]

    # -- optimizer ------------------------------------------------------------------------------------------------

    def _default_optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        mixed = isinstance(getattr(self._trainer, "precision_plugin", None), MixedPrecision)
        # Lightning refuses to clip gradients of a fused optimizer under mixed precision.
        fused = not mixed and self.device.type in ("cpu", "cuda")
        return AdamW(parameters, lr=1e-4 if self.lora else 1e-5, weight_decay=0.0, fused=fused)

    def parameter_groups(self) -> list[Any]:
        """What the optimizer is called with: parameters, or groups of them with rates of their own."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        check_trainable(self.model)
        try:
            optimizer = self.optimizer_factory(self.parameter_groups())
            scheduler = self.scheduler_factory(optimizer) if self.scheduler_factory else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.optimizer or model.lr_scheduler cannot be made: {error}") from error
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"model.optimizer returned {optimizer!r}; it must return an optimizer")
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            if not (monitor := getattr(scheduler, "monitor", None)):
                raise ConfigError(
                    "model.lr_scheduler ReduceLROnPlateau needs the metric that it goes by: "
                    "lightning.pytorch.cli.ReduceLROnPlateau with init_args: {monitor: val/nll}"
                )
            # It looks at its metric where that is measured: after an epoch with its validation.
            plateau = {"scheduler": scheduler, "interval": "epoch", "monitor": monitor}
            return {"optimizer": optimizer, "lr_scheduler": plateau}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        # A `validate` before this left states behind that were made in inference mode, which training cannot update.
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        if (clip := self.trainer.gradient_clip_val) is not None and clip < 0:
            raise ConfigError(f"trainer.gradient_clip_val is {clip}: gradients would be turned round; 0 or above")
        if (windows := self.trainer.accumulate_grad_batches) < 1:
            raise ConfigError(f"trainer.accumulate_grad_batches is {windows}: nothing would be trained; at least 1")
        if longest := self.longest_row():
            self.forward_pass.check(longest)
        # Kept from now on: later the module may be measured with rows that are rendered otherwise.
        self._renderer_is_open, self._trained_with = True, None
        self._trained_with = self.rendering()

    def configure_callbacks(self) -> list[pl.Callback]:
        """What every run of the module has; a subclass adds to it."""
        forget(self._trainer)
        return [StepEnd(self.max_empty_steps)]

    def longest_row(self) -> int:
        """Tokens of the longest row that will be trained on; 0 where it is not known before."""
        prepared = getattr(getattr(self.trainer, "datamodule", None), "prepared", {}).get("train")
        return max((row.tokens for row in prepared.rows), default=0) if prepared else 0

    def on_train_start(self) -> None:
        end_restored_epoch(self.trainer)
        # Not in configure_optimizers: asking for the number of steps there would set up the loaders before their
        # state is restored, and a resumed run would start its epoch anew.
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Warmup) and config.scheduler.total_steps is None:
                config.scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What another loader's batches say in other ways, in the way that the module computes with."""
        if type(self).training_step.__module__.startswith("rlhf_lightning."):  # one of a user's may read anything
            refuse_other_names(batch, getattr(self, "_wanted", ()))
        embedding = None if self.model is None else self.model.get_input_embeddings()
        return fitted(batch, self._tokenizer, None if embedding is None else embedding.weight.shape[0])

    def on_train_end(self) -> None:
        self.warn_unseen_validation()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        check_batch(self, batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.measures_batches:
            check_batch(self, batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.measures_batches:
            check_batch(self, batch)

    # -- loss -----------------------------------------------------------------------------------------------------

    def normalised(self, total: Tensor, batch: dict[str, Any], count: str | None, local: Tensor | float) -> Tensor:
        """`total` divided by the count of its whole optimizer step, over all ranks and accumulated micro-batches.

        Lightning divides by the number of micro-batches and DDP by the number of ranks; both are multiplied back, so
        that the gradient is that of one large batch. A batch of another loader has no counts: then `local` is used.
        Without a `count`, the step's sum is the loss.
        """
        denominators = batch.get("denominators")
        if denominators is None or self._trainer is None:
            return total / max(float(local), 1.0)
        return total * (self._pieces / (max(denominators[count], 1.0) if count else 1.0))

    @property
    def _pieces(self) -> int:
        """Into how many losses a step's is divided, over ranks and micro-batches."""
        return data_ranks(self.trainer)[1] * self.trainer.accumulate_grad_batches

    def share(self, loss: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What a loss, as `training_step` returns it, adds to that of the step; see `StepNumbers.add`."""
        if batch.get("denominators") is None or self._trainer is None:
            return loss, torch.ones_like(loss)
        return loss / self._pieces, None

    def why_empty(self) -> str:
        """Why a step may have had no trained token, and what to change."""
        return "Look at the masks of the batches."

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained; what is frozen comes from the start of the stage."""
        state = super().state_dict(*args, **kwargs)
        frozen = {
            name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad
        }
        return {name: value for name, value in state.items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["format"] = FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = self._trainer.ckpt_path if self._trainer is not None else None
        check_format(checkpoint.get("format"), f"the checkpoint {path}" if path else "the checkpoint")
        if self.model is None:
            self.configure_model()
        # Where weights are split, the strategy loads them, and has asked before.
        if "state_dict" in checkpoint:
            self.check_names(set(checkpoint["state_dict"]))
            check_content(self, checkpoint)

    def check_names(self, found: set[str]) -> None:
        """Raise `ConfigError` where a checkpoint does not hold the weights that are trained."""
        wanted = set(self.state_dict())
        if wanted != found:
            odd = sorted(wanted ^ found)[0]
            raise ConfigError(
                f"the checkpoint is not of this stage and settings: {len(wanted - found)} weights are missing, "
                f"{len(found - wanted)} are unknown (for example {odd}). Start a new stage from a model folder instead."
            )

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder; see `models.saving`. Where weights are split over ranks, all of them must call it."""
        self.configure_model()
        weights = whole_weights(self.model)
        if weights is None or self.global_rank == 0:
            kept, rows = self._below
            kept = kept and rows == self.model.get_input_embeddings().weight.shape[0]
            facts, rendering = self.stage_facts(), self.rendering()
            stop = (*self.renderer.stop_strings, *rendering["stop"])
            template = self.renderer.template if self.task == "SEQ_CLS" and self.renderer.format == "chat" else None
            stops = facts["stop_token_ids"]
            save_model(self.model, self.tokenizer, Path(folder), stops, weights, kept, facts, stop, template)

    def stage_facts(self) -> dict[str, Any]:
        """What `stage.json` says of the module."""
        source = self.start_source
        name = getattr(source, "name_or_path", None) if isinstance(source, nn.Module) else str(source)
        rendering = self.rendering()
        facts = {
            "format": FORMAT,
            "kind": self.stage_kind,
            "start": name,
            "stop_token_ids": rendering["stop_token_ids"],
        }
        return {**facts, "rendering": rendering}
