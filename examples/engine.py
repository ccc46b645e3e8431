"""A sampling engine of your own: an object that samples responses from its own copy of the policy's weights.

In YAML `sampler: {engine: {class_path: examples.engine.PlainEngine, init_args: {model: FOLDER}}}`.
"""

import sys
from collections.abc import Iterable, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams, record_token, sample_token, uniforms
from rlhf_lightning.rewards import LengthReward
from rlhf_lightning.types import Completion


class PlainEngine:
    """Samples token by token, without a KV cache, from its own copy of the model."""

    def __init__(self, model: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.decode = AutoTokenizer.from_pretrained(model).decode

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the policy's weights; called before every round."""
        self.model.load_state_dict(dict(named_tensors), strict=False)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt, with random numbers from its own seed."""
        completions = [Completion() for _ in prompts]
        for prompt, numbers, made in zip(prompts, uniforms(seeds, params.max_tokens), completions, strict=True):
            for number in numbers:
                logits = self.model(torch.tensor([[*prompt, *made.ids]])).logits[:, -1]
                token, logprob = sample_token(logits, number[None], params, torch.tensor([len(made.ids)]))
                if record_token(made, int(token), float(logprob), params, self.decode):
                    break
        return completions


def main(model: str, folder: str = "runs/examples") -> PolicyRLModule:
    """One round of GRPO whose responses come from the engine."""
    sampler = Sampler(max_tokens=8, engine=PlainEngine(model))
    module = PolicyRLModule.grpo(model, rewards=[LengthReward(target=4)], sampler=sampler)
    trainer = pl.Trainer(max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, PromptDataModule(["Say hello.", "Count to three."], prompts_per_round=2, group_size=4))
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
