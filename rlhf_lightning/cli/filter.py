"""`rlhf filter apply RULES FILE…` and `rlhf filter evaluate RULES FILE`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, add_overwrite, check_writable, column_names
from rlhf_lightning.files import as_json, visible

if TYPE_CHECKING:
    from rlhf_lightning.filtering.evaluation import FilterEvaluation
    from rlhf_lightning.types import JSON

LABEL = "unsafe"


def run(args: list[str]) -> int:
    """Filter files of rows, or measure a filter on labeled rows."""
    options = _parse(args[1:])

    from rlhf_lightning.cli.logs import setup_logging

    setup_logging("warning", None)
    return _apply(options) if options.command == "apply" else _evaluate(options)


def _apply(options: argparse.Namespace) -> int:
    from rlhf_lightning import __version__
    from rlhf_lightning.filtering.filtered_folder import REMOVED, ROWS, FilteredFolder
    from rlhf_lightning.filtering.row_filter import RuleFilter

    row_filter, columns = RuleFilter(options.rules), column_names(options.columns)
    files = list(dict.fromkeys(options.files))
    inputs: dict[str, JSON] = {"rules": row_filter.fingerprint(), "columns": {**columns}, "version": __version__}
    folder = FilteredFolder(options.output, files, inputs)
    summary = folder.finished(options.overwrite)
    if summary is not None:
        print(visible(f"{options.output} has this result already; --overwrite makes it again"), file=sys.stderr)
    else:
        summary = folder.write(row_filter.build(), columns)
    if options.json:
        print(as_json(summary, indent=2))
        return 0
    rows: list[tuple[str, ...]] = [("file", "rows", "kept", "dropped", "marked")]
    by_rule: dict[str, list[int]] = {}
    counts = summary["counts"]
    assert isinstance(counts, dict)
    for file, found in counts.items():
        assert isinstance(found, dict)
        numbers = {name: int(str(found[name])) for name in ("rows", "dropped", "marked")}
        kept = numbers["rows"] - numbers["dropped"]
        rows.append((file, *map(str, (numbers["rows"], kept, numbers["dropped"], numbers["marked"]))))
        rules = found["rules"]
        assert isinstance(rules, dict)
        for rule, count in rules.items():
            by_rule.setdefault(rule, [0] * len(counts))[list(counts).index(file)] = int(str(count))
    _table(rows)
    _table([("rule", *(f"rows of {file}" for file in counts)), *((r, *map(str, n)) for r, n in by_rule.items())])
    print(visible(f"{options.output / ROWS} has the rows that are kept, {options.output / REMOVED} the others"))
    if summary["only_rejected"]:
        print(
            f"{summary['only_rejected']} rows match only in their rejected answer. If that is what they are for, give "
            "the rules roles: [system, user, assistant, tool, other]",
            file=sys.stderr,
        )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rlhf_lightning.data.records import LocatedRow, read_rows
    from rlhf_lightning.files import write_text
    from rlhf_lightning.filtering.evaluation import evaluate
    from rlhf_lightning.filtering.filtered_folder import match_json
    from rlhf_lightning.filtering.row_filter import RuleFilter

    if options.output:
        check_writable("--output", options.output, options.overwrite)
    row_filter, columns = RuleFilter(options.rules), column_names(options.columns)
    rows = read_rows(options.file, "prompt")
    hidden = [LocatedRow({k: v for k, v in row.data.items() if k != options.label}, row.where) for row in rows]
    decisions = row_filter.build().decide(hidden, columns)
    found = evaluate(rows, decisions, [rule.name for rule in row_filter.parsed.rules], options.label)
    if options.output:
        lines: list[JSON] = [
            {
                "error": "false negative" if is_unsafe else "false positive",
                "where": row.where,
                "matches": [match_json(match) for match in decision.matches],
                "row": row.data,
            }
            for row, is_unsafe, decision in found.errors
        ]
        write_text(options.output, "".join(as_json(line) + "\n" for line in lines))
    if options.json:
        rules = {name: counts.as_json() for name, counts in found.rules.items()}
        print(as_json({"rows": len(rows), "overall": found.overall.as_json(), "rules": rules}, indent=2))
        return 0
    _show(found)
    return 0


def _show(found: "FilterEvaluation") -> None:
    head = ("rule", "matched", "false positives", "false negatives", "precision", "recall", "false positive rate")
    rows: list[tuple[str, ...]] = [head]
    for name, counts in {**found.rules, "any rule": found.overall}.items():
        matched = counts.true_positives + counts.false_positives
        rates = counts.as_json()
        shown = [
            "–"
            if rates[rate] is None
            else f"{rates[rate]:.3f} [{rates[f'{rate}_low']:.3f}, {rates[f'{rate}_high']:.3f}]"
            for rate in ("precision", "recall", "false_positive_rate")
        ]
        rows.append((name, str(matched), str(counts.false_positives), str(counts.false_negatives), *shown))
    _table(rows)
    for row, is_unsafe, decision in found.errors[:10]:
        kind = "false negative" if is_unsafe else "false positive"
        print(visible(f"{kind}: {row.where}{f' ({decision.summary})' if decision.matches else ''}"))
    if len(found.errors) > 10:
        print(f"and {len(found.errors) - 10} more (--output FILE writes all)")


def _table(rows: list[tuple[str, ...]]) -> None:
    if len(rows) < 2:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print(visible("  ".join(cells).rstrip()))
    print()


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf filter",
        description="Filter data by rules: terms, regular expressions, classifiers, judges.",
        epilog="example: rlhf filter apply rules.yaml chats.jsonl --output clean",
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    apply = commands.add_parser(
        "apply",
        help="write the rows that rules leave, and those that they remove",
        description="Write the rows of files that are kept (rows.jsonl), those that are removed with what matched "
        "(removed.jsonl), and the counts (summary.json). The same command again does nothing if the folder has the "
        "result of the same files and rules, and starts over after an interruption.",
        epilog="example: rlhf filter apply rules.yaml chats.jsonl more.jsonl --output clean",
    )
    apply.add_argument("rules", help="file of rules, see docs/safety-filter.md")
    apply.add_argument("files", nargs="+", metavar="FILE", help="rows of any kind and format")
    apply.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    add_overwrite(apply)
    evaluate = commands.add_parser(
        "evaluate",
        help="precision, recall and errors on labeled rows",
        description="Compare the decisions of rules with labels: false positives and negatives, precision, recall and "
        "false positive rate, each with its 95%% interval, for every rule and for all together.",
        epilog="example: rlhf filter evaluate rules.yaml labeled.jsonl --output errors.jsonl",
    )
    evaluate.add_argument("rules", help="file of rules, see docs/safety-filter.md")
    evaluate.add_argument("file", help="rows with a column that says which of them should be matched")
    evaluate.add_argument(
        "--label", default=LABEL, metavar="COLUMN", help=f"column that is true or 1 for such rows (default: {LABEL})"
    )
    evaluate.add_argument("--output", type=Path, help="JSONL file to write the false positives and negatives to")
    add_overwrite(evaluate)
    for command in (apply, evaluate):
        command.add_argument("--json", action="store_true", help="print the counts as one JSON object")
        command.add_argument(
            "--columns",
            nargs="+",
            metavar="OURS=YOURS",
            help="column names (data.columns), for example prompt=question",
        )
    return parser.parse_args(args)
