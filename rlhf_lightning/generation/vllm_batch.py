"""Rows that vLLM samples in this process, as they join and leave."""

from rlhf_lightning.generation.local_engine import BatchRow
from rlhf_lightning.generation.token_sampling import record_token
from rlhf_lightning.generation.vllm_engine import LoadedVLLM
from rlhf_lightning.generation.vllm_requests import ENDS, request_settings


class VLLMBatch:
    """Rows that vLLM samples. As in a `SlotBatch`, rows can be added and cancelled between two steps.

    Args:
        engine: vLLM with its weights. Nothing else may sample with it at the same time.

    Example:
        ```python
        batch = VLLMBatch(engine)
        batch.add(BatchRow(prompt, params, seed=0))
        while batch.step():
            pass
        ```
    """

    def __init__(self, engine: LoadedVLLM) -> None:
        self._engine, self._vllm = engine, engine.llm.llm_engine
        self._rows: dict[str, BatchRow] = {}
        self._added = 0

    def add(self, row: BatchRow) -> None:
        """Begin to sample a row.

        Args:
            row: The row; `check_prompts` has accepted its prompt.
        """
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self._added += 1
        name = str(self._added)
        settings = vllm.SamplingParams(**request_settings(row.params, row.seed), output_kind=RequestOutputKind.DELTA)
        self._vllm.add_request(name, {"prompt_token_ids": list(row.prompt)}, settings)
        self._rows[name] = row

    def cancel(self, row: BatchRow) -> None:
        """Stop sampling a row, if its response is not complete yet.

        Args:
            row: A row that was added.
        """
        for name in [name for name, one in self._rows.items() if one is row]:
            del self._rows[name]
            self._vllm.abort_request([name])

    def clear(self) -> None:
        """Cancel all rows."""
        for row in list(self._rows.values()):
            self.cancel(row)

    def step(self) -> bool:
        """Decode a token of every row, or compute prompts.

        Returns:
            False if no row is left.

        Raises:
            RuntimeError: If vLLM ends a response for another reason than a stop or its length.
        """
        if not self._rows:
            return False
        for result in self._vllm.step():
            row, [output] = self._rows[result.request_id], result.outputs
            for token, step in zip(output.token_ids, output.logprobs, strict=True):
                row.ended = record_token(row.completion, token, step[token].logprob, row.params, self._engine.decode)
                if row.ended:
                    break
            if result.finished and not row.ended:  # see `completion`
                if output.finish_reason not in ENDS:
                    raise RuntimeError(f"vLLM ended a response with {output.finish_reason!r}")
                row.completion.stop_reason, row.ended = output.finish_reason, True
            if row.ended:
                self.cancel(row)
        return True
