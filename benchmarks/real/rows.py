"""Rows of each part: those to train on are chosen by the seed, those to measure on are the same for all seeds."""

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.real.arithmetic import ROWS as ARITHMETIC
from benchmarks.real.plan import Part

SHORT = 500
"""Letters of a conversation, above which it is left out (about 120 tokens)."""
QUESTION = 700
"""Letters of the prompt of a pair, above which it is left out."""
WORDS = 60
"""Words that are kept of an answer of a pair."""
INSTRUCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "change_case:english_lowercase": ("Write your answer in lowercase letters only.", {}),
    "keywords:existence": ('Use the word "important" in your answer.', {"keywords": ["important"]}),
    "length_constraints:number_words": (
        "Answer with less than 12 words.",
        {"num_words": 12, "relation": "less than"},
    ),
    "punctuation:no_comma": ("Do not use any commas.", {}),
    "startend:end_checker": ('End your answer with the words "That is all."', {"end_phrase": "That is all."}),
}
"""Instructions by the names of IFEval, with the arguments of its checkers."""


class Rows(NamedTuple):
    """Rows of a part."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    chats: list[dict[str, Any]]
    """Held-out conversations, by which RL on instructions is measured as well."""


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(data: Path) -> list[dict[str, Any]]:
    """Short conversations of one question and answer."""
    rows = [row["messages"] for row in read(data / "alpaca_en_999.jsonl")]
    short = [turns for turns in rows if sum(len(turn["content"]) for turn in turns) <= SHORT]
    return [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in short]


def cut(text: str) -> str:
    """The first words of a text, with its line breaks."""
    found = re.match(rf"\s*(?:\S+\s*){{0,{WORDS}}}", text)
    return found[0].strip() if found else ""


def pairs(data: Path) -> list[dict[str, Any]]:
    """Pairs whose answers differ in their first words."""
    rows = read(data / "preference_en.jsonl")
    short = [row for row in rows if sum(len(turn["content"]) for turn in row["prompt"]) <= QUESTION]
    made = [
        {
            "prompt": row["prompt"],
            **{
                side: [{"role": "assistant", "content": cut(row[side][-1]["content"])}]
                for side in ("chosen", "rejected")
            },
        }
        for row in short
    ]
    return [row for row in made if row["chosen"] != row["rejected"]]


def instructed(data: Path) -> list[dict[str, Any]]:
    """Questions, each with one instruction."""
    asked = [row["prompt"][-1]["content"] for row in conversations(data)]
    kinds = list(INSTRUCTIONS)
    made = []
    for number, question in enumerate(question for question in asked if len(question) < 120 and "\n" not in question):
        kind = kinds[number % len(kinds)]
        text, arguments = INSTRUCTIONS[kind]
        prompt = [{"role": "user", "content": f"{question} {text}"}]
        made.append({"prompt": prompt, "instruction_id_list": [kind], "kwargs": [arguments]})
    return made


def sums() -> list[dict[str, Any]]:
    """Arithmetic of two numbers."""
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in read(ARITHMETIC)]


def rows_of(part: Part, data: str, seed: int) -> Rows:
    """Rows of a part; the order of the held-out ones does not depend on the seed.

    Args:
        part: The part.
        data: Folder of the data files.
        seed: Seed of the rows to train on.

    Raises:
        ValueError: If there are too few rows.
    """
    folder = Path(data)
    chats = conversations(folder) if part.task != "arithmetic" else []
    if part.policy_rl:
        found = instructed(folder) if part.task == "instructions" else sums()
    else:
        found = chats if part.kind == "sft" else pairs(folder)
    random.Random(0).shuffle(found)
    held_out, rest = found[: part.held_out], found[part.held_out :]
    if len(rest) < part.rows:
        raise ValueError(f"{part.kind} needs {part.rows} rows to train on besides {part.held_out}, and has {len(rest)}")
    return Rows(random.Random(seed + 1).sample(rest, part.rows), held_out, chats[: part.held_out // 2])
