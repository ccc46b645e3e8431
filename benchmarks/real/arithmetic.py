"""Writes `arithmetic.jsonl`: sums, differences and products of two numbers of one digit, from reasoning-gym.

    pip install reasoning-gym==0.1.25 && python -m benchmarks.real.arithmetic

The package is needed only for this; the file is committed. Questions are distinct.
"""

import json
import random
from pathlib import Path

ROWS = Path(__file__).parent / "arithmetic.jsonl"
KINDS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
COUNT = 300
"""Number of questions of a kind, before those that are asked twice are removed."""


def main() -> None:
    """Write the rows in random order."""
    import reasoning_gym

    answers = {
        entry["question"]: entry["answer"]
        for kind, settings in KINDS.items()
        for entry in reasoning_gym.create_dataset(kind, size=COUNT, seed=0, **settings)
    }
    rows = [{"prompt": question, "answer": answer} for question, answer in answers.items()]
    random.Random(0).shuffle(rows)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
