"""Checks that all modules share: keys of a batch, and content of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.modules.hf_batches import Columns

if TYPE_CHECKING:
    from rlhf_lightning.types import StateDict


def check_batch(batch: Columns, requires: Sequence[str], module: str) -> None:
    """Check that a batch has the keys that a module requires.

    Args:
        batch: The batch; one of another dataloader may be of any type.
        requires: The keys.
        module: Name of the module's class.

    Raises:
        ConfigError: If a key is missing.
    """
    has = list(batch) if isinstance(batch, Mapping) else []
    if missing := [name for name in requires if name not in has]:
        raise ConfigError(
            f"{module} needs batches that are dicts with {', '.join(requires)}; {missing[0]} is missing in this batch, "
            f"a {type(batch).__name__} with {', '.join(map(str, has)) or 'no keys'}; see docs/reuse.md"
        )


def check_content(module: nn.Module, checkpoint: "StateDict", resumes: bool) -> None:
    """Check that a checkpoint fits the module.

    Args:
        module: The module, with its model.
        checkpoint: The checkpoint.
        resumes: True if training resumes from it.

    Raises:
        ConfigError: If the weights have different shapes, or training cannot resume from the checkpoint.
    """
    weights = checkpoint["state_dict"]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in weights and weights[name].shape != parameter.shape:
            raise ConfigError(
                f"the checkpoint does not match this stage and its settings: {name} has shape "
                f"{list(weights[name].shape)} in the checkpoint, but {list(parameter.shape)} in the model"
            )
    lacking = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in checkpoint]
    if lacking and resumes:
        raise ConfigError(
            f"the checkpoint has no {lacking[0]}: it contains only weights, so fit cannot resume from it. "
            "Start a new stage from a model folder instead."
        )
