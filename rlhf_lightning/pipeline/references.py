"""Reference answers: how likely they are to a policy, and how near its own answers come to them."""

import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.conversations import Message, conversation, to_messages
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import DataError
from rlhf_lightning.pipeline.policies import Policy

COLUMNS = ("completion", "response", "chosen")
ROUGE = ("rouge1", "rouge2", "rougeL")  # not rougeLsum, whose sentence splitter is downloaded
Reference = list[Message]


def references_of(prompts: Sequence[Prompt], column: str | None = None) -> list[list[Reference]]:
    """The reference answers of each prompt, as messages.

    Args:
        prompts: with the rows they were read from.
        column: where they stand: text, messages, or a list of texts. By default a row's `completion`, `response` or
            `chosen` beside its `prompt`, or what the assistant says at the end of its conversation.

    Returns:
        A list for each prompt; empty where its row has none.

    Raises:
        DataError: a row without `column`, or a reference that is no answer; with file and line.
    """
    found = []
    for prompt in prompts:
        try:
            found.append(_named(prompt.row, column) if column else _own(prompt))
        except RowError as error:
            raise DataError(f"{prompt.where or f'prompt {prompt.index}'}: {error}") from None
    return found


def _named(row: dict[str, Any], column: str) -> list[Reference]:
    value = row.get(column)
    if value is None:
        raise RowError(f"no {column!r} to take as reference; the row has {', '.join(map(repr, row))}")
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return [_answer(item, column) for item in (value if texts else [value])]


def _own(prompt: Prompt) -> list[Reference]:
    row = prompt.row
    if row.get("prompt") is not None:
        name = next((name for name in COLUMNS if row.get(name) is not None), None)
        return [_answer(row[name], name, prompt.messages)] if name else []
    said = conversation(row)[len(prompt.messages) :]
    return [_answer(said, "the last assistant turn")] if said else []


def _answer(value: Any, name: str, prompt: Sequence[Message] = ()) -> Reference:
    """What the assistant says in it, without the prompt that some data sets repeat."""
    messages = to_messages(value, "assistant")
    if messages[: len(prompt)] == list(prompt):
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant" or not _text(messages):
        raise RowError(f"{name!r} is no reference answer: it must be text, or messages that begin with the assistant's")
    return messages


def _text(reference: Reference) -> str:
    """A reference as an episode's response is: the last text of the assistant."""
    spoken = [str(m.get("content") or "") for m in reference if m["role"] == "assistant"]
    return spoken[-1].strip()


def perplexity(policy: Policy, prompts: Sequence[Prompt], references: Sequence[Sequence[Reference]]) -> float:
    """exp of the mean negative log-likelihood, over tokens, of reference answers after their prompts.

    Raises:
        DataError: the chat template refuses one, or it is over the model's positions; with file and line.
    """
    rows = []
    for prompt, answers in zip(prompts, references, strict=True):
        for answer in answers:
            try:
                row = policy.renderer.exchange(prompt.messages, answer, prompt.tools)
                if policy.context and row.tokens > policy.context:
                    raise RowError(f"{row.tokens} tokens with its reference, over the model's {policy.context}")
            except RowError as error:
                raise DataError(f"{prompt.where or f'prompt {prompt.index}'}: {error}") from None
            rows.append(row)
    return math.exp(policy.nll(rows))


def nearness(answers: Sequence[str], references: Sequence[Sequence[Reference]]) -> dict[str, float]:
    """BLEU of the corpus and mean ROUGE F1 of answers, both in [0, 1], by torchmetrics.

    BLEU is that of sacreBLEU: up to 4-grams, tokenised as `13a`, with case. ROUGE compares words in lower case; a word
    is a run of letters and digits of any script, as in rouge-score for English. Of several references BLEU takes the
    n-grams of all, ROUGE the best one.

    Args:
        answers: one for each list of references. references: none of the lists may be empty.
    """
    from torchmetrics.text import ROUGEScore, SacreBLEUScore

    texts = [[_text(reference) for reference in given] for given in references]
    # torchmetrics would leave nothing of a text that is not English.
    rouge = ROUGEScore(
        rouge_keys=ROUGE, accumulate="best", normalizer=lambda text: re.sub(r"[\W_]+", " ", text.lower())
    )
    bleu = SacreBLEUScore(tokenize="13a")
    rouge.update(list(answers), texts)
    bleu.update(list(answers), texts)
    found = rouge.compute()
    return {"bleu": float(bleu.compute()), **{key: float(found[f"{key}_fmeasure"]) for key in ROUGE}}


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())
