"""Flags that override how a model is prompted, which by default is as in its training."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.files import visible

USUAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
RECORD = "by default as the model was trained, which its stage.json says"


def add_rendering_flags(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """Add the flags that `rendering_options` reads.

    Args:
        parser: The parser.
        samples: False for a command that samples no responses.
    """
    group = parser.add_argument_group("how the model is asked", RECORD)
    group.add_argument("--format", choices=("chat", "raw"), help="by the chat template, or text as it is")
    group.add_argument(
        "--template_kwargs", metavar="JSON", help="passed to the chat template: '{\"enable_thinking\": false}'"
    )
    group.add_argument("--system", metavar="TEXT", help="a system message for rows without one; '' for none")
    group.add_argument("--tools", metavar="FILE", help="a JSON file (or JSON) of tools for rows without; '[]' for none")
    if samples:
        group.add_argument(
            "--stop", action="append", metavar="TEXT", help="a text that ends a response; several are added, '' is none"
        )


def rendering_options(options: argparse.Namespace) -> dict[str, Any]:
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
    """Add the flags that `sampling_of` reads."""
    said = "default: what generation_config.json of the model says, else"
    parser.add_argument("--temperature", type=float, help=f"0 takes the likeliest token ({said} 1.0)")
    parser.add_argument("--top_p", type=float, help=f"sample from the likeliest tokens of this mass ({said} 1.0)")
    parser.add_argument("--top_k", type=int, help=f"sample from so many of the likeliest tokens, 0 for all ({said} 0)")


def sampling_of(options: argparse.Namespace, model: str, sampled: Mapping[str, float]) -> tuple[dict[str, Any], str]:
    """Sampling settings from flags and generation config.

    Args:
        options: The parsed flags.
        model: Name of the model.
        sampled: Sampling settings of its generation config.

    Returns:
        The settings, and a line that says which of them come from the generation config.
    """
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    settings = {**sampled, **given}
    if settings.get("temperature") == 0:
        settings = {"temperature": 0.0}
    own = {name: value for name, value in settings.items() if name not in given and value != USUAL[name]}
    said = ", ".join(f"{name} {value:g}" for name, value in own.items())
    return settings, f"samples as the generation_config.json of {model} says: {said}" if said else ""


def say(*lines: str) -> None:
    """Print lines to standard error, because standard output is for results; empty and repeated lines are left out."""
    for line in dict.fromkeys(line for line in lines if line):
        print(visible(line), file=sys.stderr)


def _mapping(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    import yaml

    from rlhf_lightning.errors import ConfigError

    try:
        value = yaml.safe_load(text)  # JSON is YAML, and a stage's flag takes both
    except yaml.YAMLError as error:
        raise ConfigError(f"--template_kwargs {text!r} is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--template_kwargs {text!r} is no mapping; for example '{{\"enable_thinking\": false}}'")
    return value
