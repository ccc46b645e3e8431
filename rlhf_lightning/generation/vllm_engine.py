"""vLLM as the sampling engine, in the training process. Run on a CPU only, see docs/engines.md.

model:
  sampler:
    max_tokens: 1024
    engine: {class_path: rlhf_lightning.generation.vllm_engine.VLLMEngine, init_args: {model: Qwen/Qwen3-0.6B}}
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts
from rlhf_lightning.generation.vllm_requests import check_settings, check_version, completion, request_settings
from rlhf_lightning.types import Completion

if TYPE_CHECKING:
    from torch.nn import Module
    from vllm.outputs import CompletionOutput


class VLLMEngine:
    """Samples with vLLM in this process, with its own copy of the policy's weights, loaded before every round.

    Its kernels differ from the trainer's: watch `train/logprob_gap`, and correct with truncated importance weights.
    vLLM computes log-probabilities either after temperature and cuts, renormalized over the tokens that are left, or
    before both. Only `top_p`, `top_k`, `min_p` and `min_tokens` at temperature 1, or a temperature without them, give
    the log-probabilities of the full softmax that training needs; `check` refuses the rest.

    Args:
        model: Folder or Hub id of a model with the policy's architecture and vocabulary.
        memory: Fraction of the device's memory that vLLM may use; on a CPU, that this process may use.
        max_length: Maximum number of tokens of a prompt with its response; by default the model's limit.
        raw_logprobs: Record log-probabilities before temperature and cuts. Allows `top_p`, `top_k`, `min_p` and
            `min_tokens`, and only the temperatures 1 and 0.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ConfigError: If vLLM is not installed, its version is too old, it cannot load the model, or there would be
            other processes.

    Example:
        ```python
        sampler = Sampler(max_tokens=1024, engine=VLLMEngine("Qwen/Qwen3-0.6B"))
        ```
    """

    def __init__(
        self,
        model: str,
        memory: float = 0.3,
        max_length: int | None = None,
        raw_logprobs: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        options = options or {}
        # vLLM makes this process a process group of its own, which Lightning would take for that of all ranks.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("sampler.engine: vLLM in the training process works only with one process (devices: 1)")
        # The weights are passed as tensors, so the engine has to run in this process.
        if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING is set, so vLLM would run in another process, where the policy's "
                "weights cannot be loaded; unset it or set it to 0"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if options.get(name, 1) != 1:
                raise ConfigError(f"sampler.engine: options.{name} must be 1; vLLM runs in the training process")
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"sampler.engine: vLLM cannot be imported ({first_line(error)}); docs/engines.md says how to install it"
            ) from error
        check_version(vllm.__version__)
        self.raw_logprobs = raw_logprobs
        try:
            with isolate_rng():  # vLLM seeds the generators of its process
                self.llm = vllm.LLM(
                    model=model,
                    gpu_memory_utilization=memory,
                    max_model_len=max_length,
                    logprobs_mode="raw_logprobs" if raw_logprobs else "processed_logprobs",
                    enable_prefix_caching=True,
                    **options,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"sampler.engine: vLLM cannot load the model {model}: {first_line(error)}") from error
        config = self.llm.model_config
        self.vocabulary, self.context = config.get_vocab_size(), config.max_model_len
        self.tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        tokenizer = self.llm.get_tokenizer()
        self.decode, self.eos = tokenizer.decode, tokenizer.eos_token_id
        self._failed = False

    def check(self, params: SamplingParams) -> None:
        """Refuse settings for which vLLM has no log-probabilities of the full softmax.

        Args:
            params: How to sample.

        Raises:
            ConfigError: If vLLM cannot follow them.
        """
        check_settings(params, self.raw_logprobs, self.eos, "sampler.engine.raw_logprobs: true", "raw_logprobs: false")

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights, and drop cached prompts, whose keys belong to the old weights.

        Args:
            named_tensors: See `Engine.sync`.
            version: See `Engine.sync`.

        Raises:
            ConfigError: If the engine cannot hold these weights. It cannot be used afterwards.
        """
        self._failed = True  # until all weights are there; vLLM frees the old ones before it loads new ones
        try:
            # Not `load_weights` of the model: on some devices vLLM holds repacked copies of the weights, which only
            # `reload_weights` renews.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._checked(named_tensors)})
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"sampler.engine: vLLM cannot load the policy's weights of round {version} ({first_line(error)}); "
                "engine.model must have the policy's architecture and vocabulary"
            ) from error
        if self.tied:
            self.llm.apply_model(_renew_heads)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cached prompts, whose keys belong to the old weights")
        self._failed = False

    def _checked(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors:
            if self.tied and name == "lm_head.weight":
                raise ConfigError(
                    "sampler.engine: the policy's head differs from its embeddings, but engine.model ties the two, so "
                    "vLLM would ignore the head; use a model with tie_word_embeddings: false in its config.json"
                )
            yield name, tensor.detach()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt, see `Engine.generate`.

        Args:
            prompts: Token ids of each prompt.
            params: How to sample.
            seeds: One seed per prompt.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ConfigError: If a prompt is empty, too long, or has ids outside the vocabulary.
        """
        import vllm

        if self._failed:
            raise ConfigError("sampler.engine: the last sync of weights failed, so vLLM cannot sample; start again")
        self.check(params)
        check_prompts(prompts, params.max_tokens, self.vocabulary, self.context)
        settings = [vllm.SamplingParams(**request_settings(params, seed)) for seed in seeds]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self.llm.generate(rows, settings, use_tqdm=False)
        return [self._completion(result.outputs[0], params) for result in results]

    def _completion(self, output: "CompletionOutput", params: SamplingParams) -> Completion:
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        return completion(output.token_ids, logprobs, output.finish_reason, params, self.decode)


def _renew_heads(model: "Module") -> None:
    """Renew what vLLM prepared from a head that is tied to the embeddings; `reload_weights` skips it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
