"""A judge behind an OpenAI-compatible endpoint as the reward of policy RL: grades by a rubric, and comparisons.

Arguments: the policy's model folder, the endpoint's URL, and the judge's name there. An endpoint with keys needs
`key_variable="OPENAI_API_KEY"` below and that environment variable.
"""

import sys

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import Judge, JudgeReward, PairwiseJudgeReward

RUBRIC = "The response answers the question, names the most important steps, and is short."


def main(model: str, url: str, name: str, folder: str = "runs/examples") -> pl.Trainer:
    """Train two rounds; the same call later asks only what the cache does not have."""
    judge = Judge(url, name, key_variable="", max_calls=1000, cache=f"{folder}/judge")
    rewards = [
        JudgeReward(judge, RUBRIC, maximum=5, on_failure="skip"),
        PairwiseJudgeReward(judge, RUBRIC, on_failure="skip", name="comparison"),
    ]
    rows = [{"prompt": "How do I make tea?"}, {"prompt": "How do I boil an egg?"}]
    module = PolicyRLModule(model, rewards=rewards, sampler=Sampler(max_tokens=48))
    trainer = pl.Trainer(max_epochs=2, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, PromptDataModule(rows, prompts_per_round=2, group_size=4))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
