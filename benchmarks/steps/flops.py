"""Number of operations that a step needs: those that the trained positions depend on, counting each token once."""

from dataclasses import dataclass
from typing import Any

from benchmarks.steps.workload import Workload


@dataclass(frozen=True)
class Shape:
    """The sizes that determine the operations of a decoder with gated MLPs."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the sizes from a transformers config."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Weights in the matrix products of a layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden * self.intermediate


def forward(shape: Shape, tokens: int, pairs: float, scored: int) -> float:
    """Operations of a forward over `tokens`, with `pairs` of attending tokens and `scored` tokens in the head."""
    products = 2 * tokens * shape.layers * shape.layer_weights
    attention = 4 * pairs * shape.layers * shape.heads * shape.head_dim
    return products + attention + 2 * scored * shape.vocab * shape.hidden


def needed(task: str, work: Workload, rows: list[Any]) -> float:
    """Floating-point operations of one step of `task` on prepared rows (prompt lengths for `rl` and `generate`)."""
    if task == "sft":
        return 3 * sum(_forward(work, 0, [row.tokens - 1], row.trained) for row in rows)
    if task in ("reward", "dpo"):
        total = 0.0
        for pair in rows:
            prompt = pair.chosen.loss_mask.index(1)
            branches = [side.tokens - prompt for side in (pair.chosen, pair.rejected)]
            total += _forward(work, prompt, branches, sum(branches) if task == "dpo" else 0)
        return total * (3 + (task == "dpo"))  # forward, twice that for backward; another forward for DPO's reference
    size = work.group_size if task == "rl" else 1
    prompts = rows if task == "rl" else [[prompt] for prompt in rows]
    lengths = [row.tokens for row in rows] if task == "rl" else [len(prompt) for (prompt,) in prompts]
    once = sum(_forward(work, length, [work.new_tokens] * size, work.new_tokens * size) for length in lengths)
    return once * (1 if task == "generate" else 5)  # sampling, reference, forward and backward


def _forward(work: Workload, prefix: int, branches: list[int], scored: int) -> float:
    sizes = work.hidden, work.intermediate, work.layers, work.heads, work.kv_heads, work.head_size
    pairs = prefix**2 / 2 + sum(branch * (prefix + branch / 2) for branch in branches)
    return forward(Shape(*sizes, work.vocab), prefix + sum(branches), pairs, scored)
