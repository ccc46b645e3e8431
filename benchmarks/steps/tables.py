"""A comparison of both sides as a row of a Markdown table."""

from typing import Any

from benchmarks.steps.sides import ROWWISE

HEAD = "step | ours | TRL, whole batch | ratio | TRL, fastest micro-batch | ratio | of the matmul rate |"


def line(task: str, cell: dict[str, Any] | None) -> str:
    """The cells of the columns in `HEAD`; values that were not measured say so."""
    if cell is None:
        return f"{task} | not measured | – | – | – | – | – |"
    seconds = [f"{cell[n]:.2f} s" if cell[n] else "out of memory" for n in ("ours", "trl_whole_batch", "trl_fastest")]
    ratios = [f"{cell[name]:.1f}" if cell[name] else "–" for name in ("ratio", "ratio_fastest")]
    rate = f"{cell['of_matmul_rate']:.0%}" if cell["of_matmul_rate"] else "–"
    if task not in ROWWISE:
        return f"{task} | {seconds[0]} | {seconds[1]} | {ratios[0]} | – | – | {rate} |"
    fastest = f"{seconds[2]} ({cell['trl_fastest_micro_batch']})" if cell["trl_fastest"] else seconds[2]
    return f"{task} | {seconds[0]} | {seconds[1]} | {ratios[0]} | {fastest} | {ratios[1]} | {rate} |"
