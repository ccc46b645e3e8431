"""Rows, models and comparisons for tests of the packed forward pass."""

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.batching import pad_tokens
from tests.helpers.models import build_model

VOCABULARY = 60


def model_of(architecture: str, tokenizer: Any, **options: Any) -> Any:
    return build_model(tokenizer, architecture=architecture, vocab_size=VOCABULARY, pad_token_id=0, **options)


def rows_of(*trees: tuple[int, tuple[int, ...]], seed: int = 3) -> dict[str, torch.Tensor]:
    """Shuffled rows from (prompt length, response lengths); the mask is 1 on responses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    rows = []
    for prompt_length, lengths in trees:
        prompt = draw(prompt_length)
        rows += [(prompt, draw(length)) for length in lengths]
    order = torch.randperm(len(rows), generator=generator).tolist()
    chosen = [rows[i] for i in order]
    return pad_tokens([p + r for p, r in chosen], [[0] * len(p) + [1] * len(r) for p, r in chosen], 0)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float) -> None:
    assert found.keys() == wanted.keys()
    scale = torch.stack([value.norm() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        # Some gradients are 0 up to rounding (a bias on keys); they are compared with the norm of all gradients.
        assert (found[name] - value).norm() <= relative * (value.norm() + 1e-3 * scale), name


def graph_names(tensor: Tensor) -> str:
    """Names of all functions that a tensor was computed with."""
    names, left = set(), [tensor.grad_fn]
    while left:
        if (node := left.pop()) is not None and node not in names:
            names.add(node)
            left += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in names)
