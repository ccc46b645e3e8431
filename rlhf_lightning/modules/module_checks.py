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
            f"{module} takes batches that are dicts with {', '.join(requires)}; {missing[0]} is "
            f"missing in this one, which is a {type(batch).__name__} of {', '.join(map(str, has)) or 'no names'}. "
            "See docs/reuse.md"
        )


def check_content(module: nn.Module, checkpoint: "StateDict", resumes: bool) -> None:
    """Check that a checkpoint fits the module.

    Args:
        module: The module, with its model.
        checkpoint: The checkpoint.
        resumes: True if training goes on from it.

    Raises:
        ConfigError: If its weights have other shapes, or if training cannot resume from it.
    """
    weights = checkpoint["state_dict"]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in weights and weights[name].shape != parameter.shape:
            raise ConfigError(
                f"the checkpoint does not match this stage and its settings: {name} is "
                f"{list(weights[name].shape)} there and {list(parameter.shape)} here"
            )
    lacking = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in checkpoint]
    if lacking and resumes:
        raise ConfigError(
            f"the checkpoint has no {lacking[0]}: it contains only weights, so fit cannot resume from it. "
            "Start a new stage from a model folder instead."
        )
