"""The calls of Tinker's API: sessions, training runs, sampling sessions and checkpoints, without HTTP."""

import secrets
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.errors import short
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.serving.fields import Fields, RequestError
from rlhf_lightning.tinker.adapters import AdaptedModel, AdaptedModels
from rlhf_lightning.tinker.checkpoints import Address, CheckpointStore, Record
from rlhf_lightning.tinker.replies import ForwardBackwardReply, JSONReply, Reply, SampleReply
from rlhf_lightning.tinker.requests import (
    SEEDS,
    TARGETS,
    ForwardBackward,
    Limits,
    SampleRequest,
    adam_params,
    check_optimizer,
    lora_settings,
    metadata,
    sample_request,
)
from rlhf_lightning.tinker.results import Results
from rlhf_lightning.tinker.runs import SNAPSHOTS, Run, Runs
from rlhf_lightning.tinker.sampling import sample
from rlhf_lightning.tinker.training import TrainingRun
from rlhf_lightning.tinker.worker import Call, Task, Worker
from rlhf_lightning.types import JSON

SILENT = 300.0
"""Seconds without a sign of a client, which sends one every 10 s, after which its training runs may be forgotten."""
GONE = 3600.0
"""Seconds without a sign of a client after which its session is forgotten, if it has no training run."""
UNLIMITED = 2**17
"""Largest number of tokens of a row, for models without a limit."""


class Body(Fields):
    """The fields of a request, with its bytes.

    Args:
        value: The request as JSON.
        content: The request as it was sent.

    Raises:
        RequestError: If it is not an object.
    """

    def __init__(self, value: JSON, content: bytes) -> None:
        super().__init__(value)
        self.content = content
        self.text("type")  # the client repeats the name of the call here

    def seq_id(self) -> int | None:
        """The client's number of the request."""
        return self.whole("seq_id", 0, SEEDS)


@dataclass(frozen=True)
class _SamplingSession:
    """What a sampling session samples from: the base, a checkpoint, or a snapshot of a run."""

    address: Address | None = None
    run: str | None = None


class SampleTask(Task):
    """A request for samples; waiting ones with equal parameters of the same sampling session are sampled together.

    Args:
        request: The request.
        size: Its bytes.
        session: Id of its sampling session.
        adapted: Returns the model with the session's weights.
    """

    def __init__(self, request: SampleRequest, size: int, session: str, adapted: Callable[[], AdaptedModel]) -> None:
        group: Hashable = (session, request.params)
        super().__init__(size, group)
        self._request, self._adapted = request, adapted

    def run(self, tasks: Sequence[Task]) -> list[Reply]:
        """Sample for all tasks."""
        requests = [task._request for task in tasks if isinstance(task, SampleTask)]
        return [SampleReply(result) for result in sample(self._adapted(), requests)]


class TinkerService:
    """Answers the calls of Tinker's client about one base model.

    Methods that take time return the id of a request; `result` has its future. One thread computes them in order.

    Args:
        loaded: The base model.
        name: The name by which clients ask for it.
        folder: Where checkpoints are saved.
        slots: Number of samples decoded in parallel.
        most_runs: Largest number of training runs at the same time.

    Example:
        >>> service = TinkerService(LanguageModel("Qwen/Qwen3-0.6B"), "Qwen/Qwen3-0.6B", Path("runs/tinker"))
        ... # doctest: +SKIP
        >>> service.start()  # doctest: +SKIP
    """

    def __init__(self, loaded: LanguageModel, name: str, folder: Path, slots: int = 16, most_runs: int = 8) -> None:
        self.name = name
        # An absolute path, because clients on this machine load the tokenizer from it in their own working directory.
        self.tokenizer_id = str(Path(loaded.folder).resolve()) if Path(loaded.folder).is_dir() else loaded.folder
        context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        vocabulary, width = loaded.model.get_input_embeddings().weight.shape
        self.limits = Limits(vocabulary, context or UNLIMITED, width)
        self._end_token_ids = tuple(sorted(loaded.renderer.stop_token_ids))
        self._models = AdaptedModels(loaded, slots)
        self._checkpoints = CheckpointStore(folder, loaded)
        self._worker = Worker()
        self._sessions: dict[str, float] = {}
        """Sessions of clients, with the time of the clock at which each was heard of last, in seconds."""
        self._runs = Runs(most_runs)
        self._samplers: dict[str, _SamplingSession] = {}
        self._results = Results()

    def start(self) -> None:
        """Begin to compute."""
        self._worker.start()

    def stop(self) -> None:
        """End after the present request."""
        self._worker.stop()

    # -- futures ------------------------------------------------------------------------------------------------------

    def result(self, request_id: str) -> Future[Reply]:
        """The future of a request; see `Results.get`."""
        return self._results.get(request_id)

    def _submit(self, task: Task) -> str:
        """Let a task wait for its turn; returns the id of the request.

        Raises:
            RequestError: If too many tasks of its kind wait.
        """
        self._worker.check_room(task)
        return self._submit_anyway(task)

    def _submit_anyway(self, task: Task) -> str:
        """Submit a task that frees memory, even if too many tasks wait."""
        request_id = self._results.add(task.future)
        self._worker.add(task)
        return request_id

    def _submit_in_order(
        self, model_id: str, seq_id: int | None, content: bytes, work: Callable[[], Reply]
    ) -> dict[str, JSON]:
        """Submit work of a training run; see `Run.admit`."""
        run = self._runs.get(model_id)
        self.check_session(model_id.split(":")[0])
        request_id = run.admit(seq_id, content, lambda: self._submit(Call(work, len(content))))
        return {"request_id": request_id, "model_id": model_id}

    # -- sessions and training runs -----------------------------------------------------------------------------------

    def create_session(self) -> str:
        """Begin a session of a client; returns its id. Sessions without training runs whose clients are gone end."""
        gone = {one for one in self._silent(GONE) if not self._runs.of(one)}
        for one in gone:
            del self._sessions[one]
        for sampler in [one for one in list(self._samplers) if one.split(":")[0] in gone]:
            del self._samplers[sampler]
        session = secrets.token_hex(8)
        self._sessions[session] = time.monotonic()
        return session

    def _silent(self, seconds: float) -> list[str]:
        """Sessions whose clients have given no sign for some seconds."""
        return [one for one, heard in self._sessions.items() if time.monotonic() > heard + seconds]

    def check_session(self, session: str | None) -> str:
        """Return the id of a session, and note that its client is still there.

        Raises:
            RequestError: If it is unknown.
        """
        if session is None or session not in self._sessions:
            raise RequestError(
                f"the session {short(session)} has ended, or the server was started again; create a new ServiceClient. "
                "Saved checkpoints are still there",
                "session_id",
                status=404,
            )
        self._sessions[session] = time.monotonic()
        return session

    def finish_session(self, session: str) -> Future[Reply]:
        """End a session with its training runs and sampling sessions, once waiting requests are done.

        Checkpoints stay.

        Args:
            session: Id of the session; one that has ended is left alone.

        Returns:
            A future that is done when the runs have ended.
        """
        self._sessions.pop(session, None)

        def forget() -> Reply:
            for model_id in self._runs.of(session):
                self._runs.forget(model_id)
            for sampler in [one for one in list(self._samplers) if one.startswith(f"{session}:")]:
                del self._samplers[sampler]
            return JSONReply({})

        return self.result(self._submit_anyway(Call(forget)))

    def _create(
        self, session: str, number: int | None, run: Run, content: bytes, work: Callable[[str], Reply]
    ) -> dict[str, JSON]:
        """Register a training run, and submit the work that creates it, unless the request was sent before.

        If there are too many runs, those of clients that are gone are forgotten first.
        """
        if number is None:
            raise RequestError("model_seq_id is missing; give each training run of a session its own number")
        model_id = f"{session}:train:{number}"
        request_id = self._runs.created(model_id, content)
        if request_id is None:
            if self._runs.full:
                for other in [other for one in self._silent(SILENT) for other in self._runs.of(one)]:
                    self._runs.forget(other)
            call = Call(lambda: work(model_id), len(content))
            request_id = self._runs.new(model_id, run, content, lambda: self._submit(call))
        return {"request_id": request_id, "model_id": model_id}

    def check_model(self, name: str | None) -> None:
        """Raise `RequestError` unless a client asks for the served model."""
        if name != self.name:
            raise RequestError(
                f"base_model is {short(name)}; this server has {self.name!r}. Ask for that, or start it with --name",
                "base_model",
                status=404,
            )

    def create_model(self, fields: Body) -> dict[str, JSON]:
        """Create a training run with a new adapter."""
        session, number = self.check_session(fields.text("session_id")), fields.whole("model_seq_id", 0, 10**9 - 1)
        self.check_model(fields.text("base_model"))
        (lora, seed), notes = lora_settings(fields, self.limits), metadata(fields)
        fields.finish()

        def create(model_id: str) -> Reply:
            with self._runs.creating(model_id) as run:
                adapted = self._models.of(lora)
                run.training = TrainingRun(adapted, adapted.fresh(seed))
            return JSONReply({"model_id": model_id, "type": "create_model"})

        return self._create(session, number, Run(lora, notes), fields.content, create)

    def get_info(self, fields: Body) -> dict[str, JSON]:
        """Information about a training run."""
        model_id = fields.text("model_id") or ""
        fields.finish()
        data: dict[str, JSON] = {"arch": None, "model_name": self.name, "tokenizer_id": self.tokenizer_id}
        return {
            "type": "get_info",
            "model_data": data,
            "model_id": model_id,
            "is_lora": True,
            "lora_rank": self._runs.get(model_id).lora.rank,
            "model_name": self.name,
        }

    def unload_model(self, fields: Body) -> dict[str, JSON]:
        """End a training run, whose checkpoints stay."""
        model_id = fields.text("model_id") or ""
        fields.finish()
        self._runs.get(model_id)

        def unload() -> Reply:
            self._runs.forget(model_id)
            return JSONReply({"model_id": model_id, "type": "unload_model"})

        return {"request_id": self._submit_anyway(Call(unload)), "model_id": model_id}

    def training_run(self, model_id: str) -> dict[str, JSON]:
        """A training run as Tinker's API describes it, also one of an earlier server with checkpoints.

        Args:
            model_id: Id of the run.
        """
        checkpoints = self.list_checkpoints(model_id)
        newest = {str(one["checkpoint_type"]): one for one in checkpoints}
        if model_id in self._runs or not checkpoints:
            run = self._runs.get(model_id)
            rank, notes, last = run.lora.rank, run.user_metadata, run.last_request
        else:
            record = self._checkpoints.record(Address.of(str(checkpoints[-1]["tinker_path"])))
            rank, notes, last = record.lora.rank, record.user_metadata, record.created
        return {
            "training_run_id": model_id,
            "base_model": self.name,
            "model_owner": "local",
            "is_lora": True,
            "lora_rank": rank,
            "last_request_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(last)),
            "last_checkpoint": newest.get("training"),
            "last_sampler_checkpoint": newest.get("sampler"),
            "user_metadata": {**notes},
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def forward_backward(self, request: ForwardBackward, content: bytes) -> dict[str, JSON]:
        """Compute a loss, and add its gradient to those of the run.

        Args:
            request: The request.
            content: The request as it was sent.
        """

        def compute() -> Reply:
            training = self._runs.trained(request.model_id)
            logprobs, total = training.forward_backward(request.data, request.loss, not request.forward_only)
            return ForwardBackwardReply(logprobs, {"loss:sum": total})

        return self._submit_in_order(request.model_id, request.seq_id, content, compute)

    def optim_step(self, fields: Body) -> dict[str, JSON]:
        """Update the weights of a run with its gradients."""
        model_id, seq_id, params = fields.text("model_id") or "", fields.seq_id(), adam_params(fields)
        fields.finish()

        def step() -> Reply:
            norm = self._runs.trained(model_id).optim_step(params)
            return JSONReply({"metrics": {"grad_norm": norm}})

        return self._submit_in_order(model_id, seq_id, fields.content, step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_weights(self, fields: Body) -> dict[str, JSON]:
        """Save the adapter of a run with the state of its optimizer."""
        model_id, seq_id, overwrite = fields.text("model_id") or "", fields.seq_id(), fields.flag("overwrite")
        address, record = self._address(model_id, "weights", fields), self._record(model_id, fields)
        fields.finish()

        def save() -> Reply:
            training = self._runs.trained(model_id)
            training.adapted.load(training.weights)
            state = training.optimizer_state()
            self._checkpoints.write(address, training.adapted, record, state, overwrite)
            return JSONReply({"path": str(address), "type": "save_weights"})

        return self._submit_in_order(model_id, seq_id, fields.content, save)

    def save_weights_for_sampler(self, fields: Body) -> dict[str, JSON]:
        """Save the adapter of a run without its optimizer; without a name, keep a copy for a sampling session."""
        model_id, seq_id = fields.text("model_id") or "", fields.seq_id()
        number, _ = fields.whole("sampling_session_seq_id", 0, SEEDS), fields.text("kind")
        run = self._runs.get(model_id)
        if number is not None:
            fields.finish()
            sampler = f"{model_id.split(':')[0]}:sample:{number}"

            def snapshot() -> Reply:
                run.keep(sampler, self._runs.trained(model_id).snapshot())
                self._samplers[sampler] = _SamplingSession(run=model_id)
                return JSONReply({"sampling_session_id": sampler, "type": "save_weights_for_sampler"})

            return self._submit_in_order(model_id, seq_id, fields.content, snapshot)
        address, record = self._address(model_id, "sampler_weights", fields), self._record(model_id, fields)
        fields.finish()

        def save() -> Reply:
            training = self._runs.trained(model_id)
            training.adapted.load(training.weights)
            self._checkpoints.write(address, training.adapted, record)
            return JSONReply({"path": str(address), "type": "save_weights_for_sampler"})

        return self._submit_in_order(model_id, seq_id, fields.content, save)

    def load_weights(self, fields: Body) -> dict[str, JSON]:
        """Load a checkpoint into a run, or into a new run if the request names a session."""
        address, optimizer = Address.of(fields.text("path") or ""), fields.flag("optimizer")
        session, number = fields.text("session_id"), fields.whole("model_seq_id", 0, 10**9 - 1)
        model_id, seq_id = fields.text("model_id"), fields.seq_id()
        base_model, notes, _ = fields.text("base_model"), metadata(fields), fields.text("weights_access_token")
        check_optimizer(fields)
        fields.finish()
        if base_model is not None:
            self.check_model(base_model)
        record = self._checkpoints.record(address)
        self.check_model(record.base_model)
        if optimizer and address.kind != "weights":
            raise RequestError(f"{address} has no optimizer state; only save_state writes it", "path")

        def load(model_id: str) -> Reply:
            with self._runs.creating(model_id) as run:
                adapted = self._models.of(record.lora)
                weights = self._checkpoints.weights(address, adapted)
                state = self._checkpoints.optimizer(address) if optimizer else None
                run.training = run.training or TrainingRun(adapted, weights)
                run.training.load(weights, state)
            return JSONReply({"path": str(address), "model_id": model_id, "type": "load_weights"})

        if session is not None:
            return self._create(self.check_session(session), number, Run(record.lora, notes), fields.content, load)
        loaded_into = model_id or ""
        run = self._runs.get(loaded_into)
        if run.lora != record.lora:
            raise RequestError(
                f"{address} has rank {record.rank} and the layers {list(record.target)}, but the training run has rank "
                f"{run.lora.rank} and {run.lora.target}; create a training client from the state instead",
                "path",
            )

        return self._submit_in_order(loaded_into, seq_id, fields.content, lambda: load(loaded_into))

    def weights_info(self, fields: Body) -> dict[str, JSON]:
        """What a client must know to load a checkpoint."""
        record = self._checkpoints.record(Address.of(fields.text("tinker_path") or ""))
        fields.finish()
        trained: dict[str, JSON] = {name: target in record.target for name, target in TARGETS.items()}
        return {"base_model": record.base_model, "is_lora": True, "lora_rank": record.rank, **trained}

    def list_checkpoints(self, model_id: str) -> list[dict[str, JSON]]:
        """The checkpoints of a training run as Tinker's API describes them, oldest first.

        Args:
            model_id: Id of the run.
        """
        return self._checkpoints.list(Address.of(f"tinker://{model_id}/weights/any").run)

    def delete_checkpoint(self, model_id: str, checkpoint_id: str) -> None:
        """Delete a checkpoint.

        Args:
            model_id: Id of the training run.
            checkpoint_id: `weights/NAME` or `sampler_weights/NAME`.
        """
        self._checkpoints.delete(Address.of(f"tinker://{model_id}/{checkpoint_id}"))

    def _address(self, model_id: str, kind: str, fields: Body) -> Address:
        """The address of a checkpoint that a client wants to save."""
        self._runs.get(model_id)
        return Address.of(f"tinker://{model_id}/{kind}/{fields.text('path') or ''}")

    def _record(self, model_id: str, fields: Body) -> Record:
        lora = self._runs.get(model_id).lora
        ttl, notes = fields.whole("ttl_seconds", 1, 10**10), metadata(fields)
        return Record(self.name, lora.rank, list(lora.target), ttl_seconds=ttl, user_metadata=notes)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def create_sampling_session(self, fields: Body) -> dict[str, JSON]:
        """Begin to sample from a checkpoint or from the base."""
        session, number = (
            self.check_session(fields.text("session_id")),
            fields.whole("sampling_session_seq_id", 0, SEEDS),
        )
        base_model, path = fields.text("base_model"), fields.text("model_path")
        fields.finish()
        if base_model is not None or path is None:
            self.check_model(base_model)
        address = None if path is None else Address.of(path)
        if address is not None:
            self.check_model(self._checkpoints.record(address).base_model)
        sampler = f"{session}:sample:{number}"
        self._samplers[sampler] = _SamplingSession(address)
        return {"type": "create_sampling_session", "sampling_session_id": sampler}

    def get_sampler(self, sampler: str) -> dict[str, JSON]:
        """Information about a sampling session."""
        found = self._sampler(sampler)
        path = None if found.address is None else str(found.address)
        return {"sampler_id": sampler, "base_model": self.name, "model_path": path}

    def _sampler(self, sampler: str | None) -> _SamplingSession:
        if sampler is None or sampler not in self._samplers:
            raise RequestError(
                f"the sampling session {short(sampler)} is unknown; create a new sampling client",
                "sampling_session_id",
                status=404,
            )
        return self._samplers[sampler]

    def asample(self, fields: Body) -> dict[str, JSON]:
        """Sample, or compute log-probabilities of a prompt."""
        request = sample_request(fields, self.limits, self._end_token_ids)
        sampler, _ = fields.text("sampling_session_id"), fields.seq_id()
        base_model, path = fields.text("base_model"), fields.text("model_path")
        fields.finish()
        if sampler is not None:
            source = self._sampler(sampler)
        else:
            if base_model is not None or path is None:
                self.check_model(base_model)
            source = _SamplingSession(None if path is None else Address.of(path))
        if source.run is not None and sampler not in self._runs.get(source.run).snapshots:
            raise RequestError(
                f"the weights of {sampler} are no longer kept: a training run has {SNAPSHOTS} unnamed sampling "
                "clients. Save weights that you need for longer with save_weights_for_sampler",
                "sampling_session_id",
                status=404,
            )
        key = sampler or f"{base_model} {path}"
        request_id = self._submit(SampleTask(request, len(fields.content), key, lambda: self._sampled(source, key)))
        ids: list[JSON] = [f"{request_id}:{index}" for index in range(len(request.seeds))]
        return {"request_id": request_id, "sample_sequence_ids": ids}

    def _sampled(self, source: _SamplingSession, sampler: str) -> AdaptedModel:
        """The model with the weights of a sampling session, in the worker."""
        if source.run is not None:
            run = self._runs.get(source.run)
            if sampler not in run.snapshots:
                raise RequestError(f"the weights of {sampler} are no longer kept; create a new sampling client")
            adapted = self._models.of(run.lora)
            adapted.load(run.snapshots[sampler])
            return adapted
        if source.address is None:
            return self._models.of(None)
        adapted = self._models.of(self._checkpoints.record(source.address).lora)
        adapted.load(self._checkpoints.weights(source.address, adapted))
        return adapted
