"""RLHF as plain PyTorch Lightning: supervised fine-tuning, preference models and policy RL.

The six public classes are imported on first use, so that `import rlhf_lightning` and
`rlhf --help` cost nothing.
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
    "run_pipeline": "rlhf_lightning.pipeline.run",
}

__all__ = [
    "PolicyRLModule",
    "PreferenceDataModule",
    "PreferenceModule",
    "PromptDataModule",
    "SFTDataModule",
    "SFTModule",
    "run_pipeline",
]

if TYPE_CHECKING:
    from rlhf_lightning.data.preference import PreferenceDataModule
    from rlhf_lightning.data.prompts import PromptDataModule
    from rlhf_lightning.data.sft import SFTDataModule
    from rlhf_lightning.modules.policy_rl import PolicyRLModule
    from rlhf_lightning.modules.preference import PreferenceModule
    from rlhf_lightning.modules.sft import SFTModule
    from rlhf_lightning.pipeline.run import run_pipeline


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlhf_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
