"""Parses the flags and config files of a stage, with short error messages that say what to do."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lightning.cli import suggestions as meant
from rlhf_lightning.errors import cut
from rlhf_lightning.files import visible
from rlhf_lightning.imports import elsewhere

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value type:",
    "Given value: NestedArg",
    "Not a valid subclass of",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with class_path entry",
    "a dict without class_path but",
)


class StageParser(LightningArgumentParser):
    """A parser that reports errors in a few lines, without the usage.

    Example:
        >>> parser = StageParser()
    """

    def print_usage(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print nothing, so that the error is easy to find."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in a few lines with suggestions, and exit with code 2."""
        if message.startswith("unrecognized arguments"):
            message = flags(message, self.settings())
        if "arguments are required: " in message and message.endswith("model.model"):
            message = (
                "model.model is not set: give the folder, Hub id or GGUF file to start from, for example "
                "--model.model Qwen/Qwen3-0.6B"
            )
        super().error(visible(tidy(message)), ex)

    def commands(self) -> Mapping[str, ArgumentParser]:
        """The parsers of the commands by name; empty for the parser of a single command."""
        return self._subcommands_action._name_parser_map if self._subcommands_action else {}

    def settings(self) -> set[str]:
        """Dotted names of all settings of the commands."""
        names = {action.dest for parser in self.commands().values() or [self] for action in parser._actions}
        return {name for name in names if not name.endswith((".help", "help"))}


PLAIN = (
    (r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", r"\1 has no argument '\2'"),
    (r"Problem with given class_path '([\w.]+)': the following arguments are required: ", r"\1 needs the argument "),
    (r"Expected a dot import path string: ([^;]*); Given value: \1", r"there is no class or function \1"),
    (r"Expected an? <class '(?:\w+\.)*(\w+)'>", r"expected \1"),
    (r"Expected an? typing\.Literal\[([^\]]*)\]", r"expected one of \1"),
    (r"[.;] (?:Got|Given) value: ", ", got "),
    (r'Parser key "([\w.]+)": ', r"\1: "),
)
"""Phrases of jsonargparse, and plainer ones that replace them."""


def tidy(message: str) -> str:
    """Shorten a message of jsonargparse to key, reason, value and remedy, without types and failed attempts."""
    text = re.sub(r"Type .*? expects a function or a callable class: ", "", message)
    text = re.sub(r"[.;]? Got value: (Namespace\(|Write).*", "", text)
    text = re.sub(r"Given value: \[?Namespace\(.*", "", text)
    text = re.sub(r'load config "([^"]*)"', r"load config '\1'", text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    kept = [cut(line, 300) for line in lines if line and not line.startswith(NOISE)]
    text = "".join(line + (" " if line.endswith(":") else "; ") for line in dict.fromkeys(kept)).strip("; ")
    if "<class 'float'>" in text or "<class 'int'>" in text:  # a number was meant, not a class
        text = re.sub(r"Expected a dot import path string: [^;]*; ", "", text)
    for remedy in _remedies(text):
        if remedy not in text:  # a nested parser may have said it already
            text += f"{'' if text.endswith('?') else '.'} {remedy}"
    for phrase, plain in PLAIN:
        text = re.sub(phrase, plain, text)
    return text


def _remedies(text: str) -> Iterator[str]:
    """Suggestions derived from the parser's message."""
    key = found[1] if (found := re.search(r'Parser key "([\w.]+)"', text)) else ""
    if found := re.search(r"(?:path string|path format): ([^;\s]*)", text):
        name = found[1].strip("'\".")
        close, recipe = meant.classes(key, name), meant.in_place_of_class(name.lower())
        if recipe:
            yield recipe
        elif close:
            yield f"Did you mean {' or '.join(close)}?" if len(close) <= 3 else f"Choose one of {', '.join(close)}"
        if "Write a class" not in text:
            yield "Write a class or function with its module, for example torch.optim.AdamW"
    if found := MOVED.search(text):
        path = found[1] or found[2]
        recipe = meant.in_place_of_class(path.rpartition(".")[2].lower())
        if recipe:
            yield recipe
        elif there := elsewhere(path):
            yield f"Did you mean {there}?"
    if found := re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        names = meant.arguments(found[1])
        alike = meant.argument(found[2], names)
        yield f"Did you mean {alike}?" if alike else f"Its arguments are {', '.join(names) or 'none'}"
    if key and (found := re.search(r"the following arguments are required: (\w+)", text)):
        yield f"Set {key}.init_args.{found[1]}"
    elif any(f"Expected a <class '{name}'>" in text for name in ("list", "tuple", "collections.abc.Sequence")):
        yield "Write a list: [ … ]"
    if key in SECTIONS and "Given value: {" not in text and "Problem with" not in text:
        yield f"{key} is a section of settings; set one of them, for example --{key}.{SECTIONS[key]}"
    if "is not accepted before subcommand" in text:
        yield "Write the command before its config: rlhf KIND fit -c FILE"


MOVED = re.compile(
    r"'(rlhf_lightning[\w.]*)': (?:module '[\w.]+' has no attribute|No module named)"
    r"|has no attribute .*Given value: (rlhf_lightning[\w.]*)"
)
"""Messages about a class of this package that is not where the path says."""
SECTIONS = {
    "data": "train",
    "model": "model",
    "model.critic": "learning_rate",
    "model.kl": "coefficient",
    "model.limits": "max_turns",
    "model.lora": "rank",
    "model.sampler": "max_tokens",
    "trainer": "max_steps",
}
"""Sections of settings, each with one of its settings as an example."""


def flags(message: str, known: Iterable[str]) -> str:
    """Extend the parser's message about unknown arguments with suggestions."""
    names = message.partition(": ")[2].split()
    said = []
    for name in [name for name in names if name.startswith("-")] or names[:1]:
        flag = name.partition("=")[0]
        close = meant.setting(flag, known) if flag.startswith("--") else None
        if close:
            said.append(f"{flag} is not a flag; did you mean --{close}?")
        elif flag.endswith((".yaml", ".yml", ".json")) and not flag.startswith("-"):
            said.append(f"pass a config file with -c {flag}")
        elif flag.startswith("-"):
            said.append(f"{flag} is not a flag; --help lists all flags")
        else:
            said.append(
                f"{flag!r} does not belong to a flag: a flag takes one value, and some, such as --fresh, take none"
            )
    return f"{message} ({'; '.join(said)})"
