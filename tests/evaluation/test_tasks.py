"""Benchmarks: prompts and scores as in lm-evaluation-harness, standard errors, and resuming an evaluation."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.evaluation import tasks
from rlhf_lightning.evaluation.tasks import SECTIONS, gsm8k, loose_variants, mean, pooled, read_task, rewardbench
from tests.helpers.cli import mistake, rlhf
from tests.helpers.rows import write_rows

QUESTION = {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}


@pytest.mark.parametrize(
    ("response", "answer", "strict", "flexible"),
    [
        ("It is\n#### 5", "#### 5", 1, 1),
        ("#### 1,234.", "x #### 1234", 1, 1),
        ("####5 and 7", "#### 5", 1, 0),
        ("The answer is $1,000.", "#### 1000", 0, 1),
        ("-3", "#### -3", 0, 1),
        ("6 or 5", "#### 5", 0, 1),
        ("5.0", "#### 5", 0, 1),
        ("#### 5", "5", 1, 1),
        ("none", "#### 5", 0, 0),
        ("", "#### 5", 0, 0),
        ("....", "#### 5", 0, 0),
    ],
)
def test_gsm8k(response: str, answer: str, strict: int, flexible: int) -> None:
    found = gsm8k().score(response, {"question": "?", "answer": answer})
    assert found == {"strict": [strict], "flexible": [flexible]}


def test_gsm8k_prompt_equals_that_of_lm_evaluation_harness() -> None:
    task = gsm8k([QUESTION])
    row = {"messages": [{"role": "user", "content": "4 + 4?"}, {"role": "assistant", "content": "#### 8"}], "answer": 8}
    assert task.prompt(row, chat=False) == {
        "prompt": "Question: 2 + 3?\nAnswer: 2 + 3 = <<2+3=5>>5\n#### 5\n\nQuestion: 4 + 4?\nAnswer:"
    }
    turns = task.prompt(row, chat=True)["prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[-1]["content"] == "Question: 4 + 4?\nAnswer:"
    assert task.stop == ("Question:",)


def test_standard_errors() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = mean(values)
    assert found.value == 0.6
    assert math.isclose(found.error, statistics.stdev(values) / math.sqrt(5))
    assert math.isnan(mean([1.0]).error)
    # Copies of a value within a group add no information.
    assert math.isclose(pooled([[value] * 7 for value in values]).error, found.error)
    assert pooled([[1.0, 1.0], [0.0, 1.0]]).value == 0.75


def test_rewardbench_section_scores() -> None:
    subsets = [name for section in SECTIONS.values() for name in section for _ in range(4)]
    right = [float(name not in ("math-prm", "hep-go") or i % 2) for i, name in enumerate(subsets)]
    found = rewardbench(subsets, right)
    assert found["Chat"].value == found["Safety"].value == 1
    assert math.isclose(found["Reasoning"].value, 1 - (984 * 0.5 + 164 * 0.5) / (984 + 6 * 164))
    assert math.isclose(found["overall"].value, (3 + found["Reasoning"].value) / 4)
    assert found["math-prm"].value == 0.5
    assert found["all pairs"].count == len(subsets)
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984
    assert "overall" not in rewardbench(["math-prm", ""], [1.0, 0.0])


def test_loose_variants_equal_those_of_ifeval() -> None:
    response = "Sure:\n*a*\nBye"
    parts = [response, "*a*\nBye", "Sure:\n*a*", "*a*"]
    assert loose_variants(response) == [text for part in parts for text in (part, part.replace("*", ""))]


def ifeval_row(prompt: str = "Say it.", **instructions: dict[str, Any]) -> dict[str, Any]:
    names = {name.replace("__", ":"): arguments for name, arguments in instructions.items()}
    # As in the Parquet files: each row has all keys, null where an instruction does not use them.
    nulls = {"num_words": None, "relation": None, "keywords": None}
    return {
        "key": 1,
        "prompt": prompt,
        "instruction_id_list": list(names),
        "kwargs": [{**nulls, **arguments} for arguments in names.values()],
    }


def test_ifeval() -> None:
    pytest.importorskip("if_verifiable", reason="the extra ifeval is not installed")
    task = tasks.ifeval()
    row = ifeval_row(
        punctuation__no_comma={},
        change_case__english_lowercase={},
        keywords__existence={"keywords": ["sea"]},
        length_constraints__number_words={"num_words": 4, "relation": "at least"},
    )
    assert task.ask(row) == "Say it."
    good = task.score("the sea is very blue", row)
    bad = task.score("Sure, here it is:\nthe sea is very blue", row)
    assert good == {"inst_level_strict": [1, 1, 1, 1], "inst_level_loose": [1, 1, 1, 1]}
    assert bad == {"inst_level_strict": [0, 0, 1, 1], "inst_level_loose": [1, 1, 1, 1]}
    assert task.score(" \n", row)["inst_level_loose"] == [0, 0, 0, 0]
    found = task.summarize([good, bad])
    assert {name: one.value for name, one in found.items()} == {
        "prompt_level_strict": 0.5,
        "inst_level_strict": 0.75,
        "prompt_level_loose": 1.0,
        "inst_level_loose": 1.0,
    }
    assert found["inst_level_strict"].count == 8
    repeat = ifeval_row("Repeat me", combination__repeat_prompt={"prompt_to_repeat": "Repeat me"})
    assert task.score("Repeat me\nyes", repeat)["inst_level_strict"] == [1]
    with pytest.raises(DataError, match="instruction 'x:y', which IFEval does not have"):
        task.ask(ifeval_row(x__y={}))
    with pytest.raises(DataError, match="no instruction_id_list"):
        task.ask({"prompt": "Say it."})


def test_ifeval_names_its_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("if_verifiable", reason="the extra ifeval is not installed")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = ifeval_row(length_constraints__number_sentences={"num_sentences": 1, "relation": "at least"})
    from if_verifiable.ifeval import instructions_util

    instructions_util._get_sentence_tokenizer.cache_clear()
    with pytest.raises(ConfigError, match=r"python -m nltk\.downloader punkt"):
        tasks.ifeval().ask(row)


def test_task_from_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "capitals.yaml"
    path.write_text(
        "prompt: 'Capital of {country}?'\nanswer: capital\nscore: contains\nmax_tokens: 8\nsystem: Be brief.\n"
    )
    task = read_task(path)
    row = {"country": "France", "capital": "Paris"}
    assert task.ask(row) == "Capital of France?"
    assert task.prompt(row, chat=True)["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert task.score("it is PARIS.", row) == {"contains": [1.0]}
    assert task.max_tokens == 8
    with pytest.raises(DataError, match="no column 'country'"):
        task.ask({"capital": "Paris"})
    for text, expected in (
        ("promt: x", "unknown key 'promt'"),
        ("prompt: 7", "prompt is 7; it must be text"),
        ("answer: a", "prompt is missing"),
        ("prompt: x", "set answer to its name"),
        ("prompt: x\nanswer: a\nscore: near", "score is 'near'; it must be one of exact, number, contains"),
        ("prompt: x\nscore: math.nothing", "math.nothing"),
        ("prompt: x\nanswer: a\nmax_tokens: 0", "max_tokens is 0"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            read_task(path)
    path.write_text("prompt: x\nscore: tests.evaluation.test_tasks.length_of")
    assert read_task(path).score("four", {}) == {"length_of": [4.0]}


def length_of(response: str, row: dict[str, Any]) -> float:
    return float(len(response))


def test_interrupted_evaluation_continues(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gsm.jsonl"
    write_rows(file, [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)])
    command = ["evaluate", base, str(file), "--task", "gsm8k", "--max_tokens", "4", "--device", "cpu", "--json"]
    rlhf(*command, "--output", str(tmp_path / "whole.jsonl"), "--summary", str(tmp_path / "s.json"))
    whole = json.loads((tmp_path / "s.json").read_text())
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines] == list(range(40))
    assert whole["rows"] == 40
    assert set(whole["metrics"]) == {"strict", "flexible"}
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote
    out = rlhf(*command, "--output", str(part))
    assert "5 rows are done already" in out
    assert sorted(part.read_text().splitlines(keepends=True)) == sorted(lines)

    other = [*command, "--max_tokens", "5", "--output", str(part)]
    assert "the file has results of another model, file or settings" in mistake(other, capsys)
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    assert "has no results of a task; give another file" in mistake(
        [*command, "--output", str(tmp_path / "foreign.jsonl")], capsys
    )


def test_rewardbench_command(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf_lightning import PreferenceModule

    PreferenceModule(base).save_pretrained(tmp_path / "judge")
    rows = [{"prompt": "Hi", "chosen": "one two", "rejected": "x" * i, "subset": "donotanswer"} for i in range(1, 6)]
    write_rows(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "rejected": "one two"}])
    out = tmp_path / "out.jsonl"
    command = ["evaluate", str(tmp_path / "judge"), str(tmp_path / "pairs.jsonl"), "--task", "rewardbench"]
    rlhf(*command, "--output", str(out), "--summary", str(tmp_path / "s.json"), "--device", "cpu")
    found = json.loads((tmp_path / "s.json").read_text())["metrics"]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[-1]["scores"]["right"] == [0.0]  # a tie
    assert found["Safety"] == found["all pairs"] == found["donotanswer"]
    assert found["Safety"]["count"] == 6
    assert "is not a preference model" in mistake(
        ["evaluate", base, str(tmp_path / "pairs.jsonl"), "--task", "rewardbench"], capsys
    )


MISTAKES = [
    (["--task", "mmlu"], "--task mmlu: no such task or file; give one of gsm8k, ifeval, rewardbench, or a YAML file"),
    (["--task", "gsm8k", "--shots", "2"], "--shots N and --shots_from FILE must be given together"),
    (["--task", "gsm8k"], "the row has no question; rows of GSM8K have question and answer"),
    (["--task", "rewardbench"], "the row has no chosen; rows of RewardBench have prompt, chosen, rejected and subset"),
    (["--task", "gsm8k", "--max_tokens", "0"], "--max_tokens is 0"),
    (["--task", ""], "the value is empty"),
]


@pytest.mark.parametrize(("flags", "expected"), MISTAKES)
def test_mistakes(
    flags: list[str], expected: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": " "}])
    assert expected in mistake(["evaluate", base, str(tmp_path / "rows.jsonl"), *flags], capsys)
