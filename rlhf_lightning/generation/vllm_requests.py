"""How requests to vLLM are made, and its responses are read, in the process and on a server."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.token_sampling import SamplingParams, record_token
from rlhf_lightning.generation.vllm_http import Endpoint, NotFound
from rlhf_lightning.types import JSON, Completion

log = logging.getLogger(__name__)
TESTED = (0, 32)
"""Release of vLLM that the conformance tests run with; earlier ones load weights differently."""
ENDS = ("stop", "length")
"""Why vLLM ends a response; its other reasons are failures."""
UNKNOWN = -9999.0
"""What vLLM reports for a log-probability that is minus infinity or not a number."""


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
    if finish_reason not in ENDS:
        raise RuntimeError(f"vLLM ended a response with {finish_reason!r}")
    found = Completion()
    for token, logprob in zip(ids, logprobs, strict=True):
        if record_token(found, token, logprob, params, decode):
            return found
    # A text that vLLM sees only together with the prompt: some tokenizers drop a space at the start of a text.
    found.stop_reason = finish_reason
    return found


class Served(NamedTuple):
    """The model that a server was started with.

    Args:
        name: Its name in requests.
        root: Its folder or Hub id.
        context: Maximum number of tokens of a prompt with its response.
    """

    name: str
    root: str
    context: int


def served_model(endpoint: Endpoint, root: str = "") -> Served:
    """Ask a server for its model.

    Args:
        endpoint: The server.
        root: The model that it had before; empty if unknown.

    Raises:
        ConfigError: If it is not a vLLM server, is too old, or has another model than before.
        Unavailable: If it does not answer.
    """
    setting, url = endpoint.setting, endpoint.url
    try:
        version = endpoint.read("GET", "/version").get("version")
        cards = endpoint.read("GET", "/v1/models").get("data")
    except NotFound as error:
        raise ConfigError(f"{setting}: {error}; training needs `vllm serve`, not another server") from None
    card = cards[0] if isinstance(cards, list) and cards else None
    if not isinstance(card, dict) or card.get("owned_by") != "vllm" or not isinstance(version, str):
        raise ConfigError(f"{setting}: {url} is not a vLLM server; training needs `vllm serve`")
    check_version(version, f"serves {url}", setting)
    name, found, context = card.get("id"), card.get("root"), card.get("max_model_len")
    if not isinstance(name, str) or not isinstance(found, str) or not isinstance(context, int):
        raise ConfigError(f"{setting}: {url}/v1/models does not say the model and its length")
    if root not in ("", found):
        raise ConfigError(f"{setting}: {url} was restarted with the model {found}; it had {root}")
    return Served(name, found, context)


def token_logprobs(step: JSON) -> dict[str, float]:
    """Log-probabilities of tokens at a position of a prompt, in nats, by token id.

    Args:
        step: An item of `prompt_logprobs` in an answer.
    """
    numbers = {
        token: entry.get("logprob") if isinstance(entry, dict) else None
        for token, entry in (step.items() if isinstance(step, dict) else ())
    }
    return {token: float(number) for token, number in numbers.items() if isinstance(number, int | float)}


def prompt_logprobs(steps: JSON, row: Sequence[int], endpoint: Endpoint) -> list[float]:
    """Log-probability of each token of a prompt after the first, in nats.

    Args:
        steps: `prompt_logprobs` in the answer.
        row: Token ids of the prompt.
        endpoint: The server, for messages.

    Raises:
        ConfigError: If they are not there, or are not log-probabilities.
    """
    positions = steps[1:] if isinstance(steps, list) else []
    found = [token_logprobs(step).get(str(token)) for token, step in zip(row[1:], positions, strict=False)]
    numbers = [number for number in found if number is not None]
    if len(numbers) != len(row) - 1:
        raise ConfigError(f"{endpoint.setting}: {endpoint.url} does not report the log-probabilities of a prompt")
    check_logprobs(numbers, endpoint)
    return numbers


def check_logprobs(numbers: Sequence[float], endpoint: Endpoint) -> None:
    """Refuse numbers that are not log-probabilities.

    Args:
        numbers: What a server reports as log-probabilities.
        endpoint: The server, for messages.

    Raises:
        ConfigError: If a number is not finite, or is positive beyond rounding.
    """
    if wrong := [number for number in numbers if not UNKNOWN < number <= 1e-3]:
        raise ConfigError(
            f"{endpoint.setting}: {endpoint.url} reports a log-probability of {wrong[0]}, so its computation has "
            "overflowed, or it reports logits; serve the model in bfloat16 or float32 (--dtype), and without a "
            "--logprobs-mode of logits"
        )


def check_version(version: str, where: str = "is installed", setting: str = "sampler.engine") -> None:
    """Refuse a vLLM before `TESTED`, and warn of a later one.

    Args:
        version: Its version.
        where: Which vLLM it is, for messages.
        setting: The setting that names it, for messages.

    Raises:
        ConfigError: If it is too old.
    """
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    tested = ".".join(map(str, TESTED))
    if found < TESTED:
        raise ConfigError(f"{setting}: vLLM {version} {where}, but at least {tested} is needed; upgrade it")
    if found > TESTED:
        log.warning("vLLM %s %s, but this package was tested with %s; run `make test-vllm`", version, where, tested)
