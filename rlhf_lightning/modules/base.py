"""Base class of the three modules: model and optimizer, normalization of the loss, checkpoints, and saving."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_only
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import ParamsT
from torchmetrics import Metric

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings, recorded
from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.files import FORMAT, check_format
from rlhf_lightning.gguf.folder import model_folder, names_gguf
from rlhf_lightning.models import liger
from rlhf_lightning.models.base_weights import check_trainable
from rlhf_lightning.models.compiled_layers import CompileTimer, compile_layers
from rlhf_lightning.models.distillation import Distillation, Teacher
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.loading import Start, check_source, check_vocabulary
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.memory import checkpoint_layers, trained
from rlhf_lightning.models.offload import ActivationOffload
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.precision import cast_weights_only, weights_alone
from rlhf_lightning.models.saving import save_model
from rlhf_lightning.models.sharding import full_shape, full_state_dict, shard, zero3_gathered, zero3_of
from rlhf_lightning.modules.callback_checks import check_accumulation, check_callbacks
from rlhf_lightning.modules.epochs import end_restored_epoch
from rlhf_lightning.modules.hf_batches import Columns, fitted, refuse_other_names
from rlhf_lightning.modules.memory import MemoryAwareModule, check_memory_limit
from rlhf_lightning.modules.module_checks import check_batch, check_content
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.modules.step import StepEnd, StepNumbers, remove_step_end
from rlhf_lightning.modules.trainer_state import row_data_of
from rlhf_lightning.modules.usage_checks import OptimizerFactory, SchedulerFactory, check_arguments

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from transformers import PreTrainedModel

    from rlhf_lightning.types import JSON, StateDict, StepBatch, Tokenizer

log = logging.getLogger(__name__)
BatchT = TypeVar("BatchT", bound="StepBatch")

WHERE = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
"""Options of `from_pretrained` that locate a model, and its tokenizer with it."""


class RLHFModule(MemoryAwareModule, Generic[BatchT]):
    """Base class of the modules.

    It loads and saves the model, makes the optimizer, divides losses by the counts of a whole optimizer step, and
    checks batches, settings and checkpoints. A subclass builds what uses the model (`build`), and computes the loss
    (`training_step`) and the metrics of held-out rows (`evaluate`).

    Args:
        model: Folder, Hub id, GGUF file or `PreTrainedModel` to start from.
        lora: Train LoRA adapters with these settings; by default all weights are trained.
        optimizer: Called with the trainable parameters; by default AdamW at 1e-4 for adapters, 1e-5 for all weights.
        lr_scheduler: Called with the optimizer, and stepped after every optimizer step. `modules.schedules.Warmup` gets
            the number of steps from the Trainer.
        tokenizer: Object, folder or Hub id, if the tokenizer is not the model's own.
        chat_template: File or text of a template that replaces the tokenizer's.
        dtype: Data type of the loaded weights.
        model_options: Further arguments of `from_pretrained`.
        max_tokens_per_batch: Number of tokens per forward pass. The rows of a step run in groups within this budget, in
            one autograd graph. The defaults, 2,048 on a CPU and 16,384 elsewhere, were chosen by measurement.
        gradient_checkpointing: Recompute the activations of each layer in the backward pass instead of storing them.
        activation_offload: Store activations in CPU memory if the model is on a GPU; with gradient_checkpointing, only
            the input of each layer.
        memory_limit: Memory that a step may take on one device, as a number of bytes or text such as `8GB` or `8GiB`.
            Only as many layers are checkpointed as the estimate of docs/memory.md requires. Results do not change.
        compile: Compile the layers of the model with `torch.compile`.
        use_liger_kernel: Compute norms, SwiGLU and rotary embeddings with liger-kernel (on CUDA; docs/performance.md).
            By default where it is installed; True requires it, False never uses it.
        max_empty_steps: Number of consecutive optimizer steps without a trained token (all masked, or with advantage or
            weight 0) after which the run stops; None for no limit. Such a step changes no weight.

    Raises:
        ConfigError: If a setting is unusable.

    Example:
        >>> from rlhf_lightning import SFTModule, LoRA
        >>> module = SFTModule("Qwen/Qwen3-0.6B", lora=LoRA(rank=16))  # doctest: +SKIP
    """

    task = "CAUSAL_LM"
    stage_kind = ""
    requires: tuple[str, ...] = ("input_ids", "loss_mask")
    """Keys that a training batch must have."""
    measures_batches = True
    """True if batches of validation and test have the form of training batches."""
    on_bar: tuple[str, ...] = ()
    """Metrics of a step that the progress bar shows."""

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
        memory_limit: int | str | None = None,
        compile: bool = False,
        use_liger_kernel: bool | None = None,
        max_empty_steps: int | None = 50,
    ) -> None:
        super().__init__()
        dtype = str(dtype).removeprefix("torch.")  # Python users write torch.bfloat16
        check_arguments(
            model,
            lora=lora,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            model_options=model_options,
            max_tokens_per_batch=max_tokens_per_batch,
        )
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"model.dtype is {dtype!r}; it must be a dtype, for example float32 or bfloat16")
        self._start = Start(model, lora=lora, dtype=dtype, options=model_options or {})
        self.lora, self.dtype_name, self.model_options = lora, dtype, model_options or {}
        self.max_tokens_per_batch, self.gradient_checkpointing = max_tokens_per_batch, gradient_checkpointing
        self.activation_offload, self.compiles_layers = activation_offload, compile
        self.use_liger_kernel = use_liger_kernel
        self._compile_timer: CompileTimer | None = None
        self.memory_limit = check_memory_limit(memory_limit, gradient_checkpointing, activation_offload)
        if max_empty_steps is not None:
            check_whole("model.max_empty_steps", max_empty_steps)
        self.max_empty_steps, self.step_numbers = max_empty_steps, StepNumbers(())
        self.optimizer_factory, self.scheduler_factory = optimizer or self._default_optimizer, lr_scheduler
        self._tokenizer_source, self._chat_template = tokenizer, chat_template
        self._tokenizer: Tokenizer | None = None
        self._renderer: Renderer | None = None
        self._renderer_is_open = True
        """True while the renderer of a data module may still replace the current one."""
        self._trained_with: dict[str, Any] | None = None
        self.model: PreTrainedModel = None
        """The model; None until `configure_model` has loaded it."""
        self.teacher: Teacher | None = None
        # Frozen weights are not in the checkpoint; on_load_checkpoint checks which weights are missing.
        self.strict_loading = False
        self.register_load_state_dict_post_hook(_frozen_may_be_missing)

    # -- model and renderer ---------------------------------------------------------------------------------------

    @property
    def start_source(self) -> "str | Path | PreTrainedModel":
        """Folder, Hub id or model that the stage starts from; for a GGUF file, the folder with the converted model."""
        source = self._start.source
        return model_folder(str(source), self.model_options) if names_gguf(source) else source

    @property
    def tokenizer(self) -> "Tokenizer":
        """Tokenizer of the model, with its chat template."""
        if self._tokenizer is None:
            if isinstance(self.start_source, str):
                check_source(self.start_source)
            own = WHERE if self._tokenizer_source is None else WHERE[:1]  # the revision is that of the model
            place = {k: v for k, v in self.model_options.items() if k in own}
            self._tokenizer = load_tokenizer(self.start_source, self._tokenizer_source, self._chat_template, **place)
            if self._chat_template is not None and self._tokenizer_source is None and recorded(self.start_source):
                before = load_tokenizer(self.start_source, **place).chat_template
                if before != self._tokenizer.chat_template:
                    warn = "model.chat_template differs from the template that %s was trained with; using the setting"
                    rank_zero_only(log.warning)(warn, self.start_source)
        return self._tokenizer

    @property
    def renderer(self) -> Renderer:
        """Turns messages into tokens: the data module's renderer, or else one with the settings of the start model."""
        if self._renderer is not None and not self._renderer_is_open:
            return self._renderer
        if data := row_data_of(self._trainer):
            self._renderer, self._renderer_is_open = data.renderer, False
        elif self._renderer is None:
            settings = RenderingSettings.of(self.start_source)
            rank_zero_only(settings.log)()
            self._renderer = settings.renderer(self.tokenizer, own_tokenizer=self.own_tokenizer)
        else:
            return self._renderer
        self._renderer.also_stop_at(self.end_token_ids)
        return self._renderer

    @property
    def end_token_ids(self) -> list[int]:
        """Token ids that end a response according to the generation config of the start model."""
        return end_token_ids(self.start_source, self.tokenizer)

    @property
    def own_tokenizer(self) -> bool:
        """True if the tokenizer is the model's own."""
        return self._tokenizer_source is None or isinstance(self.start_source, nn.Module)

    def rendering(self) -> dict[str, Any]:
        """Rendering settings of training. `stage.json` records them, so that later commands render prompts equally."""
        if self._trained_with is not None:
            return self._trained_with
        data = row_data_of(self._trainer)
        shared = data.shared if data else {}
        sampler = getattr(self, "sampler", None)
        own_stop = getattr(sampler, "stop", None)
        stop = {} if own_stop is None else {"stop": list(own_stop)}
        return {**self.renderer.settings(), **shared, **stop}

    def setup(self, stage: str) -> None:
        """Check the Trainer's settings; its precision plugin then casts weights only, see `weights_alone`."""
        self.check_trainer(stage)
        if self.use_liger_kernel:  # the model may have been loaded before there was a Trainer
            liger.require(self.trainer.strategy.root_device)
        # The warning appears with every data module; using the module's hook is intended.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation
        weights_alone(self.trainer.precision_plugin)

    def heads(self) -> list[nn.Module]:
        """Score and value heads, which stay in float32 at any precision."""
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RLHFModule":
        return super()._apply(cast_weights_only(fn, self, self.heads()), recurse)

    def configure_model(self) -> None:
        """Load the model once. Lightning calls this before every command and when it loads a checkpoint."""
        if self.model is not None:
            return
        workdir = Path(self._trainer.default_root_dir) if self._trainer is not None else None
        start = self.start()
        self.model = start.load(workdir)
        self.fresh_adapter = start.fresh_adapter
        # Whether the weights below the adapter are those of its base folder, and the number of rows of the embedding:
        # a later change of that number changes them.
        self._below = start.base_kept, self.model.get_input_embeddings().weight.shape[0]
        check_vocabulary(self.model, self.tokenizer)
        self._use_liger_kernel(self.model)  # before a reference is copied from it, so that both round alike
        self.build()
        for part in self.forward_passes():
            if part.model is not self.model:
                self._use_liger_kernel(part.model)
            if self.gradient_checkpointing:
                checkpoint_layers(part.model)
            if self.activation_offload:
                part.saving = ActivationOffload
        if self.compiles_layers:
            if self._device_mesh is not None and self._device_mesh["tensor_parallel"].size() > 1:
                raise ConfigError("model.compile is untested with tensor parallelism. Turn one of them off")
            device = self.device if self._trainer is None else self._trainer.strategy.root_device
            self._compile_timer = compile_layers(self.model, device)
        if self._device_mesh is not None:
            # Heads first. Each is a separate FSDP group, because all weights of a group share one data type.
            for model in (*self.heads(), *self.modules_to_shard()):
                shard(model, self._device_mesh)
            for metric in self.modules():
                if isinstance(metric, Metric):  # so that each row is counted once
                    metric.process_group = self._device_mesh["data_parallel"].get_group()
        self.train(self.training)

    def _use_liger_kernel(self, model: nn.Module) -> None:
        conflict = None
        if self.compiles_layers:
            conflict = "model.compile fuses the same operations"
        elif self._device_mesh is not None and self._device_mesh["tensor_parallel"].size() > 1:
            conflict = "it is untested with tensor parallelism"
        elif self._trainer is not None and str(self._trainer.precision) == "64-true":
            conflict = "its kernels do not compute in float64"
        if self._trainer is not None:
            device = self._trainer.strategy.root_device
        elif torch.cuda.is_available():
            device = torch.device("cuda")  # where the model may be moved later; on a CPU its own modules run
        else:
            return
        liger.use(model, self.use_liger_kernel, device, conflict)

    def modules_to_shard(self) -> list[nn.Module]:
        """Modules that `ModelParallelStrategy` shards in addition to `heads`: trained ones, and large frozen ones."""
        return [self.model, *([] if self.teacher is None else self.teacher.reference.modules_to_shard)]

    def load_teacher(self, settings: Distillation, temperature: float) -> None:
        """Load the teacher of distillation; a subclass calls this in `build`.

        Args:
            settings: The settings of distillation.
            temperature: Temperature of both distributions, unless the settings have one.

        Raises:
            ConfigError: If the teacher cannot be loaded, has another vocabulary, or would be tensor-parallel.
        """
        if self._device_mesh is not None and self._device_mesh["tensor_parallel"].size() > 1:
            raise ConfigError("model.distillation is untested with tensor parallelism. Turn one of them off")
        self.teacher = settings.build(self.tokenizer, self.max_tokens_per_batch, self.dtype_name, temperature)
        self.teacher_model = self.teacher.model  # so that it moves with this module
        # Lightning warns of modules in eval mode, as those of the teacher are meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.model.eval()
        return self

    def start(self) -> Start:
        """How to load the start model."""
        return replace(self._start, task=self.task)

    @abstractmethod
    def build(self) -> None:
        """Build the objects that use the model. Called once, after the model is loaded."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute logits as transformers does. Loads the model if it is not loaded yet.

        Args:
            input_ids: Token ids, `[B, T]`.
            attention_mask: 1 at tokens, 0 at padding, `[B, T]`; all ones by default.

        Returns:
            Logits, `[B, T, V]`.
        """
        self.configure_model()
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    @property
    @abstractmethod
    def packed_forward(self) -> PackedForward:
        """The packed forward pass of the trained model."""

    def forward_passes(self) -> list[PackedForward]:
        """The packed forward passes of all trained models."""
        return [self.packed_forward]

    # -- optimizer ------------------------------------------------------------------------------------------------

    def _default_optimizer(self, parameters: ParamsT) -> Optimizer:
        # A fused optimizer would undo the scaling of the loss itself, which Lightning cannot combine with clipping.
        scaled = getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None) is not None
        fused = not scaled and self.device.type in ("cpu", "cuda")
        return AdamW(parameters, lr=1e-4 if self.lora else 1e-5, weight_decay=0.0, fused=fused)

    def parameter_groups(self) -> ParamsT:
        """What the optimizer is called with: parameters, or parameter groups with their own learning rates."""
        return trained(self)

    def configure_optimizers(self) -> "OptimizerLRScheduler":
        check_trainable(self.model)
        try:
            optimizer = self.optimizer_factory(self.parameter_groups())
            scheduler = self.scheduler_factory(optimizer) if self.scheduler_factory else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.optimizer or model.lr_scheduler cannot be built: {error}") from error
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"model.optimizer returned {optimizer!r}; it must return an optimizer")
        for name, devices in (("differentiable", ()), ("capturable", ("cuda",))):
            if any(group.get(name) for group in optimizer.param_groups) and self.device.type not in devices:
                raise ConfigError(
                    f"model.optimizer: {name} is only for {' '.join(devices) or 'meta-learning'}; leave it out"
                )
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            if not (monitor := getattr(scheduler, "monitor", None)):
                raise ConfigError(
                    "model.lr_scheduler ReduceLROnPlateau needs the name of its metric: use "
                    "lightning.pytorch.cli.ReduceLROnPlateau with init_args: {monitor: val/nll}"
                )
            # Its metric is known only after the validation at the end of an epoch, so it is stepped once per epoch.
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "monitor": monitor},
            }
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, under `bf16-mixed` also those of a fused optimizer.

        Lightning refuses that under any mixed precision, but the reason applies only to `16-mixed`: there, a fused
        optimizer undoes the scaling of the loss after clipping. `bf16-mixed` does not scale the loss.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
            return
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        # An earlier `validate` leaves metric states created in inference mode, which training cannot update.
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
        if (clip := self.trainer.gradient_clip_val) is not None and clip < 0:
            raise ConfigError(
                f"trainer.gradient_clip_val is {clip}; it must be at least 0, because gradients would change sign"
            )
        if (windows := self.trainer.accumulate_grad_batches) < 1:
            raise ConfigError(f"trainer.accumulate_grad_batches is {windows}; it must be at least 1")
        self.fit_into_limit()
        if longest := self.longest_row():
            context = self.packed_forward.context
            if self.stage_kind != "policy" and context and longest > context:  # sampling has its own check
                raise ConfigError(
                    f"the longest row of data.train has {longest} tokens, but the model has only {context} positions. "
                    f"Set data.max_length: {context} (data.overlong says what happens to longer rows), or, if the "
                    "model supports it, a larger max_position_embeddings in model.model_options"
                )
            # Under a limit those of all models, because a later comparison would come on top of other activations.
            checked = [self.packed_forward] if self.memory_limit is None else self.forward_passes()
            with zero3_gathered(self.model):
                for part in checked:
                    part.check(longest)
        # Recorded now, because the module may later be evaluated on rows that are rendered differently.
        self._renderer_is_open, self._trained_with = True, None
        self._trained_with = self.rendering()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Callbacks of every run of the module; a subclass adds its own."""
        if self._trainer is not None:
            remove_step_end(self._trainer)
            check_callbacks(self, self._trainer)
        return [StepEnd(self.step_numbers, self.why_empty, self.on_bar, self.max_empty_steps)]

    def longest_row(self) -> int:
        """Number of tokens of the longest training row; 0 if unknown."""
        data = row_data_of(self.trainer)
        prepared = data.prepared.get("train") if data else None
        return prepared.totals()[2] if prepared else 0

    def on_train_start(self) -> None:
        end_restored_epoch(self.trainer)
        # Not in configure_optimizers: computing the number of steps there would set up the dataloaders before their
        # state is restored, and a resumed run would restart its epoch.
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Warmup) and config.scheduler.total_steps is None:
                check_accumulation(config.scheduler, self.trainer)
                steps = self.trainer.estimated_stepping_batches
                if not 0 <= steps < float("inf"):
                    raise ConfigError(
                        "the learning rate schedule needs the number of optimizer steps, which is unknown when "
                        "data.train is streamed; set trainer.max_steps, or total_steps of model.lr_scheduler"
                    )
                config.scheduler.set_total_steps(int(steps))

    def on_before_batch_transfer(self, batch: Columns, dataloader_idx: int) -> Columns:
        """Convert a batch of another dataloader into the module's format; see `hf_batches.fitted`."""
        if type(self).training_step.__module__.startswith("rlhf_lightning."):  # a user's own step may read any key
            refuse_other_names(batch, getattr(self, "_wanted", ()))
        embedding = None if self.model is None else self.model.get_input_embeddings()
        return fitted(batch, self._tokenizer, None if embedding is None else full_shape(embedding.weight)[0])

    def on_train_end(self) -> None:
        self.warn_unseen_validation()

    def on_train_batch_start(self, batch: Columns, batch_idx: int) -> None:
        check_batch(batch, self.requires, type(self).__name__)

    def on_train_batch_end(self, outputs: Any, batch: Columns, batch_idx: int) -> None:
        if self._compile_timer and (seconds := self._compile_timer.lap()):
            log.info("model.compile: %.0f s of step %d went into compiling", seconds, self.global_step)

    def on_validation_batch_start(self, batch: Columns, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.measures_batches:
            check_batch(batch, self.requires, type(self).__name__)

    on_test_batch_start = on_validation_batch_start

    # -- evaluation -----------------------------------------------------------------------------------------------

    def validation_step(self, batch: BatchT, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: BatchT, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @abstractmethod
    def evaluate(self, batch: BatchT, name: str) -> None:
        """Add a validation or test batch to the metrics, and log them.

        Args:
            batch: The batch.
            name: `val` or `test`.
        """

    # -- loss -----------------------------------------------------------------------------------------------------

    def normalized(self, total: Tensor, batch: "StepBatch", count: str | None, local: Tensor | float) -> Tensor:
        """Divide a sum by the count of the whole optimizer step, over all ranks and accumulated micro-batches.

        Lightning divides the loss by the number of micro-batches, and DDP averages gradients over ranks. This method
        multiplies by both factors, so that the gradient equals that of one large batch.

        Args:
            total: Sum over this micro-batch, a scalar.
            batch: The batch, with its `denominators`; a batch of another dataloader has none.
            count: Name of the denominator; None if the sum itself is the loss.
            local: Count of this micro-batch, used for a batch without denominators.

        Returns:
            The loss, a scalar.
        """
        denominators = batch.get("denominators")
        if denominators is None or self._trainer is None:
            return total / max(float(local), 1.0)
        return total * (self._pieces / (max(denominators[count], 1.0) if count else 1.0))

    @property
    def _pieces(self) -> int:
        """Number of losses that are averaged in an optimizer step: ranks times micro-batches."""
        return data_ranks(self.trainer)[1] * self.trainer.accumulate_grad_batches

    def share(self, loss: Tensor, batch: "StepBatch") -> tuple[Tensor, Tensor | None]:
        """Contribution of a micro-batch's loss to the logged loss of its step; see `StepNumbers.add`.

        Args:
            loss: The loss that `training_step` returns, a scalar.
            batch: The batch; one of another dataloader has no `denominators`.

        Returns:
            A sum, and its count: None if the sums add up to the loss, 1 if the losses are averaged.
        """
        if batch.get("denominators") is None or self._trainer is None:
            return loss, torch.ones_like(loss)
        return loss / self._pieces, None

    def why_empty(self) -> str:
        """Why a step may have had no trained token, and what to change."""
        return "Check the loss_mask of the batches."

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """The trained weights. Frozen ones are loaded from the start model."""
        state = {} if destination is None else destination
        super().state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)
        # In place: if the module is part of another one, such as an averaged model, only the contents of `state` are
        # saved.
        for name in _frozen(self):
            state.pop(prefix + name, None)
        return dict(state)

    def on_save_checkpoint(self, checkpoint: "StateDict") -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["format"] = FORMAT

    def on_load_checkpoint(self, checkpoint: "StateDict") -> None:
        path = self._trainer.ckpt_path if self._trainer is not None else None
        check_format(checkpoint.get("format"), f"the checkpoint {path}" if path else "the checkpoint")
        if self.model is None:
            self.configure_model()
        # With sharded weights, the strategy loads them and has checked the names already.
        if "state_dict" in checkpoint:
            self.check_names(set(checkpoint["state_dict"]))
            resumes = self._trainer is not None and self._trainer.state.fn == "fit"
            check_content(self, checkpoint, resumes)

    def check_names(self, found: set[str], wanted: set[str] | None = None) -> None:
        """Raise `ConfigError` if a checkpoint does not contain exactly the trained weights.

        Args:
            found: Names of the weights in the checkpoint.
            wanted: Names that it must have; by default those of `state_dict`.
        """
        wanted = set(self.state_dict()) if wanted is None else wanted
        if wanted != found:
            example = sorted(wanted ^ found)[0]
            raise ConfigError(
                f"the checkpoint does not match this stage and its settings: {len(wanted - found)} weights are "
                f"missing, {len(found - wanted)} are unexpected (for example {example}). Start a new stage from a "
                "model folder instead."
            )

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder; see `models.saving`. With sharded weights, all ranks must call this together.

        Args:
            folder: The folder to write.
        """
        self.configure_model()
        with zero3_gathered(self.model):
            weights = full_state_dict(self.model)
            if (weights is None and zero3_of(self.model) is None) or self.global_rank == 0:
                self._write_folder(Path(folder), weights)

    def _write_folder(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        kept, rows = self._below
        kept = kept and rows == self.model.get_input_embeddings().weight.shape[0]
        facts, rendering = self.stage_facts(), self.rendering()
        stop = (*self.renderer.stop_strings, *rendering["stop"])
        template = self.renderer.template if self.task == "SEQ_CLS" and self.renderer.format == "chat" else None
        stops = rendering["stop_token_ids"]
        save_model(self.model, self.tokenizer, folder, stops, weights, kept, facts, stop, template)

    def stage_facts(self) -> "dict[str, JSON]":
        """Facts about the module that `stage.json` records."""
        source = self.start_source
        name = getattr(source, "name_or_path", None) if isinstance(source, nn.Module) else str(source)
        rendering = self.rendering()
        facts = {
            "format": FORMAT,
            "kind": self.stage_kind,
            "start": name,
            "stop_token_ids": rendering["stop_token_ids"],
        }
        teacher = {} if self.teacher is None else {"teacher": self.teacher.settings.teacher}
        return {**facts, **teacher, "rendering": rendering}


def _frozen(module: nn.Module) -> set[str]:
    """The names of the parameters that are not trained."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def _frozen_may_be_missing(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """`load_state_dict` hook: ignore missing frozen weights, also if the module is part of another module."""
    frozen = _frozen(module)
    incompatible.missing_keys[:] = [
        key
        for key in incompatible.missing_keys
        if key not in frozen and not any(key.endswith(f".{name}") for name in frozen)
    ]
