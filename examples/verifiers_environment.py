"""GRPO on an environment of the package verifiers (extra verifiers), which runs the episodes and scores them.

Run it with a model and tasks, for example `verifiers:my_taskset?limit=8`; the module my_taskset must be importable.
"""

import sys

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.environments.base import Limits
from rlhf_lightning.environments.verifiers import VerifiersEnv
from rlhf_lightning.generation.sampler import Sampler


def main(model: str, tasks: str, folder: str = "runs/examples") -> PolicyRLModule:
    """Train one round of two tasks with two episodes each."""
    module = PolicyRLModule.grpo(
        model,
        environment=VerifiersEnv,
        # verifiers ends and scores an episode after two turns, before the limit here would cut it off unscored.
        environment_args={"config": {"agent": {"max_turns": 2}}},
        limits=Limits(max_turns=4, step_timeout=120),
        sampler=Sampler(max_tokens=8),
    )
    trainer = pl.Trainer(max_steps=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, PromptDataModule(tasks, prompts_per_round=2, group_size=2))
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
