"""Data of the quickstart on a pretrained model: real rows (rows/README.md), with instructions that a program checks."""

import gzip
import itertools
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

from rlhf_lightning.quickstart.data import Sizes, write_files
from rlhf_lightning.types import JSON, Row

ROWS = Path(__file__).parent / "rows"
REAL = Sizes(conversations=240, pairs=172, prompts=128, held_out=64)
"""Number of rows of the run on a pretrained model."""
CUT = 30
"""Words of an answer of a pair; answers of RL are as short."""

WORDS = ("example", "important", "people", "time", "help", "first", "world", "better", "simple", "work")
FIRST = ("well", "sure", "yes", "okay", "first", "indeed")
ENDINGS = ("That is all.", "I hope this helps.", "Thank you for asking.", "Is there anything else?")
COMMON = ("and", "can", "is", "that", "with")
BULLETS = (2, 3, 4)
LENGTHS = (15, 20, 25, 30)

# Phrasings of each kind of instruction; {0} is its argument.
TRAINED: dict[str, tuple[str, ...]] = {
    "change_case:english_lowercase": (
        "Write your answer in lowercase letters only.",
        "Your entire response should be in all lowercase letters. No capital letters are allowed.",
    ),
    "detectable_format:number_bullet_lists": (
        "Answer with exactly {0} bullet points. Start each with an asterisk.",
        "Your answer must contain exactly {0} bullet points in markdown, each on a line that starts with *.",
    ),
    "first_word:first_word_answer": (
        'Begin your answer with the word "{0}".',
        'The first word of your answer must be "{0}".',
    ),
    "keywords:existence": ('Use the word "{0}" in your answer.', 'Include the word "{0}" in your response.'),
    "length_constraints:number_words": ("Answer with less than {0} words.", "Use fewer than {0} words."),
    "punctuation:no_comma": ("Do not use any commas.", "In your entire response, refrain from the use of any commas."),
    "startend:end_checker": (
        'End your answer with the sentence "{0}"',
        'Finish your response with this exact phrase: "{0}"',
    ),
}
HELD_OUT_KINDS: dict[str, tuple[str, ...]] = {
    "change_case:english_capital": ("Write your answer in capital letters only.",),
    "detectable_format:title": ("Put a title in double angular brackets at the top, such as <<A title>>.",),
    "keywords:forbidden_words": ('Do not use the word "{0}" in your answer.',),
    "startend:quotation": ("Wrap your entire answer in double quotation marks.",),
}
"""Kinds that no training row has."""


def _arguments(sample: random.Random, kind: str) -> tuple[str, dict[str, JSON]]:
    """An argument as a prompt shows it, and the arguments of the checker."""
    if kind == "detectable_format:number_bullet_lists":
        count = sample.choice(BULLETS)
        return str(count), {"num_bullets": count}
    if kind == "length_constraints:number_words":
        count = sample.choice(LENGTHS)
        return str(count), {"num_words": count, "relation": "less than"}
    word = sample.choice({"first_word:first_word_answer": FIRST, "startend:end_checker": ENDINGS}.get(kind, WORDS))
    if kind == "first_word:first_word_answer":
        return word.capitalize(), {"first_word": word}
    if kind == "startend:end_checker":
        return word, {"end_phrase": word}
    if kind == "keywords:existence":
        return word, {"keywords": [word]}
    if kind == "keywords:forbidden_words":
        word = sample.choice(COMMON)
        return word, {"forbidden_words": [word]}
    return "", {}


def instructed(sample: random.Random, question: str, kind: str, phrasings: Mapping[str, tuple[str, ...]]) -> Row:
    """A row of a question with an instruction.

    Args:
        sample: The random generator.
        question: The question.
        kind: Kind of the instruction.
        phrasings: Phrasings of each kind.
    """
    shown, arguments = _arguments(sample, kind)
    instruction = sample.choice(phrasings[kind]).format(shown)
    question = question if question.endswith((".", "?", "!")) else f"{question}."
    return {"prompt": f"{question} {instruction}", "instruction_id_list": [kind], "kwargs": [arguments]}


def shortened(text: str, words: int = CUT) -> str:
    """The first sentences of a text with at most so many words, at least one sentence or so many words of it."""
    text, end = text.strip(), 0
    for stop in re.finditer(r"[.!?](?=\s|$)", text):
        if end and len(text[: stop.end()].split()) > words:
            break
        end = stop.end()
    found = text[:end] or text
    return found if len(found.split()) <= 2 * words else " ".join(found.split()[:words])


def read_shipped(name: str) -> list[Row]:
    """Rows of a file in `rows/`.

    Args:
        name: `chats`, `pairs` or `questions`.
    """
    with gzip.open(ROWS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _content(messages: JSON) -> str:
    """Text of the last of some messages."""
    assert isinstance(messages, list)
    assert isinstance(messages[-1], dict)
    return str(messages[-1]["content"])


def write_real(folder: Path, seed: int, sizes: Sizes = REAL) -> dict[str, str]:
    """Write the data files.

    Args:
        folder: Folder to write to.
        seed: Seed of the splits and of the instructions.
        sizes: Number of rows; at most as many as there are.

    Returns:
        The paths by name.
    """
    sample = random.Random(seed)
    chats, pairs, questions = (read_shipped(name) for name in ("chats", "pairs", "questions"))
    for rows in (chats, pairs, questions):
        sample.shuffle(rows)
    held = sizes.held_out
    chats, held_chats = chats[held:][: sizes.conversations], chats[:held]
    cut = [
        {
            "prompt": row["prompt"],
            "chosen": shortened(_content(row["chosen"])),
            "rejected": shortened(_content(row["rejected"])),
        }
        for row in pairs
    ]
    cut = [row for row in cut if row["chosen"] != row["rejected"]]
    real_held = min(held, len(cut) // 4)
    asked, held_asked = ([str(row["question"]) for row in part] for part in (questions[held:], questions[:held]))
    kinds = list(TRAINED)
    prompts = [  # the shift pairs a question that is asked again with another kind
        instructed(sample, asked[i % len(asked)], kinds[(i % len(asked) + i // len(asked)) % len(kinds)], TRAINED)
        for i in range(sizes.prompts)
    ]
    sample.shuffle(prompts)
    trained, others = itertools.cycle(TRAINED), itertools.cycle(HELD_OUT_KINDS)
    return write_files(
        folder,
        {
            "sft_train": chats,
            "sft_validation": held_chats,
            "preference_train": (cut[real_held:] + _off_topic(chats))[: sizes.pairs],
            "preference_validation": cut[:real_held] + _off_topic(held_chats)[:real_held],
            "prompts_train": prompts,
            "prompts_validation": [instructed(sample, text, next(trained), TRAINED) for text in held_asked],
            "prompts_held_out_kinds": [instructed(sample, text, next(others), HELD_OUT_KINDS) for text in held_asked],
        },
    )


def _off_topic(chats: list[Row]) -> list[Row]:
    """Pairs of a question's own answer and the answer to the next question (Liu et al. 2024, arXiv:2409.13156)."""
    found: list[Row] = []
    for one, other in zip(chats, chats[1:] + chats[:1], strict=True):
        messages = one["messages"]
        assert isinstance(messages, list)
        if _content(messages) == _content(other["messages"]):
            continue
        found.append({"prompt": messages[:-1], "chosen": _content(messages), "rejected": _content(other["messages"])})
    return found
