"""`rlhf evaluate POLICY [BASELINE] PROMPTS` and `rlhf best-of POLICY PROMPTS`."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli import task
from rlhf_lightning.cli.judge_file import read_judge
from rlhf_lightning.cli.options import Parser, add_overwrite, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import add_rendering_flags
from rlhf_lightning.cli.task import is_task
from rlhf_lightning.cli.user_code import SCORER_HELP, allow_user_code, import_scorer
from rlhf_lightning.files import as_json, write_text

if TYPE_CHECKING:
    from rlhf_lightning.data.prompts import Prompt
    from rlhf_lightning.evaluation.compare import Figures, SamplingOptions
    from rlhf_lightning.evaluation.policy import Policy

COLUMNS = {
    "reward": "reward",
    "win_rate": "win rate",
    "judge_win_rate": "win rate (judge)",
    "judge_order_bias": "order bias (judge)",
    "judge_failed": "no verdict (judge)",
    "kl": "KL (nats)",
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "response_tokens": "tokens",
    "truncated": "truncated",
}


def run(args: list[str]) -> int:
    """Evaluate a policy, optionally against a baseline, or sample the best of N responses."""
    if args[0] == "evaluate" and is_task(args):
        return task.run(args)
    options = _parse(args)
    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.cli.rendering_flags import rendering_options, say
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.evaluation.compare import SamplingOptions, best_of_n, make_rewards
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.rewards import JudgeReward

    setup_logging("warning", None)
    allow_user_code(args)
    check_options(options)
    import_scorer(options.scorer)
    rewards = make_rewards(options.reward, options.gold)
    best = args[0] == "best-of"
    options.judge = read_judge(options.judge) if options.judge else None
    if isinstance(options.judge, JudgeReward):
        rewards.append(options.judge)
        options.judge = None
    elif options.judge is not None and (best or not options.baseline):
        raise ConfigError(
            "--judge: a pairwise judge compares a policy with a baseline: rlhf evaluate POLICY BASELINE PROMPTS; "
            "without a baseline, remove pairwise: true from its file"
        )
    if not rewards and (best or options.best_of > 1):
        raise ConfigError("no reward: give a reward model with --reward, a function with --gold, or a --judge")
    if best and options.temperature == 0:
        raise ConfigError("--temperature is 0, so all responses to a prompt would be the same; set it above 0")
    sampling = SamplingOptions(
        rewards, options.max_tokens, options.temperature, getattr(options, "samples", 1), options.seed
    )
    options.device = device_of(options.device)
    options.asked = rendering_options(options)
    policy = Policy(options.policy, options.dtype, options.device, options.asked)
    say(policy.asking.describe())
    prompts = policy.prompts(options.prompts, options.limit)
    facts = {"prompts": len(prompts)}
    if best:
        summary, best_answers = best_of_n(policy, prompts, sampling, options.n)
        lines = [as_json(row) for row in best_answers]
    else:
        summary, lines, facts["references"] = _evaluate(options, policy, prompts, sampling)
    measured = {name: _finite(found) for name, found in summary.items()}
    text = json.dumps({**facts, **measured}, indent=2, allow_nan=False) + "\n"
    if options.json:
        print(text, end="")
    else:
        _show(summary, facts)
    if options.summary:
        write_text(options.summary, text)
    if options.output:
        write_text(options.output, "".join(line + "\n" for line in lines))
    return 0


def _evaluate(
    options: argparse.Namespace, policy: "Policy", prompts: "list[Prompt]", sampling: "SamplingOptions"
) -> tuple["dict[str, Figures]", list[str], int]:
    """Metrics, rows as JSON, and the number of prompts with references."""
    from rlhf_lightning.cli.rendering_flags import say
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.evaluation.compare import compare
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.evaluation.text_metrics import references_of

    if options.best_of > 1 and not options.baseline:
        raise ConfigError(
            "--best_of samples from the baseline, but none is given: rlhf evaluate POLICY BASELINE PROMPTS"
        )
    references = references_of(prompts, options.references)
    baseline = None
    if options.baseline:
        baseline = Policy(options.baseline, options.dtype, options.device, options.asked)
        say(baseline.asking.describe())
    summary, rows = compare(policy, baseline, prompts, sampling, options.best_of, references, options.judge)
    return summary, [as_json(row) for row in rows], sum(map(bool, references))


def _finite(found: "Figures") -> "Figures":
    """Replace NaN and infinity, which JSON lacks, with None; the interval of a single prompt is infinite."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in found.items()}


def _parse(args: list[str]) -> argparse.Namespace:
    best = args[0] == "best-of"
    parser = Parser(
        prog=f"rlhf {args[0]}",
        description="Sample N responses to each prompt and keep the one with the highest reward.\n"
        "This shows what the reward achieves without training."
        if best
        else "Measure a policy on prompts, optionally against a baseline such as the model that it was trained from:\n"
        "reward, win rate with its 95% interval, KL and length. For rows with reference answers, measure also\n"
        "their perplexity, and BLEU and ROUGE-1/2/L of the policy's answers.",
        epilog="example: rlhf best-of runs/sft/model prompts.jsonl --reward runs/preference/model -n 8"
        if best
        else "example: rlhf evaluate runs/policy/model runs/sft/model prompts.jsonl --reward runs/preference/model\n"
        "         rlhf evaluate runs/sft/model gsm8k_test.jsonl --task gsm8k\n"
        "         rlhf evaluate runs/sft/model chats_validation.jsonl --temperature 0 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", help="folder, Hub id or GGUF file of a causal language model")
    if not best:
        parser.add_argument(
            "--task", metavar="NAME", help="run a benchmark instead; see rlhf evaluate --task gsm8k --help"
        )
        parser.add_argument("baseline", nargs="?", help="policy to compare with")
    parser.add_argument("prompts", help="file of rows with prompt or messages, or a .txt file with a prompt per line")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="MODEL",
        help="preference model that gives the reward; may be repeated, rewards are added",
    )
    parser.add_argument(
        "--gold",
        action="append",
        default=[],
        metavar="FUNCTION",
        help="dotted path of a reward function, as in FunctionReward; may be repeated",
    )
    parser.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="YAML file about a judge behind an endpoint (docs/judges.md), whose grades are a reward"
        + ("" if best else "; with pairwise: true, it compares the policy with the baseline"),
    )
    add_overwrite(parser)
    parser.add_argument("--scorer", metavar="CLASS", help=SCORER_HELP)
    if best:
        parser.add_argument("-n", type=int, default=8, help="number of responses per prompt (default: 8)")
    else:
        parser.add_argument(
            "--references",
            metavar="COLUMN",
            help="column with the reference answers (default: completion, response or chosen of a row with a prompt, "
            "else the last assistant turn of a conversation)",
        )
        parser.add_argument(
            "--samples", type=int, default=1, help="number of responses per policy and prompt (default: 1)"
        )
        parser.add_argument(
            "--best_of", type=int, default=0, metavar="N", help="compare also with the baseline's best of N responses"
        )
    parser.add_argument(
        "--max_tokens", type=int, default=128, help="maximum number of tokens per response (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="sampling temperature, 0 for greedy decoding (default: 1.0)",
    )
    parser.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the metrics as a JSON object instead of a table")
    parser.add_argument("--output", type=Path, help="write the responses and their rewards to this JSONL file")
    parser.add_argument("--summary", type=Path, help="write the metrics to this JSON file")
    add_weight_flags(parser)
    add_rendering_flags(parser)
    # parse_args would misread the positional arguments of `MODEL --json FILE`.
    return parser.parse_intermixed_args(args[1:])


def _show(summary: "dict[str, Figures]", facts: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    keys = [key for key in COLUMNS if any(found.get(key) is not None for found in summary.values())]
    title = f"{facts['prompts']} prompts"
    if facts.get("references"):
        title += f", {facts['references']} with references"
    # One metric per row, because ten columns do not fit a terminal.
    table = Table(title=title, caption="intervals are 95% confidence intervals" if "reward" in keys else None)
    table.add_column("")
    for name in summary:
        table.add_column(name.replace("_", " "), justify="right")
    for key in keys:
        table.add_row(COLUMNS[key], *(_cell(found, key) for found in summary.values()))
    Console().print(table)


def _cell(found: "Figures", key: str) -> str:
    if found.get(key) is None:
        return "–"
    if key == "reward":
        return f"{found[key]:.3f} ± {found['reward_half_interval']:.3f}"
    if key.endswith("win_rate"):
        return f"{found[key]:.3f} ({found[f'{key}_low']:.3f}–{found[f'{key}_high']:.3f})"
    return f"{found[key]:.3f}"
