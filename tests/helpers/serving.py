"""Running servers with OpenAI's API, for tests."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.filtering import Filter
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import ModelSampler, Sampler
from rlhf_lightning.serving.local import BatchSampler
from rlhf_lightning.serving.requests import RequestReader
from rlhf_lightning.serving.sampling import Load, ResponseSampler, Row, Sampled
from rlhf_lightning.serving.server import ApiServer
from rlhf_lightning.serving.shutdown import ApiHttpServer, Shutdown
from rlhf_lightning.web import Access, server_config
from tests.helpers.web import started


@dataclass
class Served:
    """A model that is served, with what computes the same without a server."""

    url: str
    policy: Policy
    sampler: ModelSampler
    batch: BatchSampler
    http: ApiHttpServer

    @property
    def engine(self) -> LocalEngine:
        assert isinstance(self.sampler.engine, LocalEngine)
        return self.sampler.engine


def reader_of(policy: Policy, sampler: ModelSampler) -> RequestReader:
    return RequestReader("tiny", policy.renderer, sampler.params, len(policy.tokenizer), policy.context or 4096)


@contextmanager
def serving(
    policy: Policy,
    access: Access | None = None,
    slots: int = 4,
    max_waiting: int = 8,
    max_tokens: int = 16,
    grace: float = 5,
) -> Iterator[Served]:
    """Serve a model in a thread."""
    sampler = Sampler(max_tokens, slots=slots).build(policy.model, policy.renderer)
    assert isinstance(sampler.engine, LocalEngine)
    batch = BatchSampler(sampler.engine, max_waiting)
    batch.start()
    try:
        api = ApiServer(reader_of(policy, sampler), batch, access or Access(), shutdown=Shutdown(grace))
        http = ApiHttpServer(server_config(api.app()), api.shutdown)
        with started(http) as address:
            yield Served(f"{address}v1", policy, sampler, batch, http)
    finally:
        batch.stop()


@dataclass
class Scripted:
    """A sampler whose responses are given: each with the tokens of a text, one at a time."""

    tokens: Callable[[Row], Sequence[int]]
    error: Exception | None = None
    """Raised after the tokens instead of the end."""
    rows: list[Row] = field(default_factory=list)

    @property
    def load(self) -> Load:
        return Load(0, 0)

    async def sample(self, rows: Sequence[Row]) -> AsyncGenerator[Sampled, None]:
        self.rows += rows
        for index, row in enumerate(rows):
            *first, last = self.tokens(row)
            for token in first:
                yield Sampled(index, [token], [-0.5])
            if self.error is not None:
                raise self.error
            yield Sampled(index, [last], [-0.5], "stop")


@contextmanager
def scripted(policy: Policy, sampler: ResponseSampler, checks: Filter | None = None) -> Iterator[str]:
    """Serve given responses in a thread; yields the URL."""
    settings = Sampler(16).build(policy.model, policy.renderer)
    api = ApiServer(reader_of(policy, settings), sampler, filter=checks)
    with started(ApiHttpServer(server_config(api.app()), api.shutdown)) as address:
        yield f"{address}v1"
