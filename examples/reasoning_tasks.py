"""GRPO on tasks of the package reasoning-gym, with the tasks' own scores (extra reasoning-gym).

The model needs a chat template that supports system messages.
"""

import sys

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import ReasoningGymReward

SYSTEM = "Think first. Then write the answer alone between <answer> and </answer>."
TRAIN = [
    "reasoning_gym:chain_sum?min_terms=2&max_terms=3&size=8&seed=1",
    "reasoning_gym:leg_counting?max_animals=4&size=8&seed=1",
]


def main(model: str, folder: str = "runs/examples") -> PolicyRLModule:
    """Train one round of four questions."""
    module = PolicyRLModule.grpo(
        model,
        rewards=[ReasoningGymReward(pattern="<answer>(.*?)</answer>")],
        sampler=Sampler(max_tokens=16),
    )
    data = PromptDataModule(TRAIN, system=SYSTEM, prompts_per_round=4, group_size=2)
    trainer = pl.Trainer(max_steps=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
