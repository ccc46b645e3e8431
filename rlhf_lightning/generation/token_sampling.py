"""Sampling a token from logits with one uniform number per row, so that a row's tokens do not depend on other rows."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.errors import MOST, ConfigError
from rlhf_lightning.types import Completion

BLOCK = 64
COLDEST = 1e-6
"""Lowest temperature above 0 that float32 logits can be divided by."""
WHOLE, REAL = ("max_tokens", "min_tokens", "top_k"), ("temperature", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling.

    Args:
        max_tokens: Token budget of a response, including its stop token.
        min_tokens: No stop token is sampled, and no stop text ends the response, before this many tokens.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many of the most likely tokens; 0 for all.
        min_p: Sample from tokens that have at least this fraction of the highest probability.
        stop_token_ids: Tokens that end a response, and are part of it.
        stop_strings: Texts that end a response.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> SamplingParams(max_tokens=64, top_p=0.9).cuts
        ['top_p']
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*WHOLE, *REAL):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral if name in WHOLE else Real):
                wanted = "a whole number" if name in WHOLE else "a number"
                raise ConfigError(f"sampler.{name} is {value!r}; it must be {wanted}")
        for name, fine, wanted in (
            ("max_tokens", 1 <= self.max_tokens <= MOST, f"from 1 to {MOST}"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("temperature", self.temperature == 0 or COLDEST <= self.temperature < inf, f"0, or at least {COLDEST:g}"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", 0 <= self.top_k <= MOST, f"from 0 to {MOST}"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not fine:
                raise ConfigError(f"sampler.{name} is {getattr(self, name)}; it must be {wanted}")

    def at(self, temperature: float | None) -> "SamplingParams":
        """The parameters with another temperature; unchanged for None."""
        return self if temperature is None else replace(self, temperature=temperature)

    @property
    def distribution(self) -> Hashable:
        """The settings that the distribution of a token depends on."""
        early = self.stop_token_ids if self.min_tokens else ()
        return self.temperature, self.top_p, self.top_k, self.min_p, self.min_tokens, early

    @property
    def cuts(self) -> list[str]:
        """Names of the settings that exclude tokens from sampling."""
        active = {
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,
            "min_p": self.min_p > 0,
            "min_tokens": self.min_tokens > 0,
        }
        return [name for name, is_active in active.items() if is_active]


def is_complete(ids: list[int], params: SamplingParams, decode: Callable[[list[int]], str]) -> bool:
    """True if the last token of `ids` ends the response.

    A stop text that is complete within the first `min_tokens` tokens does not end it, as in vLLM.
    """
    if ids[-1] in params.stop_token_ids:
        return True
    if not params.stop_strings or len(ids) <= params.min_tokens:
        return False
    # Decoding the tail suffices to find a stop text at the end, because a token has at least one byte.
    tail = ids[-max(32, *(len(stop.encode()) + 1 for stop in params.stop_strings)) :]
    early = len(tail) - (len(ids) - params.min_tokens)
    passed = len(decode(tail[:early])) if early > 0 else 0
    text = decode(tail)
    return any(text.find(stop, max(0, passed - len(stop) + 1)) >= 0 for stop in params.stop_strings)


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, vocabulary: int, context: int | None) -> None:
    """Check prompts before an engine samples after them.

    Args:
        prompts: Token ids of each prompt.
        max_tokens: Token budget of a response.
        vocabulary: Number of tokens that the model embeds.
        context: Number of positions of the model; None if it has no limit.

    Raises:
        ConfigError: If a prompt is empty, has an id outside the vocabulary, or leaves no room for its response.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens; a response needs at least one token to follow")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocabulary:
                raise ConfigError(
                    f"prompt {number} has the token id {token}, but the model has the ids 0 to {vocabulary - 1}: "
                    "use the tokenizer that belongs to the model"
                )
        if context and len(prompt) + max_tokens > context:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens and sampler.max_tokens is {max_tokens}, but the model has "
                f"only {context} positions; lower sampler.max_tokens or shorten the prompt"
            )


def record_token(
    completion: Completion, token: int, logprob: float, params: SamplingParams, decode: Callable[[list[int]], str]
) -> bool:
    """Append a sampled token to a response.

    Args:
        completion: The response so far.
        token: Token id.
        logprob: Its log-probability, in nats.
        params: How the response is sampled.
        decode: Maps token ids to text, for stop texts.

    Returns:
        True if the token ends the response.
    """
    completion.ids.append(token)
    completion.logprobs.append(logprob)
    if is_complete(completion.ids, params, decode):
        completion.stop_reason = "stop"
    return completion.stop_reason == "stop" or len(completion.ids) == params.max_tokens


def uniforms(seeds: Sequence[int], tokens: int) -> Tensor:
    """Uniform random numbers in [0, 1), float32 `[rows, tokens]`, with a seed per row.

    Args:
        seeds: A seed per row.
        tokens: Number of tokens per row.
    """
    # Not the default type, which is that of the model within a step: bfloat16 has 8 significant bits.
    return torch.stack(
        [torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in seeds]
    )


def sample_token(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token per row.

    Args:
        logits: `[B, V]`.
        uniforms: Random numbers in [0, 1), `[B]`.
        params: The sampling parameters.
        lengths: Number of tokens sampled so far, `[B]`; required by `min_tokens`.

    Returns:
        `(tokens, logprobs)`, `[B]` each. Log-probabilities are in nats, under the full softmax at the temperature (at
        temperature 1 if the temperature is 0), in float32 or wider.

    Example:
        >>> tokens, logprobs = sample_token(torch.zeros(1, 4), torch.tensor([0.6]), SamplingParams())
        >>> tokens, logprobs
        (tensor([2]), tensor([-1.3863]))
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    probabilities = logits.softmax(-1)
    allowed = probabilities
    if params.min_tokens and params.stop_token_ids and lengths is not None:
        early = lengths < params.min_tokens
        allowed = allowed.clone()
        stops = torch.tensor(params.stop_token_ids, device=logits.device)
        allowed[:, stops] = allowed[:, stops].masked_fill(early[:, None], 0.0)
    tokens = allowed.argmax(-1) if params.temperature == 0 else _inverse_cdf(_cut(allowed, params), uniforms)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()


def _cut(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Set probabilities excluded by min-p, top-k and top-p to 0, in this order.

    Top-p counts the probability that the others leave, as in vLLM and transformers; the token that crosses it is kept.
    """
    if params.min_p:
        least = params.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if not params.top_k and params.top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(-1, descending=True)
    if params.top_k:
        ordered[:, params.top_k :] = 0.0
    before = ordered.cumsum(-1) - ordered
    dropped = before >= params.top_p * ordered.sum(-1, keepdim=True)
    return probabilities.scatter(-1, order, ordered.masked_fill(dropped, 0.0))


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index at which each row's cumulative sum passes the fraction `uniforms` of the row's total.

    Sums blocks first, then within one block: a running sum over the whole vocabulary is slower and rounds more.
    """
    missing = -weights.shape[-1] % BLOCK
    blocks = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, BLOCK))  # a padding of 0 copies
    sums = blocks.sum(-1)
    running = sums.cumsum(-1)
    share = uniforms.to(weights.dtype)[:, None] * running[:, -1:]
    block = _first_above(running, share)
    rest = (share - (running.gather(-1, block) - sums.gather(-1, block))).clamp(min=0)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).cumsum(-1)
    return (block * BLOCK + _first_above(inner, rest)).squeeze(-1)


def _first_above(running: Tensor, share: Tensor) -> Tensor:
    """Index of the first running sum above `share`, `[B, 1]`."""
    # Rounding may make `share` equal the total. Then take the last entry with a positive weight.
    last = (running < running[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(running, share, right=True), last)
