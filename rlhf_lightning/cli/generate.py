"""`rlhf generate MODEL`."""

import argparse
from itertools import zip_longest
from typing import TYPE_CHECKING

from rlhf_lightning.cli.filter_flag import add_filter_flag, filter_of
from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import (
    add_rendering_flags,
    add_sampling_flags,
    rendering_options,
    sampling_of,
    say,
)

if TYPE_CHECKING:
    from rlhf_lightning.types import Message


def run(args: list[str]) -> int:
    """Sample answers to prompts and print them."""
    options = _parse(args[1:])

    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.files import as_json, visible
    from rlhf_lightning.filtering.rows import message_texts

    setup_logging("warning", None)
    if bool(options.file) == bool(options.prompt):
        raise ConfigError("give either a file of prompts, or --prompt TEXT")
    check_options(options)
    checks = filter_of(options.filter)
    policy = Policy(options.model, options.dtype, device_of(options.device), rendering_options(options))
    sample, said = sampling_of(options, options.model, policy)
    say(policy.asking.describe(), said)
    source = options.file or [{"prompt": text} for text in options.prompt]
    prompts = policy.prompts(source, options.limit)
    episodes = policy.answer(prompts, options.max_tokens, options.seed, options.samples, **sample)
    decisions = [] if checks is None else checks.check_rows([message_texts(e.responses, e.label) for e in episodes])
    for episode, decision in zip_longest(episodes, decisions):
        answer = {"index": episode.group, "sample": episode.sample_index, **episode.answer()}
        if checks is not None and decision is not None:
            answer["filter"] = {"action": decision.action, "rules": decision.rules}
            if decision.withheld:
                answer["response"] = checks.refusal
            if decision.matches and not options.json:
                say(f"filter: {decision.action} of {episode.label} ({decision.summary})")
        if options.json:
            print(as_json(answer))
            continue
        if len(episodes) > 1:
            print(f"--- {_last(episode.prompt)}")
        print(visible(str(answer["response"])))
    return 0


def _last(messages: "list[Message]") -> str:
    """The last message of a prompt on one line."""
    content = str(messages[-1]["content"]) if messages else ""
    return " ".join("".join(c if c.isprintable() else " " for c in content).split())[:100]


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf generate",
        description="Print a model's answers to prompts, as text or as JSON lines with index, sample, prompt, "
        "response, stop_reason and response_tokens, and with --filter also filter.",
        epilog='example: rlhf generate runs/policy/model --prompt "How do I repair a chair?"',
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a causal language model, or an adapter")
    parser.add_argument(
        "file", nargs="?", help="file of rows with prompt or messages, or a .txt file with a prompt per line"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")
    add_sampling_flags(parser)
    parser.add_argument("--samples", type=int, default=1, help="number of answers per prompt (default: 1)")
    parser.add_argument("--limit", type=int, help="answer only the first LIMIT prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default: 0)")
    add_filter_flag(parser)
    add_weight_flags(parser)
    add_rendering_flags(parser)
    return parser.parse_args(args)
