"""Distillation: a student learns a teacher's distributions, first on the tokens of the data, then on its own answers.

The teacher defaults to the student, which then has nothing to learn; give two folders or Hub ids with one vocabulary.
"""

import sys

import lightning.pytorch as pl

from rlhf_lightning import Distillation, PolicyRLModule, PromptDataModule, Sampler, SFTDataModule, SFTModule
from rlhf_lightning.types import Row

ROWS: list[Row] = [
    {"prompt": "How are you?", "completion": "Fine, thank you."},
    {"prompt": "What is 2 + 3?", "completion": "It is 5."},
    {"prompt": "Name a color.", "completion": "Blue."},
    {"prompt": "Where is Paris?", "completion": "In France."},
]


def trainer(folder: str) -> pl.Trainer:
    """One epoch, without a log."""
    return pl.Trainer(max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False)


def main(student: str, teacher: str | None = None, folder: str = "runs/examples/distill") -> list[pl.Trainer]:
    """Train one epoch off-policy, save the model, and continue it on-policy."""
    teacher = teacher or student
    # The answers of the data: the forward KL, which covers all that the teacher may say, and a little of the NLL.
    off_policy = SFTModule(student, distillation=Distillation(teacher, beta=0.0), nll_coefficient=0.1)
    first = trainer(f"{folder}/off")
    first.fit(off_policy, SFTDataModule(ROWS, batch_size=2))
    off_policy.save_pretrained(f"{folder}/off/model")
    # Its own answers to three quarters of the prompts, on average; the answers of the data to the others.
    settings = Distillation(teacher, beta=0.5, on_policy_fraction=0.75)
    on_policy = PolicyRLModule.distill(f"{folder}/off/model", settings, sampler=Sampler(max_tokens=16))
    second = trainer(f"{folder}/on")
    second.fit(on_policy, PromptDataModule(ROWS, prompts_per_round=2, group_size=1))
    on_policy.save_pretrained(f"{folder}/on/model")
    return [first, second]


if __name__ == "__main__":
    main(*sys.argv[1:])
