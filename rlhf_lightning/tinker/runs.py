"""The training runs of a server, and the order of their requests."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf_lightning.errors import quoted
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.adapters import Weights
from rlhf_lightning.tinker.training import TrainingRun

SNAPSHOTS = 8
"""Number of unnamed sampling sessions of a training run that are kept; each holds a copy of the adapter."""
RESENT = 64
"""Number of requests of a training run that a client may send again."""


@dataclass
class Run:
    """A training run as clients see it.

    Attributes:
        lora: Form of its adapter.
        user_metadata: The client's notes.
        last_request: When the last request came, in seconds since 1970.
        training: What is trained; None until the worker has created it.
        snapshots: Weights of its unnamed sampling sessions, oldest first.

    Example:
        >>> run = Run(LoRA(rank=8), {})
        >>> run.admit(1, b"{}", lambda: "first"), run.admit(1, b"{}", lambda: "second")
        ('first', 'first')
    """

    lora: LoRA
    user_metadata: dict[str, str]
    last_request: float = field(default_factory=time.time)
    training: TrainingRun | None = None
    created_by: tuple[str, str] | None = None
    """Digest and id of the request that created it."""
    snapshots: OrderedDict[str, Weights] = field(default_factory=OrderedDict)
    _admitted: OrderedDict[int, tuple[str, str]] = field(default_factory=OrderedDict)
    """Digest and request id of the requests that the client may send again, by `seq_id`."""
    _last_seq_id: int = 0

    def admit(self, seq_id: int | None, content: bytes, submit: Callable[[], str]) -> str:
        """Submit a request, unless it was sent before: a client repeats a request when the connection breaks.

        Args:
            seq_id: The client's number of the request; None for none.
            content: The request as it was sent.
            submit: Submits it.

        Returns:
            Id of the request.

        Raises:
            RequestError: If the requests are not in order.
        """
        self.last_request = time.time()
        if not seq_id:
            return submit()
        digest = _digest(content)
        if seq_id in self._admitted:
            before, request_id = self._admitted[seq_id]
            if before != digest:
                raise RequestError(f"seq_id {seq_id} was used for another request; count up", "seq_id")
            return request_id
        if seq_id <= self._last_seq_id:
            raise RequestError(
                f"seq_id {seq_id} comes after {self._last_seq_id}; send the requests of a training run in order",
                "seq_id",
            )
        request_id = submit()
        self._admitted[seq_id], self._last_seq_id = (digest, request_id), seq_id
        if len(self._admitted) > RESENT:
            self._admitted.popitem(last=False)
        return request_id

    def keep(self, sampler: str, weights: Weights) -> None:
        """Keep the weights of an unnamed sampling session, and drop those of the oldest one if there are too many.

        Args:
            sampler: Id of the session.
            weights: The weights.
        """
        self.snapshots[sampler] = weights
        if len(self.snapshots) > SNAPSHOTS:
            self.snapshots.popitem(last=False)


class Runs:
    """The training runs by their ids.

    Args:
        most: Largest number of runs at the same time.

    Example:
        >>> runs = Runs(most=8)
        >>> runs.new("0123456789abcdef:train:0", Run(LoRA(rank=8), {}), b"{}", lambda: "request")
        'request'
        >>> runs.created("0123456789abcdef:train:0", b"{}")
        'request'
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._runs: dict[str, Run] = {}

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._runs

    @property
    def full(self) -> bool:
        """True if no further run is possible."""
        return len(self._runs) >= self.most

    def of(self, session: str) -> list[str]:
        """Ids of the runs of a session. Runs may come and go in other threads at the same time.

        Args:
            session: Id of the session.
        """
        return [model_id for model_id in list(self._runs) if model_id.startswith(f"{session}:")]

    def created(self, model_id: str, content: bytes) -> str | None:
        """Id of the request that created a run, if a client sends it again; None if the run does not exist.

        Args:
            model_id: Id of the run.
            content: The request as it was sent.

        Raises:
            RequestError: If the run was created by another request.
        """
        run = self._runs.get(model_id)
        if run is None or run.created_by is None:
            return None
        before, request_id = run.created_by
        if before != _digest(content):
            raise RequestError(f"the training run {model_id} exists; use another model_seq_id", "model_seq_id")
        return request_id

    def new(self, model_id: str, run: Run, content: bytes, submit: Callable[[], str]) -> str:
        """Register a training run, and submit the request that creates it; returns the id of the request.

        Args:
            model_id: Id of the run, which does not exist.
            run: The run.
            content: The request as it was sent.
            submit: Submits it.

        Raises:
            RequestError: If there are too many runs, or the request is refused.
        """
        if self.full:
            raise RequestError(
                f"this server has {len(self._runs)} training runs already ({quoted(list(self._runs))}); close the "
                "ServiceClient of one, or start the server with a larger --max_runs"
            )
        self._runs[model_id] = run
        try:
            request_id = submit()
        except RequestError:
            self.forget(model_id)
            raise
        run.created_by = _digest(content), request_id
        return request_id

    def get(self, model_id: str | None) -> Run:
        """A training run.

        Args:
            model_id: Its id.

        Raises:
            RequestError: If it is unknown.
        """
        if model_id is None or model_id not in self._runs:
            raise RequestError(
                f"the training run {str(model_id)[:80]!r} is unknown, or was unloaded; create_model makes a new one",
                "model_id",
                status=404,
            )
        return self._runs[model_id]

    def trained(self, model_id: str) -> TrainingRun:
        """What is trained in a run.

        Args:
            model_id: Id of the run.

        Raises:
            RequestError: If the run is unknown, or not created yet.
        """
        training = self.get(model_id).training
        if training is None:
            raise RequestError(f"the training run {model_id} was not created; wait for create_model", "model_id")
        return training

    @contextmanager
    def creating(self, model_id: str) -> Iterator[Run]:
        """Context manager in which a run gets its `training`; forgets the run if that fails.

        Args:
            model_id: Id of the run.
        """
        run = self.get(model_id)
        try:
            yield run
        finally:
            if run.training is None:
                self.forget(model_id)

    def forget(self, model_id: str) -> None:
        """End a run, if it exists.

        Args:
            model_id: Its id.
        """
        self._runs.pop(model_id, None)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
