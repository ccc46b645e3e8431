"""`--trainer.precision auto`: accepted by the parser, and replaced by a measured choice before the Trainer is made."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file, read_object, visible
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.auto_precision import measure_precision
from rlhf_lightning.run_folder import is_first_process
from rlhf_lightning.types import JSON

AUTO = "auto"
CHOSEN = "RLHF_PRECISION"
"""Environment variable in which the first process passes its choice to the ranks that Lightning starts."""


def accept_auto(parser: LightningArgumentParser) -> None:
    """Make `--trainer.precision` accept `auto`, in addition to Lightning's values."""
    action = parser._option_string_actions["--trainer.precision"]
    hint = vars(action)["_typehint"]
    vars(action)["_typehint"] = Literal["auto"] | hint
    action.help = f"{action.help} auto: bf16-mixed where this machine computes faster in it, else 32-true."


def choose_precision(config: Namespace, before: Callable[[], Mapping[str, JSON]]) -> None:
    """Replace `trainer.precision: auto` by the precision of the run in the folder, or by a measured one.

    Args:
        config: Settings of the command; changed in place.
        before: Returns the flat settings of the run in the folder; empty if there is none or it is discarded.

    Raises:
        ConfigError: If several processes would each measure.
    """
    if config.trainer.precision != AUTO:
        return
    saved = before().get("trainer.precision")
    if isinstance(saved, str) and saved != AUTO:
        config.trainer.precision = saved
        return
    if not is_first_process() and CHOSEN in os.environ:
        config.trainer.precision = os.environ[CHOSEN]
        return
    if not is_first_process() or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "trainer.precision: auto measures in one process, but a launcher started several, which may choose "
            "differently; give bf16-mixed or 32-true"
        )
    chosen, reason = _measured(config)
    print(visible(f"trainer.precision auto: {chosen}. {reason}"), flush=True)
    config.trainer.precision = os.environ[CHOSEN] = chosen


def _measured(config: Namespace) -> tuple[str, str]:
    """The precision for the configured device, and the reason."""
    accelerator = config.trainer.accelerator
    if torch.cuda.is_available() and accelerator in (AUTO, "gpu", "cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "The GPU has instructions for bf16"
        return "32-true", "The GPU has no instructions for bf16"
    if accelerator != "cpu" and (accelerator != AUTO or torch.backends.mps.is_available()):
        return "32-true", f"bf16 is not measured on accelerator {accelerator}"
    measured = measure_precision(*_sizes(config.model.model))
    return measured.precision, str(measured)


def _sizes(source: JSON) -> tuple[int, ...]:
    """Hidden sizes of a model in a local folder; empty for the defaults of `measure_precision`."""
    if not isinstance(source, str) or not is_file(path := Path(model_folder(source)) / "config.json"):
        return ()
    facts = read_object(path)
    sizes = facts.get("hidden_size"), facts.get("intermediate_size")
    return tuple(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else ()
