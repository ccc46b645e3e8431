"""A judge as an annotator: it decides the comparisons of a session as people do (AI feedback)."""

import hashlib
import time
from datetime import UTC, datetime

from rlhf_lightning.labeling.comparisons import Comparison
from rlhf_lightning.labeling.queue import Assignment
from rlhf_lightning.labeling.store import Choice, Decision, LabelStore
from rlhf_lightning.rewards import PairwiseJudgeReward
from rlhf_lightning.rewards.judge import PairwiseJudgeScores
from rlhf_lightning.rewards.judge_client import JudgeClient
from rlhf_lightning.types import Episode

CHUNK = 32
"""Number of comparisons that are asked together; their decisions are then stored."""


def annotator_name(reward: PairwiseJudgeReward) -> str:
    """Name of the judge as an annotator: its model, and a hash of what else its verdicts depend on."""
    judge = reward.judge
    settings = (reward.rubric, judge.temperature, judge.max_tokens, judge.votes, judge.structured)
    return f"judge {judge.model} {hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"


def label_by_judge(store: LabelStore, assignment: Assignment, reward: PairwiseJudgeReward, client: JudgeClient) -> str:
    """Let a judge decide all comparisons of a session that it has not decided yet.

    Both orders are asked. An answer that is preferred on average is chosen; a tie also follows from verdicts that
    depend on the order. A comparison without a verdict is skipped.

    Args:
        store: The files of the session.
        assignment: Decides which answer is recorded as A.
        reward: The rubric; its `on_failure` says whether a missing verdict ends the session.
        client: Asks the judge.

    Returns:
        The judge's name as an annotator.

    Raises:
        UserError: See `PairwiseJudgeScores.verdicts`.
    """
    scores, name = PairwiseJudgeScores(reward, client), annotator_name(reward)
    decided = store.decisions.get(name, {})
    waiting = [comparison for key, comparison in store.comparisons.items() if key not in decided]
    for start in range(0, len(waiting), CHUNK):
        chunk, begun = waiting[start : start + CHUNK], time.monotonic()
        verdicts = scores.verdicts([_episodes(comparison) for comparison in chunk])
        seconds = round((time.monotonic() - begun) / len(chunk), 2)
        for comparison, verdict in zip(chunk, verdicts, strict=True):
            first = assignment.shown_first(name, comparison.id)
            margin = None if verdict is None else verdict[0] - verdict[1]
            now = datetime.now(UTC).isoformat(timespec="seconds")
            store.decide(Decision(comparison.id, name, _choice(margin, first), first, seconds, time=now))
    return name


def _episodes(comparison: Comparison) -> tuple[Episode, Episode]:
    prompt = comparison.question.messages
    a, b = (Episode(prompt, {}, 0, where=comparison.id, responses=one.messages) for one in comparison.candidates)
    return a, b


def _choice(margin: float | None, shown_first: int) -> Choice:
    """The button for how much better the first candidate is; A is the candidate that is shown first."""
    if margin is None:
        return "skip"
    if margin == 0:
        return "tie"
    preferred = 0 if margin > 0 else 1
    return "A" if preferred == shown_first else "B"
