"""vLLM as the sampling engine, in the training process. Run on a CPU only, see docs/engines.md.

model:
  sampler:
    max_tokens: 1024
    engine: {class_path: rlhf_lightning.generation.vllm_engine.VLLMEngine, init_args: {model: Qwen/Qwen3-0.6B}}
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from rlhf_lightning.errors import ConfigError, SyncError, first_line
from rlhf_lightning.generation.policy_weights import PolicyWeights, write_adapter
from rlhf_lightning.generation.sampler import EngineSettings
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts
from rlhf_lightning.generation.vllm_requests import check_settings, check_version, completion, request_settings
from rlhf_lightning.generation.vllm_weights import (
    Held,
    adapted_layers,
    adapter_digests,
    digests,
    expected_adapter,
    expected_digests,
    held_weights,
)
from rlhf_lightning.generation.vllm_worker import renew_heads
from rlhf_lightning.models.lora import LoRAFactors, is_adapted, lora_factors
from rlhf_lightning.types import Completion, Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput

log = logging.getLogger(__name__)
SYNCS = ("adapter", "merged")
SHARED_MEMORY = Path("/dev/shm")
"""Files here stay in memory."""
OWN_OPTIONS = (
    "enable_lora",
    "max_loras",
    "max_lora_rank",
    "lora_target_modules",
    "enable_sleep_mode",
    "logprobs_mode",
    "quantization",
)
"""Arguments of `vllm.LLM` that the engine sets itself, or that would make the weights incomparable."""


class VLLMEngine(EngineSettings):
    """Samples with vLLM in this process, with its own copy of the policy's weights, loaded before every round.

    Its kernels differ from the trainer's: watch `train/logprob_gap`. Unless it computes in float32, importance weights
    are used by default. vLLM computes log-probabilities either after temperature and cuts, renormalized over the tokens
    that are left, or before both. Only `top_p`, `top_k`, `min_p` and `min_tokens` at temperature 1, or a temperature
    without them, give the log-probabilities of the full softmax that training needs; the rest is refused.

    Args:
        model: Folder or Hub id of a model with the policy's architecture and vocabulary.
        memory: Fraction of the device's memory that vLLM may use; on a CPU, that this process may use.
        max_length: Maximum number of tokens of a prompt with its response; by default the model's limit.
        raw_logprobs: Record log-probabilities before temperature and cuts. Allows `top_p`, `top_k`, `min_p` and
            `min_tokens`, and only the temperatures 1 and 0.
        lora_sync: How a policy with LoRA is passed: `adapter` passes the base once and then only the adapter; `merged`
            passes all weights every time, with the adapter merged.
        sleep: Free vLLM's memory on the GPU while it does not sample (vLLM's sleep mode, level 1): its weights move to
            the host, its KV cache is dropped.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ConfigError: If a setting is invalid.

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
        lora_sync: str = "adapter",
        sleep: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        options = options or {}
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if options.get(name, 1) != 1:
                raise ConfigError(f"sampler.engine: options.{name} must be 1; vLLM runs in the training process")
        if own := [name for name in OWN_OPTIONS if name in options]:
            raise ConfigError(f"sampler.engine: options.{own[0]} cannot be set, because the engine chooses it")
        if lora_sync not in SYNCS:
            raise ConfigError(f"sampler.engine.lora_sync is {lora_sync!r}; it must be one of {', '.join(SYNCS)}")
        self.model, self.memory, self.max_length, self.raw_logprobs = model, memory, max_length, raw_logprobs
        self.lora_sync, self.sleep, self.options = lora_sync, sleep, options

    @property
    def low_precision(self) -> bool:
        """True unless vLLM computes in float32."""
        return self.options.get("dtype") not in ("float32", "float", torch.float32)

    def build(self, model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer) -> "LoadedVLLM":
        """Start vLLM for a policy.

        Args:
            model: The policy.
            tokenizer: Its tokenizer, which decodes responses to find stop texts.

        Raises:
            ConfigError: If vLLM is not installed, its version is too old, it cannot load the model or hold the policy's
                adapter, or there would be other processes.
        """
        # vLLM makes this process a process group of its own, which Lightning would take for that of all ranks.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("sampler.engine: vLLM in the training process works only with one process (devices: 1)")
        # The weights are passed as tensors, so the engine has to run in this process.
        if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING is set, so vLLM would run in another process, where the policy's "
                "weights cannot be loaded; unset it or set it to 0"
            )
        adapted = is_adapted(model) and self.lora_sync == "adapter"
        if adapted and (obstacles := PolicyWeights(model).obstacles()):
            raise ConfigError(
                f"sampler.engine: vLLM cannot hold {' and '.join(obstacles)} as an adapter; set "
                "sampler.engine.lora_sync: merged"
            )
        try:
            import vllm
            from vllm.config.lora import MaxLoRARanks
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"sampler.engine: vLLM cannot be imported ({first_line(error)}); docs/engines.md says how to install it"
            ) from error
        check_version(vllm.__version__)
        if self.sleep and not current_platform.is_sleep_mode_available():
            raise ConfigError("sampler.engine.sleep: vLLM can free memory only on a GPU; leave it out")
        options = dict(self.options)
        if adapted:
            layers = {name: len(factors.a) for name, factors in lora_factors(model)}
            rank, ranks = max(layers.values()), get_args(MaxLoRARanks)
            if rank > max(ranks):
                raise ConfigError(
                    f"sampler.engine: the adapter has rank {rank}, but vLLM's adapters have at most {max(ranks)}; "
                    "lower lora.rank, or set sampler.engine.lora_sync: merged"
                )
            options |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": min(one for one in ranks if one >= rank),
                "lora_target_modules": sorted({name.rpartition(".")[2] for name in layers}),
            }
        if self.sleep:
            options["enable_sleep_mode"] = True
        try:
            with isolate_rng():  # vLLM seeds the generators of its process
                llm = vllm.LLM(
                    model=self.model,
                    gpu_memory_utilization=self.memory,
                    max_model_len=self.max_length,
                    logprobs_mode="raw_logprobs" if self.raw_logprobs else "processed_logprobs",
                    enable_prefix_caching=True,
                    **options,
                )
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # TypeError: an option that it does not know
            raise ConfigError(
                f"sampler.engine: vLLM cannot load the model {self.model}: {first_line(error)}"
            ) from error
        if adapted:
            (possible,) = llm.apply_model(adapted_layers)
            if unknown := sorted(layers.keys() - possible):
                raise ConfigError(
                    f"sampler.engine: vLLM has no adapter for the layer {unknown[0]}; set "
                    "sampler.engine.lora_sync: merged"
                )
        return LoadedVLLM(llm, tokenizer, self.raw_logprobs, adapted, self.sleep)


class LoadedVLLM:
    """vLLM in this process, created by `VLLMEngine.build`.

    Args:
        llm: vLLM.
        tokenizer: The policy's tokenizer.
        raw_logprobs: See `VLLMEngine`.
        adapted: True if `sync` passes the base once, and then only the adapter.
        sleeps: True to free vLLM's memory after each session.

    Attributes:
        dtype: The precision in which it computes.
        version: Version of the weights that it holds; None before the first sync.

    Example:
        ```python
        engine = VLLMEngine("Qwen/Qwen3-0.6B").build(model, tokenizer)
        engine.sync(PolicyWeights(model), version=0)
        (completion,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=16), seeds=[0])
        ```
    """

    def __init__(
        self,
        llm: "LLM",
        tokenizer: Tokenizer,
        raw_logprobs: bool = False,
        adapted: bool = False,
        sleeps: bool = False,
    ) -> None:
        self.llm, self.raw_logprobs, self.adapted, self.sleeps = llm, raw_logprobs, adapted, sleeps
        config = llm.model_config
        self.vocabulary, self.context = config.get_vocab_size(), config.max_model_len
        self.dtype: torch.dtype = config.dtype
        self.tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        self.decode, self.eos = tokenizer.decode, llm.get_tokenizer().eos_token_id
        (self._held,) = llm.apply_model(held_weights)
        self.version: int | None = None
        self._failed = self._has_base = self._asleep = False
        self._adapter: LoRARequest | None = None

    def check(self, params: SamplingParams) -> None:
        """Refuse settings for which vLLM has no log-probabilities of the full softmax.

        Args:
            params: How to sample.

        Raises:
            ConfigError: If vLLM cannot follow them.
        """
        check_settings(params, self.raw_logprobs, self.eos, "sampler.engine.raw_logprobs: true", "raw_logprobs: false")

    # -- the weights --------------------------------------------------------------------------------------------------

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights, confirm them, and drop cached prompts, whose keys belong to the old weights.

        Args:
            named_tensors: See `Engine.sync`.
            version: See `Engine.sync`.

        Raises:
            ConfigError: If the engine cannot hold these weights. It cannot be used afterwards.
            SyncError: If it holds other weights after loading them. It cannot be used afterwards.
        """
        self._failed = True  # until all weights are there; vLLM frees the old ones before it loads new ones
        self._wake()
        if not self.adapted:
            self._load(named_tensors, version)
        else:
            assert isinstance(named_tensors, PolicyWeights), "the adapter alone is in PolicyWeights only"
            if not self._has_base:
                self._load(named_tensors.base(), version)
                self._has_base = True
            self._load_adapter(dict(named_tensors.adapter()), version)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cached prompts, whose keys belong to the old weights")
        self.version, self._failed = version, False

    def _load(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load all weights, and confirm those that can be read."""
        sizes: dict[str, int] = {}
        wanted: dict[Held, int] = {}

        def recorded() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named_tensors:
                if self.tied and name == "lm_head.weight":
                    raise ConfigError(
                        "sampler.engine: the policy's head differs from its embeddings, but engine.model ties the two, "
                        "so vLLM would ignore the head; use a model with tie_word_embeddings: false in its config.json"
                    )
                if tensor.dim():
                    sizes[name] = len(tensor)
                wanted.update(expected_digests(name, tensor.detach(), self._held))
                yield name, tensor.detach()

        try:
            # Not `load_weights` of the model: on some devices vLLM holds repacked copies of the weights, which only
            # `reload_weights` renews.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": recorded()})
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"sampler.engine: vLLM cannot load the policy's weights of round {version} ({first_line(error)}); "
                "engine.model must have the policy's architecture and vocabulary"
            ) from error
        if self.tied:
            self.llm.apply_model(renew_heads)
        (found,) = self.llm.apply_model(partial(digests, sizes=sizes))
        _confirm({key: wanted[key] for key in found}, found, "weights", version)
        if self.version is None and (unseen := sizes.keys() - {key.name for key in found}):
            log.warning(
                "vLLM holds %d of %d weights in a form that cannot be compared with the policy's, for example %s; only "
                "the log-probabilities of fixed tokens check them",
                len(unseen),
                len(sizes),
                min(unseen),
            )

    def _load_adapter(self, adapter: Mapping[str, LoRAFactors], version: int) -> None:
        """Replace the adapter, and confirm it.

        vLLM reads adapters from folders only, so it is written to memory (/dev/shm) where there is such a folder.
        """
        from vllm.lora.request import LoRARequest

        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            write_adapter(Path(folder), adapter)
            self._adapter = LoRARequest(f"policy-{number}", number, folder)
            for old in self.llm.collective_rpc("list_loras")[0]:
                self.llm.collective_rpc("remove_lora", args=(old,))
            try:
                self.llm.collective_rpc("add_lora", args=(self._adapter,))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"sampler.engine: vLLM cannot load the policy's adapter of round {version} ({first_line(error)}); "
                    "set sampler.engine.lora_sync: merged"
                ) from error
        shapes = {name: (len(factors.b), *factors.a.shape) for name, factors in adapter.items()}
        (found,) = self.llm.apply_model(partial(adapter_digests, shapes=shapes))
        wanted = {name: expected_adapter(factors, self.dtype) for name, factors in adapter.items()}
        _confirm(wanted, found, "adapters of layers", version)

    # -- sampling -----------------------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context manager around sampling. With `sleeps`, vLLM frees its memory at the end."""
        self._wake()
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)  # not 2, which drops the weights: a round may sample again without a sync
                self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Compute log-probabilities of given tokens, see `ScoringEngine.score`.

        Args:
            rows: Token ids of each row.
        """
        import vllm

        settings = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self._wake()
        scores = []
        for row in rows:  # one at a time: vLLM 0.32 cannot score several prompts if the head has an adapter
            request = {"prompt_token_ids": list(row)}
            (result,) = self.llm.generate(request, settings, use_tqdm=False, lora_request=self._adapter)
            steps = zip(row[1:], result.prompt_logprobs[1:], strict=True)
            scores.append([step[token].logprob for token, step in steps])
        return scores

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
        self._wake()
        results = self.llm.generate(rows, settings, use_tqdm=False, lora_request=self._adapter)
        return [self._completion(result.outputs[0], params) for result in results]

    def _completion(self, output: "CompletionOutput", params: SamplingParams) -> Completion:
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        return completion(output.token_ids, logprobs, output.finish_reason, params, self.decode)


def _confirm(wanted: Mapping[Any, Any], found: Mapping[Any, Any], what: str, version: int) -> None:
    """Raise `SyncError` if vLLM's digests differ from those of the policy."""
    if differing := [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]:
        raise SyncError(
            f"sampler.engine: after the sync of version {version}, {len(differing)} of {len(wanted)} {what} that vLLM "
            f"holds are not those of the policy, for example {min(map(str, differing))}. vLLM loads this model in "
            "another way than the engine expects; use the built-in engine"
        )
