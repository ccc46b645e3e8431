"""The sections of a report."""

import json
from collections.abc import Sequence
from statistics import fmean

from rlhf_lightning.files import duration
from rlhf_lightning.report import charts
from rlhf_lightning.report.html import Html, details, el, join, number, table
from rlhf_lightning.report.read import Points, Run, StageRun
from rlhf_lightning.report.records import SampleRow, quickstart_columns, quickstart_title
from rlhf_lightning.types import Message

# Title of a chart and its metrics; metrics that a stage did not log are left out.
CURVES: dict[str, list[tuple[str, list[str]]]] = {
    "sft": [
        ("negative log-likelihood, nats per token", ["train/nll", "val/nll"]),
        ("divergence from the teacher, nats per token", ["train/divergence", "val/divergence"]),
        ("bits per byte", ["val/bits_per_byte"]),
    ],
    "preference": [
        ("pair accuracy", ["train/accuracy", "val/accuracy", "val/accuracy_longer_wins"]),
        ("loss", ["train/loss", "val/loss"]),
        ("margin", ["train/margin", "val/margin"]),
        ("scores", ["train/chosen_score", "train/rejected_score", "train/desirable_score", "train/undesirable_score"]),
        ("KL to the reference, nats", ["train/kl", "val/kl"]),
        ("calibration error and Brier score", ["val/ece", "val/brier"]),
    ],
    "policy": [
        ("reward", ["train/reward", "val/reward_sampled", "val/reward_greedy"]),
        ("gold reward", ["train/reward_gold"]),
        ("KL to the reference, nats per episode", ["train/kl", "val/kl"]),
        ("divergence from the teacher, nats per token", ["train/divergence", "val/divergence"]),
        ("entropy, nats per token", ["train/entropy"]),
        ("response tokens", ["train/response_tokens", "val/response_tokens"]),
        ("fraction of truncated episodes", ["train/truncated", "val/truncated"]),
        ("clip fraction", ["train/clip_fraction"]),
        ("zero-variance groups", ["train/zero_variance_groups"]),
    ],
}
HEADLINES = {
    "sft": {"val/nll": "held-out NLL", "train/nll": "NLL of the last step"},
    "preference": {"val/accuracy": "held-out pair accuracy", "train/accuracy": "pair accuracy of the last step"},
    "policy": {
        "train/reward": "reward of the last round",
        "train/divergence": "divergence from the teacher",
        "train/kl": "KL",
        "train/truncated": "truncated",
    },
}
TILES = {
    "sft": {"val/nll": "held-out NLL, nats per token"},
    "preference": {"val/accuracy": "held-out pair accuracy"},
    "policy": {
        "train/reward": "reward",
        "train/divergence": "divergence from the teacher, nats per token",
        "train/kl": "KL, nats per episode",
        "train/response_tokens": "response tokens",
    },
}


def overview(run: Run) -> Html:
    """Table of the stages with their results, and the quickstart's table."""
    rows = []
    for stage in run.stages:
        metrics = {**stage.facts.get("metrics", {}), **stage.entry.get("metrics", {})}
        titles = HEADLINES.get(stage.kind, {}).items()
        found = [f"{title} {number(metrics[name])}" for name, title in titles if name in metrics]
        seconds = stage.entry.get("seconds", stage.facts.get("seconds"))
        link = el("a", stage.name, href=f"#{anchor(stage)}")
        steps = number(stage.facts.get("steps"))
        rows.append([link, stage.kind, stage.status, steps, duration(seconds), ", ".join(found)])
    parts = [table(["stage", "kind", "status", "steps", "time", "result"], rows, "stack")]
    models = {name: run.summary[name] for name in ("base", "sft", "policy") if name in run.summary}
    if models:
        columns = quickstart_columns(list(models.values()))
        body = [[name, *(number(figures.get(key)) for key in columns)] for name, figures in models.items()]
        title = quickstart_title(run.summary)
        parts += [el("h3", title[:1].upper() + title[1:]), table(["", *columns.values()], body)]
    return el("section", el("h2", "Overview"), tiles(run), *parts)


def tiles(run: Run) -> Html | None:
    """The most important numbers, in large type."""
    found: list[Html] = []
    for stage in run.stages:
        for name, title in TILES.get(stage.kind, {}).items():
            if points := charts.finite(stage.metrics.get(name, [])):
                found.append(_tile(charts.change([value for _, value in points], 3), title, stage.name))
    trained = run.summary.get("sft", {}), run.summary.get("policy", {})
    for key, title in (("gold_reward", "held-out gold reward"), ("followed", "held-out instructions followed")):
        values = [value for figures in trained if (value := figures.get(key)) is not None]
        if len(values) == len(trained):
            found.append(_tile(charts.change(values, 2), title, "sft, policy"))
    return el("div", *found, class_="tiles") if found else None


def _tile(value: str, title: str, stage: str) -> Html:
    return el("div", el("b", value), el("span", title), el("small", stage), class_="tile")


def warnings(run: Run) -> Html:
    """Warnings of the diagnostics, failures, and inconsistencies between stages."""
    rows = [row for stage in run.stages for row in _warnings(run, stage)]
    body = table(["stage", "step", "what", "message"], rows, "stack warnings") if rows else el("p", "None.")
    return el("section", el("h2", f"Warnings ({len(rows)})" if rows else "Warnings"), body)


def _warnings(run: Run, stage: StageRun) -> list[list[str]]:
    found = [(number(row.get("step")), str(row.get("name")), str(row.get("message"))) for row in stage.warnings]
    if stopped := stage.facts.get("stopped"):
        found.append(("–", "stopped", str(stopped)))
    if stage.status == "failed":
        found.append(("–", "failed", f"exit code {stage.entry.get('exit_code')}; see {run.root / 'logs' / 'run.log'}"))
    if problem := _broken(run, stage):
        found.append(("–", "lineage", problem))
    return [[stage.name, *row] for row in found]


def _broken(run: Run, stage: StageRun) -> str:
    """Message if the model that a stage started from has been replaced since; empty otherwise."""
    parent = stage.facts.get("parent") or {}
    now = {other.name: other.facts.get("model_hash") for other in run.stages}.get(str(parent.get("stage")))
    if now and now != parent.get("hash"):
        return f"{parent['stage']} was run again after this stage started from it"
    return ""


def stage_section(stage: StageRun) -> Html:
    """Curves, calibration, distributions and samples of a stage."""
    known = CURVES.get(stage.kind, [])
    picked = {title: _picked(stage, names) for title, names in known}
    # A constant curve is reported as its number.
    constant = {title: given for title, given in picked.items() if given and all(map(charts.constant, given.values()))}
    main = [charts.curves(title, given) for title, given in picked.items() if title not in constant]
    special = _policy(stage) if stage.kind == "policy" else _preference(stage)
    shown = {name for _, names in known for name in names}
    rest = [charts.curves(name, {name: points}) for name, points in sorted(stage.metrics.items()) if name not in shown]
    body: list[Html] = [grid([*special, *main])]
    if not stage.metrics:
        body = [el("p", "No metrics.csv: the stage has logged nothing yet, or logs elsewhere (trainer.logger).")]
    if constant:
        values = [f"{title} {number(next(iter(given.values()))[0][1])}" for title, given in constant.items()]
        body.append(el("p", f"Constant: {', '.join(values)}."))
    if others := [chart for chart in rest if chart is not None]:
        body.append(details(f"{len(others)} more curves", grid(others)))
    title = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
    return el("section", el("h2", title), *body, *samples(stage), id=anchor(stage))


def _picked(stage: StageRun, names: Sequence[str]) -> dict[str, Points]:
    return {name: stage.metrics[name] for name in names if name in stage.metrics}


def _policy(stage: StageRun) -> list[Html | None]:
    """Rewards against the KL, and their distribution in the first and the last round."""
    kl = dict(stage.metrics.get("train/kl", []))
    found = []
    for name, title in (("train/reward", "reward"), ("train/reward_gold", "gold reward")):
        points = [(kl[step], value) for step, value in stage.metrics.get(name, []) if step in kl]
        note = "Each dot is a round; later rounds are darker. The line is the running mean."
        found.append(charts.path_chart(f"{title} against KL", points, "KL, nats per episode", title, note))
    first, last = stage.samples.first, stage.samples.last
    rounds = {f"step {part[0]['step']}": [row["reward"] for row in part] for part in (first, last) if part}
    return [*found, charts.distribution("rewards, first and last round", rounds, "reward")]


def _preference(stage: StageRun) -> list[Html | None]:
    """Calibration, and the accuracy on subsets of the pairs."""
    report = stage.preference
    numbers = report.get("numbers", {})
    given = [f"{name} {number(numbers[key])}" for key, name in (("ece", "ECE"), ("brier", "Brier")) if key in numbers]
    note = (
        f"{', '.join(given)}. Below the dashed line the model is overconfident, above it underconfident."
        if given
        else ""
    )
    parts = {
        key.removeprefix("accuracy_").replace("_", " "): value
        for key, value in numbers.items()
        if key.startswith("accuracy_")
    }
    rows = [[name, number(value)] for name, value in parts.items()]
    listed = el("figure", el("h4", "accuracy on subsets of the pairs"), table(["pairs", "accuracy"], rows))
    chart = charts.calibration("calibration on held-out pairs", report.get("reliability") or [], note)
    return [chart, listed if parts else None]


def samples(stage: StageRun) -> list[Html]:
    """Answers before and after training, to held-out prompts and to training prompts of several rounds.

    If there are none, the answers of the first and the last round, which are to different prompts.
    """
    found = stage.samples
    parts = held_out_answers(stage)
    if found.repeated:
        parts += [el("h3", "Answers to repeated prompts of training"), side_by_side(found.repeated)]
    if parts or not found.last:
        return parts
    rows = [
        [prompt_block(b["prompt"]), answer_block(b), prompt_block(a["prompt"]), answer_block(a)]
        for b, a in zip(worst_median_best(found.first), worst_median_best(found.last), strict=False)
    ]
    head = ["prompt", "first round", "prompt", "last round"]
    title = "Worst, median and best answers of the first and the last round (no prompt was repeated)"
    return [el("h3", title), table(head, rows, "stack answers")]


def held_out_answers(stage: StageRun) -> list[Html]:
    """Greedy answers to the same held-out prompts before and after training, and their mean metrics."""
    pairs = stage.held_out
    if not pairs:
        return []
    shown = {"reward": [(b["reward"], a["reward"]) for b, a in pairs]}
    for name in dict.fromkeys(name for b, _ in pairs for name in b.get("terms", {})):
        both = [(b.get("terms", {}).get(name), a.get("terms", {}).get(name)) for b, a in pairs]
        shown[name] = [(before, after) for before, after in both if before is not None and after is not None]
    shown["response tokens"] = [(b["response_tokens"], a["response_tokens"]) for b, a in pairs]
    means = [
        f"{name} {charts.change([fmean(values) for values in zip(*both, strict=True)], 3)}"
        for name, both in shown.items()
        if both
    ]
    title = f"Greedy answers to {len(pairs)} held-out prompts, before and after"
    return [el("h3", title), el("p", f"Means: {', '.join(means)}."), side_by_side(pairs)]


def side_by_side(pairs: Sequence[tuple[SampleRow, SampleRow]]) -> Html:
    """Table of prompts, each with an earlier and a later answer."""
    rows = [[prompt_block(b["prompt"]), answer_block(b), answer_block(a)] for b, a in pairs]
    return table(["prompt", "earlier", "later"], rows, "stack answers")


def worst_median_best(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The worst, the median and the best row by reward."""
    ordered = sorted(rows, key=lambda row: row["reward"])
    return [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})]


def prompt_block(prompt: str | list[Message]) -> Html:
    """A prompt's messages, with their roles if there are several."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    lines = [m["content"] if isinstance(m["content"], str) else json.dumps(m["content"]) for m in messages]
    named = [f"{m['role']}: {line}" for m, line in zip(messages, lines, strict=True)] if len(messages) > 1 else lines
    return el("div", "\n".join(named), class_="text")


def answer_block(row: SampleRow) -> Html:
    """A response with its step, reward, reward terms, length and stop reason."""
    terms = [f"{name} {number(value)}" for name, value in row.get("terms", {}).items() if value is not None]
    reward = f"reward {number(row['reward'])}" + (f" ({', '.join(terms)})" if terms else "")
    small = [f"step {row['step']}", reward, f"{row['response_tokens']} tokens", str(row["stop_reason"])]
    return Html(el("div", row["response"], class_="text") + el("small", " · ".join(small)))


def held_out(run: Run) -> Html | None:
    """Answers of the quickstart's SFT and RL models, side by side."""
    found = run.summary.get("samples") or []
    rows = [[el("div", row[name], class_="text") for name in ("prompt", "sft", "policy")] for row in found]
    if not rows:
        return None
    title = "Answers to held-out prompts, before and after RL"
    return el("section", el("h2", title), table(["prompt", "SFT", "RL"], rows, "stack answers"))


# -- what was run -----------------------------------------------------------------------------------------------------


def lineage(run: Run) -> Html:
    """Table of the model that each stage started from, with hashes."""
    names = {str(stage.folder / "model"): stage.name for stage in run.stages}
    rows = []
    for stage in run.stages:
        parent = stage.facts.get("parent") or {}
        start = str(stage.facts.get("start") or "–")
        handed = stage.entry.get("inputs", {})
        source = parent.get("stage") or names.get(start, start)
        further = [f"{key} {str(handed[key])[:12]}" for key in ("reward", "critic") if handed.get(key)]
        rows.append(
            [
                stage.name,
                el("span", source, el("small", f" {str(parent.get('hash') or handed.get('start') or '')[:12]}")),
                ", ".join(further) or "–",
                str(stage.folder / "model"),
                str(stage.facts.get("model_hash") or "–")[:12],
            ]
        )
    head = ["stage", "started from", "with", "model folder", "SHA-256"]
    return el("section", el("h2", "Lineage"), table(head, rows, "stack paths"))


def what_was_run(run: Run) -> Html:
    """Data, versions and the complete configuration."""
    rows = []
    for stage in run.stages:
        data = stage.settings.get("data")
        sources = data if isinstance(data, dict) else {}
        for name, digest in (stage.facts.get("data") or {}).items():
            rows.append([stage.name, name, json.dumps(sources.get(name)) if sources.get(name) else "–", digest[:12]])
    given = [stage.facts["versions"] for stage in run.stages if stage.facts.get("versions")]
    versions = {json.dumps(each, sort_keys=True) for each in given}
    listed = [el("p", ", ".join(f"{k} {v}" for k, v in json.loads(text).items())) for text in sorted(versions)]
    configs = [details(f"{stage.name}: config.yaml", el("pre", stage.config)) for stage in run.stages if stage.config]
    if run.plan:
        configs.insert(0, details("pipeline.yaml", el("pre", run.plan)))
    return el(
        "section",
        el("h2", "What was run"),
        table(["stage", "data", "source", "SHA-256"], rows, "stack paths") if rows else None,
        el("h3", "Versions"),
        *(listed or [el("p", "No stage is finished.")]),
        el("h3", "Configuration"),
        *configs,
    )


def grid(items: Sequence[Html | None]) -> Html:
    """Charts, side by side if the page is wide enough."""
    return el("div", join([item for item in items if item is not None]), class_="grid")


def anchor(stage: StageRun) -> str:
    """Id of a stage's section on the page."""
    return "stage-" + "".join(c if c.isalnum() else "-" for c in stage.name)
