"""Instructions that a program checks: the checkers against Google's, and the reward."""

import random
from typing import Any

import pytest

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.rewards import InstructionReward
from rlhf_lightning.rewards.instructions import CHECKERS, count_words, followed
from rlhf_lightning.types import Episode

TEXTS = [
    "",
    " \n",
    "The sea is very blue, and so is the sky.",
    "the sea is very blue and so is the sky",
    "THE SEA IS VERY BLUE AND SO IS THE SKY!",
    '"The sea is blue"',
    '"',
    "* The sea\n* The sky",
    "Colors:\n- blue\n  - dark blue\n * green\n** not one",
    "<<The sea>>\nIt is blue.",
    "<< >> <<>>",
    "Well, don't worry: it isn't. That is all.",
    'It is blue. That is all."\n',
    "Seaside towns (a.b) have an island",
    "1. one\n2. two",
]
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "detectable_format:number_bullet_lists": [{"num_bullets": 2}, {"num_bullets": 3}],
    "keywords:existence": [{"keywords": ["sea"]}, {"keywords": ["SEA", "sky"]}],
    "keywords:forbidden_words": [{"forbidden_words": ["sea"]}, {"forbidden_words": ["is", "the"]}],
    "length_constraints:number_words": [
        {"num_words": count, "relation": relation} for count in (3, 9) for relation in ("less than", "at least")
    ],
    "startend:end_checker": [{"end_phrase": "That is all."}, {"end_phrase": " the SKY"}],
}
OURS_ALONE = {"first_word:first_word_answer"}
"""Kinds that IFEval lacks."""


def row(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"instruction_id_list": [kind], "kwargs": [arguments]}


def said(text: str, data: dict[str, Any]) -> Episode:
    """A finished episode with one response."""
    return Episode([], data, 0, responses=[{"role": "assistant", "content": text}])


@pytest.mark.parametrize("kind", sorted(CHECKERS.keys() - OURS_ALONE))
def test_as_the_checkers_of_ifeval(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("if_verifiable", reason="the extra ifeval is not installed")
    from if_verifiable.ifeval import instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    # Ours accept every language.
    monkeypatch.setattr(instructions.langdetect, "detect", lambda text: "en")
    sample = random.Random(0)
    joined = [f"{sample.choice(TEXTS)}\n{sample.choice(TEXTS)}" for _ in range(50)]
    outcomes = set()
    for arguments in ARGUMENTS.get(kind, [{}]):
        checker = INSTRUCTION_DICT[kind](kind)
        checker.build_description(**arguments)
        for text in TEXTS + joined:
            wanted = bool(text.strip()) and bool(checker.check_following(text))
            assert followed(text, row(kind, arguments)) == [wanted], text
            outcomes.add(wanted)
    assert outcomes == {True, False}


def test_the_first_word() -> None:
    wanted = row("first_word:first_word_answer", {"first_word": "Well"})
    assert [followed(text, wanted) for text in ("Well, yes", ' "well', "Wells", "Oh well", "")] == [
        [True],
        [True],
        [False],
        [False],
        [False],
    ]
    assert count_words("It isn't (so) bad.") == 5


def test_the_reward_is_the_fraction_that_is_followed() -> None:
    reward = InstructionReward()
    both = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 3.0, "relation": "less than"}],  # numbers as Parquet may hold them
    }
    episodes = [said(text, both) for text in ("a b", "a, b", "a, b, c", "")]
    assert reward.score([*episodes, said("a", {})]) == [1.0, 0.5, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("keywords:frequency", {}, "no checker for the instruction 'keywords:frequency'"),
        ("keywords:existence", {"keywords": "sea"}, "keywords is 'sea'; it must be a list of texts"),
        ("length_constraints:number_words", {"num_words": 2.5, "relation": "less than"}, "num_words is 2.5"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "about"}, "relation is 'about'"),
        ("startend:end_checker", {}, "the instruction startend:end_checker: end_phrase is None"),
        ("first_word:first_word_answer", {"first_word": " "}, "first_word is ' '"),
    ],
)
def test_rows_that_cannot_be_checked_are_refused_before_training(
    kind: str, arguments: dict[str, Any], message: str
) -> None:
    prompt = Prompt([{"role": "user", "content": "x"}], [1], row(kind, arguments), where="rows.jsonl:3")
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{message}"):
        InstructionReward().check([prompt])


def test_data_without_instructions_is_refused() -> None:
    prompt = Prompt([{"role": "user", "content": "x"}], [1], {"answer": "y"}, where="rows.jsonl:1")
    with pytest.raises(ConfigError, match=r"no row has the column 'instruction_id_list'.*the data has answer"):
        InstructionReward().check([prompt])
