"""A trained policy outside training: answers prompts, and computes log-probabilities of answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import torch

from rlhf_lightning.data.conversations import conversation, tool_schemas
from rlhf_lightning.data.prompts import Prompt, prompt_example
from rlhf_lightning.data.records import Reading, Source, convert_rows, read_rows
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.errors import ConfigError, cut
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.models.loading import loading
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.scorers import padded_batches
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.types import JSON, Episode, TrainingSample

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


UNUSED_DEFAULTS: dict[str, tuple[JSON, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "repetition_penalty": (1.0,),
    "sequence_bias": (),
    "suppress_tokens": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
"""Settings of a generation config that change what `generate` of transformers samples, but not what `Sampler` samples,
with the values, besides None, that have no effect."""


class SamplingFilters(TypedDict, total=False):
    """Limits on the tokens that are sampled; arguments of `Sampler`."""

    top_p: float
    top_k: int
    min_p: float


class SamplingSettings(SamplingFilters, total=False):
    """How responses are sampled; arguments of `Sampler`."""

    temperature: float


class Policy:
    """A causal language model, loaded to answer prompts and to score texts.

    Args:
        source: Model folder, Hub id or GGUF file.
        dtype: Data type of the weights.
        device: Device to compute on.
        asked: Rendering settings that replace those of its training; see `data.rendering_settings.RenderingSettings`.

    Raises:
        ConfigError: If the source is a reward model.

    Example:
        >>> policy = Policy("runs/sft/model")  # doctest: +SKIP
        >>> prompts = policy.prompts([{"prompt": "2 + 2?"}])  # doctest: +SKIP
        >>> policy.answer(prompts, max_tokens=16, seed=0)[0].response  # doctest: +SKIP
    """

    def __init__(
        self, source: str, dtype: str = "float32", device: str = "cpu", asked: Mapping[str, JSON] | None = None
    ) -> None:
        loaded = LanguageModel(source, dtype, asked).to(device)
        self.tokenizer, self.asking, self.renderer = loaded.tokenizer, loaded.asking, loaded.renderer
        self.model, self.folder = loaded.model, loaded.folder
        self.token_logprobs = TokenLogprobs(self.model)
        config, where = _generation_config(loaded.folder, self.model)
        self.sampled = sampling_settings(config, where)
        """Those of `temperature`, `top_p`, `top_k` and `min_p` that the generation config sets."""
        self.unused_sampling = unused_settings(config)
        """Other settings of the generation config that `generate` of transformers would use, as `name value`."""
        self.context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompts(self, file: Source, limit: int | None = None) -> list[Prompt]:
        """Read prompts and number them.

        Args:
            file: A file, or a list of rows.
            limit: Largest number of prompts.

        Raises:
            DataError: If a row is unusable; with file and line.
        """
        rows = read_rows(file, "prompt")[:limit]
        prompts = convert_rows(rows, lambda data: [prompt_example(self.renderer, data)], Reading())
        for index, prompt in enumerate(prompts):
            prompt.index = index
        return prompts

    def check_room(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Check that the model's context has room for each prompt and an answer.

        Args:
            prompts: The prompts.
            max_tokens: Token budget of an answer.

        Raises:
            ConfigError: If it does not.
        """
        longest = max(prompt.tokens for prompt in prompts)
        if self.context and longest + max_tokens > self.context:
            raise ConfigError(
                f"the longest prompt ({longest} tokens) and max_tokens ({max_tokens}) exceed the model's context of "
                f"{self.context} tokens; lower max_tokens, or leave out long prompts"
            )

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        seed: int,
        samples: int = 1,
        temperature: float = 1.0,
        stop: Sequence[str] | None = None,
        **filters: Unpack[SamplingFilters],
    ) -> list[Episode]:
        """Sample responses.

        A response depends only on the seed, the number of its prompt, and its index.

        Args:
            prompts: The prompts.
            max_tokens: Token budget of a response.
            seed: Seed of the responses.
            samples: Number of responses per prompt.
            temperature: Temperature; 0 for greedy decoding.
            stop: Texts that end a response; by default those of the model's training.
            **filters: `top_p`, `top_k` and `min_p` of `Sampler`.

        Returns:
            The episodes in order, `len(prompts) * samples` of them.

        Raises:
            ConfigError: If a prompt and `max_tokens` exceed the model's context.
        """
        self.check_room(prompts, max_tokens)
        sampler = Sampler(max_tokens, temperature, stop=stop, **filters).build(self.model, self.renderer)
        tasks = [(prompt, sample) for prompt in prompts for sample in range(samples)]
        return EpisodeRunner(sampler, self.renderer, (seed, 7)).run(tasks)

    def logprobs(self, episodes: Sequence[Episode], temperature: float = 1.0, batch_size: int = 64) -> list[float]:
        """Log-probability of each episode's response, summed over its tokens, in nats.

        Args:
            episodes: Single-turn episodes.
            temperature: Temperature of the distribution.
            batch_size: Number of rows per forward pass.
        """
        return self._sums([episode.training_samples[0] for episode in episodes], temperature, batch_size)

    def kl(self, other: "Policy", episodes: Sequence[Episode], temperature: float = 1.0) -> float:
        """KL to another policy of the same vocabulary: the mean of log π − log π_other over responses, in nats.

        Args:
            other: The other policy.
            episodes: Single-turn episodes of this policy.
            temperature: Temperature of both distributions.
        """
        gaps = zip(self.logprobs(episodes, temperature), other.logprobs(episodes, temperature), strict=True)
        return sum(ours - theirs for ours, theirs in gaps) / len(episodes)

    def nll(self, rows: Sequence[Rendered], batch_size: int = 16) -> float:
        """Mean negative log-likelihood per trained token, in nats.

        Args:
            rows: Rendered conversations.
            batch_size: Number of rows per forward pass.
        """
        return -sum(self._sums(rows, 1.0, batch_size)) / sum(row.trained for row in rows)

    @torch.no_grad()
    def _sums(self, rows: Sequence[TrainingSample | Rendered], temperature: float, batch_size: int) -> list[float]:
        """Log-probability of each row, summed over the tokens of its loss mask, in nats."""
        ids, masks = [row.ids for row in rows], [row.loss_mask for row in rows]
        sums = [0.0] * len(rows)
        for part, tokens in padded_batches(ids, masks, batch_size, next(self.model.parameters()).device):
            found = self.token_logprobs(tokens["input_ids"], tokens["loss_mask"], temperature).logprobs.sum(-1)
            for i, value in zip(part, found.tolist(), strict=True):
                sums[i] = value
        return sums

    def conversations(self, file: Source, limit: int | None = None) -> list[Rendered]:
        """Read conversations, in which every assistant turn counts.

        Args:
            file: A file, or a list of rows.
            limit: Largest number of conversations.

        Raises:
            DataError: If a row is unusable; with file and line.
        """
        rows = read_rows(file)[:limit]
        return convert_rows(
            rows, lambda data: self.renderer.conversation(conversation(data), tool_schemas(data)), Reading()
        )

    def speaks_as(self, other: "Policy") -> bool:
        """True if both policies have the same vocabulary."""
        return self.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def _generation_config(folder: str, model: "PreTrainedModel") -> tuple["GenerationConfig", str]:
    """Generation config of a folder, or of the base model for an adapter without one; and where it is from."""
    from transformers import GenerationConfig

    file = Path(folder).expanduser() / "generation_config.json"
    if file.is_file():
        with loading(f"the generation config of {folder!r}"):
            return GenerationConfig.from_pretrained(file.parent), str(file)
    return base_of(model).generation_config, f"the generation config of {folder}"


def sampling_settings(config: "GenerationConfig", where: str) -> SamplingSettings:
    """Sampling settings from a generation config.

    Args:
        config: The generation config.
        where: Where it is from, for messages.

    Raises:
        ConfigError: If a setting is not a number in its range.
    """
    if config.do_sample is False:
        return {"temperature": 0.0}
    found: SamplingSettings = {}
    names: tuple[Literal["temperature", "top_p", "top_k", "min_p"], ...] = ("temperature", "top_p", "top_k", "min_p")
    for name in names:
        if (value := getattr(config, name, None)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a number. Correct the file")
        found[name] = value
    if found.get("top_k", 0) < 0:  # another way to write that there is no limit
        found["top_k"] = 0
    try:
        SamplingParams(**found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('sampler.')}. Correct the file") from None
    return found


def unused_settings(config: "GenerationConfig") -> list[str]:
    """Settings of a generation config that the samplers of this package do not follow, as `name value`."""
    values = {name: getattr(config, name, None) for name in UNUSED_DEFAULTS}
    return [
        f"{name} {cut(str(value), 40)}"
        for name, value in values.items()
        if value not in (None, [], {}, *UNUSED_DEFAULTS[name])
    ]
