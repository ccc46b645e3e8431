"""A filter of data and of answers: rows are removed before SFT, and a policy is penalized for what rules describe.

Argument: a model folder. The rules are in safety_rules.yaml.
"""

import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl

from rlhf_lightning import PolicyRLModule, PromptDataModule, SFTDataModule, SFTModule
from rlhf_lightning.filtering import FilterReward, RuleFilter, read_rules
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import LengthReward

RULES = str(Path(__file__).with_name("safety_rules.yaml"))
ROWS = [
    {"prompt": "How do I reach you?", "completion": "Write to ann@example.org."},
    {"prompt": "How do I make tea?", "completion": "Boil water, and let the leaves steep."},
    {"prompt": "Does tea help?", "completion": "Ask a doctor about the dosage."},
]


def main(model: str, folder: str = "runs/examples") -> tuple[pl.Trainer, pl.Trainer]:
    """Train on the rows that the rules leave, then with a penalty for answers that match a rule."""
    decision = read_rules(RULES).build().check("Mail it to ann@example.org.", role="assistant")
    print(decision.action, decision.summary)
    trainer = partial(pl.Trainer, max_epochs=1, default_root_dir=folder, logger=False, enable_checkpointing=False)
    sft = trainer()
    sft.fit(SFTModule(model), SFTDataModule(ROWS, filter=RuleFilter(RULES)))
    rewards = [LengthReward(target=8), FilterReward(RULES, penalty=-2.0)]
    policy = trainer()
    prompts = PromptDataModule([{"prompt": "How do I make tea?"}], prompts_per_round=1, group_size=4)
    policy.fit(PolicyRLModule(model, rewards=rewards, sampler=Sampler(max_tokens=16)), prompts)
    return sft, policy


if __name__ == "__main__":
    main(*sys.argv[1:])
