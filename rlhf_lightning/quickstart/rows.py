"""Data of the quickstart on a pretrained model: real rows (rows/README.md), with instructions that a program checks."""

import gzip
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_lightning.quickstart.data import Sizes, write_files
from rlhf_lightning.rewards.instructions import Arguments, count_words
from rlhf_lightning.types import JSON, Row

ROWS = Path(__file__).parent / "rows"
REAL = Sizes(conversations=460, pairs=172, prompts=128, held_out=64)
"""Number of rows of the run on a pretrained model."""
CUT = 24
"""Words of an answer; those of RL are as short."""
LONGEST = 600
"""Characters of the two answers of a pair; a text without spaces would be many tokens."""

WORDS = ("example", "important", "people", "time", "help", "first", "world", "better", "simple", "work")
FIRST = ("well", "sure", "yes", "okay", "first", "indeed")
ENDINGS = ("That is all.", "I hope this helps.", "Thank you for asking.", "Is there anything else?")
COMMON = ("and", "can", "is", "that", "with")
BULLETS = (2, 3, 4)
LENGTHS = (15, 20, 25, 30)
STOP = ("about", "their", "there", "these", "those", "which", "while", "would", "could", "should", "other")

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


def _arguments(sample: random.Random, kind: str) -> Arguments:
    """Arguments of a checker, chosen at random."""
    if kind == "detectable_format:number_bullet_lists":
        return {"num_bullets": sample.choice(BULLETS)}
    if kind == "length_constraints:number_words":
        return {"num_words": sample.choice(LENGTHS), "relation": "less than"}
    if kind == "first_word:first_word_answer":
        return {"first_word": sample.choice(FIRST)}
    if kind == "startend:end_checker":
        return {"end_phrase": sample.choice(ENDINGS)}
    if kind == "keywords:existence":
        return {"keywords": [sample.choice(WORDS)]}
    if kind == "keywords:forbidden_words":
        return {"forbidden_words": [sample.choice(COMMON)]}
    return {}


def _shown(arguments: Arguments) -> str:
    """The first argument as a prompt shows it; empty if there is none."""
    for name, value in arguments.items():
        text = str(value[0] if isinstance(value, list) else value)
        return text.capitalize() if name == "first_word" else text
    return ""


def instructed(
    sample: random.Random, question: str, kind: str, phrasings: Mapping[str, tuple[str, ...]], arguments: Arguments
) -> Row:
    """A row of a question with an instruction.

    Args:
        sample: The random generator.
        question: The question.
        kind: Kind of the instruction.
        phrasings: Phrasings of each kind.
        arguments: Arguments of the checker.
    """
    instruction = sample.choice(phrasings[kind]).format(_shown(arguments))
    question = question if question.endswith((".", "?", "!")) else f"{question}."
    return {"prompt": f"{question} {instruction}", "instruction_id_list": [kind], "kwargs": [dict(arguments)]}


def rewritten(sample: random.Random, answer: str, kind: str) -> tuple[str, Arguments] | None:
    """An answer changed to follow an instruction of a trained kind, and the arguments of the instruction.

    Args:
        sample: The random generator.
        answer: The answer.
        kind: Kind of the instruction.

    Returns:
        None if the answer does not lend itself to the kind.
    """
    items = re.findall(r"^\d+[.)]\s*(.+)$", answer, re.MULTILINE)
    if kind == "detectable_format:number_bullet_lists":
        # The items of a numbered list, without their explanations, or else the sentences.
        points = [re.split(r"[:.] ", item.strip("* "))[0].rstrip(":.*") for item in items] or sentences(answer)
        for count in sorted(BULLETS, reverse=True):
            if len(points) >= count and len(" ".join(points[:count]).split()) <= CUT + 6:
                return "\n".join(f"* {point}" for point in points[:count]), {"num_bullets": count}
        return None
    if items:
        return None  # its sentences cannot be told apart
    arguments, text = _arguments(sample, kind), shortened(answer)
    if kind == "change_case:english_lowercase":
        return (text.lower(), arguments) if text.lower().islower() else None
    if kind == "first_word:first_word_answer":
        return f"{_shown(arguments)}, {text[0].lower()}{text[1:]}", arguments
    if kind == "startend:end_checker":
        return f"{shortened(answer, CUT * 2 // 3)} {arguments['end_phrase']}", arguments
    if kind == "punctuation:no_comma":
        plain = [one for one in sentences(text) if "," not in one]
        return " ".join(plain) or text.replace(",", ""), arguments
    if kind == "keywords:existence":
        words = [word for word in re.findall(r"\b[a-z]{5,}\b", text) if word not in STOP]
        return (text, {"keywords": [sample.choice(words)]}) if words else None
    # Less than so many words.
    text = shortened(answer, sample.choice(LENGTHS) - 3)
    fitting = [count for count in LENGTHS if count_words(text) < count]
    return (text, {"num_words": fitting[0], "relation": "less than"}) if fitting else None


def demonstrations(sample: random.Random, rows: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """Conversations whose answers follow an instruction, each of the next kind that its answer lends itself to.

    Args:
        sample: The random generator.
        rows: Conversations of one turn.
        kinds: Kinds of instructions, in turn.
    """
    found: list[Row] = []
    for number, row in enumerate(rows):
        question, answer = _turn(row)
        for kind in itertools.islice(itertools.cycle(kinds), number % len(kinds), number % len(kinds) + len(kinds)):
            if (made := rewritten(sample, answer, kind)) is not None:
                prompt = instructed(sample, question, kind, TRAINED, made[1])["prompt"]
                found.append(_conversation(str(prompt), made[0]))
                break
    return found


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [one for one in re.split(r"(?<=[.!?])\s+", text.strip()) if one]


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
    chats, held_chats = chats[held:], chats[:held]
    cut: list[Row] = []
    for row in pairs:
        chosen, rejected = shortened(_content(row["chosen"])), shortened(_content(row["rejected"]))
        if chosen != rejected and len(chosen + rejected) <= LONGEST:
            cut.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    real_held = min(held, len(cut) // 4)
    asked, held_asked = ([_turn(row)[0] for row in part] for part in (questions[held:], questions[:held]))
    kinds = list(TRAINED)

    def prompt(question: str, kind: str, phrasings: Mapping[str, tuple[str, ...]]) -> Row:
        return instructed(sample, question, kind, phrasings, _arguments(sample, kind))

    prompts = [  # the shift pairs a question that is asked again with another kind
        prompt(asked[i % len(asked)], kinds[(i % len(asked) + i // len(asked)) % len(kinds)], TRAINED)
        for i in range(sizes.prompts)
    ]
    sample.shuffle(prompts)
    # A third are plain conversations. The others show each kind of instruction, twice as often on the questions of RL.
    plain, shown = chats[::2], [*chats[1::2], *questions[held:], *questions[held:]]
    conversations = plain + demonstrations(sample, shown, kinds)
    trained, others = itertools.cycle(TRAINED), itertools.cycle(HELD_OUT_KINDS)
    return write_files(
        folder,
        {
            "sft_train": conversations[: sizes.conversations],
            "sft_validation": held_chats,
            "preference_train": (cut[real_held:] + _off_topic(chats))[: sizes.pairs],
            "preference_validation": cut[:real_held] + _off_topic(held_chats)[:real_held],
            "prompts_train": prompts,
            "prompts_validation": [prompt(text, next(trained), TRAINED) for text in held_asked],
            "prompts_held_out_kinds": [prompt(text, next(others), HELD_OUT_KINDS) for text in held_asked],
        },
    )


def _turn(row: Row) -> tuple[str, str]:
    """Question and answer of a conversation of one turn."""
    messages = row["messages"]
    assert isinstance(messages, list)
    return _content(messages[:1]), _content(messages)


def _conversation(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


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
