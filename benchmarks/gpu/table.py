"""The results as Markdown; cells that were not measured say so."""

from typing import Any

from benchmarks import pages
from benchmarks.gpu.plan import CELLS, Cell

BEGIN, END = "<!-- results: python -m benchmarks.gpu --readme -->", "<!-- end of results -->"
NOT = "not measured"


def render(report: dict[str, Any]) -> str:
    """Tables of all cells, and the profiles of steps that missed their target."""
    cells = report.get("cells", {})
    lines = [_head(report), ""]
    lines += ["| check | result | numbers |", "|---|---|---|"]
    lines += [_check(cell, cells.get(cell.name)) for cell in CELLS if cell.piece in ("check", "tests")]
    lines += [
        "",
        "| step | ours | ours, CUDA graphs | beside | ratio | MFU | peak GiB: ours, beside | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measures = [cell for cell in CELLS if cell.piece not in ("check", "tests")]
    lines += [_measure(cell, cells.get(cell.name)) for cell in measures]
    notes = [note for cell in measures for note in _notes(cell, cells.get(cell.name) or {})]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _head(report: dict[str, Any]) -> str:
    if "device" not in report:
        return "Not measured: no GPU was at hand."
    device, machine = report["device"], report["device"]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    sizes = "a tiny model, to try the script" if report["settings"]["small"] else "Qwen3-0.6B from its config"
    return f"{device['name']}, {report['settings']['precision']}, {sizes}; {versions}."


def _check(cell: Cell, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"| {cell.title} | {NOT} | {NOT} |"
    if reason := found.get("skipped") or found.get("failed") if "passed" not in found else None:
        return f"| {cell.title} | {'not run' if 'skipped' in found else 'failed'} | {_cell_text(reason)} |"
    numbers = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in found.items() if _plain(value))
    return f"| {cell.title} | {'passed' if found['passed'] else 'FAILED'} | {numbers} |"


def _measure(cell: Cell, found: dict[str, Any] | None) -> str:
    if found is None:
        graphs = NOT if "graphs" in cell.variants else "–"
        wanted = cell.target.text(None) if cell.target else "–"
        return _row(cell.title, NOT, graphs, NOT, NOT, NOT, NOT, f"{wanted}: {NOT}" if cell.target else "–")
    if "failed" in found:
        return _row(cell.title, _cell_text(found["failed"]), *["–"] * 6)
    best = found.get(found.get("best", ""), {})
    return _row(
        cell.title,
        _way(found["ours"]),
        _way(found["graphs"]) if "graphs" in found else "–",
        f"{found['other']}: {_way(found['theirs'])}",
        f"{found['ratio']:.1f}" if "ratio" in found else "–",
        f"{best['mfu']:.0%}" if best else "–",
        ", ".join(_gib(way) for way in (best, found["theirs"])),
        _target(cell, found),
    )


def _target(cell: Cell, found: dict[str, Any]) -> str:
    if not cell.target:
        return "–"
    if found.get("reached") is None:
        return f"{cell.target.text(None)}: cannot be said"
    return cell.target.text(found["reached"])


def _way(way: dict[str, Any]) -> str:
    if "seconds" not in way:
        return _cell_text(way["failed"])
    details = [f"{way['seconds'] * 1e3:.0f} ms"]
    if way.get("packs") is False:
        details.append("rows padded")
    if way.get("micro"):
        details.append(f"micro-batches of {way['micro']}: all at once is {way['whole_batch'].split(':')[0]}")
    return f"{way['tokens_per_second']:,.0f} tokens/s ({', '.join(details)})"


def _gib(way: dict[str, Any]) -> str:
    return f"{way['peak_gib']:.1f}" if way.get("peak_gib") is not None else "–"


def _notes(cell: Cell, found: dict[str, Any]) -> list[str]:
    """The fraction of sampling in the RL step, and where the time went in steps that missed their target."""
    lines = []
    for name, split in found.get("split", {}).items():
        who = {"ours": "ours", "graphs": "ours with CUDA graphs", "theirs": found["other"]}[name]
        if "step" in split:
            share = split["sampling"] / split["step"]
            lines.append(f"- {cell.title}, {who}: {share:.0%} of {split['step']:.2f} s is sampling, the rest training.")
    profile = found.get("profile", {})
    if "shares" in profile:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile["shares"].items())
        top = "; ".join(f"`{row['name'][:60]}` {row['share']:.0%} ({row['calls']} times)" for row in profile["top"][:4])
        part = f" ({profile['new_tokens']} tokens drawn)" if profile.get("new_tokens") else ""
        lines.append(f"- {cell.title} missed its target{part}: {shares}, idle {profile['idle']:.0%}. Most: {top}.")
    elif "failed" in profile:
        lines.append(f"- {cell.title} missed its target, and could not be profiled: {profile['failed']}.")
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1e}"


def _cell_text(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def placed(page: str, report: dict[str, Any]) -> str:
    """A page with the tables between its markers."""
    return pages.placed(page, BEGIN, END, render(report))
