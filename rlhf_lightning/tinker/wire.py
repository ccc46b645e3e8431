"""Protobuf's wire format, as far as the messages of Tinker's client use it.

The client sends training data and receives log-probabilities as protobuf messages. They have few fields, most of them
arrays in bytes, so they are read here by field number, without generated classes and protobuf's runtime.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlhf_lightning.serving.fields import RequestError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types: how the value of a field is written."""
SIZES = {FIXED64: 8, FIXED32: 4}
"""Bytes of the values with a fixed size."""
LONGEST_VARINT = 10
"""Largest number of bytes of a varint."""


class Message:
    """A protobuf message whose fields are read by number; an absent field is empty or 0, as in proto3.

    Args:
        data: The message.

    Raises:
        RequestError: If it is malformed.

    Example:
        >>> Message(write(1, "tiny") + write(2, 7)).text(1)
        'tiny'
    """

    def __init__(self, data: bytes) -> None:
        self._values: dict[int, list[int | bytes]] = {}
        for number, value in _values(data):
            self._values.setdefault(number, []).append(value)

    def has(self, number: int) -> bool:
        """True if a field is present."""
        return number in self._values

    def bytes(self, number: int) -> bytes:
        """A field of bytes."""
        return _content(self._values.get(number, [b""])[-1], number)

    def text(self, number: int) -> str:
        """A text."""
        try:
            return self.bytes(number).decode()
        except UnicodeDecodeError:
            raise _malformed(f"field {number} is not UTF-8") from None

    def whole(self, number: int) -> int:
        """An integer that is not negative."""
        value = self._values.get(number, [0])[-1]
        if not isinstance(value, int):
            raise _malformed(f"field {number} is not a number")
        return value

    def wholes(self, number: int) -> list[int]:
        """A list of integers that are not negative, packed or not."""
        found: list[int] = []
        for value in self._values.get(number, []):
            place = 0
            while isinstance(value, bytes) and place < len(value):
                one, place = _varint(value, place)
                found.append(one)
            if isinstance(value, int):
                found.append(value)
        return found

    def double(self, number: int) -> float:
        """A float of 64 bits."""
        value = self.bytes(number) or bytes(8)
        if len(value) != 8:
            raise _malformed(f"field {number} is not a double")
        return float(struct.unpack("<d", value)[0])

    def message(self, number: int) -> "Message":
        """A message within this one."""
        return Message(self.bytes(number))

    def messages(self, number: int) -> "list[Message]":
        """A list of messages."""
        return [Message(_content(value, number)) for value in self._values.get(number, [])]

    def entries(self, number: int) -> "dict[str, Message]":
        """A map from texts; its values are field 2 of the messages."""
        return {entry.text(1): entry for entry in self.messages(number)}


def write(number: int, value: bytes | str | int | float) -> bytes:
    """A field of a message; a message is the concatenation of its fields.

    Args:
        number: The field.
        value: Bytes or a message, a text, an integer that is not negative, or a float, which is written with 64 bits.
    """
    if isinstance(value, int):
        return _as_varint(number << 3 | VARINT) + _as_varint(value)
    if isinstance(value, float):
        return _as_varint(number << 3 | FIXED64) + struct.pack("<d", value)
    content = value.encode() if isinstance(value, str) else value
    return _as_varint(number << 3 | LENGTH) + _as_varint(len(content)) + content


def write_map(number: int, values: Mapping[str, bytes | float]) -> bytes:
    """A field that is a map from texts to messages or floats."""
    return b"".join(write(number, write(1, key) + write(2, value)) for key, value in values.items())


def array(data: bytes, dtype: torch.dtype) -> Tensor:
    """The array in little-endian bytes, `[n]`.

    Args:
        data: The bytes.
        dtype: Type of its elements.

    Raises:
        RequestError: If the last element is incomplete.
    """
    if len(data) % dtype.itemsize:
        raise _malformed(f"an array of {dtype} has {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)


def as_bytes(values: Tensor) -> bytes:
    """An array as little-endian bytes."""
    return values.contiguous().numpy().tobytes()


def _values(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == LENGTH:
            size, place = _varint(data, place)
        elif kind in SIZES:
            size = SIZES[kind]
        else:
            raise _malformed(f"field {number} has the unknown wire type {kind}")
        if place + size > len(data):
            raise _malformed(f"field {number} ends after the message")
        yield number, data[place : place + size]
        place += size


def _content(value: int | bytes, number: int) -> bytes:
    """The value of a field that must have bytes."""
    if isinstance(value, int):
        raise _malformed(f"field {number} is a number")
    return value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A varint, and the place after it."""
    value = 0
    for index in range(LONGEST_VARINT):
        if place + index >= len(data):
            break
        byte = data[place + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise _malformed("a number is incomplete")


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _malformed(problem: str) -> RequestError:
    return RequestError(f"the protobuf message is malformed ({problem})")
