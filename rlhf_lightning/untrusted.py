"""What the files of a model folder may ask of the libraries that open it: nothing that imports, fetches or never ends.

A folder may come from anyone. What would make a library import a module or fetch a kernel is refused unless the user
has asked for it, and so is what would keep one busy for ever: sizes that its weights do not have, and regular
expressions that backtrack.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import read_object

REPEATS = 5
"""Unbounded repeats that a regular expression of a file may have in one sequence: each multiplies the work."""
PARTS = 1000
"""Parts of a model for which no header of weights is needed to believe in them."""
_ATTENTION = re.compile(r"_?attn_implementation(_internal)?$")
_COUNT = re.compile(
    r"(num|n)_.*(layer|block|head|expert|group)s?$|layers?$|n_(layer|head)$|(size|dim|rank)$|d_(model|ff)$"
)
_PROPERTY = re.compile(r"\\[pP]\{[^{}]*\}")


def check_folder(folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a local model folder whose files ask for more than to be read.

    Args:
        folder: of a model, an adapter or a tokenizer.
        options: what the user gives to `from_pretrained`: `attn_implementation` set there counts, not the file's.

    Raises:
        ConfigError: names the file, what it asks for, and what to do.
    """
    for name in CHECKS:
        if (path := folder / name).is_file():
            facts = path.stat()
            _check(path.resolve(), facts.st_mtime_ns, facts.st_size, "attn_implementation" in (options or {}))


@lru_cache(maxsize=64)
def _check(path: Path, modified: int, size: int, chosen: bool) -> None:
    """A folder is asked for by several parts of a run, and a tokenizer's file is large."""
    CHECKS[path.name](path, read_object(path), chosen)


def _config(path: Path, config: dict[str, Any], attention_chosen: bool) -> None:
    parts, largest = _extent(path.parent)
    for key, value in _settings(config):
        if _ATTENTION.fullmatch(key) and not attention_chosen and "/" in str(value):
            raise ConfigError(
                f"{path}: {key} is {value!r}, code that would be fetched from a hub. Remove the key, or choose it "
                f"yourself with model.model_options: {{attn_implementation: …}}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not _COUNT.search(key):
            continue
        stack = "layer" in key or "block" in key
        most = max(PARTS, parts) if stack else largest
        if parts and value > most:
            raise ConfigError(
                f"{path}: {key} is {value}, and the weights beside it have {parts} parts of {largest} numbers in all: "
                "they do not belong together. Restore the files."
            )


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of a config and of the configs inside it."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            yield from ((str(key), one) for key, one in value.items())
        elif isinstance(value, list):
            waiting += value


def _extent(folder: Path) -> tuple[int, int]:
    """How many tensors the weights of a folder have, and how many numbers at most; (0, 0) where there are none."""
    parts = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(min(length, path.stat().st_size)))
            except (ValueError, RecursionError):
                return 0, 0  # the library that opens it says what is wrong
        parts += len(header) if isinstance(header, dict) else 0
    for path in sorted(folder.glob("*.bin")):
        size += path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts += len(archive.namelist())
    return parts, 2 * size  # of 4 bits at least


def _adapter(path: Path, config: dict[str, Any], _: bool) -> None:
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise ConfigError(f"{path}: megatron_config has a library import code of another one; remove it")
    patterns = [(key, config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    patterns += [("layers_pattern", one) for one in _texts(config.get("layers_pattern"))]
    patterns += [(key, one) for key in ("rank_pattern", "alpha_pattern") for one in _texts(config.get(key))]
    for key, pattern in patterns:
        check_pattern(pattern, f"{path}: {key}")


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [one for one in value or () if isinstance(one, str)]


def _tokenizer(path: Path, config: dict[str, Any], _: bool) -> None:
    # The vocabulary has no expressions, and is most of the file.
    for key, value in _settings({key: value for key, value in config.items() if key != "model"}):
        if key == "Regex" and isinstance(value, str):
            check_pattern(value, f"{path}: the expression")


CHECKS = {"config.json": _config, "adapter_config.json": _adapter, "tokenizer.json": _tokenizer}


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a regular expression of a file that may take more than the time its text is long.

    Allowed in a repeat without a limit is what can be matched in one way only: a sequence of characters and classes.

    Raises:
        ConfigError: names the expression. One that cannot be read is refused too: it cannot be judged.
    """
    try:
        parsed = _parsed(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} {pattern[:80]!r} cannot be read ({error})") from None
    if not _is_simple(parsed) or _repeats(parsed) > REPEATS:
        raise ConfigError(
            f"{where} {pattern[:80]!r} can take for ever on some texts: it repeats without a limit what can be matched "
            f"in several ways, or has more than {REPEATS} repeats in a row. Rewrite it, or use another folder."
        )


def _parsed(pattern: str) -> Any:
    """A pattern of Python's, or of the tokenizers library, whose classes have properties and classes inside."""
    plain = _PROPERTY.sub(r"\\w", pattern).replace(r"\h", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of brackets in classes
        try:
            return _parser.parse(plain)
        except re.error:
            return _parser.parse(_flat_classes(plain))


def _flat_classes(pattern: str) -> str:
    """The pattern with a plain class in the place of each that has others inside."""
    result, depth, start = [], 0, 0
    for place in re.finditer(r"\\.|\[\^?\]?|\]", pattern, re.DOTALL):
        text = place.group()
        if text[0] == "[":
            result.append(pattern[start : place.start()] if not depth else "")
            depth += 1
        elif text == "]" and depth:
            depth -= 1
            if not depth:
                result.append("[x]")
                start = place.end()
    return "".join(result) + pattern[start:]


_REPEAT = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_ONE = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT)
_FEW = 16
"""A repeat of at most so many is no loop."""


def _is_simple(parsed: Any) -> bool:
    for kind, value in parsed:
        if kind in _REPEAT:
            _, most, body = value
            if most > _FEW and not _one_way(body):
                return False
        if not all(_is_simple(inner) for inner in _inside(kind, value)):
            return False
    return True


def _one_way(parsed: Any) -> bool:
    return all(
        kind in _ONE
        or (kind is sre.SUBPATTERN and _one_way(value[-1]))
        or (kind in _REPEAT and value[0] == value[1] and _one_way(value[2]))
        for kind, value in parsed
    )


def _repeats(parsed: Any) -> int:
    """The most unbounded repeats that one way through an expression meets."""
    count = 0
    for kind, value in parsed:
        inside = [_repeats(inner) for inner in _inside(kind, value)]
        count += max(inside, default=0) if kind is sre.BRANCH else sum(inside)
        count += kind in _REPEAT and value[1] > _FEW
    return count


def _inside(kind: Any, value: Any) -> list[Any]:
    if kind in _REPEAT:
        return [value[2]]
    if kind is sre.SUBPATTERN:
        return [value[-1]]
    if kind is sre.BRANCH:
        return list(value[1])
    if kind in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    if kind is sre.ATOMIC_GROUP:
        return [value]
    if kind is sre.GROUPREF_EXISTS:
        return [one for one in value[1:] if one is not None]
    return []
