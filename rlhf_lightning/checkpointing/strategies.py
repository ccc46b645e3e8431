"""Shards weights over devices with one flag: `--trainer.strategy fsdp2`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.distributed_c10d import _set_pg_timeout

from rlhf_lightning.checkpointing.io import damage, folder_of_shards
from rlhf_lightning.distributed import use_mesh
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import check_format
from rlhf_lightning.modules.base import RLHFModule

if TYPE_CHECKING:
    from lightning.fabric.utilities.types import _PATH

    from rlhf_lightning.types import JSON, StateDict


class FSDP2(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with data-parallel defaults and atomic, verified checkpoints.

    By default a checkpoint is one file that rank 0 assembles. It can be resumed on another number of devices, but needs
    host memory for all weights and optimizer state. With `save_distributed_checkpoint`, a checkpoint is a folder with
    the shards of all ranks.

    Args:
        data_parallel_size: Number of devices that share the weights and have different rows; by default all devices.
        tensor_parallel_size: Number of devices that compute each row together.
        save_distributed_checkpoint: Write a folder of shards instead of a file.
        kwargs: Further arguments of `ModelParallelStrategy`.

    Raises:
        ConfigError: If the sizes do not fit the number of devices.

    Example:
        >>> strategy = FSDP2(tensor_parallel_size=2)
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        if tensor_parallel_size < 1:
            raise ConfigError(f"strategy: tensor_parallel_size is {tensor_parallel_size}; it must be at least 1")
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, **kwargs)

    def setup_environment(self) -> None:
        devices, tensor = self.num_nodes * self.num_processes, int(self._tensor_parallel_size)
        if self._data_parallel_size == "auto":
            # Lightning's default is the number of machines, with tensor parallelism within each.
            self._data_parallel_size = devices // tensor
        if int(self._data_parallel_size) * tensor != devices:
            raise ConfigError(
                f"strategy: data_parallel_size {self._data_parallel_size} × tensor_parallel_size {tensor} must equal "
                f"the number of devices, {devices}"
            )
        super().setup_environment()
        use_mesh(self.device_mesh)
        for group in self.device_mesh.get_all_groups():  # groups of a mesh have their own timeout
            if self._timeout is not None:
                _set_pg_timeout(self._timeout, group)

    def teardown(self) -> None:
        use_mesh(None)
        super().teardown()

    def setup(self, trainer: pl.Trainer) -> None:
        # Weights that a validation before training gathers in inference mode could not be trained.
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
        for loop in loops:
            loop.inference_mode = False
        super().setup(trainer)

    def save_checkpoint(
        self, checkpoint: "StateDict", filepath: "_PATH", storage_options: "dict[str, JSON] | None" = None
    ) -> None:
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        with folder_of_shards(filepath, self) as folder:
            super().save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: "_PATH", weights_only: bool | None = None) -> "StateDict":
        path = Path(self.broadcast(checkpoint_path))
        if found := damage(path):
            raise UserError(f"{path}: the checkpoint is damaged ({found}); use an earlier one, or start over")
        names, version = _contents(path)
        check_format(version, str(path))
        if isinstance(self.lightning_module, RLHFModule):
            self.lightning_module.check_names(names)
        return super().load_checkpoint(path, weights_only)

    def load_weights(self, path: "_PATH") -> None:
        """Load only the weights of a checkpoint, which need not contain an optimizer state."""
        optimizers, self.optimizers = self.optimizers, []
        try:
            self.load_checkpoint(path, weights_only=True)
        finally:
            self.optimizers = optimizers


def _contents(path: Path) -> tuple[set[str], int | None]:
    """Names of the weights in a checkpoint, and its format version, without reading the weights."""
    stored = path if path.is_file() else path / "meta.pt"  # where Lightning stores everything but the weights
    facts = torch.load(stored, mmap=True, map_location="meta", weights_only=True)
    if path.is_file():
        return set(facts["state_dict"]), facts.get("format")
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}, facts.get("format")


StrategyRegistry.register("fsdp2", FSDP2, description="weights, gradients and optimizer state sharded over all devices")
