"""Critique and revision of answers by a judge, as in constitutional AI (Bai et al. 2022, arXiv:2212.08073)."""

import logging
from collections.abc import Mapping, Sequence

from rlhf_lightning.labeling.comparisons import Candidate, Comparison, Question, distinct, messages_key
from rlhf_lightning.labeling.store import LabelStore
from rlhf_lightning.rewards import PairwiseJudgeReward
from rlhf_lightning.rewards import judge as judging
from rlhf_lightning.rewards.generative import transcript
from rlhf_lightning.rewards.judge_client import JudgeClient
from rlhf_lightning.types import JSON

log = logging.getLogger(__name__)
CHUNK = 16
"""Number of answers that are revised together; their revisions are then stored."""
TASK = "You revise the response of an assistant by a rubric. You first say what is wrong with it, then write it anew."
FORM = (
    '{"critique": "what does not follow the rubric, in a few sentences", "revision": "the whole revised response"}. If '
    "nothing is wrong, the revision repeats the response."
)
SCHEMA = judging.schema({"critique": {"type": "string"}, "revision": {"type": "string"}})


def add_revisions(
    store: LabelStore,
    answers: Sequence[tuple[Question, Candidate]],
    reward: PairwiseJudgeReward,
    client: JudgeClient,
    rounds: int,
) -> int:
    """Let a judge criticize and revise answers, and store comparisons of each answer with its last revision.

    Answers whose revision the session already has are not revised again. An answer with tool calls or several turns is
    left out, and so is one that the judge leaves as it is.

    Args:
        store: The files of the session.
        answers: The answers, with what they respond to.
        reward: The rubric; its `on_failure` says whether a missing revision ends the session.
        client: Asks the judge.
        rounds: How often each answer is criticized and revised.

    Returns:
        Number of answers that were left out because they have tool calls or several turns.

    Raises:
        UserError: If a revision is missing and `on_failure` is `fail`; see also `JudgeClient.ask`.
    """
    sources = [one.source for comparison in store.comparisons.values() for one in comparison.candidates]
    known = {source.get("revision_of") for source in sources}
    single = [(question, one) for question, one in answers if _text(one) is not None]
    waiting = [pair for pair in single if _key(*pair) not in known]
    for start in range(0, len(waiting), CHUNK):
        revised = _revised(waiting[start : start + CHUNK], client, reward, rounds)
        store.add(distinct(revised))
    return len(answers) - len(single)


def _revised(
    answers: Sequence[tuple[Question, Candidate]], client: JudgeClient, reward: PairwiseJudgeReward, rounds: int
) -> list[Comparison]:
    """Comparisons of answers with their last revision."""
    texts: list[str | None] = [_text(candidate) for _, candidate in answers]
    critiques: list[list[JSON]] = [[] for _ in answers]
    for _ in range(rounds):
        asked = [i for i, text in enumerate(texts) if text is not None]
        labels = [f"the answer {messages_key(answers[i][1].messages)}" for i in asked]
        questions = [
            _question(answers[i][0], texts[i] or "", reward.rubric, label)
            for i, label in zip(asked, labels, strict=True)
        ]
        votes = client.ask(questions, votes=1)
        judging.report(reward.name, reward.on_failure, list(zip(labels, votes, strict=True)))
        for i, (vote,) in zip(asked, votes, strict=True):
            texts[i] = None
            if vote.value is not None:
                critique, texts[i] = vote.value
                critiques[i].append(critique)
    found = []
    for (question, candidate), text, said in zip(answers, texts, critiques, strict=True):
        if text is not None:
            source: dict[str, JSON] = {
                "model": f"{reward.judge.model} (revision)",
                "revision_of": _key(question, candidate),
            }
            revision = Candidate([{"role": "assistant", "content": text}], {**source, "critiques": said})
            found.append(Comparison(question, (candidate, revision)))
    return found


def _question(question: Question, text: str, rubric: str, label: str) -> judging.Question[tuple[str, str]]:
    texts = {"prompt": transcript(question.messages), "response": text}
    return judging.Question(
        judging.SYSTEM.format(task=TASK, rubric=rubric, answer=FORM),
        judging.fenced(texts, "Criticize the response by the rubric, and revise it."),
        SCHEMA,
        _read,
        label,
    )


def _read(answer: Mapping[str, JSON]) -> tuple[str, str] | None:
    """Critique and revision of an answer of the judge."""
    critique, revision = answer.get("critique"), answer.get("revision")
    if not isinstance(critique, str) or not isinstance(revision, str) or not revision.strip():
        return None
    return critique, revision


def _text(candidate: Candidate) -> str | None:
    """The text of an answer; None if it has tool calls or several turns."""
    message, *more = candidate.messages
    return None if more or message.get("tool_calls") or not message["content"] else message["content"]


def _key(question: Question, candidate: Candidate) -> str:
    return f"{question.key} {messages_key(candidate.messages)}"
