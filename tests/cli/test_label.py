"""`rlhf label`, as people start it: killed, continued, ended; and its pairs are trained on."""

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import mistake, rlhf, rlhf_in_process
from tests.helpers.judge_server import Asked, serving
from tests.helpers.labels import Client
from tests.helpers.rows import prompts, write_rows
from tests.helpers.runs import Run


@pytest.fixture
def answers(tmp_path: Path) -> str:
    """A file of answers."""
    rows = [{"prompt": f"Count {i}", "responses": ["one two", "three"], "models": ["a", "b"]} for i in range(12)]
    return write_rows(tmp_path / "answers.jsonl", rows)


@contextmanager
def labeling(*args: str, output: Path) -> Iterator[tuple[Run, str]]:
    """Run the command; yields the process and the address that it prints."""
    output.unlink(missing_ok=True)
    run = Run(["label", "--port", "0", *args], output)
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"open (http://\S+)", run.text)):
            assert run.poll() is None, run.text
            assert time.monotonic() < until, run.text
            time.sleep(0.02)
        yield run, found[1]
    finally:
        if run.poll() is None:
            run.end()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_kill_loses_no_decision_and_annotators_go_on_where_they_were(answers: str, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    args = ("--responses", answers, "--out", str(out), "--overlap", "100")
    seen: dict[str, list[str]] = {"Ann": [], "Ben": []}
    for confirmed in (1, 4, 2):
        with labeling(*args, output=tmp_path / "log") as (run, address):
            clients = {name: Client(address) for name in seen}
            for name, client in clients.items():
                client.sign_in(name)
            for _ in range(confirmed):
                for name, client in clients.items():
                    shown = client.get().comparison
                    assert client.decide("A").status == 303
                    seen[name].append(str(shown))
            run.send(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        made = rows(tmp_path / "pairs.labeling" / "decisions.jsonl")
        for name in seen:
            assert [row["comparison"] for row in made if row["annotator"] == name] == seen[name]
            assert len(set(seen[name])) == len(seen[name])
    with labeling(*args, output=tmp_path / "log") as (run, address):
        client = Client(address)
        client.sign_in("Ann")
        assert "7 decided, 5 ready" in client.get().text
        run.send(signal.SIGINT)
        assert run.wait() == 0
        assert "12 comparisons, 14 pairs" in run.text
        assert "Cohen's kappa" in run.text
    assert len(rows(out)) == 14
    report = rlhf("label", "--report", str(out), "--json")
    found = json.loads(report)
    assert set(found["annotators"]) == {"Ann", "Ben"}
    assert found["krippendorff_count"] == 7


def test_answers_of_a_model_are_compared_and_the_pairs_train(base: str, tmp_path: Path) -> None:
    file, out = write_rows(tmp_path / "prompts.jsonl", prompts(6)), tmp_path / "pairs.jsonl"
    args = ("--model", base, "--prompts", file, "--out", str(out), "--max_tokens", "6", "--top_k", "50", "--seed", "5")
    with labeling(*args, output=tmp_path / "log") as (run, address):
        client = Client(address)
        client.sign_in("Ann")
        for choice in ("A", "B", "tie", "both_bad", "A", "B"):
            while not client.get().comparison:
                time.sleep(0.02)
            client.decide(choice, note="clear")
        run.send(signal.SIGTERM)
        assert run.wait() == 0
    made = rows(out)
    assert len(made) == 4
    sampling = {"max_tokens": 6, "seed": 5, "temperature": 1.0, "top_k": 50}
    for row in made:
        assert (row["annotator"], row["note"]) == ("Ann", "clear")
        for side in ("chosen_source", "rejected_source"):
            assert row[side]["model"] == base
            assert sampling.items() <= row[side]["sampling"].items()
    settings: tuple[str, ...] = ("--model.model", base, "--data.train", str(out), "--trainer.max_epochs", "1")
    settings += ("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "run"))
    assert "4 rows read, 4 examples" in rlhf("preference", "fit", *settings)
    assert (tmp_path / "run" / "model").is_dir()
    # The same command with other sampling settings would mix two kinds of answers.
    with pytest.raises(AssertionError, match="begun with other settings"):
        rlhf("label", *args[:-6], "--max_tokens", "7", "--top_k", "50", "--seed", "5", "--port", "0")


def test_other_machines_need_a_token(answers: str, tmp_path: Path) -> None:
    args = ("--responses", answers, "--out", str(tmp_path / "pairs.jsonl"), "--host", "0.0.0.0")
    with labeling(*args, output=tmp_path / "log") as (_, address):
        place, _, token = address.partition("#")
        assert len(token) > 20
        assert token not in (tmp_path / "pairs.labeling" / "session.json").read_text()
        port = re.findall(r":(\d+)/", place)[0]
        client = Client(f"http://127.0.0.1:{port}/")
        assert client.sign_in("Ann").status == 403
        assert client.sign_in("Ann", token=token).status == 303
        assert "Answer A" in client.get().text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either a model that answers, with --model, or given answers"),
        (["--model", "m", "--responses", "answers.jsonl", "--out", "p.jsonl"], "give either a model"),
        (["--model", "m", "--out", "p.jsonl"], "--model needs the prompts"),
        (["--responses", "a.jsonl", "--prompts", "p.jsonl", "--out", "p.jsonl"], "--prompts and --and are for answers"),
        (["--responses", "a.jsonl"], "give the file of pairs to write"),
        (["--responses", "a.jsonl", "--out", "pairs.json"], "must end with .jsonl"),
        (["--responses", "nothing.jsonl", "--out", "p.jsonl", "--port", "0"], "no such file"),
        (["--responses", "a.jsonl", "--out", "p.jsonl", "--overlap", "120"], "--overlap is 120"),
        (["--responses", "a.jsonl", "--out", "p.jsonl", "--queue", "separate"], "--annotators Ann,Ben"),
        (
            ["--responses", "a.jsonl", "--out", "p.jsonl", "--pick", "uncertain", "--port", "0"],
            "at least two preference",
        ),
        (["--responses", "a.jsonl", "--out", "p.jsonl", "--reward", "m"], "add that flag"),
        (["--responses", "a.jsonl", "--out", "p.jsonl", "--port", "70000"], "--port is 70000"),
        (["--responses", "a.jsonl", "--out", "p.jsonl", "--annotators", "x" * 41], "more than 40 characters"),
        (["--report", "p.jsonl"], "there is no p.labeling/decisions.jsonl"),
    ],
)
def test_mistakes(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in mistake(["label", *args], capsys)
    assert not (tmp_path / "p.jsonl").exists() or "no such file" in message


def test_one_model_without_randomness_is_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", prompts(1))
    args = ["label", "--model", base, "--prompts", file, "--out", str(tmp_path / "p.jsonl"), "--temperature", "0"]
    assert "both answers of the model would be the same" in mistake([*args, "--port", "0"], capsys)


def test_missing_package_is_named(
    answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rlhf_lightning.web", None)
    monkeypatch.delitem(sys.modules, "rlhf_lightning.web")
    monkeypatch.delattr("rlhf_lightning.web", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = mistake(["label", "--responses", answers, "--out", str(tmp_path / "p.jsonl")], capsys)
    assert "rlhf label needs the package uvicorn; install it with pip install 'rlhf-lightning[label]'" in found


def test_report_for_people(answers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    with labeling("--responses", answers, "--out", str(out), "--overlap", "100", output=tmp_path / "log") as (
        _,
        address,
    ):
        for name, choices in {"Ann": ("A", "tie", "skip"), "Ben": ("B", "tie", "A")}.items():
            client = Client(address)
            client.sign_in(name)
            for choice in choices:
                client.decide(choice)
    rlhf_in_process("label", "--report", str(out))
    text = capsys.readouterr().out
    for words in ("12 comparisons, 3 pairs", "position bias", "Krippendorff's alpha", "a over b"):
        assert words in text


# -- a judge ----------------------------------------------------------------------------------------------------------


def test_a_judge_decides_beside_people(answers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")

    def longer(asked: Asked) -> str:
        text = asked["messages"][1]["content"]
        found = re.findall(r"BEGIN \w+ response \w+\n(.*?)\nEND", text, re.DOTALL)
        if "Count 3\n" in text:
            return json.dumps({"reason": "", "better": "first"})
        return "no" if "Count 5\n" in text else json.dumps({"reason": "", "better": _position(found)})

    out = tmp_path / "pairs.jsonl"
    with serving(longer) as server:
        judge = {"url": server.url, "model": "judge-1", "key_variable": ""}
        file = tmp_path / "judge.yaml"
        file.write_text(json.dumps({"judge": judge, "rubric": "Long.", "pairwise": True, "on_failure": "skip"}))
        command = ["label", "--out", str(out), "--judge", str(file), "--json"]
        assert "has no session yet" in mistake(command, capsys)
        rlhf_in_process(*command, "--responses", answers)
        report = json.loads(capsys.readouterr().out)
        assert len(server.requests) == 24
        (name,) = report["annotators"]
        assert name.startswith("judge judge-1 ")
        made = rows(out)
        assert len(made) == 10, "a tie by position and a skip"
        for row in made:
            assert row["chosen"] == [{"role": "assistant", "content": "one two"}]
            assert row["annotator"] == name
        choices = [row["choice"] for row in rows(tmp_path / "pairs.labeling" / "decisions.jsonl")]
        assert (choices.count("tie"), choices.count("skip")) == (1, 1)
        assert {"A", "B"} <= set(choices), "the order is random"
        # The same again asks nothing; another rubric is another annotator, who agrees.
        rlhf_in_process(*command)
        assert len(server.requests) == 24
        file.write_text(file.read_text().replace("Long.", "Longer."))
        capsys.readouterr()
        rlhf_in_process(*command)
        report = json.loads(capsys.readouterr().out)
        assert len(report["annotators"]) == 2
        assert report["agreement"][0]["cohen_kappa"] == 1.0
        assert "add pairwise: true" in mistake(
            [*command[:4], str(_without(file, "pairwise")), "--responses", answers], capsys
        )
        assert "sample the answers with rlhf generate" in mistake([*command, "--model", "m"], capsys)


def test_a_judge_revises_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is criticized and revised twice, then compared with its last revision; a second run asks nothing."""
    pytest.importorskip("openai")

    def judge_of(asked: Asked) -> str:
        text = asked["messages"][1]["content"]
        found = re.findall(r"BEGIN \w*\s?response \w+\n(.*?)\nEND", text, re.DOTALL)
        if len(found) == 2:
            return json.dumps({"reason": "", "better": _position(found)})
        if "never" in found[0]:
            return json.dumps({"critique": "none", "revision": " "})
        same = "fine" in found[0]
        return json.dumps({"critique": "too short", "revision": found[0] if same else f"{found[0]}, and why"})

    texts = ["short", "fine", "never"]
    answers = write_rows(tmp_path / "answers.jsonl", [{"prompt": f"Say {one}", "response": one} for one in texts])
    call = {"name": "f", "arguments": {}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    with (tmp_path / "answers.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "Call", "response": [turn]}) + "\n")
    out = tmp_path / "pairs.jsonl"
    with serving(judge_of) as server:
        judge = {"url": server.url, "model": "judge-1", "key_variable": ""}
        file = tmp_path / "judge.yaml"
        file.write_text(json.dumps({"judge": judge, "pairwise": True, "on_failure": "skip"}))
        command = ["label", "--out", str(out), "--judge", str(file), "--revise", "2"]
        assert "--responses FILE" in mistake(command, capsys)
        rlhf_in_process(*command, "--responses", answers)
        said = capsys.readouterr()
        assert "1 answers have tool calls or several turns" in said.out + said.err
        (row,) = rows(out)
        assert row["chosen"] == [{"role": "assistant", "content": "short, and why, and why"}]
        assert row["rejected"] == [{"role": "assistant", "content": "short"}]
        assert row["chosen_source"]["model"] == "judge-1 (revision)"
        assert row["chosen_source"]["critiques"] == ["too short", "too short"]
        asked = len(server.requests)
        assert asked == 2 + 2 + 1 + 2, "two rounds, two of an answer that stays, one that fails, and both orders"
        rlhf_in_process(*command, "--responses", answers)
        again = [one["messages"][1]["content"] for one in server.requests[asked:]]
        assert not any("\nshort" in text for text in again), "its revision is in the session"
        assert "--judge FILE" in mistake(["label", "--out", str(out), "--responses", answers, "--revise", "1"], capsys)


def _position(texts: list[str]) -> str:
    return "first" if len(texts[0]) > len(texts[1]) else "second"


def _without(file: Path, name: str) -> Path:
    settings = json.loads(file.read_text())
    del settings[name]
    other = file.with_name("other.yaml")
    other.write_text(json.dumps(settings))
    return other
