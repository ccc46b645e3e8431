"""`rlhf evaluate` with references: perplexity, BLEU and ROUGE, and the accepted references."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.evaluation.text_metrics import nearness, perplexity, references_of
from tests.helpers.cli import mistake, rlhf_in_process
from tests.helpers.models import build_model
from tests.helpers.rows import chats, prompts, write_rows
from tests.helpers.training import trainer

VOWELS = "tests.evaluation.test_text_metrics.vowels"
REFERENCE_KEYS = {"perplexity", "bleu", "rouge1", "rouge2", "rougeL"}


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in completions]


def figures(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    rlhf_in_process("evaluate", *args, "--max_tokens", "5", "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_bleu_and_rouge_of_a_worked_example() -> None:
    """6 of 7 words match: precisions 6/7, 5/6, 4/5, 3/4 and no brevity penalty, because both texts have 7 words."""
    found = nearness(["the cat sat on the mat today"], [said("the cat sat on the mat yesterday")])
    assert found["bleu"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25, abs=1e-6)
    assert found["rouge1"] == pytest.approx(6 / 7, abs=1e-6)
    assert found["rouge2"] == pytest.approx(5 / 6, abs=1e-6)
    assert found["rougeL"] == pytest.approx(6 / 7, abs=1e-6)
    # Precision 1, recall 3/6: F1 2/3. The words are there, half of their order is: LCS 2 of 3 and 6.
    turned = nearness(["Sat THE cat"], [said("the cat sat on a mat")])
    assert turned["rouge1"] == pytest.approx(2 / 3, abs=1e-6)
    assert turned["rougeL"] == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6), abs=1e-6)


def test_best_reference_counts_in_any_script() -> None:
    texts = ["кошка сидит на ковре", "one two three four"]
    found = nearness(texts, [said("нет", "Кошка сидит на ковре!"), said("one two three four")])
    assert found["rouge1"] == found["rougeL"] == 1.0
    assert nearness([""], [said("кошка")]) == dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL"), 0.0)


def test_perplexity_equals_that_of_sft_validation(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage validates the same file that the command evaluates."""
    file = write_rows(tmp_path / "chats.jsonl", chats(9))
    module = SFTModule(base)
    [logged] = trainer(tmp_path).validate(module, SFTDataModule(validation=file, batch_size=4), verbose=False)
    found = figures(capsys, base, file)
    assert (found["prompts"], found["references"]) == (9, 9)
    assert found["policy"]["perplexity"] == pytest.approx(logged["val/perplexity"], rel=1e-5)
    assert set(found["policy"]) == {*REFERENCE_KEYS, "response_tokens", "truncated"}


def test_perplexity_of_several_references_is_over_their_tokens(base: str) -> None:
    policy = Policy(base)
    rows = policy.prompts([{"prompt": "Count 1", "answers": ["one", "one two three"]}, {"prompt": "2", "answers": []}])
    rows[1].row["answers"] = ["four"]
    references = references_of(rows, "answers")
    sides = [
        policy.renderer.exchange(row.messages, one)
        for row, given in zip(rows, references, strict=True)
        for one in given
    ]
    total = sum(policy.nll([side]) * side.trained for side in sides)
    assert perplexity(policy, rows, references) == pytest.approx(
        math.exp(total / sum(side.trained for side in sides)), rel=1e-5
    )


def test_model_that_answers_with_the_reference_has_perfect_metrics(
    base: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The references are the policy's own greedy answers: its metrics are 1, those of another model are lower."""
    other = tmp_path / "other"
    build_model(tokenizer, seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    policy = Policy(base)
    rows = prompts(12)
    for row, episode in zip(rows, policy.answer(policy.prompts(rows), 12, 0, temperature=0.0), strict=True):
        row["best"] = [episode.response, "none of it"]
    # Some answers of a random model have no words, so they have no ROUGE.
    rows = [row for row in rows if len(re.findall(r"\w+", row["best"][0])) > 1][:4]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    args = ["--references", "best", "--temperature", "0", "--gold", VOWELS, "--summary", str(tmp_path / "s.json")]
    rlhf_in_process("evaluate", base, *args, str(other), file, "--max_tokens", "12")
    table = capsys.readouterr().out
    assert "4 prompts, 4 with references" in table
    assert all(name in table for name in ("perplexity", "BLEU", "ROUGE-L", "win rate", "KL (nats)", "baseline"))
    found = json.loads((tmp_path / "s.json").read_text())
    own, others = found["policy"], found["baseline"]
    assert own["rouge1"] == own["rougeL"] == pytest.approx(1.0)
    assert others["rougeL"] < 0.9
    assert {"reward", "win_rate", "kl"} <= own.keys()


def test_references_are_found_in_each_row_format(base: str, tmp_path: Path) -> None:
    policy = Policy(base)
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "one"},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "two"}], "rejected": "three"},
        {"prompt": "a", "response": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "three"}]},
        {"instruction": "a", "output": "four"},
        {"messages": ["a", "b", "c", "five"]},
        {"messages": ["a"]},
        {"prompt": "a", "answer": "no reference unless it is asked for"},
    ]
    found = references_of(policy.prompts(rows))
    texts = [[message["content"] for [message] in given] for given in found]
    assert texts == [["one"], ["two"], ["three"], ["four"], ["five"], [], []]


def test_only_rows_with_references_are_compared(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = figures(capsys, base, write_rows(tmp_path / "some.jsonl", [*chats(3), {"messages": ["Count 9"]}]))
    assert (some["prompts"], some["references"]) == (4, 3)
    three = figures(capsys, base, write_rows(tmp_path / "three.jsonl", chats(3)))
    assert {key: some["policy"][key] for key in REFERENCE_KEYS} == pytest.approx(
        {key: three["policy"][key] for key in REFERENCE_KEYS}, rel=1e-5
    )
    none = figures(capsys, base, write_rows(tmp_path / "none.jsonl", prompts(2)))
    assert none["references"] == 0
    assert set(none["policy"]) == {"response_tokens", "truncated"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--references", "gold"],
            "rows.jsonl:1: the row has no column 'gold' with the reference answer; its columns are 'prompt', 'blank'",
        ),
        (["--references", "blank"], "rows.jsonl:1: 'blank' is not a reference answer"),
        (["--best_of", "4"], "no reward: give a reward model"),
        (["--best_of", "4", "--gold", VOWELS], "--best_of samples from the baseline"),
    ],
)
def test_unsuitable_references_are_refused(
    args: list[str], message: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "blank": " "}])
    assert message in mistake(["evaluate", base, file, "--max_tokens", "4", *args], capsys)


def test_references_longer_than_the_context_are_left_out(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are empty answers, and answers that were not preferred."""
    rows = [{"prompt": "a", "completion": "word " * 300}, {"prompt": "b", "completion": "a b"}]
    both = figures(capsys, base, write_rows(tmp_path / "both.jsonl", rows))
    short = figures(capsys, base, write_rows(tmp_path / "short.jsonl", rows[1:]))
    assert both["references"] == 2
    assert both["policy"]["perplexity"] == pytest.approx(short["policy"]["perplexity"], rel=1e-5)
    assert figures(capsys, base, write_rows(tmp_path / "long.jsonl", rows[:1]))["policy"]["perplexity"] is None
    others = [{"prompt": "c", "response": ""}, {"prompt": "d", "response": "no", "label": 0}]
    others += [{"prompt": "e", "response": "yes", "label": 1}]
    assert figures(capsys, base, write_rows(tmp_path / "others.jsonl", others))["references"] == 1


def test_rouge_takes_the_best_reference_for_each_metric_in_any_script() -> None:
    said = lambda *texts: [[{"role": "assistant", "content": text}] for text in texts]  # noqa: E731
    found = nearness(["a b c d e f"], [said("f e d c b a", "a b c x y z")])
    assert (found["rouge1"], found["rougeL"]) == (1.0, 0.5)
    assert found["rouge2"] == pytest.approx(0.4)
    assert nearness(["की का के"], [said("कि को कु")])["rouge1"] == 0.0
