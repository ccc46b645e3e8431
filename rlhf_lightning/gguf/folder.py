"""Converts a GGUF file once to an ordinary model folder in a cache."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.files import is_file, locked, real_path, write_json
from rlhf_lightning.gguf.header import Header, Tensor, is_gguf, read_header
from rlhf_lightning.types import JSON, ModelSource

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
CONVERSION = 1
"""Version of the conversion. Increase it when the converted folders change."""
SHARD = 2 << 30
"""Size in bytes above which the weights continue in another file."""
RECORD = "gguf.json"
"""File that records which GGUF file a folder was converted from."""
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):([^:]+\.gguf)", re.IGNORECASE)
_FLOATS = ("F32", "F16", "BF16")


def cache_root() -> Path:
    """Folder of the converted models: `RLHF_CACHE`, or `rlhf-lightning` in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RLHF_CACHE") or user / "rlhf-lightning") / "gguf"


def names_gguf(source: ModelSource) -> bool:
    """True if a model's source is a GGUF file: `FILE.gguf`, `owner/name:file.gguf`, or a file with its magic number."""
    if not isinstance(source, str | Path) or not str(source):
        return False
    path = Path(str(source)).expanduser()
    try:
        if path.is_dir():
            return False
        return path.suffix.lower() == ".gguf" or (path.is_file() and is_gguf(path))
    except (OSError, ValueError):  # not a valid path: too long, or with a null character
        return False


def model_folder(source: str, options: Mapping[str, JSON] | None = None) -> str:
    """Convert a GGUF file if necessary, and return its model folder; other sources are returned unchanged.

    Args:
        source: Folder, Hub id, `FILE.gguf`, or `owner/name:file.gguf` for a file on the Hub.
        options: Options of `from_pretrained` that locate files on the Hub.

    Raises:
        ConfigError: If the file does not exist, is damaged or is not supported.
    """
    if not names_gguf(source):
        return source
    path = Path(source).expanduser()
    if not path.exists() and (named := _ON_HUB.fullmatch(source)):
        path = _downloaded(named[1], named[2], options or {})
    if not is_file(path):
        raise ConfigError(f"model {source!r}: no such file (seen from {Path.cwd()})")
    facts = path.stat()
    return _converted(real_path(path), facts.st_size, facts.st_mtime_ns)


def _downloaded(repository: str, file: str, options: Mapping[str, Any]) -> Path:
    """Download a file from the Hub to the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    place = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only") if options.get(key)}
    try:
        return Path(hf_hub_download(repository, file, **place))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(
            f"the GGUF file {repository}:{file} cannot be downloaded from the Hub: {first_line(error)}"
        ) from None


@lru_cache(maxsize=64)
def _converted(path: Path, size: int, modified: int) -> str:
    """Convert a file unless its folder exists. Size and modification time detect that the file has changed."""
    quants = _quants(path)
    header = read_header(path, quants.sizes)
    with open(path, "rb") as stream:
        begin = stream.read(header.length)
    key = hashlib.sha256(f"{CONVERSION} {size} {modified} ".encode() + begin).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]+", "_", path.stem, flags=re.ASCII).strip("._")[:60] or "model"
    folder = cache_root() / f"{stem}-{key}"
    with _locked(folder):
        if not (folder / "config.json").is_file():
            _convert(header, quants, folder)
    kind, dtype = storage(header, quants)
    done = f"{kind} weights are read as {dtype}" if kind in _FLOATS else f"{kind} weights were dequantized to {dtype}"
    log.warning("%s: %s; the model folder is %s", path.name, done, folder)
    return str(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, so that only one process at a time converts into it; others wait."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be written ({error.strerror}); set RLHF_CACHE to another folder"
            ) from None
        yield


class Quants:
    """The weight types that the package gguf supports, and their dequantization."""

    def __init__(self) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        self.sizes: dict[int, tuple[int, int]] = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        self.names: dict[int, str] = {int(kind): kind.name for kind in GGMLQuantizationType}
        self.kinds, self.dequantize = GGMLQuantizationType, dequantize

    def read(self, header: Header, tensor: Tensor) -> "torch.Tensor":
        """Read a tensor of the file: floating-point types as they are stored, quantized types as float32."""
        import numpy
        import torch

        with open(header.path, "rb") as stream:
            stream.seek(tensor.offset)
            raw = numpy.frombuffer(stream.read(tensor.size), numpy.uint8).copy()
        name = self.names[tensor.kind]
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        if name in plain:
            return torch.from_numpy(raw).view(plain[name]).reshape(tensor.shape)
        try:
            found = self.dequantize(raw.reshape(*tensor.shape[:-1], -1), self.kinds(tensor.kind))
        except NotImplementedError:
            raise header.refuse(f"it has weights of type {name}, which the package gguf cannot dequantize") from None
        return torch.from_numpy(numpy.ascontiguousarray(found, dtype=numpy.float32)).reshape(tensor.shape)


def _quants(path: Path) -> Quants:
    try:
        return Quants()
    except ImportError as error:
        raise ConfigError(
            f"the GGUF file {str(path)!r}: reading it needs the package gguf, which cannot be imported ({error}). "
            "Install it with pip install 'rlhf-lightning[gguf]'"
        ) from None


def storage(header: Header, quants: Quants) -> tuple[str, str]:
    """The most frequent weight type of a file, and the data type of the weights in its folder.

    Args:
        header: The file's header.
        quants: The supported types.
    """
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            counts[quants.names[tensor.kind]] += prod(tensor.shape)
    kind = counts.most_common(1)[0][0] if counts else "F32"
    halves = {"F16": "float16", "BF16": "bfloat16"}
    plain = set(counts) <= set(_FLOATS)
    return kind, halves.get(kind, "float32") if plain else "float32"


def _convert(header: Header, quants: Quants, folder: Path) -> None:
    """Write the model folder under a temporary name and rename it, so that an incomplete one is never used."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        _write(header, quants, scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror or error}); free disk space, or set RLHF_CACHE to another "
            "folder"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(header: Header, quants: Quants, folder: Path) -> None:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from rlhf_lightning.gguf.config import ROPE_FACTORS, config_of, restored, weight_names
    from rlhf_lightning.gguf.tokenizer import stop_ids, tokenizer_of

    rope = header.tensors.get(ROPE_FACTORS)
    kind, dtype = storage(header, quants)
    # Checked before the shapes, because the error for an unsupported architecture is clearer.
    settings = config_of(header, quants.read(header, rope).float() if rope else None)
    names = weight_names(header)
    tokenizer, stops = tokenizer_of(header), stop_ids(header)
    if outside := [one for one in stops if one >= header.tensors["token_embd.weight"].shape[0]]:
        raise header.refuse(f"its end-of-sequence token {outside[0]} is not in its vocabulary")
    try:
        config = AutoConfig.for_model(**settings, dtype=dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise header.refuse(f"transformers cannot build a model from its metadata: {reason:.200}") from None
    _check_shapes(header, names, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    restore = restored(str(header.text("general.architecture")), config)
    target = getattr(torch, dtype)
    index: dict[str, str] = {}

    def flush(weights: dict[str, torch.Tensor]) -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(weights, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(weights, name))

    weights: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in ((name, header.tensors[name]) for name in names):
            weights[names[name]] = restore(names[name], quants.read(header, tensor)).to(target).contiguous()
            if sum(one.nbytes for one in weights.values()) > SHARD:
                flush(weights)
                weights = {}
        if weights:
            flush(weights)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if len(set(index.values())) == 1:
        os.rename(folder / next(iter(index.values())), folder / "model.safetensors")
    else:
        total = sum(prod(header.tensors[name].shape) for name in names) * target.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = stops or None
    generation.save_pretrained(folder)
    write_json(folder / RECORD, {"file": str(header.path), "quantization": kind, "dtype": dtype})


def _check_shapes(header: Header, names: Mapping[str, str], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `ConfigError` unless the file has exactly the weights of the model, with the right shapes."""
    if "output.weight" not in header.tensors:
        wanted.pop("lm_head.weight", None)  # tied to the embedding
    found = {names[name]: header.tensors[name].shape for name in names}
    if missing := sorted(wanted.keys() - found.keys()):
        raise header.refuse(f"it lacks {len(missing)} of the model's weights (for example {missing[0]})")
    if beyond := sorted(found.keys() - wanted.keys()):
        raise header.refuse(f"it has weights that the model does not have (for example {beyond[0]})")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise header.refuse(f"{name} has the shape {shape}, but by its metadata the model needs {wanted[name]}")


def source_of(folder: str | Path) -> str | None:
    """The GGUF file that a folder was converted from; None for any other folder.

    Args:
        folder: A model folder.
    """
    record = Path(folder) / RECORD
    return str(json.loads(record.read_text())["file"]) if record.is_file() else None
