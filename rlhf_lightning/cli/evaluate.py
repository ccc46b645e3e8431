"""`rlhf evaluate POLICY BASELINE PROMPTS` and `rlhf best-of POLICY PROMPTS`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "reward": "reward",
    "win_rate": "win rate",
    "kl": "KL (nats)",
    "response_tokens": "tokens",
    "truncated": "truncated",
}


def run(args: list[str]) -> int:
    """Compare two policies, or draw the best of N."""
    options = _parse(args)
    # As with `python -m`: a function in the user's folder can be named by its module.
    sys.path.insert(0, str(Path.cwd()))

    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.cli.score import default_device
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.pipeline.compare import Drawing, best_of_n, compare, make_rewards
    from rlhf_lightning.pipeline.policies import Policy

    setup_logging("warning", None)
    for name in ("samples", "n", "max_tokens", "limit"):
        if (value := getattr(options, name, None)) is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")
    rewards = make_rewards(options.reward, options.gold)
    samples = getattr(options, "samples", 1)
    drawing = Drawing(rewards, options.max_tokens, options.temperature, samples, options.seed)
    device = options.device or default_device()
    policy = Policy(options.policy, options.dtype, device)
    prompts = policy.prompts(options.prompts, options.limit)
    if args[0] == "best-of":
        if options.temperature == 0:
            raise ConfigError("--temperature is 0: all responses to a prompt would be the same")
        summary, rows = best_of_n(policy, prompts, drawing, options.n)
    else:
        baseline = Policy(options.baseline, options.dtype, device)
        summary, rows = compare(policy, baseline, prompts, drawing, options.best_of)
    _show(summary, len(prompts))
    if options.summary:
        _write(options.summary, json.dumps({"prompts": len(prompts), **summary}, indent=2) + "\n")
    if options.output:
        _write(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return 0


def _parse(args: list[str]) -> argparse.Namespace:
    best = args[0] == "best-of"
    parser = argparse.ArgumentParser(
        prog=f"rlhf {args[0]}",
        description="Draw N responses to each prompt and keep the best by a reward: what the reward buys without any "
        "training."
        if best
        else "Compare a policy with a baseline (the one it was trained from, say) on prompts: win rate with its 95% "
        "interval, mean reward, KL and length.",
        epilog="example: rlhf best-of runs/sft/model prompts.jsonl --reward runs/preference/model -n 8"
        if best
        else "example: rlhf evaluate runs/policy/model runs/sft/model prompts.jsonl --reward runs/preference/model",
    )
    parser.add_argument("policy", help="folder or Hub id of a causal language model")
    if not best:
        parser.add_argument("baseline", help="the policy to compare with")
    parser.add_argument("prompts", help="rows with prompt, or plain lines")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="MODEL", help="a preference model; several are added"
    )
    parser.add_argument(
        "--gold", action="append", default=[], metavar="FUNCTION", help="a function's dotted path, as in FunctionReward"
    )
    if best:
        parser.add_argument("-n", type=int, default=8, help="responses to each prompt")
    else:
        parser.add_argument("--samples", type=int, default=1, help="responses of each policy to each prompt")
        parser.add_argument("--best_of", type=int, default=0, metavar="N", help="show the baseline's best of N too")
    parser.add_argument("--max_tokens", type=int, default=128, help="budget of a response")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--limit", type=int, help="use the first so many prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSONL file: the responses and their rewards")
    parser.add_argument("--summary", type=Path, help="JSON file: the figures")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU where there is one)")
    return parser.parse_args(args[1:])


def _show(summary: dict[str, dict[str, Any]], prompts: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{prompts} prompts; intervals hold in 95 of 100 cases")
    table.add_column("")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, found in summary.items():
        table.add_row(name.replace("_", " "), *(_cell(found, key) for key in COLUMNS))
    Console().print(table)


def _cell(found: dict[str, Any], key: str) -> str:
    if found.get(key) is None:
        return "–"
    if key == "reward":
        return f"{found[key]:.3f} ± {found['reward_half_interval']:.3f}"
    if key == "win_rate":
        return f"{found[key]:.3f} ({found['win_rate_low']:.3f}–{found['win_rate_high']:.3f})"
    return f"{found[key]:.3f}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
