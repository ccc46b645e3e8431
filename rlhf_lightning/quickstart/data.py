"""The quickstart's data: conversations of mixed quality, preference pairs with noisy labels, prompts; all seeded.

A subject is an adjective and a thing ("rusty bicycle"). A fifth of all subjects is held out: no training row of any
stage mentions them, so what is measured on them was not learnt by heart.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.quickstart import phrases
from rlhf_lightning.quickstart.rubric import rubric

LABEL_NOISE = 0.1
"""The part of training pairs whose label is flipped."""
MIN_GAP = 0.1
"""The least difference in rubric between the two answers of a pair."""
HELD_OUT = 0.2


@dataclass(frozen=True)
class Sizes:
    """Rows of each file."""

    conversations: int = 3000
    pairs: int = 3000
    prompts: int = 2400
    held_out: int = 240


def subjects(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(subject, material) of training and of the held-out split."""
    everything = [
        (f"{adjective} {thing}", material)
        for material, things in phrases.THINGS.items()
        for thing in things
        for adjective in phrases.ADJECTIVES
    ]
    random.Random(seed).shuffle(everything)
    cut = int(len(everything) * HELD_OUT)
    return everything[cut:], everything[:cut]


def question(draw: random.Random, subject: str) -> str:
    """A question about a subject."""
    return draw.choice(phrases.QUESTIONS).format(subject)


def answer(draw: random.Random, subject: str, material: str) -> str:
    """Advice of mixed quality: every part of the rubric is there in some answers only (0.45 in the mean)."""
    named = draw.random() < 0.5
    sentences = [draw.choice(phrases.NAMED).format(subject) if named else draw.choice(phrases.UNNAMED)]
    if draw.random() < 0.6:
        suited = material if draw.random() < 0.8 else draw.choice(list(phrases.STEPS))
        sentences.append(f"First, {draw.choice(phrases.STEPS[suited])}.")
    else:
        sentences.append(draw.choice(phrases.VAGUE))
    if draw.random() < 0.4:
        sentences.append(draw.choice(phrases.REASONS))
    if draw.random() < 0.35:
        sentences.append(draw.choice(phrases.CAUTIONS))
    if draw.random() < 0.3:
        sentences.insert(0, draw.choice(phrases.FILLERS[:2]))
    if draw.random() < 0.4:
        sentences.append(draw.choice(phrases.FILLERS[2:]))
    return " ".join(sentences)


def _pair(draw: random.Random, subject: str, material: str) -> tuple[str, str]:
    """A better and a worse answer by the rubric."""
    while True:
        one, other = answer(draw, subject, material), answer(draw, subject, material)
        gap = rubric(one, subject, material) - rubric(other, subject, material)
        if abs(gap) >= MIN_GAP - 1e-9:
            return (one, other) if gap > 0 else (other, one)


def write_data(folder: Path, seed: int, sizes: Sizes = Sizes()) -> dict[str, str]:
    """Write the six files; returns their paths by name."""
    train, held_out = subjects(seed)
    draw = random.Random(seed + 1)
    rows: dict[str, list[dict[str, Any]]] = {
        "sft_train": [_conversation(draw, *draw.choice(train)) for _ in range(sizes.conversations)],
        "sft_validation": [_conversation(draw, *draw.choice(held_out)) for _ in range(sizes.held_out)],
        "preference_train": [_preference(draw, LABEL_NOISE, *draw.choice(train)) for _ in range(sizes.pairs)],
        "preference_validation": [_preference(draw, 0.0, *draw.choice(held_out)) for _ in range(2 * sizes.held_out)],
        "prompts_train": [_prompt(draw, *draw.choice(train)) for _ in range(sizes.prompts)],
        "prompts_validation": [_prompt(draw, *draw.choice(held_out)) for _ in range(sizes.held_out)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def _conversation(draw: random.Random, subject: str, material: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": question(draw, subject)},
        {"role": "assistant", "content": answer(draw, subject, material)},
    ]
    return {"messages": messages}


def _preference(draw: random.Random, noise: float, subject: str, material: str) -> dict[str, Any]:
    better, worse = _pair(draw, subject, material)
    if draw.random() < noise:
        better, worse = worse, better
    return {"prompt": question(draw, subject), "chosen": better, "rejected": worse}


def _prompt(draw: random.Random, subject: str, material: str) -> dict[str, Any]:
    return {"prompt": question(draw, subject), "subject": subject, "material": material}
