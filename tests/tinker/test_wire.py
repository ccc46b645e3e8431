"""Protobuf messages as Tinker's client writes and reads them; the bytes are those of its generated classes."""

import random
import struct

import pytest
import torch

from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.replies import ForwardBackwardReply, SampleReply
from rlhf_lightning.tinker.requests import Limits, forward_backward_of_message
from rlhf_lightning.tinker.sampling import SampleResult, Top
from rlhf_lightning.tinker.wire import Message, array, as_bytes, write, write_map
from rlhf_lightning.types import Completion

LIMITS = Limits(vocabulary=400, context=64, width=32)
REQUEST = bytes.fromhex(
    "0a096d3a747261696e3a3010ac021a88010a100a0e0a0c01000000020000002c01000012210a0a616476616e746167657312"
    "130a0c000000000000c03f000000c01801220103121f0a086c6f6770726f627312130a0c00000000000080bf000000bf1801"
    "22010312300a0d7461726765745f746f6b656e73121f0a1802000000000000002c0100000000000005000000000000001802"
    "2201031a600a080a060a040700000012190a0a616476616e7461676573120b0a040000803f180122010112170a086c6f6770"
    "726f6273120b0a04000080bf180122010112200a0d7461726765745f746f6b656e73120f0a08080000000000000018022201"
    "01220370706f2a1e0a13636c69705f686967685f7468726573686f6c64119a9999999999f13f2a1d0a12636c69705f6c6f77"
    "5f7468726573686f6c6411cdccccccccccec3f30013a200a13636c69705f686967685f7468726573686f6c641209099a9999"
    "999999f13f3a1f0a12636c69705f6c6f775f7468726573686f6c64120909cdccccccccccec3f"
)
"""`forward_backward_request_to_proto` of tinker 0.38.0: two datums for `ppo`, model `m:train:0`, seq_id 300."""
OUTPUT = bytes.fromhex(
    "0a0b41727261795265636f726412470a0b41727261795265636f726412360a086c6f6770726f6273122a0a0c000080bf0000"
    "20c0000000bf1218000000000000000008000000000000000c00000000000000180118021a130a086c6f73733a73756d1100"
    "00000000001040"
)
"""A `ForwardBackwardOutput` of its classes."""
SAMPLES = bytes.fromhex(
    "0a3e120805000000020000001a08000080be0000c0bf22280a10040000000500000004000000050000001210000000bf0000"
    "80bf000000bf000080bf180220020a2808011204070000001a04000040c022180a0804000000050000001208000000bf0000"
    "80bf1802200112080000c07f000040bf1a280a10000000000000000004000000050000001210804fc3c7804fc3c7000000bf"
    "000080bf18022002"
)
"""A `SampleResponse` of its classes."""


def test_request_of_the_client() -> None:
    found = forward_backward_of_message(REQUEST, LIMITS)
    assert (found.model_id, found.seq_id, found.forward_only) == ("m:train:0", 300, True)
    assert (found.loss.name, found.loss.objective.bounds) == ("ppo", pytest.approx((0.9, 1.1)))  # type: ignore[union-attr]
    first, second = found.data
    assert (first.tokens.tolist(), first.targets.tolist()) == ([1, 2, 300], [2, 300, 5])
    assert second.tokens.tolist() == [7]
    torch.testing.assert_close(first.inputs["advantages"], torch.tensor([0.0, 1.5, -2.0]))
    torch.testing.assert_close(first.inputs["logprobs"], torch.tensor([0.0, -1.0, -0.5]))
    assert first.inputs["weights"].tolist() == [1.0, 1.0, 1.0]


def test_results_for_the_client() -> None:
    reply = ForwardBackwardReply([torch.tensor([-1.0, -2.5]), torch.tensor([-0.5])], {"loss:sum": 4.0})
    assert reply.message() == OUTPUT
    completions = [Completion([5, 2], [-0.25, -1.5], "stop"), Completion([7], [-3.0], "length")]
    top = Top(torch.tensor([[4, 5]]), torch.tensor([[-0.5, -1.0]]))
    result = SampleResult(
        completions, 2, [-0.75], top, [Top(torch.cat([top.ids] * 2), torch.cat([top.logprobs] * 2)), top]
    )
    assert SampleReply(result).message() == SAMPLES


def test_values() -> None:
    nested = write(1, write(2, "é"))
    message = Message(write(1, 5) + write(1, 300) + nested + write(3, -2.5) + write_map(4, {"a": 1.0, "b": b"x"}))
    assert message.message(1).text(2) == "é"  # the last value counts
    assert (message.double(3), message.double(9), message.whole(9), message.bytes(9)) == (-2.5, 0.0, 0, b"")
    assert (message.entries(4)["a"].double(2), message.entries(4)["b"].bytes(2)) == (1.0, b"x")
    assert Message(write(4, 3) + write(4, bytes([1, 0xAC, 2]))).wholes(4) == [3, 1, 300]
    assert array(as_bytes(torch.tensor([-1, 2])), torch.int64).tolist() == [-1, 2]
    assert Message(b"\x0d" + struct.pack("<f", 1.0)).bytes(1) == struct.pack("<f", 1.0)


def test_number_instead_of_a_message() -> None:
    """Nothing that a client sent is ignored."""
    for read in (Message.messages, Message.message, Message.bytes):
        with pytest.raises(RequestError, match="field 3 is a number"):
            read(Message(write(3, 7)), 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05ab", "ends after the message"),
        (b"\x80", "a number is incomplete"),
        (b"\xff" * 11, "a number is incomplete"),
        (b"\x0b", "unknown wire type 3"),
    ],
)
def test_malformed(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Message(data)


def test_changed_requests_are_refused_or_read() -> None:
    """Whatever bytes are changed, no error but `RequestError` is raised."""
    numbers = random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(REQUEST)
        for _ in range(numbers.randint(1, 3)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        data = data[: numbers.randint(1, len(data))] if numbers.random() < 0.3 else data
        try:
            forward_backward_of_message(bytes(data), LIMITS)
        except RequestError:
            refused += 1
    assert refused > 1000
