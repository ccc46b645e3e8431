"""Seeded data of the quickstart: conversations of mixed quality, preference pairs with noise, and prompts.

A subject is an adjective and a thing ("rusty bicycle"). A fifth of all subjects is held out. No training row of any
stage mentions them, so evaluation on them does not measure memorization.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.quickstart import phrases
from rlhf_lightning.quickstart.rubric import rubric
from rlhf_lightning.types import Row

LABEL_NOISE = 0.1
"""Fraction of training pairs whose label is flipped."""
MIN_GAP = 0.1
"""Smallest difference in rubric between the two answers of a pair."""
HELD_OUT = 0.2


@dataclass(frozen=True)
class Sizes:
    """Number of rows of each file.

    Attributes:
        conversations: Training conversations.
        pairs: Training pairs.
        prompts: Training prompts.
        held_out: Held-out conversations and prompts; there are twice as many held-out pairs.

    Example:
        >>> Sizes(conversations=10, pairs=10, prompts=10, held_out=2).held_out
        2
    """

    conversations: int = 3000
    pairs: int = 3000
    prompts: int = 2400
    held_out: int = 240


def subjects(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs of subject and material, of the training split and of the held-out split."""
    everything = [
        (f"{adjective} {thing}", material)
        for material, things in phrases.THINGS.items()
        for thing in things
        for adjective in phrases.ADJECTIVES
    ]
    random.Random(seed).shuffle(everything)
    cut = int(len(everything) * HELD_OUT)
    return everything[cut:], everything[:cut]


def question(sample: random.Random, subject: str) -> str:
    """A question about a subject."""
    return sample.choice(phrases.QUESTIONS).format(subject)


def answer(sample: random.Random, subject: str, material: str) -> str:
    """Advice of mixed quality. Each criterion of the rubric is met by some answers only; their mean rubric is 0.45.

    Args:
        sample: The random generator.
        subject: The subject, for example "rusty bicycle".
        material: Its material, a key of `phrases.STEPS`.
    """
    named = sample.random() < 0.5
    sentences = [sample.choice(phrases.NAMED).format(subject) if named else sample.choice(phrases.UNNAMED)]
    if sample.random() < 0.6:
        suited = material if sample.random() < 0.8 else sample.choice(list(phrases.STEPS))
        sentences.append(f"First, {sample.choice(phrases.STEPS[suited])}.")
    else:
        sentences.append(sample.choice(phrases.VAGUE))
    if sample.random() < 0.4:
        sentences.append(sample.choice(phrases.REASONS))
    if sample.random() < 0.35:
        sentences.append(sample.choice(phrases.CAUTIONS))
    if sample.random() < 0.3:
        sentences.insert(0, sample.choice(phrases.FILLERS[:2]))
    if sample.random() < 0.4:
        sentences.append(sample.choice(phrases.FILLERS[2:]))
    return " ".join(sentences)


def _pair(sample: random.Random, subject: str, material: str) -> tuple[str, str]:
    """A better and a worse answer by the rubric."""
    while True:
        one, other = answer(sample, subject, material), answer(sample, subject, material)
        gap = rubric(one, subject, material) - rubric(other, subject, material)
        if abs(gap) >= MIN_GAP - 1e-9:
            return (one, other) if gap > 0 else (other, one)


def write_data(folder: Path, seed: int, sizes: Sizes = Sizes()) -> dict[str, str]:
    """Write the six data files.

    Args:
        folder: Folder to write to.
        seed: Seed of the data.
        sizes: Number of rows.

    Returns:
        The paths by name.
    """
    train, held_out = subjects(seed)
    sample = random.Random(seed + 1)
    rows = {
        "sft_train": [_conversation(sample, *sample.choice(train)) for _ in range(sizes.conversations)],
        "sft_validation": [_conversation(sample, *sample.choice(held_out)) for _ in range(sizes.held_out)],
        "preference_train": [_preference(sample, LABEL_NOISE, *sample.choice(train)) for _ in range(sizes.pairs)],
        "preference_validation": [
            _preference(sample, 0.0, *sample.choice(held_out)) for _ in range(2 * sizes.held_out)
        ],
        "prompts_train": [_prompt(sample, *sample.choice(train)) for _ in range(sizes.prompts)],
        "prompts_validation": [_prompt(sample, *sample.choice(held_out)) for _ in range(sizes.held_out)],
    }
    return write_files(folder, rows)


def write_files(folder: Path, rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Write a JSONL file for each list of rows.

    Args:
        folder: Folder to write to.
        rows: The rows by name.

    Returns:
        The paths by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def _conversation(sample: random.Random, subject: str, material: str) -> Row:
    return {
        "messages": [
            {"role": "user", "content": question(sample, subject)},
            {"role": "assistant", "content": answer(sample, subject, material)},
        ]
    }


def _preference(sample: random.Random, noise: float, subject: str, material: str) -> Row:
    better, worse = _pair(sample, subject, material)
    if sample.random() < noise:
        better, worse = worse, better
    return {"prompt": question(sample, subject), "chosen": better, "rejected": worse}


def _prompt(sample: random.Random, subject: str, material: str) -> Row:
    return {"prompt": question(sample, subject), "subject": subject, "material": material}
