"""Sampling settings, and the protocol of what samples by them."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import run_on_leader
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.generation import end_token_ids, stop_texts
from rlhf_lightning.models.lora import base_of, named_weights
from rlhf_lightning.sampling.local_engine import LocalEngine
from rlhf_lightning.sampling.token_sampling import Completion, SamplingParams

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What samples responses: the built-in `LocalEngine`, or one that runs elsewhere with weights of its own."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """A response to each prompt (token ids). A row's random numbers come from its own seed.

        Log-probabilities are those of the full softmax at `params.temperature`, in nats, one for each sampled token.
        """

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's weights, under the names of the Hugging Face model, adapters merged in.

        Called before every round with the round's number; the tensors must not be kept, they are trained on. Called on
        every rank; under FSDP2 each tensor is gathered as it is asked for, so all ranks must go through all of them.
        """


class Sampler:
    """Samples responses. Log-probabilities are those of the full softmax at the sampling temperature.

    A row's random numbers come from its own seed: they do not depend on its neighbors, batch or rank.

    Args:
        max_tokens: budget of a response.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this mass; the recorded log-probabilities are not cut, so importance
            ratios are biased where it is set.
        top_k: sample from so many of the likeliest tokens, 0 for all; biased likewise.
        min_p: sample from tokens at least this fraction as likely as the likeliest; biased likewise.
        min_tokens: no response ends before; biased likewise.
        stop: texts that end a response where they are complete. Their tokens are trained; rewards and environments see
            the text before. By default those that the model was trained with, as its `stage.json` says,
            and those of its generation config.
        batch_rows: rows decoded side by side.
        engine: an `Engine` that samples in place of the built-in one.
        cuda_graphs: on a GPU, replay the steps of decoding as graphs.
        gather: where weights are split over ranks (FSDP2), have all of them on every rank while a round is sampled; if
            not, ranks decode in step, each layer gathered for each token. By default gathered where that takes at most
            half of the free memory.
    """

    def __init__(
        self,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        min_tokens: int = 0,
        batch_rows: int = 256,
        engine: Any = None,
        cuda_graphs: bool = False,
        stop: Sequence[str] | None = None,
        gather: bool | None = None,
    ) -> None:
        self.params = SamplingParams(max_tokens, min_tokens, temperature, top_p, top_k, min_p)
        check_whole("sampler.batch_rows", batch_rows)
        if engine is not None and not (hasattr(engine, "generate") and hasattr(engine, "sync")):
            raise ConfigError(
                f"sampler.engine is {engine!r}; an object with generate and sync, for example by class_path: "
                "rlhf_lightning.sampling.vllm_engine.VLLMEngine"
            )
        self.batch_rows, self.engine, self.cuda_graphs = batch_rows, engine, cuda_graphs
        self._local, self.gather = engine is None, gather
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop or ()):
            raise ConfigError(f"sampler.stop is {stop!r}; it must be a list of texts, none of them empty")
        self.own_stop = None if stop is None else tuple(stop)
        self.stop = self.own_stop or ()
        """Texts that end a response; after `bind` also those of the model."""

    @property
    def max_tokens(self) -> int:
        """Budget of a response."""
        return self.params.max_tokens

    @property
    def temperature(self) -> float:
        """Of the softmax."""
        return self.params.temperature

    def bind(self, model: Any, renderer: Renderer, max_tokens: int | None = None) -> None:
        """Take the model, and the renderer that knows what ends a turn; `max_tokens` of prompts computed at once.

        Whatever the model's generation config names as an end is one to the renderer as well from then on.
        """
        self.model = model
        renderer.also_stop_at(end_token_ids(model, renderer.tokenizer))
        if self.own_stop is None:
            own = [text for text in stop_texts(model) if text not in (*renderer.stop, *renderer.stop_strings)]
            self.stop = (*renderer.stop, *own)
        elif renderer.stop and set(renderer.stop) != set(self.own_stop):
            log.warning(
                "sampler.stop is %s, and the model was trained with %s: the setting is used",
                list(self.own_stop),
                list(renderer.stop),
            )
        self.params = replace(
            self.params,
            stop_token_ids=tuple(renderer.stop_token_ids),
            stop_strings=(*renderer.stop_strings, *self.stop),
        )
        for text in self.stop:
            _check_stop(text, renderer.tokenizer)
        if self._local:
            decode = renderer.tokenizer.decode
            self.engine = LocalEngine(model, decode, self.batch_rows, self.cuda_graphs, max_tokens, self.gather)
        self.context = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)

    def warn_of_bias(self) -> None:
        """Say so where importance ratios will not be those of the distribution that is sampled from."""
        if cuts := self.params.cuts:
            log.warning(
                "sampler.%s: tokens are left out of the sample, but log-probabilities are those of the full softmax; "
                "importance ratios are biased. Leave it out for training.",
                " and sampler.".join(cuts),
            )

    def sync(self, version: int) -> None:
        """Hand the weights to an engine that has its own."""
        self.engine.sync(() if self._local else named_weights(self.model), version)

    def session(self) -> AbstractContextManager[None]:
        """Around the samples of a round. All ranks enter and leave together; inside, each samples as often as it likes."""
        return self.engine.session() if self._local else nullcontext()

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float | None = None
    ) -> list[Completion]:
        """A response to each prompt (token ids)."""
        params = self.params if temperature is None else replace(self.params, temperature=temperature)
        sample = partial(self.engine.generate, prompts, params, seeds)
        return sample() if self._local else run_on_leader(sample)


def _check_stop(stop: str, tokenizer: Any) -> None:
    """Refuse a stop text that the tokenizer can never write: no response would end by it."""
    written = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (stop, f"a{stop}a")]
    if not any(stop in text for text in written):
        raise ConfigError(
            f"sampler.stop: the tokenizer never writes {stop!r} (of that text it makes {written[0]!r}), "
            "so no response would end there"
        )
