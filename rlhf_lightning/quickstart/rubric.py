"""Gold reward of the quickstart: a rubric of good advice, which RL never sees.

It was fixed before anything was tuned. An answer to a question about a thing (for example "my rusty bicycle") earns

    0.30  for naming the thing as the question does
    0.25  for a first step ("First, …") that suits the material of the thing
    0.20  for a reason ("because")
    0.15  for a caution ("make sure" or "careful")
    0.10  for brevity: no filler sentence, at most 45 words, and a final full stop

so that the best answer scores 1.0 and an empty one 0.0.
"""

import re

from rlhf_lightning.quickstart.phrases import FILLERS, STEPS

WEIGHTS = {"names": 0.30, "step": 0.25, "reason": 0.20, "caution": 0.15, "concise": 0.10}
MAX_WORDS = 45


def rubric_parts(answer: str, subject: str, material: str) -> dict[str, float]:
    """The points of an answer by criterion, each 0 or its weight.

    Args:
        answer: The answer.
        subject: The subject of the question, for example "rusty bicycle".
        material: Its material, a key of `phrases.STEPS`.
    """
    text = answer.strip().lower()
    held = {
        # Match whole words, because "cold tent" does not name "old tent".
        "names": re.search(rf"\b{re.escape(subject.lower())}\b", text) is not None,
        "step": any(f"first, {step}" in text for step in STEPS[material]),
        "reason": " because " in text,
        "caution": "make sure" in text or "careful" in text,
        "concise": text.endswith(".")
        and len(text.split()) <= MAX_WORDS
        and not any(filler.lower() in text for filler in FILLERS),
    }
    return {name: WEIGHTS[name] * flag for name, flag in held.items()}


def rubric(answer: str, subject: str, material: str) -> float:
    """The gold reward, in [0, 1]; see `rubric_parts` for the arguments."""
    return sum(rubric_parts(answer, subject, material).values())
