"""Rewards without a policy."""

from functools import lru_cache

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.quickstart.model import make_tokenizer
from rlhf_lightning.rewards import Reward, RewardTerm
from tests.helpers.models import TEXTS


@lru_cache
def _renderer() -> Renderer:
    return Renderer(make_tokenizer(TEXTS * 5))


def terms(*rewards: Reward) -> list[RewardTerm]:
    """Terms for episodes of a small tokenizer."""
    return [RewardTerm(reward, _renderer()) for reward in rewards]
