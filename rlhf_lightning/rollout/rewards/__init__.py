"""Rewards: finished episodes in, one number each out. YAML names them `rlhf_lightning.rollout.rewards.NAME`."""

from rlhf_lightning.rollout.rewards.base import Reward, check_finite, total_rewards
from rlhf_lightning.rollout.rewards.function import FunctionReward
from rlhf_lightning.rollout.rewards.model import EnsembleReward, ModelReward
from rlhf_lightning.rollout.rewards.normalise import Normaliser, ReferenceNorm, RunningNorm
from rlhf_lightning.rollout.rewards.pairwise import PairwiseReward
from rlhf_lightning.rollout.rewards.shaping import LengthReward, OverlongPenalty
from rlhf_lightning.rollout.rewards.terms import BlockedTerms, KeywordReward
from rlhf_lightning.rollout.rewards.verifiers import ExactAnswer, RegexReward

__all__ = [
    "BlockedTerms",
    "EnsembleReward",
    "ExactAnswer",
    "FunctionReward",
    "KeywordReward",
    "LengthReward",
    "ModelReward",
    "Normaliser",
    "OverlongPenalty",
    "PairwiseReward",
    "ReferenceNorm",
    "RegexReward",
    "Reward",
    "RunningNorm",
    "check_finite",
    "total_rewards",
]
