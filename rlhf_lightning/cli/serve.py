"""`rlhf serve MODEL`: an HTTP server with OpenAI's API."""

import argparse
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf_lightning.cli.filter_flag import add_filter_flag, filter_of
from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import (
    add_rendering_flags,
    add_sampling_flags,
    json_object,
    rendering_options,
    sampling_of,
    say,
)
from rlhf_lightning.cli.web_flags import access_of, add_web_flags, check_port, reachable
from rlhf_lightning.errors import ConfigError, check_whole, missing_package
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.generation.sampler import ModelSampler
    from rlhf_lightning.serving.local import BatchSampler
    from rlhf_lightning.serving.requests import RequestReader
    from rlhf_lightning.serving.threaded import ThreadSampler
    from rlhf_lightning.serving.vllm import VLLMSampler
    from rlhf_lightning.web import Access

TOKEN = "RLHF_SERVE_TOKEN"
"""Environment variable with the API key that clients must give."""


def run(args: list[str]) -> int:
    """Serve a model until Ctrl-C."""
    options = _parse(args[1:])
    from rlhf_lightning.cli.logs import setup_logging

    setup_logging("warning", None)
    _check(options)
    try:
        from rlhf_lightning import web
        from rlhf_lightning.serving.server import ApiServer
        from rlhf_lightning.serving.shutdown import ApiHttpServer, ended_by_signals
    except ModuleNotFoundError as error:
        raise missing_package(error, "rlhf serve", "serve") from None
    access, checks = access_of(options, TOKEN), filter_of(options.filter)
    with ExitStack() as opened:
        place = opened.enter_context(web.bound(options.host, options.port))
        reader, sampler = _load(options)
        api = ApiServer(reader, sampler, access, checks)
        server = ApiHttpServer(web.server_config(api.app()), api.shutdown)
        opened.enter_context(ended_by_signals(server))
        sampler.start()
        opened.callback(sampler.stop)
        _greet(reachable(web.address_of(place), options.host), reader.name, access)
        server.run(sockets=[place])
    return 0


def _check(options: argparse.Namespace) -> None:
    check_options(options)
    check_port(options)
    check_whole("--slots", options.slots, 1, 4096)
    check_whole("--max_waiting", options.max_waiting, 0)
    if options.max_length is not None:
        check_whole("--max_length", options.max_length)
    if options.engine == "vllm" and options.device is not None:
        raise ConfigError("--device: vLLM chooses the device itself; leave it out with --engine vllm")
    if options.engine != "vllm" and options.vllm_options is not None:
        raise ConfigError("--vllm_options are arguments of vLLM; add --engine vllm")
    _vllm_options(options)
    if options.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("--engine vllm needs the package vllm; docs/engines.md says how to install it")


def _load(options: argparse.Namespace) -> "tuple[RequestReader, ThreadSampler]":
    """The model, ready to answer."""
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.generation.sampler import Sampler
    from rlhf_lightning.serving.requests import RequestReader

    is_vllm = options.engine == "vllm"
    device = "cpu" if is_vllm else device_of(options.device)
    policy = Policy(options.model, options.dtype, device, rendering_options(options))
    sampling, said = sampling_of(options, options.model, policy)
    say(policy.asking.describe(), said)
    settings = Sampler(options.max_tokens, slots=options.slots, **sampling)
    sampler = settings.build(policy.model, policy.renderer)
    length = options.max_length or policy.context or UNLIMITED
    if policy.context and length > policy.context:
        raise ConfigError(f"--max_length is {length}, but the model has only {policy.context} positions; lower it")
    vocabulary = policy.token_logprobs.backbone.vocabulary
    reader = RequestReader(options.name or options.model, policy.renderer, sampler.params, vocabulary, length)
    return reader, _vllm(options, policy, length) if is_vllm else _local(options, sampler, length)


def _local(options: argparse.Namespace, sampler: "ModelSampler", length: int) -> "BatchSampler":
    from rlhf_lightning.generation.local_engine import LocalEngine
    from rlhf_lightning.serving.local import BatchSampler

    assert isinstance(sampler.engine, LocalEngine)  # no other one is configured
    # The numerical check takes seconds; the first client should not wait for it.
    with sampler.engine.decoding(min(length, 2 * options.max_tokens)):
        pass
    return BatchSampler(sampler.engine, options.max_waiting)


def _vllm(options: argparse.Namespace, policy: "Policy", length: int) -> "VLLMSampler":
    from rlhf_lightning.serving.vllm import VLLMSampler, load_vllm

    engine = load_vllm(policy, options.dtype, length, options.slots, _vllm_options(options))
    return VLLMSampler(engine, options.slots, options.max_waiting)


def _vllm_options(options: argparse.Namespace) -> dict[str, JSON]:
    return json_object("--vllm_options", options.vllm_options or "{}", '{"enforce_eager": true}')


UNLIMITED = 2**17
"""Largest number of tokens of a prompt with its response, for models without a limit."""


def _greet(address: str, name: str, access: "Access") -> None:
    from rlhf_lightning.files import visible

    print(visible(f"serving {name} at {address}v1 (OpenAI's API); Ctrl-C ends"), flush=True)
    if access.token:
        print(f"clients need the API key {access.token}", flush=True)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf serve",
        description="Serve a model with OpenAI's API: chat completions, completions and models, with streaming.\n"
        "Requests are sampled together. Ctrl-C ends.",
        epilog="example: rlhf serve runs/policy/model\n"
        "         rlhf serve runs/policy/model --name policy --port 8080 --slots 32",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a causal language model, or an adapter")
    parser.add_argument("--name", help="name by which requests ask for the model (default: MODEL as given)")
    parser.add_argument(
        "--engine",
        choices=("built-in", "vllm"),
        default="built-in",
        help="what samples: this package's sampler, or vLLM in this process (default: built-in)",
    )
    parser.add_argument(
        "--vllm_options",
        help="""further arguments of vllm.LLM as JSON, for example '{"gpu_memory_utilization": 0.5}'""",
    )
    parser.add_argument("--slots", type=int, default=16, help="responses sampled at the same time (default: 16)")
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=64,
        help="responses that may wait for a slot; further requests are refused with status 429 (default: 64)",
    )
    parser.add_argument(
        "--max_length",
        "--max-length",
        type=int,
        help="maximum number of tokens of a prompt with its response (default: the model's context)",
    )
    add_web_flags(parser, "server", 8000, "clients", TOKEN)
    add_filter_flag(parser)
    add_sampling_flags(parser)
    add_weight_flags(parser)
    add_rendering_flags(parser)
    return parser.parse_args(args)
