"""The operations that a step needs, counted on paper: what the trained positions depend on, each token once."""

from typing import Any

from benchmarks.steps.workload import Workload


def needed(task: str, work: Workload, rows: list[Any]) -> float:
    """Floating point operations of one step of `task` on prepared rows (prompt lengths for `rl` and `generate`)."""
    if task == "sft":
        return 3 * sum(_forward(work, 0, [row.tokens - 1], row.trained) for row in rows)
    if task in ("reward", "dpo"):
        total = 0.0
        for pair in rows:
            prompt = pair.chosen.mask.index(1)
            branches = [side.tokens - prompt for side in (pair.chosen, pair.rejected)]
            total += _forward(work, prompt, branches, sum(branches) if task == "dpo" else 0)
        return total * (3 + (task == "dpo"))  # forward, twice that in backward; DPO's reference once more
    size = work.group_size if task == "rl" else 1
    prompts = rows if task == "rl" else [[prompt] for prompt in rows]
    lengths = [row.tokens for row in rows] if task == "rl" else [len(prompt) for (prompt,) in prompts]
    once = sum(_forward(work, length, [work.new_tokens] * size, work.new_tokens * size) for length in lengths)
    return once * (1 if task == "generate" else 5)  # sampling, reference, forward and backward


def _forward(work: Workload, prefix: int, branches: list[int], scored: int) -> float:
    size = work.hidden // work.heads
    attention = work.hidden * work.heads * size * 2 + work.hidden * work.kv_heads * size * 2
    layer = attention + 3 * work.hidden * work.intermediate
    tokens = prefix + sum(branches)
    pairs = prefix**2 / 2 + sum(branch * (prefix + branch / 2) for branch in branches)
    per_pair = 4 * work.heads * size
    return 2 * tokens * work.layers * layer + pairs * per_pair * work.layers + 2 * scored * work.vocab * work.hidden
