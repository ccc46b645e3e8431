"""Policy-gradient losses: pure functions (`losses`, `importance`), and classes for configs (`classes`)."""

from rlhf_lightning.objectives.policy.classes import (
    CISPO,
    DRO,
    SAPO,
    ClippedSurrogate,
    ImportanceSampling,
    ImportanceWeights,
    PolicyObjective,
    Reinforce,
    SequenceClippedSurrogate,
)
from rlhf_lightning.objectives.policy.importance import importance_weights
from rlhf_lightning.objectives.policy.losses import (
    cispo,
    clipped_surrogate,
    dro,
    importance_sampling,
    reinforce,
    sapo,
    sequence_clipped_surrogate,
)

__all__ = [
    "CISPO",
    "DRO",
    "SAPO",
    "ClippedSurrogate",
    "ImportanceSampling",
    "ImportanceWeights",
    "PolicyObjective",
    "Reinforce",
    "SequenceClippedSurrogate",
    "cispo",
    "clipped_surrogate",
    "dro",
    "importance_sampling",
    "importance_weights",
    "reinforce",
    "sapo",
    "sequence_clipped_surrogate",
]
