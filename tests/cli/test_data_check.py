"""`rlhf data check`: its findings, and its output for scripts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main as entry
from rlhf_lightning.cli.main import COMMANDS
from rlhf_lightning.data import check
from rlhf_lightning.data.check import histogram, statistics
from tests.helpers.cli import mistake, write_yaml
from tests.helpers.rows import chats, labeled, pairs, prompts, rankings, write_rows


def rlhf(args: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(args)
    assert stop.value.code == code


def checked(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """The JSON output of `rlhf data check`."""
    rlhf(["data", "check", *args, "--json"], code)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ok"] is (code == 0)
    return found


def test_bad_rows_are_listed_with_line_and_reason(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(write_rows(tmp_path / "chats.jsonl", chats(4)))
    lines = file.read_text().splitlines()
    lines[1:1] = ["{broken", "[1, 2]", "", '{"messages": []}', '{"question": "?"}']
    file.write_text("\n".join(lines) + "\n")
    found = checked([str(file), "--kind", "sft", "--model", base], capsys, code=1)
    bad = {row["where"].rpartition(":")[2]: row["reason"] for row in found["bad"]}
    assert list(bad) == ["2", "3", "5", "6"]
    assert bad["2"].startswith("not valid JSON")
    assert "a JSON list" in bad["3"]
    assert (found["rows"], found["examples"], found["blank_lines"]) == (8, 4, 1)

    rlhf(["data", "check", str(file), "--kind", "sft", "--model", base], 1)
    out = capsys.readouterr().out
    assert f"{file}:6: " in out
    assert "bad rows: 4" in out


def test_mixture_of_a_config_and_the_first_rows_of_large_files(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(write_rows(tmp_path / "a.jsonl", chats(6)))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")
    sources = {"a": {"source": str(file), "weight": 2}, "b": {"source": write_rows(tmp_path / "b.jsonl", chats(8))}}
    config = write_yaml(tmp_path / "sft.yaml", {"data": {"train": sources}})
    whole = checked([config, "--kind", "sft", "--model", base], capsys, code=1)
    assert (whole["file"], whole["rows"], whole["examples"], len(whole["bad"])) == ("a, b", 15, 14, 1)
    first = checked([config, "--kind", "sft", "--model", base, "--limit", "3"], capsys, code=1)
    assert (first["rows"], first["examples"]) == (7, 6)
    assert first["bad"][0]["where"] == f"{file}:3"
    assert first["bad"] == whole["bad"]


def test_figures_equal_those_computed_from_the_rows(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [*chats(6), chats(6)[2]]
    other_answer = {"messages": [chats(1)[0]["messages"][0], {"role": "assistant", "content": "ten"}]}
    held_out = [chats(9)[1], other_answer, chats(9)[8]]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", train), ("b", held_out))]
    found = checked([files[0], "--kind", "sft", "--model", base, "--validation", files[1]], capsys)
    assert found["duplicates"] == [{"where": f"{files[0]}:7", "same_as": f"{files[0]}:3"}]
    assert found["repeated_prompts"] == 1
    assert found["overlap"] == {"rows": [{"where": f"{files[1]}:1", "same_as": f"{files[0]}:2"}], "prompts": 2}
    assert found["columns"] == {"messages": {"list": 7}}
    assert sum(part["count"] for part in found["histogram"]) == 7
    assert found["lengths"]["trained"]["total"] < found["lengths"]["tokens"]["total"]
    assert found["samples"][0]["text"].count("⟦") == 1
    assert "⟦one<" in found["samples"][0]["text"]


def test_lengths() -> None:
    found = statistics([4, 1, 2, 3])
    assert (found["total"], found["mean"], found["min"], found["median"], found["max"]) == (10, 2.5, 1, 3, 4)
    assert histogram([5, 5, 7], bins=2) == [{"from": 5, "to": 6, "count": 2}, {"from": 7, "to": 8, "count": 1}]
    assert histogram([3, 3]) == [{"from": 3, "to": 3, "count": 2}]


def test_preference_rows_of_every_kind(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = {"prompt": "Count 1", "chosen": pairs(2)[1]["rejected"], "rejected": pairs(2)[1]["chosen"]}
    file = write_rows(tmp_path / "pairs.jsonl", [*pairs(4), turned])
    found = checked([file, "--kind", "preference", "--model", base], capsys)
    assert found["reversed"] == [{"where": f"{file}:5", "reverses": f"{file}:2"}]
    assert found["chosen_longer"] == 0.8
    assert found["samples"][0]["text"].startswith("chosen: ")
    for rows in (labeled(4), rankings(4)):
        found = checked([write_rows(tmp_path / "rows.jsonl", rows), "--kind", "preference", "--model", base], capsys)
        assert found["examples"] == 4


def test_prompts_may_be_plain_lines(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Count 1\nCount 2\n\nCount 1\n")
    found = checked([str(file), "--kind", "prompts", "--model", base], capsys)
    assert (found["rows"], len(found["duplicates"]), found["blank_lines"]) == (3, 1, 1)
    assert "⟦" not in found["samples"][0]["text"]


def test_settings_equal_those_of_a_stage(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": row["prompt"], "wanted": row["wanted"]} for row in prompts(3)]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    args = [file, "--kind", "prompts", "--model", base]
    assert len(checked(args, capsys, code=1)["bad"]) == 3
    args += ["--columns", "prompt=question"]
    assert checked(args, capsys)["examples"] == 3
    assert "exceed data.max_prompt_tokens 4" in checked([*args, "--max_length", "4"], capsys, 1)["bad"][0]["reason"]
    assert len(checked([*args, "--max_length", "4", "--overlong", "skip"], capsys)["skipped"]) == 3


def test_control_characters_are_escaped(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "Count\x1b[2J", "completion": "one\x07"}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rlhf(["data", "check", file, "--kind", "sft", "--model", base])
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert "Count\\x1b[2J" in out
    assert "\x1b[32mone\\x07" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing.jsonl"], "no such file"),
        (["{file}", "--model", "./nowhere"], "no such folder"),
        (["{file}", "--columns", "prompt"], "OURS=YOURS"),
        (["{file}", "--train_on", "all"], "train_on"),
        (["{file}", "--kind", "prompts", "--train_on", "all"], "train_on"),
        (["{file}", "--samples", "-1"], "--samples"),
        (["{file}", "--kind", "chats"], "invalid choice"),
    ],
)
def test_mistakes_of_data_check(
    args: list[str], message: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "chats.jsonl", chats(2))
    given = [arg.format(file=file) for arg in args]
    for name, value in (("--kind", "sft"), ("--model", base)):
        given += [] if name in given else [name, value]
    assert message in mistake(["data", "check", *given], capsys)


@pytest.mark.parametrize(
    ("kind", "rows", "renderings", "tokenized"), [("sft", chats(40), 3, 1), ("preference", pairs(40), 4, 2)]
)
def test_row_is_rendered_and_tokenized_once(
    kind: str, rows: list[Any], renderings: int, tokenized: int, base: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Count the renderings and tokenizations in a check of many rows."""
    calls: Counter[str] = Counter()
    module = check.data_module(kind, base)
    template, tokenizer = module.renderer.template, type(module.renderer.tokenizer)
    rendered, encode = template._rendered, tokenizer._encode_plus
    monkeypatch.setattr(template, "_rendered", lambda *a: calls.update(["rendered"]) or rendered(*a))
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda *a, **k: calls.update(["tokenized"]) or encode(*a, **k))
    found = check.check(module, write_rows(tmp_path / "rows.jsonl", rows))
    assert len(found.examples) == 40
    assert calls == {"rendered": 40 * renderings, "tokenized": 40 * tokenized}


@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
@pytest.mark.parametrize("further", [[], ["fit"]])
def test_help_of_a_stage_has_an_example(kind: str, further: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main([kind, *further, "--help"])
    assert stop.value.code == 0
    assert f"example: rlhf {kind} fit -c rlhf:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("sft", "preference", "policy")])
def test_help_has_an_example_and_is_fast(command: str) -> None:
    args = [command, *(["check"] if command == "data" else []), "--help"]
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf_lightning", *args], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert f"example: rlhf {command} " in " ".join(out.stdout.split())
    heavy = {line.split("|")[-1].strip() for line in out.stderr.splitlines()} & {"torch", "lightning", "transformers"}
    assert heavy == set()


def test_docs_describe_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    for command in COMMANDS:
        assert f"`{command}`" in page or f"`rlhf {command}" in page, command
    shown = [line.split() for line in page.splitlines() if line.startswith("rlhf ")]
    assert len(shown) >= 6
    assert {line[1] for line in shown} <= set(COMMANDS)
