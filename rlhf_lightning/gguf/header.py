"""Reads the header of a GGUF file, its metadata and table of tensors, with bounds checks.

Files may come from untrusted sources. Every count and length is compared with the rest of the file before anything of
that size is read, so that no header can cause a large allocation or a long loop. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeVar

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_METADATA = 2**28
"""Largest size of the metadata in bytes; with a vocabulary of 262,144 tokens they take about 10 MB."""
MOST_TENSORS = 100_000
MOST_DIMENSIONS = 4

MOST_VALUES = 2**22
"""Largest number of values in a list; vocabularies and merges have a few hundred thousand."""

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]
T = TypeVar("T", str, int, float, bool)

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: Its name in llama.cpp.
        shape: Its shape in torch's order, with the contiguous dimension last.
        kind: Number of its ggml type.
        offset: Start of its data, in bytes from the start of the file.
        size: Length of its data in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: The metadata by key.
        tensors: The tensors by name.
        length: Length of the header in bytes.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]
    length: int

    def refuse(self, what: str) -> ConfigError:
        """Make an error about this file.

        Args:
            what: What is wrong, and what to do.
        """
        return _error(self.path, what)

    def text(self, key: str) -> str | None:
        """A string of the metadata; None if the key is missing."""
        return self._value(key, str, "text")

    def whole(self, key: str) -> int | None:
        """A whole number of the metadata, at least 0; None if the key is missing."""
        value = self._value(key, int, "a whole number")
        if value is not None and value < 0:
            raise self.refuse(f"{key} is {value}; it must be at least 0")
        return value

    def number(self, key: str) -> float | None:
        """A number of the metadata; None if the key is missing."""
        if isinstance(whole := self.metadata.get(key), int) and not isinstance(whole, bool):
            return float(whole)
        return self._value(key, float, "a number")

    def flag(self, key: str) -> bool | None:
        """A Boolean of the metadata; None if the key is missing."""
        return self._value(key, bool, "true or false")

    def _value(self, key: str, kind: type[T], named: str) -> T | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(f"{key} is {value!r:.60}; it must be {named}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings of the metadata; empty if the key is missing."""
        return self._values(key, str)

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers of the metadata; empty if the key is missing."""
        return self._values(key, int)

    def numbers(self, key: str) -> list[float]:
        """A list of floating-point numbers of the metadata; empty if the key is missing."""
        return self._values(key, float)

    def _values(self, key: str, kind: type[T]) -> list[T]:
        values = self.metadata.get(key, [])
        found = [value for value in values if isinstance(value, kind)] if isinstance(values, list) else []
        if not isinstance(values, list) or len(found) < len(values):
            raise self.refuse(f"{key} is {values!r:.60}; it must be a list of {kind.__name__}")
        return found


def is_gguf(path: Path) -> bool:
    """True if a file begins with the magic number of GGUF files, whatever its name."""
    with open(path, "rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> Header:
    """Read the header of a GGUF file.

    Args:
        path: The file.
        block_sizes: For each ggml type the number of weights in a block, and its size in bytes.

    Raises:
        ConfigError: If the file is not a GGUF file, is truncated, or its header contradicts its length.
    """
    try:
        is_file(path)
        with open(path, "rb") as stream:
            return _Reader(stream, path).header(block_sizes)
    except OSError as error:
        raise _error(path, f"it cannot be read ({error.strerror})") from None


def _error(path: Path, what: str) -> ConfigError:
    return ConfigError(f"the GGUF file {str(path)!r}: {what}")


class _Reader:
    """Reads values one after the other, but never beyond the end of the file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.length = stream.seek(0, 2)
        stream.seek(0)
        self.position = 0

    def header(self, block_sizes: dict[int, tuple[int, int]]) -> Header:
        if self.length < len(MAGIC) or self.take(len(MAGIC)) != MAGIC:
            raise self.refuse("it does not begin with GGUF; it is another kind of file, or its download is incomplete")
        version = self.whole(4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
            kind = (
                "is big-endian, which is not supported" if swapped else f"has version {version}; 2 and 3 are supported"
            )
            raise self.refuse(f"it {kind}. Convert the model again with a current llama.cpp")
        tensors = self.count("tensors", self.whole(8), 32, MOST_TENSORS)
        metadata: dict[str, Value] = {}
        for _ in range(self.count("keys", self.whole(8), 13)):
            key = self.text()
            if key in metadata:
                raise self.refuse(f"the metadata key {key!r:.80} appears twice")
            metadata[key] = self.value()
            if self.position > MOST_METADATA:
                raise self.refuse(f"it has more than {MOST_METADATA >> 20} MiB of metadata; no model needs that much")
        entries = [self.entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise self.refuse(f"general.alignment is {alignment!r:.40}; it must be a power of two, at most 65536")
        start = -(-self.position // alignment) * alignment
        return Header(self.path, metadata, self.table(entries, start, block_sizes), start)

    def table(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, block_sizes: dict[int, tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The tensors by name, after checking that each is within the file and that none overlap.

        Args:
            entries: Name, shape, ggml type and offset of each tensor.
            start: Start of the tensor data in bytes.
            block_sizes: See `read_header`.
        """
        found: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                raise self.refuse(f"the tensor {name!r:.80} appears twice")
            if kind not in block_sizes:
                raise self.refuse(
                    f"the tensor {name!r:.80} has the unknown ggml type {kind}; a newer version of the package gguf "
                    "may support it"
                )
            weights, size = block_sizes[kind]
            if not all(shape) or shape[-1] % weights:
                raise self.refuse(f"the tensor {name!r:.80} has the shape {shape}, which its type does not allow")
            tensor = Tensor(name, shape, kind, start + offset, prod(shape) // weights * size)
            if tensor.offset + tensor.size > self.length:
                raise self.refuse(
                    f"the tensor {name!r:.80} ends at byte {tensor.offset + tensor.size}, but the file has only "
                    f"{self.length} bytes: it is damaged, or its download is incomplete. Download it again"
                )
            found[name] = tensor
        end = start
        for tensor in sorted(found.values(), key=lambda one: one.offset):
            if tensor.offset < end:
                raise self.refuse(f"the tensor {tensor.name!r:.80} overlaps another tensor; the file is damaged")
            end = tensor.offset + tensor.size
        return found

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self.text(), self.whole(4)
        if not 1 <= count <= MOST_DIMENSIONS:
            raise self.refuse(f"the tensor {name!r:.80} has {count} dimensions; it must have 1 to {MOST_DIMENSIONS}")
        shape = tuple(self.whole(8) for _ in range(count))
        return name, shape[::-1], self.whole(4), self.whole(8)

    def value(self) -> Value:
        kind = self.whole(4)
        if kind != _ARRAY:
            return self.scalar(kind)
        kind = self.whole(4)
        if kind not in (*_SCALARS, _STRING):
            raise self.refuse(f"its metadata have a list of values of type {kind}, which is not supported")
        least = 8 if kind == _STRING else _SCALARS[kind].size
        count = self.count("values in a list", self.whole(8), least, MOST_VALUES)
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        return [value for (value,) in _SCALARS[kind].iter_unpack(self.take(count * least))]

    def scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.text()
        if kind not in _SCALARS:
            raise self.refuse(f"its metadata have a value of the unknown type {kind}; the file is damaged")
        value: Scalar = _SCALARS[kind].unpack(self.take(_SCALARS[kind].size))[0]
        return value

    def text(self) -> str:
        raw = self.take(self.whole(8))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refuse(f"the text before byte {self.position} is not valid UTF-8; the file is damaged") from None

    def whole(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, what: str, value: int, least: int, most: int | None = None) -> int:
        """Return a count, after checking that the rest of the file has room for that many entries.

        Args:
            what: Name of the entries, for the message.
            value: The count.
            least: Smallest size of an entry in bytes.
            most: Largest count that is allowed.
        """
        if value * least > self.length - self.position or (most is not None and value > most):
            raise self.refuse(
                f"its header declares {value} {what}, too many for a file of {self.length} bytes: it is damaged or "
                "truncated"
            )
        return value

    def take(self, size: int) -> bytes:
        if size > self.length - self.position:
            raise self.refuse(
                f"it ends within its header (at byte {self.length}): it is damaged, or its download is incomplete. "
                "Download it again"
            )
        if size > MOST_METADATA:
            raise self.refuse(f"its header has a value of {size} bytes; no model needs that much")
        self.position += size
        return self.stream.read(size)

    def refuse(self, what: str) -> ConfigError:
        return _error(self.path, what)
