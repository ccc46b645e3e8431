"""What both sides get: a tokenizer, a policy, a different reference, a classifier, and rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without the line break that it (and the quickstart) has after the stop token."""
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass
class Folders:
    """Model folders, each with the tokenizer."""

    policy: str
    reference: str
    classifier: str


def conversations(count: int) -> list[dict[str, Any]]:
    """Answers of 1 to 7 words; every third conversation has a system message."""
    return [
        {
            "messages": [
                *([{"role": "system", "content": "Count."}] if i % 3 == 0 else []),
                {"role": "user", "content": f"Up to {i}?"},
                {"role": "assistant", "content": " ".join(WORDS[: 1 + 3 * i % 7])},
            ]
        }
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths, as messages."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", f"Up to {i}?"),
            "chosen": turn("assistant", " ".join(WORDS[: 3 + i % 6])),
            "rejected": turn("assistant", " ".join(WORDS[4 : 5 + 2 * i % 5])),
        }
        for i in range(count)
    ]


def labels(count: int) -> list[dict[str, Any]]:
    """Single answers with a label."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 1 else "chosen"], "label": i % 3 != 1}
        for i, row in enumerate(pairs(count))
    ]


def model_config(tokenizer: Any) -> Any:
    """Qwen3, 2 layers of width 32, weights large enough that outputs differ."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def make_folders(root: Path, template: str | None = PLAIN, pad_is_eos: bool = False) -> Folders:
    """Write the models. With `template` None the quickstart's is used."""
    from transformers import AutoModelForCausalLM, Qwen3ForSequenceClassification

    from rlhf_lightning.quickstart.model import make_tokenizer

    tokenizer = make_tokenizer([" ".join(WORDS), "user\nassistant\nsystem\n", "Up to 1? Count."] * 5)
    if template is not None:
        tokenizer.chat_template = template
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    config = model_config(tokenizer)
    with seeded(0):
        reference = AutoModelForCausalLM.from_config(config)
    with seeded(1):
        policy = AutoModelForCausalLM.from_config(config)
    near(policy, reference)
    config.num_labels = 1
    with seeded(2):
        classifier = Qwen3ForSequenceClassification(config)
    for name, model in (("policy", policy), ("reference", reference), ("classifier", classifier)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return Folders(*(str(root / name) for name in ("policy", "reference", "classifier")))


@torch.no_grad()
def near(policy: Any, reference: Any, part: float = 0.02) -> None:
    """Move the policy to the fraction `part` of its distance from the reference."""
    for a, b in zip(policy.parameters(), reference.parameters(), strict=True):
        a.copy_(b + part * (a - b))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with a seed; the caller's random state is restored."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass
class Step:
    """An optimizer step: its loss, the gradient of every weight, and its rows."""

    loss: float
    gradient: dict[str, torch.Tensor]
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Ids (without padding) and mask of each row, sorted, since the order of rows is not compared."""

    @property
    def norm(self) -> float:
        """Norm of the gradient."""
        return float(self.vector.norm())

    @property
    def vector(self) -> torch.Tensor:
        """The gradient as one vector, ordered by the names of the weights."""
        return torch.cat([self.gradient[name].flatten().double() for name in sorted(self.gradient)])

    def distance(self, other: "Step") -> float:
        """Norm of the gradients' difference relative to the norm of the other; raises if the sets of weights differ."""
        if set(self.gradient) != set(other.gradient):
            odd = sorted(set(self.gradient) ^ set(other.gradient))
            raise ValueError(f"gradients of unlike weights: {odd[:4]}")
        return float((self.vector - other.vector).norm()) / other.norm


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients by name, of the weights that have one."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(ids: Any, loss_mask: Any, attention: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The rows of a batch without padding, by its attention mask."""
    there = attention.bool()
    return [
        (tuple(row[flags].tolist()), tuple(marks[flags].long().tolist()))
        for row, marks, flags in zip(ids, loss_mask, there, strict=True)
    ]
