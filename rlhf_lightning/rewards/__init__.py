"""Rewards: each maps finished episodes to one score per episode. In YAML, they are `rlhf_lightning.rewards.NAME`."""

from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.generative import GenerativeReward
from rlhf_lightning.rewards.instructions import InstructionReward
from rlhf_lightning.rewards.judge import JudgeReward, PairwiseJudgeReward
from rlhf_lightning.rewards.judge_client import Judge
from rlhf_lightning.rewards.keywords import BlockedTerms, KeywordReward
from rlhf_lightning.rewards.length import LengthReward, OverlongPenalty
from rlhf_lightning.rewards.model import EnsembleReward, ModelReward
from rlhf_lightning.rewards.normalization import Normalizer, ReferenceNorm, RunningNorm, ScoreStatistics
from rlhf_lightning.rewards.pairwise import PairwiseReward
from rlhf_lightning.rewards.reasoning_gym import ReasoningGymReward
from rlhf_lightning.rewards.term import RewardTerm, total_rewards
from rlhf_lightning.rewards.verifiers import ExactAnswer, RegexReward

__all__ = [
    "BlockedTerms",
    "EnsembleReward",
    "ExactAnswer",
    "FunctionReward",
    "GenerativeReward",
    "InstructionReward",
    "Judge",
    "JudgeReward",
    "KeywordReward",
    "LengthReward",
    "ModelReward",
    "Normalizer",
    "OverlongPenalty",
    "PairwiseJudgeReward",
    "PairwiseReward",
    "ReasoningGymReward",
    "ReferenceNorm",
    "RegexReward",
    "Reward",
    "RewardTerm",
    "RunningNorm",
    "ScoreStatistics",
    "check_finite",
    "total_rewards",
]
