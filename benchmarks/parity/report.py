"""The results as Markdown."""

from typing import Any


def table(report: dict[str, Any]) -> str:
    """Both tables."""
    versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items())
    lines = [
        "# Parity with TRL",
        "",
        f"{versions}. Written by `python -m benchmarks.parity`. One model (2 layers, width 32, float32), the same rows "
        "and settings; whole runs, `Trainer.fit` against `Trainer.train`, gradient descent.",
        "",
        "| case | step | loss, ours | loss, TRL | norm of the gradient | relative difference of gradients "
        "| same tokens | same mask |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        for number, step in enumerate(case, 1):
            loss_mask = {True: "yes", False: "no", None: "–"}[step["same_mask"]]
            lines.append(
                f"| {name} | {number} | {step['ours']:.7f} | {step['trl']:.7f} | {step['norm']:.3g} "
                f"| {step['difference']:.1e} | {'yes' if step['same_tokens'] else 'no'} | {loss_mask} |"
            )
    lines += [
        "",
        f"Largest relative difference of gradients: {report['largest']['difference']:.1e} "
        f"({report['largest']['case']}); without it {report['second']['difference']:.1e} ({report['second']['case']}).",
        "",
        "## Differences",
        "",
        "| where | measured | ours | TRL | right | why |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["differences"]:
        for i, (what, ours, theirs) in enumerate(row["numbers"]):
            first = (row["name"], row["right"], row["why"]) if not i else ("", "", "")
            lines.append(f"| {first[0]} | {what} | {_cell(ours)} | {_cell(theirs)} | {first[1]} | {first[2]} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    return f"{value:.2g}" if abs(value) < 1e-3 else f"{value:.7g}"
