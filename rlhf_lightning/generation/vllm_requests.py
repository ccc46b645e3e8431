"""How requests to vLLM are made, and its responses are read, in the process and on a server."""

import logging
from collections.abc import Callable, Sequence

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.token_sampling import SamplingParams, record_token
from rlhf_lightning.types import JSON, Completion

log = logging.getLogger(__name__)
TESTED = (0, 32)
"""Release of vLLM that the conformance tests run with; earlier ones load weights differently."""


def check_settings(params: SamplingParams, raw_logprobs: bool, eos: int | None, raw: str, processed: str) -> None:
    """Refuse settings for which vLLM has no log-probabilities of the full softmax.

    Args:
        params: How to sample.
        raw_logprobs: True if vLLM computes log-probabilities before temperature and cuts, False if after both.
        eos: The end token that vLLM takes from the model's tokenizer.
        raw: The setting that makes `raw_logprobs` true, for messages.
        processed: The setting that makes it false.

    Raises:
        ConfigError: If vLLM cannot follow them.
    """
    if raw_logprobs and params.temperature not in (0.0, 1.0):
        raise ConfigError(
            f"sampler.temperature is {params.temperature}, but with {raw} vLLM's log-probabilities are "
            f"those at temperature 1; set {processed}, or temperature: 1.0"
        )
    if params.min_tokens and eos is not None and eos not in params.stop_token_ids:
        raise ConfigError(
            f"sampler.min_tokens is {params.min_tokens}, and vLLM also keeps the model's end token {eos} out "
            "of the first tokens, although the response would not end there; leave min_tokens out, or add the "
            "token to sampler.stop"
        )
    if params.cuts and not raw_logprobs:
        raise ConfigError(
            f"sampler.{' and sampler.'.join(params.cuts)}: vLLM's log-probabilities would not be those of the full "
            f"softmax; leave it out, or set {raw} with temperature 1"
        )


def request_settings(params: SamplingParams, seed: int) -> dict[str, JSON]:
    """The arguments of `vllm.SamplingParams` for one response.

    Args:
        params: How to sample.
        seed: The response's seed.
    """
    return {
        "max_tokens": params.max_tokens,
        "min_tokens": params.min_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only the stop tokens end a response, not those of the config that vLLM loads
        "stop": list(params.stop_strings) or None,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop text may have the text of a special token
        "seed": seed % 2**63,
        "logprobs": 0,  # only the sampled token's
    }


def completion(
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    params: SamplingParams,
    decode: Callable[[list[int]], str],
) -> Completion:
    """The response up to the token that ends it.

    vLLM holds back text that ends within a character, so it may see a stop text a few tokens late.

    Args:
        ids: Tokens that vLLM sampled.
        logprobs: Their log-probabilities, in nats.
        finish_reason: Why vLLM ended the response.
        params: How it was sampled.
        decode: Maps token ids to text, for stop texts.

    Raises:
        RuntimeError: If vLLM ended it for another reason than a stop or its length.
    """
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {finish_reason!r}")
    found = Completion()
    for token, logprob in zip(ids, logprobs, strict=True):
        if record_token(found, token, logprob, params, decode):
            return found
    # A text that vLLM sees only together with the prompt: some tokenizers drop a space at the start of a text.
    found.stop_reason = finish_reason
    return found


def check_version(version: str, where: str = "is installed") -> None:
    """Refuse a vLLM before `TESTED`, and warn of a later one.

    Args:
        version: Its version.
        where: Which vLLM it is, for messages.

    Raises:
        ConfigError: If it is too old.
    """
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    tested = ".".join(map(str, TESTED))
    if found < TESTED:
        raise ConfigError(f"sampler.engine: vLLM {version} {where}, but at least {tested} is needed; upgrade it")
    if found > TESTED:
        log.warning("vLLM %s %s, but this engine was tested with %s; run `make test-vllm`", version, where, tested)
