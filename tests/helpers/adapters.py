"""Policies with an adapter that was trained for a few steps, so that it changes what the model computes."""

import copy
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA, base_of


def with_trained_adapter(model: Any, steps: int = 10, lora: LoRA | None = None) -> Any:
    """A copy of the model with an adapter, after some steps on fixed tokens, in float32."""
    torch.manual_seed(1)
    policy = Start(copy.deepcopy(model), lora=lora or LoRA(rank=4)).load().eval()
    ids = torch.randint(len(base_of(policy).get_input_embeddings().weight), (4, 12))
    train_adapter(policy, ids, steps)
    return policy


def train_adapter(policy: Any, ids: Tensor, steps: int = 1) -> None:
    """Train the adapter to predict tokens `[B, T]`."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        policy(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
