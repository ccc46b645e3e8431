"""What a server expects of the object that samples its responses."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rlhf_lightning.generation.token_sampling import SamplingParams


class Row(NamedTuple):
    """A response to sample."""

    prompt: list[int]
    """Token ids of its prompt."""
    params: SamplingParams
    seed: int
    logprobs: bool = False
    """True if the client gets the log-probabilities."""


class Load(NamedTuple):
    """How much a sampler has to do."""

    sampling: int
    """Number of responses that are being sampled."""
    waiting: int
    """Number of responses that wait."""


@dataclass(frozen=True)
class Sampled:
    """Tokens that were sampled for a response.

    Attributes:
        index: Number of the response within its request.
        ids: Token ids.
        logprobs: Their log-probabilities, in nats.
        finish_reason: `stop` or `length` with the last tokens; None before.

    Example:
        >>> Sampled(0, [5], [-0.1]).finish_reason is None
        True
    """

    index: int
    ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None = None


class ResponseSampler(Protocol):
    """Samples responses for a server, for example `BatchSampler`."""

    @property
    def load(self) -> Load:
        """How much it has to do."""

    def sample(self, rows: Sequence[Row]) -> AsyncGenerator[Sampled, None]:
        """Sample responses. They are cancelled when the iteration is closed.

        Args:
            rows: The responses.

        Yields:
            New tokens of one of them.

        Raises:
            RequestError: If too many responses wait, or sampling fails.
        """
