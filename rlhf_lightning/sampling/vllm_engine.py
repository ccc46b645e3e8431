"""vLLM as the sampling engine (extra `vllm`, CUDA only). UNTESTED: written from its documentation, not yet run.

model:
  sampler:
    max_tokens: 1024
    engine: {class_path: rlhf_lightning.sampling.vllm_engine.VLLMEngine, init_args: {model: Qwen/Qwen3-0.6B}}
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.sampling.token_sampling import Completion, SamplingParams


class VLLMEngine:
    """Samples with vLLM on the GPU of this process; it takes the policy's weights before every round.

    Its kernels are not the trainer's: watch `train/logprob_gap`, and correct with truncated importance weights.

    Args:
        model: folder or Hub id with the policy's architecture. memory: fraction of the GPU's memory that it may take.
        max_length: tokens of a prompt with its response, the model's by default. options: further arguments of
            `vllm.LLM`.
    """

    def __init__(
        self, model: str, memory: float = 0.3, max_length: int | None = None, options: dict[str, Any] | None = None
    ) -> None:
        # In this process: otherwise its weights are out of reach.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError("sampler.engine: vLLM is not installed; pip install 'rlhf-lightning[vllm]'") from error
        self.llm = LLM(
            model=model,
            gpu_memory_utilization=memory,
            max_model_len=max_length,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            enable_prefix_caching=True,
            **(options or {}),
        )

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights, and forget cached prompts, whose keys are those of the old ones."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(named_tensors)
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """A response to each prompt."""
        import vllm

        settings = [
            vllm.SamplingParams(
                max_tokens=params.max_tokens,
                min_tokens=params.min_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=params.min_p,
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,  # these and no others, whatever the folder that vLLM was given says
                stop=list(params.stop_strings) or None,
                include_stop_str_in_output=True,
                seed=seed % 2**31,
                logprobs=0,  # that of the sampled token alone
            )
            for seed in seeds
        ]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [_sample(result.outputs[0]) for result in self.llm.generate(rows, settings, use_tqdm=False)]


def _sample(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, "length" if output.finish_reason == "length" else "stop")
