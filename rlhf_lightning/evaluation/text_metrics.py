"""Metrics with reference answers: perplexity of the references under a policy, and BLEU and ROUGE of its answers."""

import logging
import math
import unicodedata
from collections.abc import Sequence

from rlhf_lightning.data.conversations import conversation, to_messages, without_prompt
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import DataError, quoted
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.types import JSON, Message, Row

log = logging.getLogger(__name__)
COLUMNS = ("completion", "response", "chosen")
ROUGE = ("rouge1", "rouge2", "rougeL")  # not rougeLsum, because it needs a sentence splitter that is downloaded
ReferenceAnswer = list[Message]


def references_of(prompts: Sequence[Prompt], column: str | None = None) -> list[list[ReferenceAnswer]]:
    """The reference answers of each prompt, as messages.

    Args:
        prompts: Prompts with the rows that they were read from.
        column: Column with the references: text, messages, or a list of texts. By default the `completion`, `response`
            or `chosen` of a row with a `prompt`, or else the last assistant turn of its conversation.

    Returns:
        A list of references per prompt; empty if its row has none.

    Raises:
        DataError: If a row lacks `column`, or a reference is not an answer; the message has file and line.
    """
    found = []
    for prompt in prompts:
        try:
            found.append(_named(prompt.row, column) if column else _own(prompt))
        except RowError as error:
            raise DataError(f"{prompt.where or f'prompt {prompt.index}'}: {error}") from None
    return found


def _named(row: Row, column: str) -> list[ReferenceAnswer]:
    value = row.get(column)
    if value is None:
        raise RowError(f"the row has no column {column!r} with the reference answer; its columns are {quoted(row)}")
    texts = value if isinstance(value, list) and all(isinstance(item, str) for item in value) else [value]
    return [_answer(text, column) for text in texts]


def _own(prompt: Prompt) -> list[ReferenceAnswer]:
    row = prompt.row
    if row.get("label") is not None and not row["label"]:
        return []  # a KTO row with a bad answer
    if row.get("prompt") is not None:
        name = next((name for name in COLUMNS if row.get(name) is not None), "")
        said: JSON | list[Message] = row.get(name)
    else:
        name, said = "the last assistant turn", conversation(row)[len(prompt.messages) :]
    try:
        return [_answer(said, name, prompt.messages)] if said else []
    except RowError:
        return []  # the user did not name this column as a reference


def _answer(value: JSON | list[Message], name: str, prompt: Sequence[Message] = ()) -> ReferenceAnswer:
    """The assistant's messages in a value, without the prompt that some datasets repeat."""
    messages = without_prompt(to_messages(value, "assistant"), prompt)
    if not messages or messages[0]["role"] != "assistant" or not _text(messages):
        raise RowError(
            f"{name!r} is not a reference answer: it must be text, or messages that begin with an assistant message"
        )
    return messages


def _text(reference: ReferenceAnswer) -> str:
    """Text of a reference's last assistant message, comparable to an episode's response."""
    spoken = [str(m.get("content") or "") for m in reference if m["role"] == "assistant"]
    return spoken[-1].strip()


def perplexity(policy: Policy, prompts: Sequence[Prompt], references: Sequence[Sequence[ReferenceAnswer]]) -> float:
    """Perplexity of reference answers after their prompts: exp of the mean negative log-likelihood per token.

    References longer than the model's context are left out with a warning; the result is NaN if none is left.

    Args:
        policy: The policy.
        prompts: The prompts.
        references: Reference answers to each prompt.

    Raises:
        DataError: If the chat template refuses a reference; with file and line.
    """
    rows, long = [], 0
    for prompt, answers in zip(prompts, references, strict=True):
        for answer in answers:
            try:
                row = policy.renderer.exchange(prompt.messages, answer, prompt.tools)
            except RowError as error:
                raise DataError(f"{prompt.where or f'prompt {prompt.index}'}: {error}") from None
            if policy.context and row.tokens > policy.context:
                long += 1
            else:
                rows.append(row)
    if long:
        log.warning(
            "perplexity: %d references are left out, because they exceed the model's context of %d tokens",
            long,
            policy.context,
        )
    return math.exp(policy.nll(rows)) if rows else math.nan


def nearness(answers: Sequence[str], references: Sequence[Sequence[ReferenceAnswer]]) -> dict[str, float]:
    """Corpus BLEU and mean ROUGE F1 of answers, both in [0, 1], computed by torchmetrics.

    BLEU is that of sacreBLEU: up to 4-grams, `13a` tokenization, case-sensitive. ROUGE compares lower-case words. A
    word is a run of letters, marks and digits, as in rouge-score for English; scripts without spaces are not split. Of
    several references, BLEU uses the n-grams of all, and each ROUGE score the best one.

    Args:
        answers: Answers, one per list of references.
        references: Reference answers; no list may be empty.
    """
    from torchmetrics.text import ROUGEScore, SacreBLEUScore

    texts = [[_text(reference) for reference in given] for given in references]
    bleu = SacreBLEUScore(tokenize="13a")
    bleu.update(list(answers), texts)
    found = {"bleu": float(bleu.compute())}
    for key in ROUGE:
        # One key at a time: with several keys, torchmetrics selects the best reference by the first key for all keys.
        # Its default normalizer would remove all characters that are not ASCII.
        rouge = ROUGEScore(rouge_keys=key, accumulate="best", normalizer=_words)
        rouge.update(list(answers), texts)
        found[key] = float(rouge.compute()[f"{key}_fmeasure"])
    return found


def _words(text: str) -> str:
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower()).split())
