"""`rlhf data check FILE`."""

import argparse
import sys
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, column_names
from rlhf_lightning.cli.rendering_flags import add_rendering_flags, rendering_options, say
from rlhf_lightning.files import as_json, visible

if TYPE_CHECKING:
    from rlhf_lightning.data.check import FileFigures
    from rlhf_lightning.types import JSON, Row

KINDS = ("sft", "preference", "prompts")
TRAINED, PLAIN = "\x1b[32m", "\x1b[0m"


def run(args: list[str]) -> int:
    """Check a file of rows; the exit code is 1 if rows are bad."""
    options = _parse(args[1:])

    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.data import check
    from rlhf_lightning.errors import ConfigError

    setup_logging("warning", None)
    if options.limit is not None and options.limit < 1:
        raise ConfigError("--limit must be at least 1")
    if options.samples < 0 or (options.max_length is not None and options.max_length < 1):
        raise ConfigError("--samples must be at least 0, and --max_length at least 1")
    module = check.data_module(options.kind, options.model, options.chat_template, **_settings(options))
    say(module.asking.describe())
    train = check.check(module, _source(options.file), limit=options.limit)
    tokenizer = module.renderer.tokenizer
    figures: check.Figures = {
        "kind": options.kind,
        "model": options.model,
        **check.report(train, tokenizer, options.samples),
    }
    files = [train]
    if options.validation:
        files.append(check.check(module, options.validation, "validation", options.limit))
        figures["validation"] = check.report(files[1], tokenizer, 0)
        figures["overlap"] = check.overlap(train, files[1])
    bad = sum(len(file.bad) for file in files)
    if options.json:
        print(as_json({**figures, "ok": not bad}, indent=2))
        return int(bool(bad))
    _summary(figures)
    if train.openings.message:
        print(visible(f"\n{train.openings.message}"))
    for where, example in train.examples[: options.samples]:
        marks = (TRAINED, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
        shown = "in green" if sys.stdout.isatty() else "between ⟦ and ⟧"
        print(visible(f"\n{where}, trained tokens {shown}:"))
        print(check.show(check.pieces(example, tokenizer), marks))
    if options.validation:
        print()
        _summary(figures["validation"])
        rows, prompts = figures["overlap"]["rows"], figures["overlap"]["prompts"]
        print(
            f"overlap: {len(rows)} validation rows are also training rows, {prompts} have the prompt of a training row"
        )
        _listing("  ", [f"{row['where']} is {row['same_as']}" for row in rows])
    for file in files:
        if file.bad:
            print(visible(f"\nbad rows of {file.source} ({len(file.bad)} of {file.rows}):"))
            print(visible("\n".join(f"{where}: {reason}" for where, reason in file.bad)))
    print(f"\nbad rows: {bad}")
    return int(bool(bad))


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf data",
        description="Check a data file before training on it.",
        epilog="example: rlhf data check chats.jsonl --kind sft --model Qwen/Qwen3-0.6B",
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="show columns, lengths, duplicates, bad rows and rendered samples",
        description="Show the columns, lengths in tokens, duplicates, overlap of training and validation data,\n"
        "samples with their trained tokens marked, and every bad row with its line and the reason.\n"
        "Rows are read and rendered as in training.",
        epilog="example: rlhf data check chats.jsonl --kind sft --model Qwen/Qwen3-0.6B --validation held_out.jsonl\n"
        "Exit codes: 0 all rows are good, 1 some rows are bad, 2 the check could not run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "file",
        help="rows: a .jsonl, .json, .csv, .parquet or .txt (prompts) file, a glob pattern or a Hub id; or the .yaml\n"
        "config of a stage, whose data.train is checked",
    )
    check.add_argument(
        "--limit", type=int, metavar="N", help="check only the first N rows of each source, without reading it further"
    )
    check.add_argument("--kind", required=True, choices=KINDS, help="kind of stage that the rows are for")
    check.add_argument(
        "--model", required=True, help="folder, Hub id or GGUF file whose tokenizer and chat template are used"
    )
    check.add_argument(
        "--validation", metavar="FILE", help="held-out rows; they are checked too, and compared with the training rows"
    )
    check.add_argument("--json", action="store_true", help="print everything as one JSON object")
    check.add_argument(
        "--samples", type=int, default=2, help="number of rows to show with their trained tokens marked (default: 2)"
    )
    check.add_argument(
        "--columns", nargs="+", metavar="OURS=YOURS", help="column names (data.columns), for example prompt=question"
    )
    check.add_argument("--chat_template", help="file or text of a chat template (model.chat_template)")
    check.add_argument("--lines", action="store_true", help="prompts: each line of the file is a prompt (data.lines)")
    check.add_argument(
        "--max_length",
        type=int,
        help="maximum number of tokens per row (data.max_length; for prompts, data.max_prompt_tokens)",
    )
    check.add_argument(
        "--overlong", choices=("error", "truncate", "skip"), help="what to do with longer rows (data.overlong)"
    )
    check.add_argument("--train_on", help="sft: which messages are trained (data.train_on)")
    add_rendering_flags(check, samples=False)
    return parser.parse_args(args)


def _source(file: str) -> "str | list[JSON] | dict[str, JSON]":
    """The rows to check: a file, or `data.train` of a stage's config."""
    if not file.lower().endswith((".yaml", ".yml")):
        return file

    from pathlib import Path

    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.yaml_files import read_mapping

    data = read_mapping(Path(file)).get("data")
    source = data.get("train") if isinstance(data, dict) else None
    if not isinstance(source, str | list | dict):
        raise ConfigError(f"{file}: there is no data.train; give the config of a stage, or a file of rows")
    return source


def _settings(options: argparse.Namespace) -> "Row":
    """The given settings of the data module."""
    length = "max_prompt_tokens" if options.kind == "prompts" else "max_length"
    settings: Row = {"overlong": options.overlong, "train_on": options.train_on, **rendering_options(options)}
    settings[length] = options.max_length
    settings["lines"] = options.lines or None
    settings["columns"] = {**column_names(options.columns)} or None
    return {name: value for name, value in settings.items() if value is not None}


def _summary(figures: "FileFigures") -> None:
    bad, skipped = len(figures["bad"]), len(figures["skipped"])
    print(
        f"{visible(str(figures['file']))}: {figures['rows']} rows, {figures['examples']} examples, {bad} bad, "
        f"{skipped} skipped, "
        f"{figures['truncated']} truncated, {figures['blank_lines']} blank lines"
    )
    for name, types in figures["columns"].items():
        print(visible(f"  column {name}: {', '.join(f'{kind} in {count}' for kind, count in types.items())}"))
    if figures["columns_not_used"]:
        print(visible(f"  columns not used: {', '.join(figures['columns_not_used'])}"))
    if not figures["examples"]:
        return
    print(f"\n{'tokens of a row':<18}{'total':>10}{'mean':>9}{'min':>7}{'median':>8}{'95%':>7}{'max':>7}")
    for name, row in figures["lengths"].items():
        title = {"tokens": "all", "trained": "trained"}.get(name, f"{name} response")
        print(
            f"{title:<18}{row['total']:>10}{row['mean']:>9.1f}{row['min']:>7}{row['median']:>8}"
            f"{row['p95']:>7}{row['max']:>7}"
        )
    if "chosen_longer" in figures:
        print(f"chosen is the longer response in {figures['chosen_longer']:.0%} of pairs")
    print()
    most = max(part["count"] for part in figures["histogram"])
    for part in figures["histogram"]:
        bar = "█" * round(40 * part["count"] / most) or ("▏" if part["count"] else "")
        print(f"{part['from']:>7} – {part['to']:<7} {bar} {part['count']}")
    print(f"\nduplicates: {len(figures['duplicates'])}; repeated prompts: {figures['repeated_prompts']}")
    _listing("  ", [f"{row['where']} is {row['same_as']}" for row in figures["duplicates"]])
    if figures.get("reversed"):
        print(f"pairs that reverse an earlier pair: {len(figures['reversed'])}")
        _listing("  ", [f"{row['where']} reverses {row['reverses']}" for row in figures["reversed"]])


def _listing(indent: str, lines: list[str], most: int = 5) -> None:
    for line in lines[:most]:
        print(visible(f"{indent}{line}"))
    if len(lines) > most:
        print(f"{indent}and {len(lines) - most} more (--json has all)")
