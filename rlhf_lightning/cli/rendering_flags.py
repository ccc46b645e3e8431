"""Flags that override how a model is prompted, which by default is as in its training."""

import argparse
import sys
from typing import TYPE_CHECKING, Literal

from rlhf_lightning.files import visible
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from rlhf_lightning.inference.policy import SamplingSettings

USUAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
RECORD = "by default as in the model's training, which stage.json records"


def add_rendering_flags(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """Add the flags that `rendering_options` reads.

    Args:
        parser: The parser.
        samples: False for a command that samples no responses.
    """
    group = parser.add_argument_group("how the model is prompted", RECORD)
    group.add_argument(
        "--format", choices=("chat", "raw"), help="chat: apply the chat template; raw: use the text as it is"
    )
    group.add_argument(
        "--template_kwargs", metavar="JSON", help="arguments for the chat template: '{\"enable_thinking\": false}'"
    )
    group.add_argument("--system", metavar="TEXT", help="system message for rows that have none; '' for none")
    group.add_argument(
        "--tools", metavar="FILE", help="tools for rows that have none: a JSON file or JSON; '[]' for none"
    )
    if samples:
        group.add_argument(
            "--stop", action="append", metavar="TEXT", help="text that ends a response; may be repeated, '' for none"
        )


def rendering_options(options: argparse.Namespace) -> dict[str, JSON]:
    """The given settings, for `data.rendering_settings.RenderingSettings`; raises `ConfigError`."""
    stop = getattr(options, "stop", None)
    found = {
        "format": options.format,
        "template_kwargs": _mapping(options.template_kwargs),
        "system": options.system,
        "tools": options.tools,
        "stop": None if stop is None else [text for text in stop if text],
    }
    return {key: value for key, value in found.items() if value is not None}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--max_tokens`, and the flags that `sampling_of` reads."""
    parser.add_argument(
        "--max_tokens",
        "--max-tokens",
        type=int,
        default=256,
        help="largest number of tokens of an answer (default: 256)",
    )
    said = "default: the value in the model's generation_config.json, else"
    parser.add_argument(
        "--temperature", type=float, help=f"sampling temperature; 0 takes the likeliest token ({said} 1.0)"
    )
    parser.add_argument(
        "--top_p", type=float, help=f"sample from the likeliest tokens up to this total probability ({said} 1.0)"
    )
    parser.add_argument("--top_k", type=int, help=f"sample from this number of likeliest tokens, 0 for all ({said} 0)")


def sampling_of(options: argparse.Namespace, model: str, sampled: "SamplingSettings") -> tuple["SamplingSettings", str]:
    """Sampling settings from flags and generation config.

    Args:
        options: The parsed flags.
        model: Name of the model.
        sampled: Sampling settings of its generation config.

    Returns:
        The settings, and a line that says which of them come from the generation config.
    """
    settings = sampled.copy()
    names: tuple[Literal["temperature", "top_p", "top_k"], ...] = ("temperature", "top_p", "top_k")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        settings[name] = value
    if settings.get("temperature") == 0:
        settings = {"temperature": 0.0}
    own = {name: value for name, value in settings.items() if name not in given and value != USUAL[name]}
    said = ", ".join(f"{name} {value:g}" for name, value in own.items())
    return settings, f"sampling settings from generation_config.json of {model}: {said}" if said else ""


def say(*lines: str) -> None:
    """Print lines to standard error, because standard output is for results; empty and repeated lines are left out."""
    for line in dict.fromkeys(line for line in lines if line):
        print(visible(line), file=sys.stderr)


def _mapping(text: str | None) -> dict[str, JSON] | None:
    if text is None:
        return None
    import yaml

    from rlhf_lightning.errors import ConfigError

    try:
        value = yaml.safe_load(text)  # JSON is YAML, and a stage's flag takes both
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--template_kwargs {text[:200]!r} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"--template_kwargs {text!r} is not a mapping; write for example '{{\"enable_thinking\": false}}'"
        )
    return value
