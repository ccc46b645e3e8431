"""Comparison of policies by a reward, and best-of-N sampling as a baseline without training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Required, TypedDict

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.evaluation.text_metrics import ReferenceAnswer, nearness, perplexity
from rlhf_lightning.imports import imported
from rlhf_lightning.objectives.intervals import best_of_kl, mean_interval, wilson, win_rate
from rlhf_lightning.rewards import FunctionReward, ModelReward, PairwiseJudgeReward, Reward, RewardTerm, total_rewards
from rlhf_lightning.rewards.judge import PairwiseJudgeScores
from rlhf_lightning.types import Episode, Message

Figures = dict[str, float | None]
"""Metrics of a policy by name; None for a metric that cannot be measured."""


class ScoredAnswer(TypedDict, total=False):
    """A response to a prompt, with its reward if there is one."""

    response: Required[str]
    reward: float


class BestAnswer(TypedDict):
    """The best of several responses to a prompt, and the rewards of all of them."""

    prompt: list[Message]
    response: str
    reward: float
    rewards: list[float]
    stop_reason: str


@dataclass
class SamplingOptions:
    """How responses are sampled and rewarded.

    Args:
        rewards: Terms of the reward, which are weighted and added.
        max_tokens: Token budget of a response.
        temperature: Temperature; 0 for greedy decoding.
        samples: Number of responses per prompt.
        seed: Seed of the samples.
        truncated_reward: Reward of a truncated response, instead of its own.

    Example:
        >>> options = SamplingOptions(rewards=[], max_tokens=64, temperature=0.0)
    """

    rewards: list[Reward]
    max_tokens: int = 128
    temperature: float = 1.0
    samples: int = 1
    seed: int = 0
    truncated_reward: float | None = None

    def sample(self, policy: Policy, prompts: Sequence[Prompt], samples: int | None = None) -> list[list[Episode]]:
        """Sample and reward responses.

        Args:
            policy: The policy.
            prompts: The prompts.
            samples: Number of responses per prompt; `self.samples` by default.

        Returns:
            A list of episodes for each prompt.
        """
        samples = samples or self.samples
        device = next(policy.model.parameters()).device
        terms = [RewardTerm(reward, policy.renderer).to(device) for reward in self.rewards]
        for term in terms:
            term.check(prompts)
        episodes = policy.answer(prompts, self.max_tokens, self.seed, samples, self.temperature)
        total_rewards(episodes, terms, self.truncated_reward)
        return [episodes[start : start + samples] for start in range(0, len(episodes), samples)]


def make_rewards(models: Sequence[str], functions: Sequence[str]) -> list[Reward]:
    """Make rewards with equal weights.

    Args:
        models: Model folders with any scorer.
        functions: Dotted paths of reward functions.
    """
    rewards: list[Reward] = [
        ModelReward(folder, name="reward_model" if len(models) == 1 else f"reward_model_{i}")
        for i, folder in enumerate(models)
    ]
    return rewards + [FunctionReward(imported(path, "--gold")) for path in functions]


def figures(groups: Sequence[Sequence[Episode]], rewarded: bool = True) -> Figures:
    """Mean reward with its 95% interval, mean response length, and fraction of truncated responses.

    The interval treats prompts, not responses, as independent.

    Args:
        groups: The episodes of each prompt.
        rewarded: Include the reward.
    """
    reward, half = mean_interval([sum(e.reward for e in group) / len(group) for group in groups])
    episodes = [episode for group in groups for episode in group]
    return {
        **({"reward": reward, "reward_half_interval": half} if rewarded else {}),
        "response_tokens": sum(episode.response_tokens for episode in episodes) / len(episodes),
        "truncated": sum(episode.truncated for episode in episodes) / len(episodes),
    }


def wins(ours: Sequence[Sequence[Episode]], theirs: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """Fraction of the pairs in which the first policy's response has the higher reward, with its 95% interval.

    Ties count half.

    Args:
        ours: Episodes of the first policy for each prompt.
        theirs: Episodes of the second policy for each prompt.
    """
    rates = [win_rate([e.reward for e in a], [e.reward for e in b]) for a, b in zip(ours, theirs, strict=True)]
    rate = sum(rates) / len(rates)
    low, high = wilson(rate, len(rates))
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}


def judged_wins(
    judge: PairwiseJudgeScores, ours: Sequence[Sequence[Episode]], theirs: Sequence[Sequence[Episode]]
) -> Figures:
    """Fraction of the pairs in which a judge prefers the first policy's response, with its 95% interval.

    Each response is compared in both orders with the other policy's response of the same number. Ties count half. The
    interval treats prompts, not responses, as independent.

    Args:
        judge: Judges pairs.
        ours: Episodes of the first policy for each prompt.
        theirs: Episodes of the second policy for each prompt.

    Returns:
        The rate, the judge's mean preference for a position (0 to 1), and the fraction of pairs without a verdict. The
        first two are None if no pair has one. Pairs without a column that the judge is shown do not count.
    """
    pairs = [
        (a, b)
        for left, right in zip(ours, theirs, strict=True)
        for a, b in zip(left, right, strict=True)
        if judge.comparable(a) and judge.comparable(b)
    ]
    verdicts = judge.verdicts(pairs)
    by_prompt: dict[int, list[float]] = {}
    for (a, _), verdict in zip(pairs, verdicts, strict=True):
        if verdict is not None:
            by_prompt.setdefault(a.group, []).append(0.5 + (verdict[0] - verdict[1]) / 4)
    found = [verdict for verdict in verdicts if verdict is not None]
    failed: Figures = {"judge_failed": 1 - len(found) / len(verdicts) if verdicts else None}
    if not found:
        return {"judge_win_rate": None, "judge_order_bias": None, **failed}
    rate = sum(sum(wins) / len(wins) for wins in by_prompt.values()) / len(by_prompt)
    low, high = wilson(rate, len(by_prompt))
    bias = sum(abs(forward + backward) / 2 for forward, backward in found) / len(found)
    return {
        "judge_win_rate": rate,
        "judge_win_rate_low": low,
        "judge_win_rate_high": high,
        "judge_order_bias": bias,
        **failed,
    }


def compare(
    policy: Policy,
    baseline: Policy | None,
    prompts: Sequence[Prompt],
    sampling: SamplingOptions,
    best_of: int = 0,
    references: Sequence[Sequence[ReferenceAnswer]] = (),
    judge: PairwiseJudgeReward | None = None,
) -> tuple[dict[str, Figures], list[dict[str, list[Message] | list[ScoredAnswer]]]]:
    """Compare a policy with a baseline on the same prompts.

    Args:
        policy: The policy.
        baseline: The baseline, if any.
        prompts: The prompts.
        sampling: How responses are sampled and rewarded.
        best_of: If above 1, best-of-N sampling from the baseline is compared too.
        references: Good answers to each prompt; the list of a prompt may be empty.
        judge: Compares the policy's responses with the baseline's, if there is one.

    Returns:
        Metrics of `policy`, `baseline` and `best_of_N`, and a row per prompt. `kl` is the mean of log π − log
        π_baseline over the policy's responses, in nats at the sampling temperature; None if the vocabularies differ.
        Without rewards there is no reward and no win rate; without references there is no perplexity, BLEU or ROUGE.
    """
    rewarded = bool(sampling.rewards)
    # Before anything is sampled: a missing key or column is refused here.
    comparison = None if judge is None else judge.build(policy.renderer)
    if judge is not None:
        judge.check(prompts)
    answers = {"policy": sampling.sample(policy, prompts)}
    found: dict[str, Figures] = {"policy": _measured(policy, prompts, answers["policy"], references, rewarded)}
    if baseline is not None:
        asked = [_own(baseline, prompt) for prompt in prompts]
        theirs = answers["baseline"] = sampling.sample(baseline, asked)
        found["baseline"] = _measured(baseline, asked, theirs, references, rewarded)
        found["policy"]["kl"] = _kl(policy, baseline, answers["policy"], sampling.temperature)
        if rewarded:
            found["policy"] |= wins(answers["policy"], theirs)
        if comparison is not None:
            found["policy"] |= judged_wins(comparison, answers["policy"], theirs)
        if best_of > 1:
            best = [[max(group, key=_reward)] for group in sampling.sample(baseline, asked, best_of)]
            found[f"best_of_{best_of}"] = {**figures(best), **wins(best, theirs), "kl": best_of_kl(best_of)}
    return found, [
        {
            "prompt": prompt.messages,
            **{name: [_answer(e, rewarded) for e in groups[i]] for name, groups in answers.items()},
        }
        for i, prompt in enumerate(prompts)
    ]


def _answer(episode: Episode, rewarded: bool) -> ScoredAnswer:
    return {"response": episode.response, "reward": episode.reward} if rewarded else {"response": episode.response}


def _measured(
    policy: Policy,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Episode]],
    references: Sequence[Sequence[ReferenceAnswer]],
    rewarded: bool,
) -> Figures:
    """Metrics of one policy's answers, and its perplexity on the references of prompts that have them."""
    found = figures(groups, rewarded)
    if not any(references):
        return found
    pairs = [(e.response, given) for group, given in zip(groups, references, strict=True) for e in group if given]
    nearest = nearness([answer for answer, _ in pairs], [given for _, given in pairs])
    return {**found, "perplexity": perplexity(policy, prompts, references), **nearest}


def _reward(episode: Episode) -> float:
    return episode.reward


def best_of_n(
    policy: Policy, prompts: Sequence[Prompt], sampling: SamplingOptions, count: int
) -> tuple[dict[str, Figures], list[BestAnswer]]:
    """Sample `count` responses to each prompt and keep the one with the highest reward.

    Args:
        policy: The policy.
        prompts: The prompts.
        sampling: How responses are sampled and rewarded.
        count: Number of responses per prompt.

    Returns:
        Metrics of a single sample and of the best, and a row per prompt.
    """
    groups = sampling.sample(policy, prompts, count)
    best = [[max(group, key=_reward)] for group in groups]
    rows: list[BestAnswer] = [
        {
            "prompt": prompt.messages,
            "response": chosen.response,
            "reward": chosen.reward,
            "rewards": [episode.reward for episode in group],
            "stop_reason": chosen.stop_reason,
        }
        for prompt, group, (chosen,) in zip(prompts, groups, best, strict=True)
    ]
    return {"single": figures(groups), f"best_of_{count}": {**figures(best), "kl": best_of_kl(count)}}, rows


def _own(policy: Policy, prompt: Prompt) -> Prompt:
    """The same prompt, tokenized for another policy."""
    return replace(prompt, ids=policy.renderer.prompt(prompt.messages, prompt.tools))


def _kl(policy: Policy, baseline: Policy, groups: Sequence[Sequence[Episode]], temperature: float) -> float | None:
    if not policy.speaks_as(baseline):
        return None
    return policy.kl(baseline, [episode for group in groups for episode in group], temperature or 1.0)
