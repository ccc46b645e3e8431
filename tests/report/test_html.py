"""`report.html`: its contents, that it is safe and complete, and that a browser shows it at any width."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main as entry
from rlhf_lightning.errors import UserError
from rlhf_lightning.report import charts, render, report_after_stage, write_report
from rlhf_lightning.report.html import el
from rlhf_lightning.report.read import read_metrics, read_run, read_samples
from tests.helpers.cli import mistake, rlhf, stage_config, write_yaml

EVIL = "<script>alert('x')</script> & \"quoted\" \x1b[2J \ud800 </td>"
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """The page's tree of texts and tags; raises for a tag that is closed in the wrong place."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def charts(self) -> list[str]:
        """The text alternative of each chart."""
        return [str(attrs["aria-label"]) for tag, attrs in self.tags if tag == "svg"]


def write_metrics(path: Path, columns: dict[str, list[Any]]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["epoch", "step", *columns])
        for step, values in enumerate(zip(*columns.values(), strict=True)):
            writer.writerow([0, step, *values])


def episode(step: int, prompt: str, reward: float, response: str) -> dict[str, Any]:
    shown = {"step": step, "round": step, "prompt": [{"role": "user", "content": prompt}], "response": response}
    return {**shown, "reward": reward, "response_tokens": 7, "stop_reason": "stop"}


def write_stage(folder: Path, kind: str, **facts: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("data:\n  train: rows.jsonl\n")
    found = {"kind": kind, "steps": 50, "metrics": {}, "data": {"train": "ab" * 32}, "model_hash": "cd" * 32}
    (folder / "stage.json").write_text(json.dumps({**found, "versions": {"torch": "2.13.0"}, "seconds": 75, **facts}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished pipeline of three stages, with hostile text in every text field."""
    root = tmp_path / "runs" / "mine"
    write_stage(root / "sft", "sft")
    write_metrics(root / "sft" / "metrics.csv", {"train/nll": [3.0 - 0.05 * i for i in range(50)]})
    write_stage(root / "preference", "preference", parent={"stage": "sft", "hash": "cd" * 32})
    write_metrics(root / "preference" / "metrics.csv", {"train/accuracy": [0.5, 0.75], "val/accuracy": ["", 0.875]})
    curve = [{"confidence": 0.5 + 0.05 * i, "accuracy": 0.5 + 0.04 * i, "pairs": 9.0 * (i % 3)} for i in range(10)]
    numbers = {"ece": 0.0425, "brier": 0.125, "accuracy_longer_wins": 0.375}
    (root / "preference" / "preference_report.json").write_text(
        json.dumps({"step": 2, "numbers": numbers, "reliability": curve})
    )
    write_stage(root / "policy", "policy", parent={"stage": "sft", "hash": "ee" * 32}, stopped={"step": 9})
    names = ("reward", "reward_gold", "kl", "entropy", "response_tokens", "truncated", "odd")
    rising = [0.1 * i for i in range(60)]
    write_metrics(root / "policy" / "metrics.csv", {f"train/{name}": rising for name in names})
    rows = [
        episode(step, f"prompt {i} {EVIL}", step + i / 10, f"answer {step} {EVIL}")
        for step in (0, 5, 9)
        for i in (1, 2)
    ]
    (root / "policy" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    warning = {"step": 8, "name": "high_kl", "message": f"KL is 60 nats {EVIL}", "numbers": {}}
    (root / "policy" / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    stages = {
        name: {"status": "finished", "kind": name, "inputs": {}, "seconds": 3725.0}
        for name in ("sft", "preference", "policy")
    }
    (root / "manifest.json").write_text(json.dumps({"name": f"mine {EVIL}", "seed": 0, "stages": stages}))
    (root / "pipeline.yaml").write_text(f"name: mine # {EVIL!a}\n")
    return root


def test_report_of_a_complete_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(["report", str(run)])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text())
    found = page.charts()
    assert "negative log-likelihood, nats per token: train/nll 3 → 0.55" in found
    assert "pair accuracy: train/accuracy 0.5 → 0.75; val/accuracy 0.875" in found
    assert "calibration on held-out pairs: accuracy of pairs 81 pairs" in found
    for title in ("reward against KL", "gold reward against KL", "entropy, nats per token", "response tokens"):
        assert any(label.startswith(f"{title}: ") for label in found)
    assert "rewards, first and last round: step 0 mean 0.15, n 2; step 9 mean 9.15, n 2" in found
    assert any(label.startswith("train/odd: ") for label in found), "every curve is there"
    for text in ("ECE 0.0425", "longer wins", "1 h 2 min", "torch 2.13.0", "cdcdcdcdcdcd", "abababababab", "high_kl"):
        assert text in page.text
    assert "sft was run again after this stage started from it" in page.text
    before, after = page.text.index("answer 0 "), page.text.index("answer 9 ")
    assert before < after
    assert "answer 5 " not in page.text


def test_main_figures_come_first(run: Path) -> None:
    """In large type; a constant curve is a sentence, not a chart."""
    write_report(run)
    page = (run / "report.html").read_text()
    shown = re.findall(r'class="tile"><b>([^<]*)</b><span>([^<]*)</span><small>([^<]*)</small>', page)
    assert ("held-out pair accuracy", "preference") in [(title, stage) for _, title, stage in shown]
    assert page.index('class="tiles"') < page.index("<table")


@pytest.mark.parametrize(
    ("values", "digits", "wanted"),
    [
        ([2.6e-8, 6.07], 4, "0 → 6.07"),
        ([0.33621, 0.2505], 3, "0.336 → 0.251"),
        ([0.875], 4, "0.875"),
        ([0, 0], 4, "0 → 0"),
    ],
)
def test_change_is_shown_with_few_digits(values: list[float], digits: int, wanted: str) -> None:
    assert charts.change(values, digits) == wanted


def test_constant_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,train/reward,train/clip_fraction\n" + "".join(f"{i},{i},0.0\n" for i in range(4))
    )
    page = Page(render(read_run(tmp_path)))
    assert "Constant: clip fraction 0." in page.text
    assert [label for label in page.charts() if "reward" in label or "clip" in label] == ["reward: train/reward 0 → 3"]


def test_model_output_is_escaped(run: Path) -> None:
    raw = write_report(run).read_text(encoding="utf-8")
    page = Page(raw)
    assert page.text.count("<script>alert('x')</script>") >= 5
    assert "\x1b" not in raw
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "base", "form"})
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert str(value).startswith(("#", "data:,")), f"{tag} {name}={value}"
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", raw), "nothing comes from the network"
    assert any(a.get("http-equiv") == "Content-Security-Policy" for t, a in page.tags if t == "meta")


def test_report_of_a_single_unfinished_stage(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", {"train/nll": [2.0, "nan", 1.0]})
    with open(tmp_path / "metrics.csv", "a") as stream:
        stream.write("0,")
    page = Page(write_report(tmp_path).read_text())
    assert "not finished" in page.text
    assert "1 values are not finite." in page.text
    assert page.charts() == ["negative log-likelihood, nats per token: train/nll 2 → 1"]


def test_stage_command_writes_its_report(base: str, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "sft.yaml", stage_config("sft", base, tmp_path))
    folder = tmp_path / "runs" / "first"
    out = rlhf("sft", "fit", "-c", config, "--trainer.default_root_dir", str(folder))
    assert f"report: {folder / 'report.html'}" in out
    page = Page((folder / "report.html").read_text())
    assert next(label.partition(":")[0] for label in page.charts()) == "negative log-likelihood, nats per token"
    for text in ("finished", "transformers", "sft.jsonl", "class_path: torch.optim.AdamW"):
        assert text in page.text


def test_folder_without_a_run_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "contains no run" in mistake(["report", str(tmp_path)], capsys)
    assert "no such folder" in mistake(["report", str(tmp_path / "none")], capsys)


def test_failing_report_does_not_end_a_run(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="Expecting"):
        write_report(run)
    report_after_stage(run)
    assert "the report could not be written" in caplog.text


def test_samples_are_compared_on_equal_prompts(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [episode(0, "a", 0, "first"), episode(0, "a", 1, "sibling"), episode(0, "b", 0, "once")]
    rows += [episode(3, "a", 2, "middle"), episode(6, "a", 3, "latest"), episode(6, "c", 0, "new")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_samples(path)
    assert [(b["response"], a["response"]) for b, a in found.repeated] == [("first", "latest")]
    assert ([len(found.first), len(found.last)]) == [3, 2]
    path.write_text(json.dumps(rows[0]) + "\n")
    only = read_samples(path)
    assert (len(only.first), only.last, only.repeated) == (1, [], [])
    assert read_samples(tmp_path / "none").first == []


def test_held_out_prompts_are_shown_before_and_after(tmp_path: Path) -> None:
    """The same prompts on both sides, with the terms of the reward; not the prompts of the first and last round."""
    write_stage(tmp_path / "policy", "policy")
    rounds = [episode(0, "trained first", 0, "x"), episode(9, "trained last", 0, "y")]
    (tmp_path / "policy" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    told = {0: (0.25, {"asked": 0.0, "style": 0.5}), 4: (0.3, {}), 9: (0.75, {"asked": 1.0, "style": None})}
    rows = [
        {**episode(step, f"question {i}", reward, f"reply {i} at {step}"), "group": i, "terms": terms}
        for step, (reward, terms) in told.items()
        for i in (1, 0)
    ]
    (tmp_path / "policy" / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    page = Page(write_report(tmp_path / "policy").read_text()).text
    assert "Greedy answers to 2 held-out prompts, before and after" in page
    assert "Means: reward 0.25 → 0.75, asked 0 → 1, response tokens 7 → 7." in page
    places = [page.index(f"reply {i} at {step}") for i in (0, 1) for step in (0, 9)]
    assert places == sorted(places)
    assert "step 0 · reward 0.25 (asked 0, style 0.5) · 7 tokens" in page
    assert "step 9 · reward 0.75 (asked 1) · 7 tokens" in page
    assert "at 4" not in page
    assert "trained" not in page
    (tmp_path / "policy" / "heldout.jsonl").write_text(json.dumps({**rows[0], "terms": [1.0]}) + "\n")
    with pytest.raises(UserError, match=r"heldout\.jsonl:1: terms is \[1\.0\], which is not a valid value here"):
        write_report(tmp_path / "policy")


def test_metrics_are_read_by_column(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,0,1.5,\n0,2,,-inf\n0,")
    assert read_metrics(path) == {"a": [(0.0, 1.5)], "b": [(2.0, float("-inf"))]}
    with pytest.raises(UserError):
        read_run(tmp_path / "nowhere")


def test_points_are_drawn_at_their_positions() -> None:
    frame = charts.Frame((0.0, 10.0), (-1.0, 1.0))
    left, floor = frame.at(0.0, -1.0)
    assert (left, floor) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert frame.at(10.0, 1.0) == (charts.WIDTH - charts.RIGHT, charts.TOP)
    middle = ((left + charts.WIDTH - charts.RIGHT) / 2, (floor + charts.TOP) / 2)
    assert frame.at(5.0, 0.0) == middle


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (-0.3, 2.1, [0.0, 1.0, 2.0]),
        (0.0, 40.0, [0.0, 10.0, 20.0, 30.0, 40.0]),
        (1e6, 1e6 + 2, None),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float] | None) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert wanted is None or found == pytest.approx(wanted)


def test_curves_of_unusual_values() -> None:
    assert charts.curves("empty", {"a": [(0.0, float("nan"))]}) is None
    for values in ([0.0], [5.0, 5.0], [1e-300, 1e300], [-1e-12, 1e-12], list(range(5000))):
        drawn = charts.curves("odd", {"a": [(float(i), float(v)) for i, v in enumerate(values)]})
        assert drawn is not None
        assert "nan" not in drawn
        assert "inf" not in drawn
        assert len(drawn) < 25_000, "many points are thinned"
    assert charts.distribution("same", {"a": [2.0, 2.0]}, "x") is not None
    mean = charts.smoothed([(float(i), float(i % 2)) for i in range(100)])
    assert all(abs(y - 0.5) < 0.1 for _, y in mean[5:-5])


def test_elements_escape_plain_values() -> None:
    assert (
        el("p", "a < b", el("b", "&"), class_="x", title='"') == '<p class="x" title="&quot;">a &lt; b<b>&amp;</b></p>'
    )


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(run: Path, tmp_path: Path, width: int) -> None:
    page = write_report(run).read_text()
    # The page allows no scripts, so the measured copy is changed to allow one.
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    measure = (
        "<script>const d = document.documentElement, widths = [...document.querySelectorAll('svg')].map(e => "
        "e.getBoundingClientRect().width); parent.postMessage({inner: innerWidth, scroll: d.scrollWidth, "
        "height: d.scrollHeight, charts: widths.length, narrowest: Math.min(...widths.filter(w => w))}, '*')</script>"
    )
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{measure}</body>"))
    # In a frame: a headless window is never narrower than 500 pixels.
    (tmp_path / "frame.html").write_text(
        "<!doctype html><body><pre id=found></pre><script>onmessage = e => "
        "document.getElementById('found').textContent = JSON.stringify(e.data)</script>"
        f'<iframe src="measured.html" width="{width}" height="800" style="border:0"></iframe>'
    )
    out = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'chromium'}",
            "--window-size=1400,900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{tmp_path / 'frame.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<pre id=\"found\">(.+?)</pre>", out.stdout)
    assert found, out.stdout[:500] + out.stderr[-2000:]
    size = json.loads(found[1])
    assert size["scroll"] <= size["inner"]
    assert size["charts"] >= 10
    assert size["narrowest"] > 250
    assert size["height"] > 1500
    assert size["inner"] == width
