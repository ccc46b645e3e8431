"""Checks the files of a model folder before libraries open them: they must not import or download code, or hang.

A folder may come from an untrusted source. Settings that make a library import a module or download a kernel are
refused unless the user set them. So are settings that would keep a library busy forever: sizes that do not match the
weights, and regular expressions with exponential backtracking.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.files import LFS_POINTER, LFS_REMEDY, adapted_base, check_files_in, read_object, real_path
from rlhf_lightning.types import JSON

REPEATS = 5
"""Largest number of consecutive unbounded repeats in a regular expression; each one multiplies the matching time."""
PARTS = 1000
"""Largest number of parts (layers, experts) that is accepted without comparing it with the headers of the weights."""
_ATTENTION = re.compile(r"_?attn_implementation(_internal)?$")
_COUNT = re.compile(
    r"(num|n)_.*(layer|block|head|expert|group)s?$|layers?$|n_(layer|head)$|(size|dim|rank)$|d_(model|ff)$"
)
_LARGEST = 2**32
"""Largest layer or vocabulary size that is accepted if there are no weights to compare it with."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options of `from_pretrained` that locate files."""
_QUIET = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
"""Suffixes of the files that libraries open in a folder."""
_LISTS = {
    ("config.json", "configuration_files"): "config.json",
    ("tokenizer_config.json", "fast_tokenizer_files"): "tokenizer.json",
}
"""Keys that list further files, of which transformers picks the one for its version."""
_PROPERTY = re.compile(r"\\[pP]\{[^{}]*\}")


def check_files(source: str, options: Mapping[str, JSON] | None = None, weights: bool = False) -> None:
    """Check the files of a model, an adapter or a tokenizer before a library opens them.

    Args:
        source: Local folder, or a name on the Hub. The small files of a repository are downloaded into the cache as the
            libraries do (offline they are taken from there).
        options: The user's arguments of `from_pretrained`. `attn_implementation` overrides that of the config;
            `revision`, `subfolder` and others select the files.
        weights: Also download the weights of a model on the Hub, to compare its config with their headers.

    Raises:
        ConfigError: If a file is unsafe; the message names the file, the setting and what to do.
    """
    if Path(source).is_dir():
        check_folder(Path(source), options)
        return
    folder = _fetched(source, options or {}, weights) if _HUB_ID.fullmatch(source) else None
    if folder is None:
        return  # it does not exist or is unreachable; the library that opens it reports that
    _check_all(folder, options)
    if (folder / "adapter_config.json").is_file():  # transformers then opens the adapter's base
        base = str(adapted_base(folder))
        inner = Path(base) if Path(base).is_dir() else _fetched(base, {}, False) if _HUB_ID.fullmatch(base) else None
        if inner is not None:
            refuse_chain(inner, source)
        check_files(base, weights=weights)


def load_failure(error: BaseException) -> str:
    """The reason why a library could not load a model or a tokenizer, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs custom code; to run that code, set model.model_options: {trust_remote_code: true}"
    if isinstance(error, UnpicklingError | EOFError):  # the message of torch advises to run the file's code
        return "a .bin file is damaged, or contains other objects than weights, which could run code"
    return first_line(error)


def refuse_chain(base: Path, adapter: str | Path) -> None:
    """Refuse an adapter as the base of another adapter; libraries would follow such a chain without limit.

    Args:
        base: Folder of the base model.
        adapter: The adapter, for the message.

    Raises:
        ConfigError: If `base` contains an adapter.
    """
    if (base / "adapter_config.json").exists():
        raise ConfigError(
            f"the adapter {adapter} has another adapter as its base: {base}. First merge that one (rlhf export)"
        )


def _fetched(name: str, options: Mapping[str, JSON], weights: bool) -> Path | None:
    """Download the small files of a repository and return their folder in the cache; None if there are none."""
    from transformers.utils.hub import cached_files

    place = {key: options[key] for key in WHERE if options.get(key) is not None}

    def fetch(files: Iterable[str]) -> list[str]:
        try:
            return cached_files(name, list(files), **place, **_QUIET) or []
        except OSError:
            return []  # no such repository or revision; the library reports that

    if not (found := fetch([*CHECKS, *INDEXES])):
        return None
    folder = Path(found[0]).parent
    _check_names(folder)
    fetch([other for listed in _LISTS for other in _listed(folder, listed)])
    if weights and not (fetch(_shards(folder)) or any(folder.glob("*.safetensors"))):
        fetch(["pytorch_model.bin"])
    return folder


def _shards(folder: Path) -> list[str]:
    """Names of the weight files that transformers and peft load from a folder."""
    for index in INDEXES:
        if (folder / index).is_file():
            shards = read_object(folder / index).get("weight_map")
            return sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
    return ["model.safetensors", "adapter_model.safetensors"]


def check_folder(folder: Path, options: Mapping[str, JSON] | None = None) -> None:
    """Check the files of a local folder; see `check_files`."""
    _check_all(folder / str((options or {}).get("subfolder") or ""), options)


def _check_all(folder: Path, options: Mapping[str, JSON] | None) -> None:
    check_files_in(folder)
    _check_names(folder)
    chosen = "attn_implementation" in (options or {})
    extent = _extent(folder)
    for name in CHECKS:
        others = [
            folder / other for listed, kind in _LISTS.items() if kind == name for other in _listed(folder, listed)
        ]
        for path in (folder / name, *others):
            if path.is_file():
                facts = path.stat()
                _check(path.absolute(), name, facts.st_mtime_ns, facts.st_size, extent, chosen)


@lru_cache(maxsize=64)
def _check(path: Path, kind: str, modified: int, size: int, extent: tuple[int, int], chosen: bool) -> None:
    """Check a file. Results are cached, because several parts of a run open the same, possibly large, files."""
    CHECKS[kind](path, read_object(path, unique=kind != "tokenizer.json"), extent, chosen)


def _check_names(folder: Path) -> None:
    """Refuse files that lead out of their folder: links to other kinds of files, and listed names that are paths.

    Pointers of Git LFS are refused, too, because no library says what they are.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix not in SUFFIXES:
            continue
        if not path.is_file():
            raise ConfigError(
                f"{path}: this is a folder, a broken link, a device or a pipe; it must be a file. Restore it"
            )
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ConfigError(f"{path}: {LFS_REMEDY}")
        target = real_path(path)
        # Links to the blobs of the Hub's cache are allowed, and links to files of the same kind, which save disk space.
        if target.parent.name != "blobs" and target.suffix != path.suffix and path.is_symlink():
            raise ConfigError(
                f"{path}: this is a link to another kind of file, {target}; replace it with a copy of the right file"
            )
    for listed in _LISTS:
        for name in _listed(folder, listed):
            _check_name(name, f"{folder / listed[0]}: {listed[1]}")
    for index in INDEXES:
        if (folder / index).is_file():
            shards = read_object(folder / index).get("weight_map")
            for name in set(map(str, shards.values())) if isinstance(shards, dict) else ():
                _check_name(name, f"{folder / index}: weight_map")


def _check_name(name: str, where: str) -> None:
    if Path(name).name != name:
        raise ConfigError(f"{where} contains {name!r}, which is not a file in its folder; restore the file")


def _listed(folder: Path, listed: tuple[str, str]) -> list[str]:
    """Names of the files that a config lists, and that libraries read instead of it or of `tokenizer.json`."""
    path = folder / listed[0]
    names = read_object(path).get(listed[1]) if path.is_file() else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _config(path: Path, config: dict[str, JSON], extent: tuple[int, int], attention_chosen: bool) -> None:
    parts, largest = extent
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{path}: architectures must be a list of names; restore the file")
    for key, value in _settings(config):
        if _ATTENTION.fullmatch(key) and not attention_chosen and "/" in str(value):
            raise ConfigError(
                f"{path}: {key} is {value!r}, which would download code from a hub. Remove the key, or set it yourself "
                f"with model.model_options: {{attn_implementation: …}}"
            )
        if key == "use_pretrained_backbone" and value:
            raise ConfigError(f"{path}: {key} would download another model; remove the key")
        if key in ("modules_to_not_convert", "llm_int8_skip_modules"):
            for pattern in _texts(value):
                check_pattern(pattern, f"{path}: {key}")
        if not isinstance(value, int) or isinstance(value, bool) or not _COUNT.search(key):
            continue
        stack = "layer" in key or "block" in key or "expert" in key
        if value > (max(PARTS, parts) if stack else largest or _LARGEST):
            beside = f"the weight files next to it have only {parts} tensors with {largest} numbers in all"
            raise ConfigError(
                f"{path}: {key} is {value}, and {beside if parts else 'no model is that large'}. Restore the files."
            )


def _settings(config: JSON) -> Iterator[tuple[str, JSON]]:
    """All settings of a config, including those of nested configs."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            yield from ((str(key), one) for key, one in value.items())
        elif isinstance(value, list):
            waiting += value


def _extent(folder: Path) -> tuple[int, int]:
    """Number of tensors in the weights of a folder, and an upper bound of their elements.

    Files with a damaged header are not counted; (0, 0) if there are no others.
    """
    parts = size = 0
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        facts = path.stat()
        found = _parts(path.absolute(), facts.st_mtime_ns, facts.st_size)
        if found is None:
            continue  # if a library opens this file, it reports what is wrong; the other files still set a bound
        parts, size = parts + found, size + facts.st_size
    return parts, 2 * size  # an element has at least 4 bits


@lru_cache(maxsize=256)
def _parts(path: Path, modified: int, size: int) -> int | None:
    """Number of tensors in a weight file; None if its header is damaged."""
    if path.suffix == ".bin":
        if not zipfile.is_zipfile(path):
            return 0
        try:
            with zipfile.ZipFile(path) as archive:
                return len(archive.namelist())
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
            return None
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, size)))
        except (ValueError, RecursionError):
            return None
    return len(header) if isinstance(header, dict) else 0


def _adapter(path: Path, config: dict[str, JSON], extent: tuple[int, int], _: bool) -> None:
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise ConfigError(f"{path}: megatron_config makes peft import a module that the file names; remove it")
    names = ("target_modules", "exclude_modules")
    patterns = [(key, pattern) for key in names if isinstance(pattern := config.get(key), str)]
    patterns += [("layers_pattern", one) for one in _texts(config.get("layers_pattern"))]
    patterns += [(key, one) for key in ("rank_pattern", "alpha_pattern") for one in _texts(config.get(key))]
    for key, pattern in patterns:
        check_pattern(pattern, f"{path}: {key}")
    ranks = [config.get("r"), *(_ints(config.get("rank_pattern")))]
    if extent[1] and any(isinstance(rank, int) and rank > extent[1] for rank in ranks):
        raise ConfigError(f"{path}: a rank is larger than the weight files next to it; restore the files")
    # pissa_niter_N runs N iterations of a singular value decomposition.
    if len(niter := str(config.get("init_lora_weights")).removeprefix("pissa_niter_")) > 2 and niter.isdigit():
        raise ConfigError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which could take unlimited time; restore it"
        )
    if config.get("alora_invocation_tokens") is not None:
        raise ConfigError(
            f"{path}: alora_invocation_tokens (an adapter that is active only after certain tokens) is not supported; "
            "use another adapter"
        )
    if config.get("layer_replication"):
        raise ConfigError(
            f"{path}: layer_replication (repeated layers of the base model) is not supported; use another adapter"
        )


def _ints(value: JSON) -> list[int]:
    return [one for one in value.values() if isinstance(one, int)] if isinstance(value, dict) else []


def _named_files(path: Path, config: dict[str, JSON], extent: tuple[int, int], _: bool) -> None:
    """Check `tokenizer_config.json`: nothing to do, because the files that it lists have been checked before."""


def _tekken(path: Path, config: dict[str, JSON], extent: tuple[int, int], _: bool) -> None:
    inner = config.get("config")
    if isinstance(inner, dict) and isinstance(pattern := inner.get("pattern"), str):
        check_pattern(pattern, f"{path}: pattern")


def _texts(value: JSON) -> list[str]:
    if isinstance(value, list | dict):
        return [one for one in value if isinstance(one, str)]
    return [value] if isinstance(value, str) else []


def _tokenizer(path: Path, config: dict[str, JSON], extent: tuple[int, int], _: bool) -> None:
    # Skip the vocabulary, which is most of the file and contains no regular expressions.
    for key, value in _settings({key: value for key, value in config.items() if key != "model"}):
        if key == "Regex" and isinstance(value, str):
            check_pattern(value, f"{path}: the regular expression")


CHECKS = {
    "config.json": _config,
    "adapter_config.json": _adapter,
    "tokenizer.json": _tokenizer,
    "tokenizer_config.json": _named_files,
    "tekken.json": _tekken,
}


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a regular expression that may take extremely long on some texts.

    The body of an unbounded repeat must match in only one way: it must be a sequence of characters and character
    classes.

    Args:
        pattern: The regular expression.
        where: Its origin, for the message.

    Raises:
        ConfigError: If the expression may be slow, or cannot be parsed.
    """
    try:
        parsed = _parsed(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} {pattern[:80]!r} cannot be read ({error})") from None
    if not _is_simple(parsed) or _repeats(parsed) > REPEATS:
        raise ConfigError(
            f"{where} {pattern[:80]!r} can take forever on some texts: an unlimited repeat contains something that "
            f"matches in several ways, or more than {REPEATS} repeats follow each other. Rewrite it, or use another "
            "folder."
        )


def _parsed(pattern: str) -> _parser.SubPattern:
    """Parse a regular expression of Python or of the tokenizers library, which adds properties and nested classes."""
    plain = _PROPERTY.sub(r"\\w", pattern).replace(r"\h", " ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about brackets in character classes
        try:
            return _parser.parse(plain)
        except re.error:
            return _parser.parse(_flat_classes(plain))


def _flat_classes(pattern: str) -> str:
    """Replace each nested character class by a simple one."""
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
"""Largest number of repetitions that does not count as unbounded."""


def _is_simple(parsed: _parser.SubPattern) -> bool:
    for kind, value in parsed:
        if kind in _REPEAT:
            _, most, body = value
            if most > _FEW and not _one_way(body):
                return False
        if not all(_is_simple(inner) for inner in _inside(kind, value)):
            return False
    return True


def _one_way(parsed: _parser.SubPattern) -> bool:
    return all(
        kind in _ONE
        or (kind is sre.SUBPATTERN and _one_way(value[-1]))
        or (kind in _REPEAT and value[0] == value[1] and _one_way(value[2]))
        for kind, value in parsed
    )


def _repeats(parsed: _parser.SubPattern) -> int:
    """Largest number of unbounded repeats on any path through a regular expression."""
    count = 0
    for kind, value in parsed:
        inside = [_repeats(inner) for inner in _inside(kind, value)]
        count += max(inside, default=0) if kind is sre.BRANCH else sum(inside)
        count += kind in _REPEAT and value[1] > _FEW
    return count


def _inside(kind: Any, value: Any) -> list[_parser.SubPattern]:
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
