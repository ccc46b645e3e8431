"""Diagnostics of policy RL: checks by kind of failure, and callbacks that run them."""

from rlhf_lightning.diagnostics.check import Check
from rlhf_lightning.diagnostics.critic import UselessCritic
from rlhf_lightning.diagnostics.kl import GrowingKL, HighKL, NegativeKL
from rlhf_lightning.diagnostics.numbers import NotFinite
from rlhf_lightning.diagnostics.ratios import ClampedRatios, Clipping, LogprobGap, WildRatios
from rlhf_lightning.diagnostics.responses import (
    EntropyCollapse,
    LengthCollapse,
    LengthHacking,
    RepeatedText,
    Truncation,
)
from rlhf_lightning.diagnostics.reward import NoSignal, OverOptimized, RewardCollapse

__all__ = [
    "Check",
    "ClampedRatios",
    "Clipping",
    "EntropyCollapse",
    "GrowingKL",
    "HighKL",
    "LengthCollapse",
    "LengthHacking",
    "LogprobGap",
    "NegativeKL",
    "NoSignal",
    "NotFinite",
    "OverOptimized",
    "RepeatedText",
    "RewardCollapse",
    "Truncation",
    "UselessCritic",
    "WildRatios",
]
