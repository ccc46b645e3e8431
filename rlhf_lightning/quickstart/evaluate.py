"""Metrics of the quickstart's models on held-out prompts."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.report.records import AnswerPair, Figures
from rlhf_lightning.rewards.instructions import followed
from rlhf_lightning.types import Episode, Row

Gold = Callable[[str, Row], float]


@dataclass(frozen=True)
class Evaluation:
    """What the models are measured on, and how they answer.

    Attributes:
        prompts: File of prompts.
        chats: File of conversations.
        max_tokens: Token budget of a response.
        seed: Seed of the responses.
        limit: Largest number of prompts and of conversations.
        other_kinds: File of prompts with kinds of instructions that no training row has.
        temperature: Temperature; 0 for greedy decoding.
        dtype: Data type of the weights.
        gold: Gold reward of a response and its data row.
        shown: Number of prompts whose answers are shown.

    Example:
        >>> Evaluation("prompts.jsonl", "chats.jsonl", max_tokens=48, seed=0, limit=64).temperature
        1.0
    """

    prompts: str
    chats: str
    max_tokens: int
    seed: int
    limit: int
    other_kinds: str | None = None
    temperature: float = 1.0
    dtype: str = "float32"
    gold: Gold | None = None
    shown: int = 3


@dataclass
class Measured:
    """Result of `measure`.

    Attributes:
        figures: Figures by model.
        kinds: Fraction of instructions followed, by model and kind.
        samples: Some answers of the SFT model and of the policy.

    Example:
        >>> Measured({}, {}, []).samples
        []
    """

    figures: dict[str, Figures]
    kinds: dict[str, dict[str, float]]
    samples: list[AnswerPair]


def measure(folders: Mapping[str, str], judge: RewardModel, evaluation: Evaluation) -> Measured:
    """Measure models on held-out prompts and conversations.

    Args:
        folders: Model folders, by `base`, `sft` and `policy`, in this order.
        judge: The trained preference model.
        evaluation: What they are measured on.
    """
    result, answers = Measured({}, {}, []), {}
    start: Policy | None = None
    for name, folder in folders.items():
        policy = Policy(folder, evaluation.dtype)
        prompts = policy.prompts(evaluation.prompts, evaluation.limit)
        others = policy.prompts(evaluation.other_kinds, evaluation.limit) if evaluation.other_kinds else []
        episodes, of_others = (_answered(policy, rows, evaluation) for rows in (prompts, others))
        found = figures(episodes, judge, evaluation.gold)
        if evaluation.temperature and name != "base":
            start = start or policy
            found["kl"] = policy.kl(start, episodes)  # an estimate of the KL only if the answers are sampled
        found["followed"], found["followed_other_kinds"] = _fraction(episodes), _fraction(of_others)
        nll = policy.nll(policy.conversations(evaluation.chats, evaluation.limit))
        found["val_nll"], found["perplexity"] = nll, math.exp(nll)
        result.figures[name], result.kinds[name] = found, _by_kind([*episodes, *of_others])
        answers[name] = [episode.response for episode in episodes]
    result.samples = [
        {"prompt": prompts[i].messages[-1]["content"] or "", "sft": answers["sft"][i], "policy": answers["policy"][i]}
        for i in range(min(evaluation.shown, len(prompts)))
    ]
    return result


def _answered(policy: Policy, prompts: Sequence[Prompt], evaluation: Evaluation) -> list[Episode]:
    if not prompts:
        return []
    return policy.answer(prompts, evaluation.max_tokens, evaluation.seed, temperature=evaluation.temperature)


def figures(episodes: Sequence[Episode], judge: RewardModel, gold: Gold | None) -> Figures:
    """The row of the final table for one model.

    Args:
        episodes: Its responses.
        judge: The trained preference model.
        gold: The gold reward of a response and its data row, if there is one.
    """
    rewards = [gold(episode.response, episode.row) for episode in episodes] if gold else []
    # Scores the sampled tokens, not their text, so that empty and truncated answers have a score too.
    training_samples = [episode.training_samples[-1] for episode in episodes]
    scores = judge.score_tokens(
        [training_sample.ids for training_sample in training_samples],
        [training_sample.loss_mask for training_sample in training_samples],
    )
    return {
        "gold_reward": sum(rewards) / len(rewards) if gold else None,
        "reward_model_score": float(scores.mean()),
        "kl": None,
        "response_tokens": sum(episode.response_tokens for episode in episodes) / len(episodes),
        "truncated_fraction": sum(episode.truncated for episode in episodes) / len(episodes),
    }


def _by_kind(episodes: Sequence[Episode]) -> dict[str, float]:
    """Fraction of the instructions of each kind that responses follow."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        kinds = episode.row.get("instruction_id_list")
        if isinstance(kinds, list) and kinds:
            for kind, right in zip(kinds, followed(episode.response, episode.row), strict=True):
                found[str(kind)].append(right)
    return {kind: sum(rights) / len(rights) for kind, rights in found.items()}


def _fraction(episodes: Sequence[Episode]) -> float | None:
    """Fraction of all instructions that responses follow; None without instructions."""
    rights = [
        right
        for episode in episodes
        if episode.row.get("instruction_id_list")
        for right in followed(episode.response, episode.row)
    ]
    return sum(rights) / len(rights) if rights else None
