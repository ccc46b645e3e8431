"""`rlhf tinker MODEL`: an HTTP server in the form of Tinker's API."""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.web_flags import access_of, add_web_flags, check_port, reachable
from rlhf_lightning.errors import ConfigError, check_whole, missing_package

if TYPE_CHECKING:
    from rlhf_lightning.tinker.service import TinkerService
    from rlhf_lightning.web import Access

TOKEN = "RLHF_TINKER_TOKEN"
"""Environment variable with the API key that clients must give."""
PREFIX = "tml-"
"""What Tinker's client wants every API key to begin with."""


def run(args: list[str]) -> int:
    """Serve a model until Ctrl-C."""
    options = _parse(args[1:])
    from rlhf_lightning.cli.logs import setup_logging

    setup_logging("warning", None)
    _check(options)
    try:
        from rlhf_lightning import web
        from rlhf_lightning.serving.shutdown import ApiHttpServer, ended_by_signals
        from rlhf_lightning.tinker.server import CONNECTIONS, TinkerServer
    except ModuleNotFoundError as error:
        raise missing_package(error, "rlhf tinker", "serve") from None
    access = access_of(options, TOKEN, PREFIX)
    with ExitStack() as opened:
        place = opened.enter_context(web.bound(options.host, options.port))
        service = _load(options)
        api = TinkerServer(service, access)
        server = ApiHttpServer(web.server_config(api.app(), CONNECTIONS), api.shutdown)
        opened.enter_context(ended_by_signals(server))
        service.start()
        opened.callback(service.stop)
        _greet(reachable(web.address_of(place), options.host), service.name, access)
        server.run(sockets=[place])
    return 0


def _check(options: argparse.Namespace) -> None:
    check_options(options)
    check_port(options)
    check_whole("--slots", options.slots, 1, 4096)
    check_whole("--max_runs", options.max_runs, 1, 4096)
    key = os.environ.get(TOKEN)
    if key and not key.startswith(PREFIX):
        raise ConfigError(f"{TOKEN} must begin with {PREFIX}, because Tinker's client accepts no other key")
    if options.folder.exists() and not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder} is not a folder; name another one")


def _load(options: argparse.Namespace) -> "TinkerService":
    """The model, ready to train."""
    from rlhf_lightning.models.language_model import LanguageModel
    from rlhf_lightning.models.loading import is_adapter
    from rlhf_lightning.tinker.service import TinkerService

    if is_adapter(options.model):
        raise ConfigError(
            f"{options.model} is an adapter, and rlhf tinker trains adapters of a model; merge it first (rlhf export)"
        )
    loaded = LanguageModel(options.model, options.dtype).to(device_of(options.device))
    return TinkerService(loaded, options.name or options.model, options.folder, options.slots, options.max_runs)


def _greet(address: str, name: str, access: "Access") -> None:
    from rlhf_lightning.files import visible

    key = access.token or f"{PREFIX}local"
    print(visible(f"serving {name} in the form of Tinker's API; Ctrl-C ends. Clients need:"), flush=True)
    print(visible(f"  export TINKER_BASE_URL={address.rstrip('/')} TINKER_API_KEY={key}"), flush=True)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf tinker",
        description="Train LoRA adapters of a model through Tinker's API: create_model, forward_backward, optim_step,\n"
        "sample, save_state and so on. Ctrl-C ends; saved checkpoints stay.",
        epilog="example: rlhf tinker Qwen/Qwen3-0.6B\n"
        "         rlhf tinker runs/sft/model --name policy --folder runs/tinker",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a causal language model")
    parser.add_argument("--name", help="name by which clients ask for the model (default: MODEL as given)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tinker"), help="where checkpoints are saved (default: runs/tinker)"
    )
    parser.add_argument("--slots", type=int, default=32, help="samples decoded at the same time (default: 32)")
    parser.add_argument(
        "--max_runs", "--max-runs", type=int, default=8, help="training runs at the same time (default: 8)"
    )
    add_web_flags(parser, "server", 8001, "clients", TOKEN)
    add_weight_flags(parser)
    return parser.parse_args(args)
