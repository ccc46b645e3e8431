"""RLHF as plain PyTorch Lightning: supervised fine-tuning, preference models and policy RL.

The public names are imported on first use, so that `import rlhf_lightning` and `rlhf --help` are fast. Rewards are in
`rlhf_lightning.rewards`, losses in `rlhf_lightning.objectives`, diagnostic checks in `rlhf_lightning.diagnostics`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "SFTModule": "rlhf_lightning.modules.sft",
    "PreferenceModule": "rlhf_lightning.modules.preference",
    "PolicyRLModule": "rlhf_lightning.modules.policy_rl",
    "SFTDataModule": "rlhf_lightning.data.sft",
    "PreferenceDataModule": "rlhf_lightning.data.preference",
    "PromptDataModule": "rlhf_lightning.data.prompts",
    "LoRA": "rlhf_lightning.models.lora",
    "Critic": "rlhf_lightning.models.critic",
    "Distillation": "rlhf_lightning.models.distillation",
    "KLPenalty": "rlhf_lightning.rollout.kl",
    "GAE": "rlhf_lightning.rollout.advantages",
    "GlobalWhitened": "rlhf_lightning.rollout.advantages",
    "GroupCentered": "rlhf_lightning.rollout.advantages",
    "LeaveOneOut": "rlhf_lightning.rollout.advantages",
    "Sampler": "rlhf_lightning.generation.sampler",
    "run_pipeline": "rlhf_lightning.pipeline.run",
}

__all__ = [
    "GAE",
    "Critic",
    "Distillation",
    "GlobalWhitened",
    "GroupCentered",
    "KLPenalty",
    "LeaveOneOut",
    "LoRA",
    "PolicyRLModule",
    "PreferenceDataModule",
    "PreferenceModule",
    "PromptDataModule",
    "SFTDataModule",
    "SFTModule",
    "Sampler",
    "run_pipeline",
]

if TYPE_CHECKING:
    from rlhf_lightning.data.preference import PreferenceDataModule
    from rlhf_lightning.data.prompts import PromptDataModule
    from rlhf_lightning.data.sft import SFTDataModule
    from rlhf_lightning.generation.sampler import Sampler
    from rlhf_lightning.models.critic import Critic
    from rlhf_lightning.models.distillation import Distillation
    from rlhf_lightning.models.lora import LoRA
    from rlhf_lightning.modules.policy_rl import PolicyRLModule
    from rlhf_lightning.modules.preference import PreferenceModule
    from rlhf_lightning.modules.sft import SFTModule
    from rlhf_lightning.pipeline.run import run_pipeline
    from rlhf_lightning.rollout.advantages import GAE, GlobalWhitened, GroupCentered, LeaveOneOut
    from rlhf_lightning.rollout.kl import KLPenalty


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlhf_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
