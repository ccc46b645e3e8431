"""`rlhf evaluate MODEL FILE --task NAME`: runs a benchmark on a local file of its rows."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.cli.options import Parser, add_weight_flags, check_options, check_writable, device_of
from rlhf_lightning.cli.rendering_flags import add_rendering_flags, rendering_options, say
from rlhf_lightning.cli.user_code import SCORER_HELP, allow_user_code, import_scorer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import as_json, visible, write_text
from rlhf_lightning.pipeline.verify import settings_hash

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.tasks import Estimate, Scores, Task
    from rlhf_lightning.types import JSON, Row

CHUNK = 32
"""Number of rows that are answered before their results are written."""


def is_task(args: Sequence[str]) -> bool:
    """True if the arguments of `rlhf evaluate` contain `--task`."""
    return any(arg == "--task" or arg.startswith("--task=") for arg in args)


def run(args: list[str]) -> int:
    """Evaluate a model on a task, and print its metrics with their standard errors."""
    options = _parse(args[1:])
    from rlhf_lightning.cli.logs import setup_logging
    from rlhf_lightning.data.records import fingerprint, read_rows
    from rlhf_lightning.files import hash_model

    setup_logging("warning", None)
    allow_user_code(args)
    output, options.output = options.output, None
    check_options(options)
    rows = read_rows(options.file)[: options.limit]
    if not rows:
        raise ConfigError(f"{options.file}: the file has no rows")
    settings = {
        **{key: vars(options)[key] for key in ("task", "max_tokens", "shots", "limit", "seed", "dtype", "scorer")},
        "temperature": options.temperature,
        "model": hash_model(Path(options.model).expanduser()) or options.model,
        "file": fingerprint(options.file),
        "shots_from": fingerprint(options.shots_from),
        "task_file": fingerprint(options.task) if Path(options.task).is_file() else None,
        "asked": rendering_options(options),
    }
    if output:
        check_writable("--output", output, overwrite=True)
    results = Results(output, settings, options.overwrite)
    measure = _pairs if options.task == "rewardbench" else _answers
    found = measure(options, rows, results)
    figures = {name: _finite(one) for name, one in found.items()}
    text = json.dumps({"task": options.task, "rows": len(rows), "metrics": figures}, indent=2, allow_nan=False) + "\n"
    if options.json:
        print(text, end="")
    else:
        _show(options.task, found)
    if options.summary:
        write_text(options.summary, text)
    return 0


class Results:
    """Results of an evaluation. They are appended to a file, so that an interrupted evaluation can continue.

    Args:
        path: The file; None to keep the results in memory.
        settings: Settings that the results depend on; a file has results of one set of settings only.
        overwrite: Replace an existing file.

    Raises:
        ConfigError: If the file has results with other settings, or no results at all.

    Example:
        >>> Results(None, {}, False).done
        {}
    """

    def __init__(self, path: Path | None, settings: "Mapping[str, JSON]", overwrite: bool) -> None:
        self.path = path
        self.run = settings_hash(settings)[:16]
        self.done: dict[int, Row] = {}
        if path is None:
            return
        if overwrite:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        whole = 0
        with open(path, "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # the evaluation was killed while it wrote this line
                try:
                    row = json.loads(line)
                    same = row["run"] == self.run
                    self.done[int(row["index"])] = row
                except (ValueError, KeyError, TypeError):
                    raise ConfigError(
                        f"--output {path}: the file exists and has no results of a task; give another file"
                    ) from None
                if not same:
                    raise ConfigError(
                        f"--output {path}: the file has results of another model, file or settings; give another file, "
                        "or replace it with --overwrite"
                    )
                whole += len(line)
        os.truncate(path, whole)
        if self.done:
            print(visible(f"{path}: {len(self.done)} rows are done already"), file=sys.stderr)

    def missing(self, count: int) -> Iterator[list[int]]:
        """The indices of rows without a result, in chunks.

        Args:
            count: Total number of rows.
        """
        left = [number for number in range(count) if number not in self.done]
        for start in range(0, len(left), CHUNK):
            yield left[start : start + CHUNK]
            if sys.stderr.isatty():
                print(f"\r{min(start + CHUNK, len(left))} of {len(left)} rows", end="", file=sys.stderr)
        if left and sys.stderr.isatty():
            print(file=sys.stderr)

    def scores(self, number: int) -> "Scores":
        """The scores of a row.

        Args:
            number: Index of the row.

        Raises:
            ConfigError: If the file has no valid scores for the row.
        """
        found = self.done[number].get("scores")
        scores = {
            name: [float(value) for value in values if isinstance(value, int | float)]
            for name, values in (found.items() if isinstance(found, dict) else ())
            if isinstance(values, list)
        }
        if not scores or not all(scores.values()):
            raise ConfigError(
                f"--output {self.path}: the row with index {number} has no scores; start over with --overwrite"
            )
        return scores

    def add(self, rows: Sequence["Row"]) -> None:
        """Append rows, each with its `index`, in one write."""
        rows = [{"run": self.run, **row} for row in rows]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as stream:
                stream.write("".join(as_json(row) + "\n" for row in rows).encode())
        self.done |= {int(str(row["index"])): row for row in rows}


def _task(options: argparse.Namespace) -> "Task":
    from rlhf_lightning.data.records import read_rows
    from rlhf_lightning.evaluation import tasks

    if bool(options.shots) != bool(options.shots_from):
        raise ConfigError(
            "--shots N and --shots_from FILE must be given together: the first N rows of the file are solved examples"
        )
    shots = read_rows(options.shots_from)[: options.shots] if options.shots else []
    if len(shots) < options.shots:
        raise ConfigError(f"--shots is {options.shots}, but {options.shots_from} has only {len(shots)} rows")
    if options.task == "gsm8k":
        return tasks.gsm8k([row.data for row in shots])
    if options.shots:
        raise ConfigError(f"--shots is only for gsm8k; the task {options.task} takes no solved examples")
    if options.task == "ifeval":
        return tasks.ifeval()
    if not Path(options.task).is_file():
        raise ConfigError(
            f"--task {options.task}: no such task or file; give one of {', '.join(tasks.NAMES)}, or a YAML file"
        )
    return tasks.read_task(Path(options.task))


def _answers(options: argparse.Namespace, given: Sequence, results: Results) -> "dict[str, Estimate]":
    """Sample the policy's answers and score them."""
    from rlhf_lightning.errors import DataError
    from rlhf_lightning.evaluation.policy import Policy

    task = _task(options)
    rows = [one.data for one in given]
    for one in given:  # before the model is loaded
        try:
            task.ask(one.data)
        except DataError as error:
            raise DataError(f"{one.where}: {error}") from None
    left = list(results.missing(len(rows)))
    if left:
        policy = Policy(options.model, options.dtype, device_of(options.device), rendering_options(options))
        say(policy.asking.describe())
        chat = policy.renderer.format == "chat"
        prompts = policy.prompts([task.prompt(row, chat) for row in rows])
        for numbers in left:
            episodes = policy.answer(
                [prompts[number] for number in numbers],
                options.max_tokens or task.max_tokens,
                options.seed,
                temperature=options.temperature,
                stop=[*policy.renderer.stop, *task.stop] or None,
            )
            results.add(
                [
                    _row(task, number, rows[number], episode.record())
                    for number, episode in zip(numbers, episodes, strict=True)
                ]
            )
    return task.summarize([results.scores(number) for number in range(len(rows))])


def _row(task: "Task", number: int, row: "Row", record: Mapping) -> "Row":
    kept = {key: record[key] for key in ("prompt", "response", "response_tokens", "stop_reason")}
    return {"index": number, **kept, "scores": task.score(str(record["response"]), row)}


def _pairs(options: argparse.Namespace, given: Sequence, results: Results) -> "dict[str, Estimate]":
    """Score the two responses of each pair with a preference model."""
    from rlhf_lightning.errors import DataError
    from rlhf_lightning.evaluation.tasks import rewardbench
    from rlhf_lightning.models.reward_model import RewardModel

    if options.shots or options.max_tokens:
        raise ConfigError(
            "--shots and --max_tokens have no effect on rewardbench, which scores given responses; leave them out"
        )
    for one in given:
        for key in ("prompt", "chosen", "rejected"):
            if one.data.get(key) is None:
                raise DataError(
                    f"{one.where}: the row has no {key}; rows of RewardBench have prompt, chosen, rejected and subset"
                )
    rows = [one.data for one in given]
    if left := list(results.missing(len(rows))):
        import_scorer(options.scorer)
        judge = RewardModel(options.model, options.dtype, asked=rendering_options(options))
        judge.to(device_of(options.device))
        say(judge.asking.describe())
        for numbers in left:
            part = [rows[number] for number in numbers]
            # Scored in one call, so that equal responses are in the same batch and get equal scores.
            responses = [row[side] for side in ("chosen", "rejected") for row in part]
            scores = judge.score([row["prompt"] for row in part] * 2, responses).tolist()
            results.add(
                [
                    {
                        "index": number,
                        "subset": str(row.get("subset") or ""),
                        "chosen_score": high,
                        "rejected_score": low,
                        "scores": {"right": [float(high > low)]},
                    }
                    for number, row, high, low in zip(
                        numbers, part, scores[: len(part)], scores[len(part) :], strict=True
                    )
                ]
            )
    subsets = [str(row.get("subset") or "") for row in rows]
    return rewardbench(subsets, [results.scores(number)["right"][0] for number in range(len(rows))])


def _finite(one: "Estimate") -> dict[str, float | int | None]:
    return {
        "value": one.value if math.isfinite(one.value) else None,
        "standard_error": one.error if math.isfinite(one.error) else None,
        "count": one.count,
    }


def _show(task: str, found: "Mapping[str, Estimate]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=visible(task), caption="value ± standard error")
    table.add_column("")
    for name in ("value", "count"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        table.add_row(visible(name), f"{one.value:.4f} ± {one.error:.4f}", str(one.count))
    Console().print(table)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rlhf evaluate",
        description="Run a benchmark on a file of its rows. Tasks, and the columns of their rows:\n"
        "  gsm8k        question, answer\n"
        "  ifeval       prompt, instruction_id_list, kwargs\n"
        "  rewardbench  prompt, chosen, rejected, subset (for preference models)\n"
        "  FILE.yaml    your own task\n"
        "With --output, the same command continues an interrupted evaluation.",
        epilog="example: rlhf evaluate runs/sft/model gsm8k_test.jsonl --task gsm8k --output gsm8k.jsonl \\\n"
        "             --shots 5 --shots_from gsm8k_train.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, Hub id or GGUF file of a model")
    parser.add_argument("file", help="rows of the benchmark: a .jsonl, .json or .parquet file, or a Hub id")
    parser.add_argument("--task", required=True, metavar="NAME", help="gsm8k, ifeval, rewardbench, or a YAML file")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="N", help="gsm8k: number of solved examples per prompt (default: 0)"
    )
    parser.add_argument("--shots_from", metavar="FILE", help="file whose first N rows are the solved examples")
    parser.add_argument(
        "--max_tokens", type=int, help="maximum number of tokens per response (default: that of the task)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy decoding)"
    )
    parser.add_argument("--limit", type=int, help="use only the first LIMIT rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the metrics as a JSON object instead of a table")
    parser.add_argument("--output", type=Path, help="write each response and its scores to this JSONL file")
    parser.add_argument("--summary", type=Path, help="write the metrics to this JSON file")
    parser.add_argument("--overwrite", action="store_true", help="start over, and replace existing output files")
    parser.add_argument("--scorer", metavar="CLASS", help=SCORER_HELP)
    add_weight_flags(parser)
    add_rendering_flags(parser)
    return parser.parse_intermixed_args(args)
