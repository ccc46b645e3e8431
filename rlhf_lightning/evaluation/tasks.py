"""Benchmarks on local files: the prompt of each row, the scores of a response, and their summary."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from rlhf_lightning.errors import ConfigError, DataError, check_whole
from rlhf_lightning.imports import imported
from rlhf_lightning.rewards.verifiers import as_number
from rlhf_lightning.types import JSON, Row
from rlhf_lightning.yaml_files import read_mapping

Scores = dict[str, list[float]]
"""Scores of a response by metric, a list because a row may have several instructions. A score is 0 or 1, or the number
that a user's function returns."""
NAMES = ("gsm8k", "ifeval", "rewardbench")


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        value: The mean.
        error: Its standard error; NaN for a single row.
        count: Number of scores that the mean is over: rows or instructions.
    """

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Task:
    """A benchmark that a policy answers.

    Attributes:
        name: Its name.
        ask: Makes the prompt of a row, as text; raises `DataError` for a row that does not fit the benchmark.
        score: Computes the scores of a response to a row.
        max_tokens: Default token budget of a response.
        shots: Solved rows (few-shot examples) that precede each prompt.
        reply: Makes the answer of a solved row, as text.
        stop: Texts that end a response.
        whole: For metrics with several scores per row, the name of a second metric: the fraction of rows whose scores
            are all 1.
        system: System message of each prompt.
    """

    name: str
    ask: Callable[[Row], str]
    score: Callable[[str, Row], Scores]
    max_tokens: int
    shots: Sequence[Row] = ()
    reply: Callable[[Row], str] | None = None
    stop: tuple[str, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None

    def prompt(self, row: Row, chat: bool) -> "Row":
        """Make the row that the policy answers, after the solved rows.

        Args:
            row: A row of the benchmark.
            chat: Make a conversation, in which solved rows are turns; otherwise make text.
        """
        solved = [(self.ask(shot), self.reply(shot)) for shot in self.shots] if self.reply else []
        if not chat:
            return {"prompt": "".join(f"{asked} {told}\n\n" for asked, told in solved) + self.ask(row)}
        turns: list[JSON] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, told in solved:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        return {"prompt": [*turns, {"role": "user", "content": self.ask(row)}]}

    def summarize(self, rows: Sequence[Scores]) -> dict[str, Estimate]:
        """Compute the metrics of scored rows.

        Args:
            rows: The scores of each row.
        """
        found = {}
        for name in rows[0] if rows else ():
            scores = [row[name] for row in rows]
            if name in self.whole:
                found[self.whole[name]] = mean([float(all(score == 1 for score in row)) for row in scores])
            found[name] = pooled(scores)
        return found


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent values, with its standard error s/√n."""
    return pooled([[value] for value in values])


def pooled(groups: Sequence[Sequence[float]]) -> Estimate:
    """Mean over all values of groups, with a standard error that treats groups, not values, as independent.

    Args:
        groups: The values of each group.
    """
    count, rows = sum(map(len, groups)), len(groups)
    if not count:
        return Estimate(math.nan, math.nan, 0)
    value = sum(map(sum, groups)) / count
    if rows < 2:
        return Estimate(value, math.nan, count)
    spread = sum((sum(group) - value * len(group)) ** 2 for group in groups)
    return Estimate(value, math.sqrt(spread * rows / (rows - 1)) / count, count)


# -- GSM8K ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_MARKED = re.compile(r"####\s*(\-?[0-9.,]+)")


def gsm8k(shots: Sequence[Row] = ()) -> Task:
    """Grade-school mathematics, with the prompt and the two metrics of lm-evaluation-harness.

    `strict` takes the number after `####`, `flexible` the last number of the response.

    Args:
        shots: Solved rows that precede each question; published results usually use 5 rows of the training set.
    """

    def score(response: str, row: Row) -> Scores:
        marked, numbers = _MARKED.search(response), _NUMBER.findall(response)
        right = _gold(row)
        return {
            "strict": [float(marked is not None and _value(marked[1]) == right)],
            "flexible": [float(bool(numbers) and _value(numbers[-1]) == right)],
        }

    stop = ("Question:",)
    return Task("gsm8k", lambda row: f"Question: {_question(row)}\nAnswer:", score, 512, shots, _solution, stop)


def _question(row: Row) -> str:
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    text = first.get("content") if isinstance(first, dict) else row.get("question", row.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        raise DataError("the row has no question; rows of GSM8K have question and answer, or messages and answer")
    return text.strip()


def _solution(row: Row) -> str:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    text = last.get("content") if isinstance(last, dict) else row.get("answer")
    return str(text).strip()


def _gold(row: Row) -> str | Fraction:
    text = str(row.get("answer", ""))
    marked = _MARKED.search(text)
    right = _value(marked[1] if marked else text)
    if as_number(str(right)) is None:
        raise DataError(f"answer is {text[-40:]!r}; it must end with #### and a number")
    return right


def _value(text: str) -> str | Fraction:
    """The value of a number, without commas, dollar signs and a final period; other text is returned unchanged."""
    plain = text.replace(",", "").replace("$", "").rstrip(".")
    number = as_number(plain)
    return plain if number is None else number


# -- IFEval ---------------------------------------------------------------------------------------------------------


def ifeval() -> Task:
    """Verifiable instructions, with Google's checkers (package if-verifiable), strict and loose.

    Strict checks the response as it is. Loose accepts a response if any of eight variants passes: whole, without its
    first line, its last line or both, and each of these without asterisks (Zhou et al. 2023, arXiv:2311.07911).

    Raises:
        ConfigError: If the package is missing.
    """
    try:
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ConfigError(
            f"--task ifeval needs the package if-verifiable, which cannot be imported ({error}). Install it with pip "
            "install 'rlhf-lightning[ifeval]'"
        ) from None
    langdetect.DetectorFactory.seed = 0  # otherwise the detected language of a text may vary between calls

    def checkers(row: Row) -> list[Callable[[str], bool]]:
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(names, list) or not names:
            raise DataError(
                "the row has no instruction_id_list; rows of IFEval have prompt, instruction_id_list and kwargs"
            )
        found = []
        for number, name in enumerate(names):
            if name not in INSTRUCTION_DICT:
                raise DataError(f"the row has the instruction {name!r:.60}, which IFEval does not have")
            given = arguments[number] if isinstance(arguments, list) and number < len(arguments) else {}
            checker = INSTRUCTION_DICT[name](name)
            # Rows from Parquet have the keys of all instructions, null where they are not used.
            named = given if isinstance(given, dict) else {}
            checker.build_description(**{key: value for key, value in named.items() if value is not None})
            if "prompt" in (checker.get_instruction_args() or {}):
                checker.build_description(prompt=row["prompt"])
            found.append(checker.check_following)
        return found

    def ask(row: Row) -> str:
        text = row.get("prompt")
        if not isinstance(text, str):
            raise DataError("the row has no prompt; rows of IFEval have prompt, instruction_id_list and kwargs")
        try:
            for check in checkers(row):
                check("Hello.")
        except LookupError as error:
            data = re.search(r"Resource '?\W*([\w/]+)", str(error))
            raise ConfigError(
                f"IFEval needs data of NLTK to split sentences, and they are not installed; download them once with "
                f"python -m nltk.downloader {data[1] if data else 'punkt_tab'}"
            ) from None
        return text

    def score(response: str, row: Row) -> Scores:
        variants = loose_variants(response)
        checks = checkers(row)
        return {
            "inst_level_strict": [float(bool(response.strip()) and check(response)) for check in checks],
            "inst_level_loose": [float(any(text.strip() and check(text) for text in variants)) for check in checks],
        }

    whole = {"inst_level_strict": "prompt_level_strict", "inst_level_loose": "prompt_level_loose"}
    return Task("ifeval", ask, score, 1280, whole=whole)


def loose_variants(response: str) -> list[str]:
    """A response whole, without its first line, its last line or both, each with and without asterisks."""
    lines = response.split("\n")
    parts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text for part in parts for text in (part, part.replace("*", ""))]


# -- RewardBench ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
    },
}
"""Subsets of each section of RewardBench with their weights; `math-prm` counts as much as all code subsets together
(arXiv:2403.13787)."""


def rewardbench(subsets: Sequence[str], right: Sequence[float]) -> dict[str, Estimate]:
    """Accuracy on pairs by section and subset; `overall` is the mean of the sections.

    Args:
        subsets: The subset of each pair; an empty string for none.
        right: 1 where the chosen response has the higher score; a tie is 0.
    """
    groups: dict[str, list[float]] = {}
    for subset, value in zip(subsets, right, strict=True):
        groups.setdefault(subset, []).append(value)
    each = {subset: mean(values) for subset, values in groups.items()}
    sections = {}
    for section, weights in SECTIONS.items():
        if there := {subset: weight for subset, weight in weights.items() if subset in each}:
            total = sum(there.values())
            value = sum(weight * each[subset].value for subset, weight in there.items()) / total
            error = math.hypot(*(weight * each[subset].error for subset, weight in there.items())) / total
            sections[section] = Estimate(value, error, sum(each[subset].count for subset in there))
    found = dict(sections)
    if len(sections) == len(SECTIONS):
        value = sum(one.value for one in sections.values()) / len(sections)
        error = math.hypot(*(one.error for one in sections.values())) / len(sections)
        found["overall"] = Estimate(value, error, sum(one.count for one in sections.values()))
    return {**found, "all pairs": mean(right), **{name: one for name, one in sorted(each.items()) if name}}


# -- tasks from YAML files ------------------------------------------------------------------------------------------

_PLACE = re.compile(r"\{(\w+)\}")
_KEYS = ("prompt", "answer", "score", "max_tokens", "system")


def read_task(path: Path) -> Task:
    """Read a task from a YAML file with the keys `prompt`, `answer`, `score`, `max_tokens` and `system`.

    `prompt` is a text with names of columns in braces, and `answer` a column. `score` is `exact`, `number` (compares
    the last number of the response), `contains`, or the dotted name of a function that takes the response and the row
    and returns a number.

    Args:
        path: The file.

    Raises:
        ConfigError: If a key is unknown, missing or has a value of the wrong type.
    """
    settings = read_mapping(path)
    if unknown := set(settings) - set(_KEYS):
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]!r}; known keys are {', '.join(_KEYS)}")

    def text(key: str) -> str | None:
        value = settings.get(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{path}: {key} is {value!r:.60}; it must be text")
        return value

    template, column, system, how = text("prompt"), text("answer"), text("system"), text("score") or "exact"
    if not template:
        raise ConfigError(f"{path}: prompt is missing; set it, for example prompt: 'Question: {{question}}'")
    if how in _MATCHES and not column:
        raise ConfigError(f"{path}: score {how} compares the response with a column; set answer to its name")
    if how not in _MATCHES and "." not in how:
        raise ConfigError(
            f"{path}: score is {how!r}; it must be one of {', '.join(_MATCHES)}, or a function as module.name"
        )
    budget = settings.get("max_tokens", 256)
    if not isinstance(budget, int):
        raise ConfigError(f"{path}: max_tokens is {budget!r:.60}; it must be a whole number")
    check_whole(f"{path}: max_tokens", budget)
    function = None if how in _MATCHES else imported(how, f"{path}: score")

    def cell(row: Row, name: str) -> str:
        if row.get(name) is None:
            raise DataError(f"{path}: the row has no column {name!r}; its columns are {', '.join(map(str, row))}")
        return str(row[name])

    def ask(row: Row) -> str:
        if column:
            cell(row, column)
        return _PLACE.sub(lambda place: cell(row, place[1]), template)

    def score(response: str, row: Row) -> Scores:
        if function is None:
            return {how: [float(_MATCHES[how](response, cell(row, str(column))))]}
        value = function(response, row)
        if isinstance(value, str) or not math.isfinite(float(value)):
            raise ConfigError(f"{path}: {how} returned {value!r:.60}; it must return a finite number")
        return {how.rpartition(".")[2]: [float(value)]}

    return Task(path.stem, ask, score, budget, system=system)


def _exact(response: str, answer: str) -> bool:
    return " ".join(response.split()) == " ".join(answer.split())


def _last_number(response: str, answer: str) -> bool:
    numbers = _NUMBER.findall(response)
    return bool(numbers) and _value(numbers[-1]) == _value(answer)


def _contains(response: str, answer: str) -> bool:
    return answer.casefold() in response.casefold()


_MATCHES = {"exact": _exact, "number": _last_number, "contains": _contains}
