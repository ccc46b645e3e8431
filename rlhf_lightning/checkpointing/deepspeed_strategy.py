"""Shards training over devices with DeepSpeed: `--trainer.strategy zero2` or `zero3`."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.deepspeed import _DEEPSPEED_AVAILABLE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_lightning.checkpointing.io import damage, folder_of_shards
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import check_format
from rlhf_lightning.models.lora import is_quantized
from rlhf_lightning.models.offload import placements
from rlhf_lightning.models.sharding import ZeRO3, use_zero3
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.preference import PreferenceModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepspeed import DeepSpeedEngine
    from lightning.fabric.utilities.types import _PATH
    from lightning.pytorch.utilities.types import STEP_OUTPUT

    from rlhf_lightning.types import JSON, StateDict

TAG = "checkpoint"
"""Name of the folder in a checkpoint, as Lightning writes it."""
KNOWN = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What DeepSpeed's checkpoints contain apart from tensors and plain values."""


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy` for the modules of this package, on GPUs and on CPUs.

    ZeRO-2 shards gradients and optimizer state; ZeRO-3 also shards the weights of all models of the module. Under
    ZeRO-3, every device holds all weights while a round is sampled and during validation. A checkpoint is a folder with
    the shards of all ranks, from which a run resumes with the same number of devices; it is written atomically and
    verified, as those of `FSDP2`.

    Unlike Lightning's class, a step without trained tokens and a step that is not finite change nothing, and an
    incomplete window of `accumulate_grad_batches` at the end of an epoch is a step.

    Args:
        stage: 2 or 3.
        kwargs: Further arguments of Lightning's `DeepSpeedStrategy`; those for offloading are refused.

    Raises:
        ConfigError: If DeepSpeed is not installed, or an argument is not supported.

    Example:
        >>> strategy = DeepSpeed(stage=3)  # doctest: +SKIP
    """

    handles_gradient_accumulation = False

    def __init__(self, stage: int = 2, **kwargs: Any) -> None:
        if stage not in (2, 3):
            raise ConfigError(f"strategy: stage is {stage}; it must be 2 or 3. For whole weights, use ddp")
        if refused := sorted({"config", "offload_optimizer", "offload_parameters", "remote_device"} & kwargs.keys()):
            raise ConfigError(f"strategy: {', '.join(refused)} is untested with this package; leave it out")
        if not _DEEPSPEED_AVAILABLE:
            raise ConfigError("strategy: DeepSpeed is not installed; pip install 'rlhf-lightning[deepspeed]'")
        super().__init__(stage=stage, exclude_frozen_parameters=True, **kwargs)
        self._zero3: ZeRO3 | None = None
        self._gathered = ExitStack()

    # -- setup ----------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed wants an index also for a CPU.
        device = super().root_device
        return device if device.type == "cuda" else torch.device(device.type, 0)

    def setup_environment(self) -> None:
        from deepspeed.accelerator import get_accelerator

        assert self.accelerator is not None
        DDPStrategy.setup_environment(self)  # Lightning's class refuses everything but CUDA
        if (known := get_accelerator().device_name()) != self.root_device.type:
            raise ConfigError(
                f"trainer.accelerator is {self.root_device.type}, but DeepSpeed has chosen {known}: set the "
                f"environment variable DS_ACCELERATOR={self.root_device.type}"
            )

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _format_batch_size_and_grad_accum_config(self) -> None:
        # Lightning would ask the dataloader for its batch size before the model is loaded, to log the throughput. It
        # divides the loss by the number of micro-batches; DeepSpeed would do so again.
        assert isinstance(self.config, dict)
        clip = self.lightning_module.trainer.gradient_clip_val if self.lightning_module else None
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        self.config |= {**sizes, "gradient_clipping": clip or 0.0}

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        # DeepSpeed would shard the weights while they are loaded, before the numerical checks of the package.
        self._init_config_if_needed()
        yield

    def setup(self, trainer: pl.Trainer) -> None:
        # DeepSpeed clips gradients itself, by the trainer's setting.
        warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping internally")
        module = self.lightning_module
        if not isinstance(module, RLHFModule):
            raise ConfigError(f"DeepSpeed supports only modules of rlhf_lightning, not {type(module).__name__}")
        _check(module, self.zero_stage_3)
        super().setup(trainer)

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        module = self.lightning_module
        assert isinstance(module, RLHFModule)
        if self._zero3 is not None:
            raise ConfigError("a second fit in the same process is not supported with ZeRO-3; start a new process")
        super()._initialize_deepspeed_train(model)
        if self.zero_stage_3:
            models = [module, *module.heads(), *module.modules_to_shard()]
            self._zero3 = use_zero3(module, models, self._zero_optimizer.parameter_offload)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        # Every device holds the whole model, as for sampling; DeepSpeed would remove the hooks of all its modules.
        self.model = model
        if self._zero3 is None:
            self.model_to_device()
        else:
            self._gathered.enter_context(self._zero3.gathered())

    @property
    def _engine(self) -> "DeepSpeedEngine":
        return self.model

    @property
    def _zero_optimizer(self) -> Any:
        return self._engine.optimizer

    # -- steps ----------------------------------------------------------------------------------------------------

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context manager around a micro-batch that no optimizer step follows."""
        self._engine.set_gradient_accumulation_boundary(False)
        yield

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: "Callable[[], Any]",
        model: "pl.LightningModule | nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        self._engine.set_gradient_accumulation_boundary(True)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def local_gradients(self) -> list[Tensor]:
        """This rank's shards of the gradients, before an optimizer step."""
        shards = self._zero_optimizer.averaged_gradients.values()
        return [gradient for shard in shards for gradient in shard or ()]

    def drop_gradients(self) -> None:
        """Make the optimizer step that follows change neither weights nor optimizer state."""
        optimizer = self._zero_optimizer
        optimizer.zero_grad()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
        self._engine.set_gradient_accumulation_boundary(False)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        if self._zero3 is not None:
            self._gathered.enter_context(self._zero3.gathered())

    def on_validation_end(self) -> None:
        if self.model is not self.lightning_module:  # during fit
            self._gathered.close()

    def validation_step(self, *args: Any, **kwargs: Any) -> "STEP_OUTPUT":
        assert self.lightning_module is not None
        return self.lightning_module.validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> "STEP_OUTPUT":
        assert self.lightning_module is not None
        return self.lightning_module.test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.predict_step(*args, **kwargs)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return {}  # DeepSpeed writes the weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return {}

    def save_checkpoint(
        self, checkpoint: "StateDict", filepath: "_PATH", storage_options: "dict[str, JSON] | None" = None
    ) -> None:
        self._gathered.close()  # a checkpoint after a validation; DeepSpeed shards all weights again before it saves
        with folder_of_shards(filepath, self) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: "_PATH", weights_only: bool | None = None) -> "StateDict":
        path = Path(self.broadcast(checkpoint_path))
        if self.model is self.lightning_module:
            raise ConfigError(f"{path}: a DeepSpeed checkpoint only resumes fit; evaluate the model folder instead")
        self._check_checkpoint(path)
        # With ZeRO-3 each rank has written a state of its own, but that of rank 0 is the state of the run.
        state = self.broadcast(super().load_checkpoint(path, weights_only))
        check_format(state.get("format"), str(path))
        return state

    def _check_checkpoint(self, path: Path) -> None:
        """Raise an error for a checkpoint that is damaged, unsafe, or of another run, before DeepSpeed reads it."""
        module, folder = self.lightning_module, path / TAG
        files = sorted(folder.glob("*.pt"))
        if not path.is_dir() or not files or (path / "latest").read_text().strip() != TAG:
            raise ConfigError(f"{path}: not a checkpoint of DeepSpeed; resume with the strategy that wrote it")
        if found := damage(path) or next(filter(None, map(damage, files)), None):
            raise UserError(f"{path}: the checkpoint is damaged ({found}); use an earlier one, or start over")
        for file in files:  # DeepSpeed does not read them with weights_only
            if unknown := set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - KNOWN:
                raise UserError(
                    f"{file}: the checkpoint contains {min(unknown)}; it is not opened, because it could run code"
                )
        shards = len(list(folder.glob("*optim_states.pt")))
        stage = (
            3 if any(file.name.startswith("zero_") and file.name.endswith("model_states.pt") for file in files) else 2
        )
        if (shards, stage == 3) != (self.world_size, self.zero_stage_3):
            ours = 3 if self.zero_stage_3 else 2
            raise ConfigError(
                f"{path}: the checkpoint has the shards of {shards} ranks with ZeRO-{stage}, but the run has "
                f"{self.world_size} ranks with ZeRO-{ours}; resume with those of the checkpoint"
            )
        assert isinstance(module, RLHFModule)
        own = next(file for file in files if file.name.endswith("model_states.pt"))
        shapes = torch.load(own, map_location="meta", mmap=True, weights_only=True)["param_shapes"]
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        module.check_names({name for group in shapes for name in group}, trained)

    def load_weights(self, path: "_PATH") -> None:
        """Load only the weights of a checkpoint.

        Args:
            path: The checkpoint's folder.
        """
        self._check_checkpoint(Path(path))
        self._engine.load_checkpoint(
            path, load_optimizer_states=False, load_lr_scheduler_states=False, load_module_strict=False
        )

    def teardown(self) -> None:
        self._gathered.close()
        if self.model is not None and self.model is not self.lightning_module and self._zero3 is None:
            self._engine.destroy()  # removes its hooks, so that the module can be trained again
        super().teardown()


def _check(module: RLHFModule, shards_weights: bool) -> None:
    """Raise `ConfigError` for settings that would fail, or be ignored, under DeepSpeed."""
    precision = str(module.trainer.precision)
    if precision not in ("32-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision is {precision}; with DeepSpeed use 32-true or bf16-true, which holds the weights in "
            "bfloat16 and a float32 copy in the optimizer"
        )
    refused = {
        "model.compile": module.compiles_layers,
        "model.activation_offload": module.activation_offload,
        "model.lora.quantize": is_quantized(module.model),
    }
    if isinstance(module, PolicyRLModule):
        critic, kl = module.critic, module.kl
        refused["critic.warmup_rounds"] = critic is not None and bool(critic.warmup_rounds)
        if shards_weights:
            refused["kl.refresh_every"] = kl is not None and bool(kl.refresh_every)
    if isinstance(module, PreferenceModule) and shards_weights:
        refused["scorer.store"] = bool(getattr(module.scorer, "store", False))
    if shards_weights and placements(module):
        refused["another device (device, offload) of a reference or reward model"] = True
    refused["model.distillation"] = shards_weights and module.teacher is not None
    for name, used in refused.items():
        if used:
            stage = "ZeRO-3" if shards_weights else "DeepSpeed"
            raise ConfigError(f"{name} is not supported with {stage}; leave it out, or use trainer.strategy fsdp2")
    if precision == "bf16-true" and module.heads():
        raise ConfigError(
            "trainer.precision is bf16-true, but DeepSpeed would also hold the score or value head in bfloat16. Use "
            "32-true, or trainer.strategy fsdp2"
        )


StrategyRegistry.register("zero2", DeepSpeed, description="gradients and optimizer state sharded by DeepSpeed", stage=2)
StrategyRegistry.register("zero3", DeepSpeed, description="weights, too, sharded by DeepSpeed", stage=3)
