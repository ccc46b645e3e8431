"""vLLM as the sampling engine (extra `vllm`, CUDA only). UNTESTED: written from vLLM's documentation, not yet run.

model:
  sampler:
    max_tokens: 1024
    engine: {class_path: rlhf_lightning.sampling.vllm_engine.VLLMEngine, init_args: {model: Qwen/Qwen3-0.6B}}
"""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.sampling.token_sampling import SamplingParams
from rlhf_lightning.types import Completion

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


class VLLMEngine:
    """Samples with vLLM on this process's GPU, taking the policy's weights before every round.

    Its kernels differ from the trainer's: watch `train/logprob_gap`, and correct with truncated importance weights.

    Args:
        model: Folder or Hub id of a model with the policy's architecture.
        memory: Fraction of the GPU's memory that vLLM may use.
        max_length: Tokens of a prompt with its response; the model's limit by default.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ConfigError: If vLLM is not installed.

    Example:
        ```python
        sampler = Sampler(max_tokens=1024, engine=VLLMEngine("Qwen/Qwen3-0.6B"))
        ```
    """

    def __init__(
        self, model: str, memory: float = 0.3, max_length: int | None = None, options: dict[str, Any] | None = None
    ) -> None:
        # Run the engine in this process, where its weights can be set.
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
        """Load the weights, and drop cached prompts, whose keys belong to the old weights."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(named_tensors)
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt, see `Engine.generate`."""
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
                ignore_eos=True,  # only these end a response, whatever the config that vLLM loaded says
                stop=list(params.stop_strings) or None,
                include_stop_str_in_output=True,
                seed=seed % 2**31,
                logprobs=0,  # only the sampled token's
            )
            for seed in seeds
        ]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [_sample(result.outputs[0]) for result in self.llm.generate(rows, settings, use_tqdm=False)]


def _sample(output: "CompletionOutput") -> Completion:
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, "length" if output.finish_reason == "length" else "stop")
