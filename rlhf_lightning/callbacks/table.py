"""Table of episodes: Rich in a terminal, plain lines elsewhere."""

import io
from collections.abc import Sequence
from typing import Required

from rlhf_lightning.types import EpisodeRecord

WIDTH, NARROW = 100, 80


class SampleRow(EpisodeRecord, total=False):
    """A row of `samples.jsonl`."""

    step: Required[int]
    """Optimizer steps before the round."""
    round: Required[int]
    group: Required[int]
    sample: Required[int]
    kl: Required[float | None]
    """KL of the episode from the reference, in nats; None without a reference."""


def choose(rows: Sequence[SampleRow]) -> dict[str, SampleRow]:
    """The best, median and worst row by reward; fewer if there are not enough rows."""
    ordered = sorted(rows, key=lambda row: -row["reward"])
    chosen = {"best": ordered[0]}
    if len(ordered) > 2:
        chosen["median"] = ordered[len(ordered) // 2]
    if len(ordered) > 1:
        chosen["worst"] = ordered[-1]
    return chosen


def plain(title: str, rows: dict[str, SampleRow]) -> str:
    """The rows as plain text, three lines per episode.

    Args:
        title: Title of the table.
        rows: Rows of `samples.jsonl` by their label.
    """
    lines = [title]
    for name, row in rows.items():
        lines.append(f"  {name:<7}{_numbers(row)}")
        lines.append(f"    prompt    {shorten(asked(row), WIDTH)}")
        lines.append(f"    response  {shorten(row['response'], WIDTH)}")
    return "\n".join(lines)


def rich(title: str, rows: dict[str, SampleRow], width: int | None = None) -> str:
    """The rows as a table of the terminal's width, or as plain text if the terminal is too narrow.

    Args:
        title: Title of the table.
        rows: Rows of `samples.jsonl` by their label.
        width: Width in characters; that of the terminal by default.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = width or Console().width
    if width < NARROW:
        return plain(title, rows)
    table = Table(title=title, title_justify="left", title_style="bold", expand=True)
    for column in ("", "prompt", "response"):
        table.add_column(column, ratio={"prompt": 2, "response": 3}.get(column), overflow="fold")
    for column in ("reward", "adv.", "KL"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("stop", no_wrap=True)
    for name, row in rows.items():
        texts = [Text(shorten(text, 2 * width)) for text in (asked(row), row["response"])]
        numbers = map(_number, (row["reward"], row["advantage"], row["kl"]))
        table.add_row(name, *texts, *numbers, shorten(row["stop_reason"], WIDTH))
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True).print(table)
    return out.getvalue().rstrip("\n")


def asked(row: SampleRow) -> str:
    """Content of the prompt's last message."""
    content = row["prompt"][-1]["content"] if row["prompt"] else ""
    return content if isinstance(content, str) else str(content)


def shorten(text: str, width: int) -> str:
    """Text on one line, without control characters, and no longer than `width`.

    Args:
        text: The text.
        width: Maximum number of characters.
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _numbers(row: SampleRow) -> str:
    parts = [f"{shorten(name, WIDTH)} {value:.4g}" for name, value in row["terms"].items() if value is not None]
    shown = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    rest = f"advantage {_number(row['advantage'])}  KL {_number(row['kl'])}  {shorten(row['stop_reason'], WIDTH)}"
    return f"reward {_number(row['reward'])}{shown}  {rest}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
