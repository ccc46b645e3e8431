"""Sampling for a server with vLLM in this process."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.generation.canary import Canary
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.vllm_batch import VLLMBatch
from rlhf_lightning.generation.vllm_engine import LoadedVLLM, VLLMEngine
from rlhf_lightning.models.loading import adapter_base, is_adapter
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.serving.sampling import Row
from rlhf_lightning.serving.threaded import Job, ThreadSampler
from rlhf_lightning.types import JSON


def load_vllm(policy: Policy, dtype: str, max_length: int, slots: int, options: dict[str, JSON]) -> LoadedVLLM:
    """Start vLLM with the weights of a policy, and confirm that it computes the same.

    Args:
        policy: The policy. An adapter is merged.
        dtype: The precision in which vLLM computes.
        max_length: Largest number of tokens of a prompt with its response.
        slots: Largest number of responses that are sampled at the same time.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ConfigError: If vLLM is missing, or cannot hold the model.
        SyncError: If it holds other weights, or computes something else.
    """
    # vLLM reads the architecture, and its own copy of the tokenizer.
    model = adapter_base(Path(policy.folder)) if is_adapter(policy.folder) else policy.folder
    usual: dict[str, JSON] = {
        "gpu_memory_utilization": 0.9 if torch.cuda.is_available() else 0.3,
        "dtype": dtype,
        "max_num_seqs": slots,
    }
    options = {**usual, **options}
    memory = options.pop("gpu_memory_utilization")
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= 1:
        raise ConfigError(f"--vllm_options: gpu_memory_utilization is {memory!r}; it must be above 0 and at most 1")
    try:
        settings = VLLMEngine(model, memory, max_length, lora_sync="merged", options=options)
        engine = settings.build(policy.model, policy.tokenizer)
        engine.sync(PolicyWeights(policy.model), version=0)
        Canary(engine, policy.model, max_length).check(version=0)
    except UserError as error:
        said = str(error).replace("sampler.engine: options.", "--vllm_options: ")
        raise type(error)(said.replace("sampler.engine", "--engine vllm")) from error
    return engine


class VLLMSampler(ThreadSampler):
    """Samples the responses of all requests with vLLM, in one thread.

    Args:
        engine: vLLM with the model's weights.
        slots: Number of responses that are sampled at the same time.
        max_waiting: Number of responses that may wait for a slot.

    Example:
        >>> sampler = VLLMSampler(engine, slots=64)  # doctest: +SKIP
    """

    def __init__(self, engine: LoadedVLLM, slots: int, max_waiting: int = 64) -> None:
        super().__init__(slots, max_waiting)
        self.engine = engine

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse what vLLM samples or reports in another way than the built-in engine.

        Args:
            rows: The responses.

        Raises:
            RequestError: For log-probabilities with `top_p`, `top_k`, `min_p` or `min_tokens`, which vLLM renormalizes,
                and for `min_tokens` if vLLM would keep out an end token that is none of the model's stop tokens.
        """
        for row in rows:
            if row.logprobs and row.params.cuts:
                raise RequestError(
                    f"with {' and '.join(row.params.cuts)}, vLLM has no log-probabilities of the full softmax; leave "
                    "logprobs out, or set top_p: 1, top_k: -1, min_p: 0 and min_tokens: 0",
                    "logprobs",
                    "unsupported_value",
                )
            if row.params.min_tokens and self.engine.eos not in (None, *row.params.stop_token_ids):
                raise RequestError(
                    "vLLM would also keep an end token out of the answer that does not end it; leave min_tokens out",
                    "min_tokens",
                    "unsupported_value",
                )

    def _sample(self, job: Job) -> None:
        batch = VLLMBatch(self.engine)
        try:
            self._run_batch(job, batch)
        finally:
            batch.clear()
