"""The quickstart on SmolLM2-135M-Instruct: one run, stored with its machine, and tables for the pages.

python -m benchmarks.real_quickstart            # runs it in runs/quickstart, or measures a finished run there again
python -m benchmarks.real_quickstart FOLDER     # stores a finished run of another folder

It writes the tables into README.md and docs/quickstart.md. The variable NOTE is added to the line below the table.
"""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.quickstart import machine
from rlhf_lightning.quickstart.rows import HELD_OUT_KINDS, TRAINED
from rlhf_lightning.quickstart.run import QuickstartSettings, quickstart
from rlhf_lightning.report.records import QUICKSTART

FILE = Path(__file__).parent / "results" / "real_quickstart.json"
MODELS = {"base": "SmolLM2-135M-Instruct (4-bit)", "sft": "after SFT", "policy": "after RL"}
ROWS = {
    "followed": "instructions followed",
    "followed_other_kinds": "instructions of kinds never trained, followed",
    "perplexity": "perplexity of held-out chats",
    "response_tokens": "tokens per answer",
    "truncated_fraction": "answers cut off at the token limit",
    "reward_model_score": "score of the preference model",
}


def figures(report: dict[str, Any]) -> str:
    """The table of the three models."""
    lines = [f"| held-out prompts, greedy decoding | {' | '.join(MODELS.values())} |", "|---" * 4 + "|"]
    for key, title in ROWS.items():
        assert key in QUICKSTART
        values = [report["summary"][name][key] for name in MODELS]
        share = key.startswith(("followed", "truncated"))
        lines.append(f"| {title} | {' | '.join(f'{value:.0%}' if share else f'{value:.1f}' for value in values)} |")
    return "\n".join([*lines, "", where(report)])


def where(report: dict[str, Any]) -> str:
    """Time, memory, machine and versions."""
    summary, found = report["summary"], report["machine"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"{summary['seconds'] / 60:.1f} minutes and {summary['peak_memory_gb']:.1f} GB on {report['threads']} of the "
        f"{found['cores']} cores of an {found['cpu']}, {summary['dtype']}, {versions}, "
        f"{report['date']}{report['note']}."
    )


def kinds(report: dict[str, Any]) -> str:
    """Instructions followed, by kind."""
    found = report["summary"]["kinds"]
    lines = [f"| kind | {' | '.join(MODELS.values())} |", "|---" * 4 + "|"]
    for kind in [*TRAINED, *HELD_OUT_KINDS]:
        title = f"`{kind}`" + ("" if kind in TRAINED else " (never trained)")
        lines.append(f"| {title} | {' | '.join(f'{found[name][kind]:.0%}' for name in MODELS)} |")
    return "\n".join(lines)


def answers(report: dict[str, Any]) -> str:
    """Answers before and after RL."""

    def cell(text: str) -> str:
        return text.strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("\n", "<br>")

    lines = ["| prompt | after SFT | after RL |", "|---" * 3 + "|"]
    return "\n".join(
        lines
        + [
            f"| {' | '.join(cell(row[name]) for name in ('prompt', 'sft', 'policy'))} |"
            for row in report["summary"]["samples"]
        ]
    )


def main() -> None:
    """Run or read a quickstart, and store it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    summary = json.loads((folder / "summary.json").read_text()) if folder else quickstart(QuickstartSettings())
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    report = {
        "date": date.today().isoformat(),
        "threads": threads,
        "note": os.environ.get("NOTE", ""),
        "machine": machine(),
        "summary": summary,
    }
    FILE.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, str(Path(__file__).with_name("summary.py")), "--readme"], check=True)
    print(figures(report), kinds(report), answers(report), sep="\n\n")


if __name__ == "__main__":
    main()
