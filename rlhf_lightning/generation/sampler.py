"""Sampling settings, and the protocol of sampling engines."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import run_on_leader
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.generation.canary import Canary, ScoringEngine
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.policy_weights import PolicyWeights
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.models.generation import end_token_ids, stop_texts
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Completion, Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Samples responses: the built-in `LocalEngine`, or an external engine with its own copy of the weights.

    An engine that cannot follow every setting also has a method `check(params)`, which raises `ConfigError` for those
    that it cannot follow; it is called when the run is set up. An engine that can score given tokens (`ScoringEngine`)
    is compared with the trainer after each sync. `docs/engines.md` lists what is expected of an engine.

    Example:
        ```python
        class ServerEngine:
            def sync(self, named_tensors, version):
                self.server.load({name: tensor.cpu() for name, tensor in named_tensors})

            def generate(self, prompts, params, seeds):
                replies = self.server.sample(prompts, max_tokens=params.max_tokens, seeds=seeds)
                return [Completion(reply.ids, reply.logprobs, reply.finish_reason) for reply in replies]
        ```
    """

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt.

        Args:
            prompts: Token ids of each prompt.
            params: How to sample.
            seeds: One seed per prompt; a row's random numbers must depend on nothing else.

        Returns:
            The responses, with one log-probability per sampled token, of the full softmax at `params.temperature`, in
            nats.
        """

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the policy's weights. Called on every rank before every round, validation, test and prediction.

        Under FSDP2, each tensor is gathered when it is requested, so all ranks must consume all tensors. With
        `max_staleness`, a thread beside the training one calls this method and `generate` for rounds; calls never
        overlap.

        Args:
            named_tensors: Weights by their Hugging Face names, with adapters merged. Copy them, because training
                changes them. It is a `PolicyWeights`, from which an engine can also take the adapter alone.
            version: Index of the round; before validation, test and prediction, the optimizer step. Not unique.
        """


@runtime_checkable
class EngineWithSession(Protocol):
    """An engine that prepares for sampling, or frees memory afterwards."""

    def session(self) -> AbstractContextManager[None]:
        """Context manager around the turns of a round. `sync` is called outside of it."""


class EngineSettings(Settings):
    """Settings from which `build` makes an engine once the policy is loaded; `sampler.engine` may be either.

    Example:
        ```python
        class Server(EngineSettings):
            def __init__(self, url: str) -> None:
                self.url = url

            def build(self, model, tokenizer):
                return ServerEngine(self.url, tokenizer.decode)
        ```
    """

    @property
    def low_precision(self) -> bool:
        """True if the engine's log-probabilities differ from the trainer's by more than the rounding of float32.

        Policy RL then corrects them with importance weights by default.
        """
        return False

    def build(self, model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer) -> Engine:
        """Create the engine of a policy.

        Args:
            model: The policy.
            tokenizer: Its tokenizer.

        Raises:
            ConfigError: If the engine cannot hold its weights.
        """
        raise NotImplementedError


class Sampler(Settings):
    r"""Sampling settings; `build` creates the `ModelSampler` of a model.

    Recorded log-probabilities are those of the full softmax at the sampling temperature. A row's tokens do not depend
    on the other rows of the batch, the batch size, or the rank, because each row has its own seed.

    Args:
        max_tokens: Token budget of a response.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_p: Sample from the most likely tokens that together have this probability (nucleus sampling). The recorded
            log-probabilities are not renormalized, so importance ratios are biased if this is set.
        top_k: Sample from this many of the most likely tokens, 0 for all; biases ratios likewise.
        min_p: Sample from tokens that have at least this fraction of the highest probability; biases ratios likewise.
        min_tokens: No response ends before this many tokens; biases ratios likewise. Rewards and environments see the
            text before the first stop text, even if it came too early to end the response.
        slots: Number of responses decoded in parallel by the built-in engine.
        engine: An `Engine` that replaces the built-in one, or `EngineSettings`.
        cuda_graphs: On a GPU, replay decoding steps as CUDA graphs.
        stop: Texts that end a response as soon as they are complete. Their tokens are trained on; rewards and
            environments see the text before them. By default the stop texts that the model was trained with, from its
            `stage.json`, and those of its generation config.
        gather: With sharded weights (FSDP2), True gathers all of them on every rank while a round is sampled; with
            False, ranks decode in lockstep and gather each layer for every token. By default they are gathered if that
            takes at most half of the free memory.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> sampler = Sampler(max_tokens=256, temperature=0.7, stop=["\n\n"])
        >>> sampler.max_tokens
        256
    """

    def __init__(
        self,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        min_tokens: int = 0,
        slots: int = 256,
        engine: Engine | EngineSettings | None = None,
        cuda_graphs: bool = False,
        stop: Sequence[str] | None = None,
        gather: bool | None = None,
    ) -> None:
        self.params = SamplingParams(max_tokens, min_tokens, temperature, top_p, top_k, min_p)
        check_whole("sampler.slots", slots)
        complete = hasattr(engine, "generate") and hasattr(engine, "sync")
        if engine is not None and not (complete or isinstance(engine, EngineSettings)):
            raise ConfigError(
                f"sampler.engine is {engine!r}; it must be an object with generate and sync, for example "
                "class_path: rlhf_lightning.generation.vllm_engine.VLLMEngine"
            )
        self.slots, self.engine, self.cuda_graphs, self.gather = slots, engine, cuda_graphs, gather
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop or ()):
            raise ConfigError(f"sampler.stop is {stop!r}; it must be a list of texts, none of them empty")
        self.stop = None if stop is None else tuple(stop)
        self._built: Engine | None = None

    @property
    def max_tokens(self) -> int:
        """Token budget of a response."""
        return self.params.max_tokens

    @property
    def temperature(self) -> float:
        """Temperature of the softmax."""
        return self.params.temperature

    def _build_engine(
        self, engine: Engine | EngineSettings, model: "PreTrainedModel | PeftModel", tokenizer: Tokenizer
    ) -> Engine:
        """The engine; settings build it once, so that all samplers of this object share it."""
        if not isinstance(engine, EngineSettings):
            return engine
        if self._built is None:
            self._built = engine.build(model, tokenizer)
        return self._built

    def warn_of_bias(self) -> None:
        """Warn if settings exclude tokens from sampling, so that importance ratios are biased."""
        if cuts := self.params.cuts:
            log.warning(
                "sampler.%s: some tokens cannot be sampled, but log-probabilities are those of the full softmax, so "
                "importance ratios are biased. Leave it out for training.",
                " and sampler.".join(cuts),
            )

    def build(
        self, model: "PreTrainedModel | PeftModel", renderer: Renderer, max_tokens_per_batch: int | None = None
    ) -> "ModelSampler":
        """Create the sampler of a model.

        Args:
            model: The policy.
            renderer: The policy's renderer. The end tokens of the model's generation config are added to its stop
                tokens.
            max_tokens_per_batch: Largest number of prompt tokens in a forward pass; see `PackedForward`.

        Raises:
            ConfigError: If the tokenizer can never produce a stop text.
        """
        return ModelSampler(self, model, renderer, max_tokens_per_batch)


class ModelSampler:
    """A sampler with its model, created by `Sampler.build`.

    Args:
        sampler: The settings.
        model: See `Sampler.build`.
        renderer: See `Sampler.build`.
        max_tokens_per_batch: See `Sampler.build`.

    Attributes:
        engine: The engine that samples.
        params: The sampling parameters, with all stop tokens and stop texts.
        stop: Texts that end a response, in addition to the template's end of turn: from the settings, or the model's.
        context: Number of positions of the model; None for no limit.

    Example:
        >>> sampler = Sampler(max_tokens=64).build(model, Renderer(tokenizer))  # doctest: +SKIP
        >>> (completion,) = sampler.generate([prompt_ids], seeds=[0])  # doctest: +SKIP
    """

    def __init__(
        self,
        sampler: Sampler,
        model: "PreTrainedModel | PeftModel",
        renderer: Renderer,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.model = model
        renderer.also_stop_at(end_token_ids(model, renderer.tokenizer))
        self.stop = _stop_texts(sampler.stop, model, renderer)
        self.params = replace(
            sampler.params,
            stop_token_ids=tuple(renderer.stop_token_ids),
            stop_strings=(*renderer.stop_strings, *self.stop),
        )
        self.engine: LocalEngine | LeaderEngine
        config = base_of(model).config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        if sampler.engine is not None:
            own = sampler._build_engine(sampler.engine, model, renderer.tokenizer)
            canary = Canary(own, model, self.context, max_tokens_per_batch) if isinstance(own, ScoringEngine) else None
            self.engine = LeaderEngine(own, canary)
            self.engine.check(self.params)
        else:
            decode = renderer.tokenizer.decode
            self.engine = LocalEngine(
                model, decode, sampler.slots, sampler.cuda_graphs, max_tokens_per_batch, sampler.gather
            )

    def sync(self, version: int) -> None:
        """Pass the policy's weights to an engine with its own copy, and check that it holds them.

        All ranks must call this together, in the precision of training.

        Args:
            version: See `Engine.sync`.

        Raises:
            SyncError: If the engine does not hold them; see `Canary`.
        """
        self.engine.sync(PolicyWeights(self.model), version)

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float | None = None
    ) -> list[Completion]:
        """Sample a response to each prompt.

        Args:
            prompts: Token ids of each prompt.
            seeds: One seed per prompt.
            temperature: Replaces the sampler's temperature.
        """
        return self.engine.generate(prompts, self.params.at(temperature), seeds)


class LeaderEngine:
    """Calls an external engine on the leader of the ranks that compute the same rows; the others get its result.

    Args:
        engine: The engine.
        canary: Compares it with the trainer after each sync; None if it cannot score tokens.
    """

    def __init__(self, engine: Engine, canary: Canary | None = None) -> None:
        self.engine, self.canary = engine, canary

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """See `Engine.generate`."""
        self.check(params)
        return run_on_leader(partial(self.engine.generate, prompts, params, seeds))

    def check(self, params: SamplingParams) -> None:
        """Raise `ConfigError` for settings that the engine says it cannot follow.

        Args:
            params: How to sample.
        """
        if hasattr(self.engine, "check"):
            self.engine.check(params)

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.sync`. Raises `SyncError` if the engine does not hold these weights afterwards."""
        self.engine.sync(named_tensors, version)
        if self.canary is not None:
            self.canary.check(version)

    def session(self) -> AbstractContextManager[None]:
        """See `LocalEngine.session`. Most external engines need no preparation."""
        return self.engine.session() if isinstance(self.engine, EngineWithSession) else nullcontext()


def _stop_texts(
    own: tuple[str, ...] | None, model: "PreTrainedModel | PeftModel", renderer: Renderer
) -> tuple[str, ...]:
    """Texts that end a response: from the settings, or else from the model's training and its generation config."""
    if own is None:
        found = [text for text in stop_texts(model) if text not in (*renderer.stop, *renderer.stop_strings)]
        own = (*renderer.stop, *found)
    elif renderer.stop and set(renderer.stop) != set(own):
        log.warning(
            "sampler.stop is %s, but the model was trained with %s; using the setting",
            list(own),
            list(renderer.stop),
        )
    for text in own:
        _check_stop(text, renderer.tokenizer)
    return own


def _check_stop(stop: str, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` for a stop text that the tokenizer can never produce, so that no response would end there."""
    written = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (stop, f"a{stop}a")]
    if not any(stop in text for text in written):
        raise ConfigError(
            f"sampler.stop: the tokenizer never produces {stop!r} (it decodes the text's tokens to {written[0]!r}), so "
            "no response would end there"
        )
