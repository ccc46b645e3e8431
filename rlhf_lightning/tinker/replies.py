"""Results of requests, as JSON and as the protobuf messages that the client wants."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.tinker.sampling import SampleResult, Top
from rlhf_lightning.tinker.wire import as_bytes, write, write_map
from rlhf_lightning.types import JSON

FLOAT32 = 1
"""Number of the type float32 in protobuf messages."""
NO_LOGPROB = -99999.0
"""Log-probability in an empty cell of a table of most likely tokens."""
LENGTH = 1
"""Number of the end `length` in protobuf messages; that of `stop` is 0, which is not written."""


class Reply(ABC):
    """The result of a request."""

    @abstractmethod
    def json(self) -> dict[str, JSON]:
        """The result as JSON."""

    def message(self) -> bytes | None:
        """The result as a protobuf message; None if the client wants JSON."""
        return None


class JSONReply(Reply):
    """A result that is always JSON.

    Args:
        body: The result.

    Example:
        >>> JSONReply({"path": None}).json()
        {'path': None}
    """

    def __init__(self, body: Mapping[str, JSON]) -> None:
        self._body = dict(body)

    def json(self) -> dict[str, JSON]:
        """The result as JSON."""
        return self._body


class Failure(JSONReply):
    """A request that failed.

    Args:
        message: What is wrong and what to do.
        category: `user` if the request is the reason, `server` if the server is.

    Example:
        >>> Failure("there are no gradients", "user").json()
        {'error': 'there are no gradients', 'category': 'user'}
    """

    def __init__(self, message: str, category: Literal["user", "server"]) -> None:
        super().__init__({"error": message, "category": category})


class ForwardBackwardReply(Reply):
    """The result of `forward_backward`.

    Args:
        logprobs: Log-probabilities of the targets of each datum, in nats, `[N]` each.
        metrics: Metrics, with their reduction over several requests in their names.

    Example:
        >>> ForwardBackwardReply([torch.tensor([-1.0])], {"loss:sum": 1.0}).json()["metrics"]
        {'loss:sum': 1.0}
    """

    def __init__(self, logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> None:
        self._logprobs, self._metrics = [row.float() for row in logprobs], dict(metrics)

    def json(self) -> dict[str, JSON]:
        """The result as JSON."""
        outputs: list[JSON] = [
            {"logprobs": {"data": row.tolist(), "dtype": "float32", "shape": [len(row)]}} for row in self._logprobs
        ]
        return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": {**self._metrics}}

    def message(self) -> bytes:
        """A `ForwardBackwardOutput`."""
        ends = torch.tensor([0, *(len(row) for row in self._logprobs)]).cumsum(0) * torch.float32.itemsize
        batched = write(1, as_bytes(torch.cat(self._logprobs))) + write(2, as_bytes(ends)) + write(3, FLOAT32)
        record = write(1, "ArrayRecord") + write_map(2, {"logprobs": batched}) + write(3, len(self._logprobs))
        return write(1, "ArrayRecord") + write(2, record) + write_map(3, self._metrics)


class SampleReply(Reply):
    """The result of `sample`.

    Args:
        result: The result.
    """

    def __init__(self, result: SampleResult) -> None:
        self._result = result

    def json(self) -> dict[str, JSON]:
        """The result as JSON."""
        found = self._result
        sequences: list[JSON] = [
            {"stop_reason": one.stop_reason, "tokens": list(one.ids), "logprobs": list(one.logprobs)}
            for one in found.completions
        ]
        body: dict[str, JSON] = {"type": "sample", "sequences": sequences}
        if found.prompt_logprobs is not None:
            body["prompt_logprobs"] = [*repeat(None, self._unscored), *found.prompt_logprobs]
        if found.top_prompt is not None:
            body["topk_prompt_logprobs"] = [*repeat(None, self._unscored), *_pairs(found.top_prompt)]
        if found.top_samples is not None:
            for sequence, top in zip(sequences, found.top_samples, strict=True):
                assert isinstance(sequence, dict)
                sequence["topk_logprobs"] = _pairs(top)
        return body

    @property
    def _unscored(self) -> int:
        """Number of tokens at the beginning of the prompt without a log-probability."""
        return self._result.prompt_tokens - len(self._result.prompt_logprobs or ())

    def message(self) -> bytes:
        """A `SampleResponse`."""
        found = self._result
        tops: Sequence[Top | None] = found.top_samples or [None] * len(found.completions)
        fields = []
        for one, top in zip(found.completions, tops, strict=True):
            sequence = write(1, LENGTH) if one.stop_reason == "length" else b""
            sequence += write(2, as_bytes(torch.tensor(one.ids, dtype=torch.int32)))
            sequence += write(3, as_bytes(torch.tensor(one.logprobs, dtype=torch.float32)))
            fields.append(write(1, sequence + (b"" if top is None else write(4, _table(top, 0)))))
        if found.prompt_logprobs is not None:
            values = [math.nan] * self._unscored + found.prompt_logprobs
            fields.append(write(2, as_bytes(torch.tensor(values, dtype=torch.float32))))
        if found.top_prompt is not None:
            fields.append(write(3, _table(found.top_prompt, self._unscored)))
        return b"".join(fields)


def _pairs(top: Top) -> list[JSON]:
    """Pairs of token id and log-probability at each position."""
    return [
        [[token, value] for token, value in zip(ids, values, strict=True)]
        for ids, values in zip(top.ids.tolist(), top.logprobs.tolist(), strict=True)
    ]


def _table(top: Top, empty: int) -> bytes:
    """A `TopkLogprobs`, with `empty` rows of empty cells before the others."""
    k = top.ids.shape[1]
    ids = torch.cat([torch.zeros(empty, k, dtype=torch.long), top.ids]).int()
    logprobs = torch.cat([torch.full((empty, k), NO_LOGPROB), top.logprobs])
    return write(1, as_bytes(ids)) + write(2, as_bytes(logprobs)) + write(3, k) + write(4, len(ids))
