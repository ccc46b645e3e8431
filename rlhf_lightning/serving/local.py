"""Sampling for a server with the built-in engine: one batch that requests join and leave while it runs."""

from contextlib import ExitStack

from rlhf_lightning.generation.hf_generate import generate
from rlhf_lightning.generation.local_engine import BatchRow, LocalEngine, SlotBatch
from rlhf_lightning.serving.threaded import Job, ThreadSampler


class _Cancelled(Exception):
    """The client of the row that is sampled is gone."""


class BatchSampler(ThreadSampler):
    """Samples the responses of all requests in one thread, as rows of one batch.

    A model that is sampled with its own `generate` answers one response after the other.

    Args:
        engine: The engine. Its `slots` are the number of responses that are sampled at the same time.
        max_waiting: Number of responses that may wait for a slot.

    Example:
        >>> sampler = BatchSampler(engine)  # doctest: +SKIP
        >>> sampler.start()  # doctest: +SKIP
        >>> async for sampled in sampler.sample([Row(prompt_ids, params, seed=0)]):  # doctest: +SKIP
        ...     print(sampled.ids)
        >>> sampler.stop()  # doctest: +SKIP
    """

    def __init__(self, engine: LocalEngine, max_waiting: int = 64) -> None:
        super().__init__(engine.slots, max_waiting)
        self.engine = engine
        self._opened = ExitStack()
        self._in_session = False

    def _run(self) -> None:
        with self._opened:
            super()._run()

    def _sample(self, job: Job) -> None:
        if not self._in_session:
            # The weights of a server do not change, so a session copies them once for all requests. It begins with the
            # first of them, and not with the thread, so that a request gets the error if it cannot begin.
            self._opened.enter_context(self.engine.session())
            self._in_session = True
        with self.engine.decoding(job.row.limit) as in_slots:
            if in_slots:
                self._run_batch(job, SlotBatch(self.engine, eager=True))
            else:
                self._run_alone(job)

    def _may_join(self, row: BatchRow) -> bool:
        """A row whose length is not checked yet waits until the batch is empty."""
        return row.limit <= self.engine.packed_forward.checked_length

    def _run_alone(self, job: Job) -> None:
        """Sample a job with the model's own `generate`."""
        row = job.row

        def on_token(_: int, token: int, logprob: float, ended: bool) -> None:
            if job.cancelled or self._stopping:
                raise _Cancelled
            row.completion.ids.append(token)
            row.completion.logprobs.append(logprob)
            if not ended:
                job.report()

        try:
            [completion] = generate(
                self.engine.model, [row.prompt], row.params, [row.seed], self.engine.decode, on_token
            )
        except _Cancelled:
            return
        row.completion, row.ended = completion, True
        job.report()
