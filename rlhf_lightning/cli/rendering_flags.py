"""Flags that override how a model is prompted; by default it is prompted as in its training."""

import argparse
import sys
from typing import TYPE_CHECKING, Literal

from rlhf_lightning.files import visible
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.policy import Policy, SamplingSettings

USUAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
RECORD = "The defaults are the settings that the model was trained with, as recorded in its stage.json."


def add_rendering_flags(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """Add the flags that `rendering_options` reads.

    Args:
        parser: The parser.
        samples: False for a command that samples no responses.
    """
    group = parser.add_argument_group("prompting options", RECORD)
    group.add_argument(
        "--format", choices=("chat", "raw"), help="chat: apply the chat template; raw: use the text unchanged"
    )
    group.add_argument(
        "--template_kwargs",
        metavar="JSON",
        help="arguments of the chat template, for example '{\"enable_thinking\": false}'",
    )
    group.add_argument("--system", metavar="TEXT", help="system message for rows without one; '' for none")
    group.add_argument(
        "--tools", metavar="FILE", help="tools for rows without any: a JSON file or JSON text; '[]' for none"
    )
    if samples:
        group.add_argument(
            "--stop", action="append", metavar="TEXT", help="text that ends a response, '' for none; may be repeated"
        )


def rendering_options(options: argparse.Namespace) -> dict[str, JSON]:
    """The given settings, for `data.rendering_settings.RenderingSettings`; raises `ConfigError`."""
    stop = getattr(options, "stop", None)
    kwargs = options.template_kwargs
    found = {
        "format": options.format,
        "template_kwargs": kwargs and json_object("--template_kwargs", kwargs, '{"enable_thinking": false}'),
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
        help="maximum number of tokens per answer (default: 256)",
    )
    said = "default: that of the model's generation_config.json, else"
    parser.add_argument("--temperature", type=float, help=f"sampling temperature, 0 for greedy decoding ({said} 1.0)")
    parser.add_argument(
        "--top_p", type=float, help=f"sample from the most likely tokens up to this total probability ({said} 1.0)"
    )
    parser.add_argument("--top_k", type=int, help=f"sample from the TOP_K most likely tokens, 0 for all ({said} 0)")


def sampling_of(options: argparse.Namespace, model: str, policy: "Policy") -> tuple["SamplingSettings", str]:
    """Sampling settings from flags and generation config.

    Args:
        options: The parsed flags.
        model: Name of the model.
        policy: The model.

    Returns:
        The settings, and a message about those of the generation config: used ones, and others that have no effect.
    """
    settings = policy.sampled.copy()
    names: tuple[Literal["temperature", "top_p", "top_k"], ...] = ("temperature", "top_p", "top_k")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        settings[name] = value
    if settings.get("temperature") == 0:
        settings = {"temperature": 0.0}
    own = {name: value for name, value in settings.items() if name not in given and value != USUAL[name]}
    said = ", ".join(f"{name} {value:g}" for name, value in own.items())
    parts = [said] if said else []
    if policy.unused_sampling:
        parts.append(f"not supported, and not used: {', '.join(policy.unused_sampling)}")
    return settings, f"sampling settings from generation_config.json of {model}: {'; '.join(parts)}" if parts else ""


def say(*lines: str) -> None:
    """Print lines to standard error, because standard output is for results; skip empty and repeated lines."""
    for line in dict.fromkeys(line for line in lines if line):
        print(visible(line), file=sys.stderr)


def json_object(flag: str, text: str, example: str) -> dict[str, JSON]:
    """The value of a flag that takes a JSON object.

    Args:
        flag: The flag.
        text: Its value.
        example: An object, for messages.

    Raises:
        ConfigError: If it is something else.
    """
    import yaml

    from rlhf_lightning.errors import ConfigError

    try:
        value = yaml.safe_load(text)  # JSON is YAML, and the flag of a stage takes both
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {text[:200]!r} is not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} {text!r} must be a JSON object, for example '{example}'")
    return value
