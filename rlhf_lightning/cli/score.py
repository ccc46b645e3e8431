"""`rlhf score MODEL FILE`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, add_overwrite, add_weight_flags, check_options, device_of
from rlhf_lightning.cli.rendering_flags import add_rendering_flags, rendering_options, say
from rlhf_lightning.cli.user_code import SCORER_HELP, allow_user_code, import_scorer
from rlhf_lightning.files import as_json, read_stage, write_json, write_text
from rlhf_lightning.types import Row

if TYPE_CHECKING:
    from rlhf_lightning.data.rendering import Rendered, Renderer


def run(args: list[str]) -> int:
    """Score the responses in a file of rows, and write the rows with their scores."""
    parser = Parser(
        prog="rlhf score",
        description="Score responses with a trained preference model of any kind. Rows with chosen and rejected get "
        "chosen_score and rejected_score, and the accuracy is printed. Rows with responses get response_scores. Rows "
        "with prompt and response get score, and so do rows with messages (for the last assistant turn).",
        epilog="example: rlhf score runs/preference/model pairs.jsonl --output scored.jsonl",
    )
    parser.add_argument("model", help="model folder of a preference stage, or any sequence classifier with one label")
    parser.add_argument("file", help="rows: a .jsonl, .json or .parquet file, or a Hub id")
    parser.add_argument("--output", type=Path, help="JSONL file to write (default: standard output)")
    add_overwrite(parser)
    parser.add_argument("--scorer", metavar="CLASS", help=SCORER_HELP)
    parser.add_argument(
        "--shifted", action="store_true", help="add the reward_shift in the model's stage.json to the scores"
    )
    parser.add_argument(
        "--set_shift",
        action="store_true",
        help="write reward_shift to the model's stage.json, such that the mean score of this file's responses "
        "(reference demonstrations) becomes 0",
    )
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="error",
        help="error: stop at the first bad row (default); skip: leave out bad rows and count them",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="number of rows scored at once (default: 64)")
    add_weight_flags(parser)
    add_rendering_flags(parser, samples=False)
    options = parser.parse_args(args[1:])

    from rlhf_lightning.cli.logs import setup_logging

    setup_logging("warning", None)
    allow_user_code(args)
    check_options(options)
    rows, summary = score_file(options)
    text = "".join(as_json(row) + "\n" for row in rows)
    if options.output:
        write_text(options.output, text)
    else:
        print(text, end="")
    # Printed to standard error, because standard output is for the rows.
    print("  ".join(f"{name} {value:.4g}" for name, value in summary.items()), file=sys.stderr)
    return 0


def score_file(options: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """Score the rows of a file; return them with their scores, and summary metrics."""
    from rlhf_lightning.data.records import LocatedRow, Reading, convert_rows, read_rows
    from rlhf_lightning.models.reward_model import RewardModel

    import_scorer(options.scorer)
    judge = RewardModel(options.model, options.dtype, options.shifted, rendering_options(options))
    judge.to(device_of(options.device))
    say(judge.asking.describe())
    reading = Reading()
    # Each example keeps its row, because bad rows may have been left out.
    given: list[LocatedRow] = read_rows(options.file, reading=reading)
    examples = convert_rows(given, lambda data: [(data, responses(judge.renderer, data))], reading, options.on_bad_row)
    sides = [side for _, rendered in examples for side in rendered.values()]
    scores = iter(judge.score_tokens([s.ids for s in sides], [s.loss_mask for s in sides], options.batch_size).tolist())
    rows, pairs, singles = [], [], []
    for data, rendered in examples:
        found = {name: next(scores) for name in rendered}
        if "chosen" in found:
            pairs.append((found, rendered, str(data.get("category") or "")))
            row: Row = {"chosen_score": found["chosen"], "rejected_score": found["rejected"]}
        elif "response" in found:
            row = {"score": found["response"]}
        else:
            row = {"response_scores": list(found.values())}  # `scores` may be a column of the data
        # Chosen responses serve as reference demonstrations.
        singles += [found[name] for name in ("chosen", "response") if name in found]
        rows.append({**data, **row})
    summary: dict[str, float] = {"rows": len(rows), "skipped": len(reading.skipped)}
    if singles:
        summary["mean_score"] = sum(singles) / len(singles)
    if pairs:
        summary |= _pairs(pairs)
    if options.set_shift:
        _set_shift(options.model, singles, judge.shift)
    return rows, summary


def responses(renderer: "Renderer", data: Row) -> "dict[str, Rendered]":
    """Render the responses of a row, by name; raises `RowError`."""
    from rlhf_lightning.data.columns import refuse_media
    from rlhf_lightning.data.conversations import conversation, tool_schemas
    from rlhf_lightning.data.preference_rows import row_kind, split_pair, split_ranking, split_response
    from rlhf_lightning.data.records import RowError

    refuse_media(data)
    tools = tool_schemas(data)
    if data.get("chosen") is not None:
        prompt, chosen, rejected = split_pair(data)
        named = {"chosen": chosen, "rejected": rejected}
    elif row_kind(data) == "rankings":
        prompt, answers, _ = split_ranking({k: v for k, v in data.items() if k not in ("scores", "ranks")})
        named = {f"response {number}": answer for number, answer in enumerate(answers)}
    elif data.get("messages") is not None or data.get("conversations") is not None:
        messages = conversation(data)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        if not last:
            raise RowError("the conversation has no assistant turn to score after its first message")
        prompt, named = messages[:last], {"response": messages[last : last + 1]}
    else:
        prompt, response = split_response(data)
        named = {"response": response}
    for response in named.values():
        renderer.refuse_lost(prompt + response, tools)
    return {name: renderer.exchange(prompt, response, tools) for name, response in named.items()}


def _pairs(pairs: "list[tuple[dict[str, float], dict[str, Rendered], str]]") -> dict[str, float]:
    import torch

    from rlhf_lightning.modules.preference_metrics import pair_report

    categories = sorted({category for *_, category in pairs} - {""})
    columns = {side: torch.tensor([found[side] for found, _, _ in pairs]) for side in ("chosen", "rejected")}
    columns |= {
        f"{side}_lengths": torch.tensor([float(rendered[side].trained) for _, rendered, _ in pairs])
        for side in ("chosen", "rejected")
    }
    columns["category"] = torch.tensor([categories.index(c) if c else -1 for *_, c in pairs])
    return pair_report(columns, categories)[0]


def _set_shift(folder: str, scores: list[float], applied: float) -> None:
    from rlhf_lightning.errors import ConfigError

    if not scores or not Path(folder).is_dir():
        raise ConfigError("--set_shift needs a local model folder, and rows with a chosen or response column")
    shift = applied - sum(scores) / len(scores)
    write_json(Path(folder) / "stage.json", {**read_stage(folder), "reward_shift": shift})
