"""`rlhf chat MODEL`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_lightning.cli.filter_flag import add_filter_flag, filter_of
from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import (
    add_rendering_flags,
    add_sampling_flags,
    rendering_options,
    sampling_of,
    say,
)


def run(args: list[str]) -> int:
    """Read messages until the end of the input, and answer each one."""
    options = _parse(args[1:])

    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.errors import UserError
    from rlhf_lightning.evaluation.chat import Conversation
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.files import visible

    setup_logging("warning", None)
    check_options(options)
    device, checks = device_of(options.device), filter_of(options.filter)
    talks = {}
    for name in dict.fromkeys([options.model, *(options.and_ or [])]):
        policy = Policy(name, options.dtype, device, rendering_options(options))
        sample, said = sampling_of(options, name, policy)
        say(policy.asking.describe(), said)
        talks[name] = Conversation(policy, None, options.max_tokens, seed=options.seed, filter=checks, **sample)
    labels = dict(zip(talks, _labels(list(talks)), strict=True))

    def show(text: str) -> None:
        print(visible(text), end="", flush=True)

    for message in _messages():
        if message == "/new":
            for talk in talks.values():
                talk.begin()
            continue
        for name, talk in talks.items():
            show(f"{labels[name]}: " if len(talks) > 1 else "")
            try:
                talk.reply(message, show)
            except UserError as error:
                if not sys.stdin.isatty():
                    raise  # a script could take the next answer for the answer to this message
                show(f"({error})")
            print(flush=True)
            for what, decision in zip(("message", "answer"), talk.decisions, strict=False):
                if decision.matches:
                    say(f"filter: {decision.action} of the {what} ({decision.summary})")
    return 0


def _messages() -> Iterator[str]:
    """Lines that are typed or piped in, until the end of the input or `/quit`."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - adds a history and editing to input()

        print("/new starts a new conversation, /quit or Ctrl-D exits", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _labels(models: list[str]) -> list[str]:
    """Short, distinct names of the models: `sft` for `runs/sft/model`."""
    names = [Path(model).parent.name if Path(model).name == "model" else Path(model).name for model in models]
    return names if len(set(names)) == len(names) and all(names) else models


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf chat",
        description="Chat with one or several models; each model continues its own conversation.\n"
        "Answers are printed while they are sampled. Messages can be piped in, one per line.",
        epilog="example: rlhf chat runs/policy/model --and runs/sft/model\n"
        '         echo "How do I repair a chair?" | rlhf chat runs/policy/model --temperature 0',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a causal language model, or an adapter")
    parser.add_argument(
        "--and", dest="and_", action="append", metavar="MODEL", help="another model to chat with; may be repeated"
    )
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default: 0)")
    add_filter_flag(parser)
    add_weight_flags(parser)
    add_rendering_flags(parser)
    return parser.parse_args(args)
