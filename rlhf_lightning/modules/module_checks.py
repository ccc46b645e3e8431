"""Checks that all modules share: keys of a batch, and content of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import ConfigError


def check_batch(module: Any, batch: Any) -> None:
    """Check that a batch has the keys that the module requires.

    Args:
        module: The module.
        batch: The batch.

    Raises:
        ConfigError: If a key is missing.
    """
    has = list(batch) if isinstance(batch, Mapping) else []
    if missing := [name for name in module.requires if name not in has]:
        raise ConfigError(
            f"{type(module).__name__} takes batches that are dicts with {', '.join(module.requires)}; {missing[0]} is "
            f"missing in this one, which is a {type(batch).__name__} of {', '.join(map(str, has)) or 'no names'}. "
            "See docs/reuse.md"
        )


def check_content(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint fits the module.

    Args:
        module: The module, with its model.
        checkpoint: The checkpoint.

    Raises:
        ConfigError: If its weights have other shapes, or if `fit` cannot resume from it.
    """
    weights = checkpoint["state_dict"]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in weights and weights[name].shape != parameter.shape:
            raise ConfigError(
                f"the checkpoint does not match this stage and its settings: {name} is "
                f"{list(weights[name].shape)} there and {list(parameter.shape)} here"
            )
    lacking = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in checkpoint]
    if lacking and module._trainer is not None and module._trainer.state.fn == "fit":
        raise ConfigError(
            f"the checkpoint has no {lacking[0]}: it contains only weights, so fit cannot resume from it. "
            "Start a new stage from a model folder instead."
        )
