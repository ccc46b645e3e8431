"""Rules of a filter: terms, a regular expression, a classifier, a judge. Settings, and what applies them to texts."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import regex

from rlhf_lightning.environments.user_calls import check_limit
from rlhf_lightning.errors import ConfigError, UserError, check_dtype, check_whole, first_line, short
from rlhf_lightning.rewards.base import check_finite
from rlhf_lightning.rewards.judge import SYSTEM, fenced, schema
from rlhf_lightning.rewards.judge_client import Judge, Question
from rlhf_lightning.text_search.normalization import Normalizer
from rlhf_lightning.text_search.terms import TermSearch, is_term, read_terms
from rlhf_lightning.types import FILTER_ACTIONS, JSON

log = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant", "rejected", "tool", "other")
"""Roles of the texts that a rule can be restricted to; `filtering.rows` says which text has which."""
FAILURES = ("fail", "skip", "match")
MOST_MATCHES = 20
"""Largest number of matches of a regular expression in a text that are recorded."""
LONGEST = 200
"""Number of characters at which recorded text is cut off."""
TASK = "You decide whether a text breaks a rule. The rubric is the rule."


@dataclass(frozen=True)
class FilterText:
    """A text to check.

    Args:
        text: The text.
        role: One of `ROLES`; None if it is unknown, so that every rule applies.
        where: Place in its row.
        label: File and line, for error messages.

    Example:
        >>> FilterText("Hello", "user").role
        'user'
    """

    text: str
    role: str | None = None
    where: str = ""
    label: str = "the text"


@dataclass(frozen=True)
class Found:
    """A match of a rule.

    Args:
        text: What matched.
        score: Probability or share of votes, if the rule has one.
        failure: Why the rule could not be applied, if that counts as a match.

    Example:
        >>> Found("credit card").score
    """

    text: str
    score: float | None = None
    failure: str = ""


Matcher = Callable[[Sequence[FilterText]], list[list[Found]]]
"""Applies a rule: returns the matches in each text."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Base class of rules.

    Args:
        name: Name in counts, in the file of removed rows, and in metrics.
        action: What is done with a text that matches: `mark`, `drop` or `block`.
        roles: Apply the rule only to texts of these roles: `system`, `user`, `assistant`, `rejected` (the worse answer
            of a pair), `tool`, `other` (text that is no message). By default to all.

    Raises:
        ConfigError: If a value is unknown.

    Example:
        See the subclasses.
    """

    name: str
    action: str = "drop"
    roles: list[str] | None = None

    def __post_init__(self) -> None:
        if not regex.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(
                f"the name of a rule is {self.name!r}; it must consist of letters, digits, _, . and -, because metrics "
                "are named after it"
            )
        self.require(self.action in FILTER_ACTIONS, f"action is {self.action!r}; it must be mark, drop or block")
        for role in self.roles or ():
            self.require(role in ROLES, f"roles has {role!r}; the roles are {', '.join(ROLES)}")
        self.require(self.roles != [], "roles is empty, so it would apply to no text; leave it out for all roles")

    def require(self, condition: bool, message: str) -> None:
        """Raise `ConfigError` with the name of the rule unless a condition holds."""
        if not condition:
            raise ConfigError(f"the rule {self.name}: {message}")

    @property
    def files(self) -> list[Path]:
        """Files and model folders that the rule reads."""
        return []

    @abstractmethod
    def build(self) -> Matcher:
        """Load what the rule needs, and return what applies it."""


@dataclass(frozen=True, kw_only=True)
class FallibleRule(Rule):
    """Base class of rules that can fail on a text.

    Args:
        on_failure: What follows if the rule cannot be applied to a text: `fail` (an error), `skip` (the rule does not
            match; a warning counts such texts) or `match` (the text is treated as a match).

    Raises:
        ConfigError: If a value is unknown.

    Example:
        See the subclasses.
    """

    on_failure: str = "fail"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.on_failure in FAILURES, f"on_failure is {self.on_failure!r}; it must be one of {', '.join(FAILURES)}"
        )

    def failed(self, text: FilterText, reason: str, remedy: str) -> list[Found]:
        """What a failure on a text means; raises `UserError` with `on_failure: fail`."""
        message = f"the rule {self.name} cannot be applied to {text.label}: {reason}"
        if self.on_failure == "fail":
            raise UserError(f"{message}. {remedy}, or set on_failure of the rule: skip, or match")
        if self.on_failure == "match":
            return [Found(text.text, failure=reason)]
        log.warning("%s. The rule is skipped for this text", message)
        return []


@dataclass(frozen=True, kw_only=True)
class Terms(Rule):
    """Words and phrases.

    They match in any case and whatever the white space between words, and only as whole words. Compatible characters
    are equal and invisible ones are ignored (see `Normalizer`).

    Args:
        terms: The terms.
        file: A text file with a term on each line, added to `terms`.
        ignore_case: Match in any case.
        whole_words: Do not match within longer words, such as `class` in `classic`.

    Raises:
        ConfigError: If there are no terms, one of them is empty, or the file cannot be read.

    Example:
        >>> find = Terms(name="cards", terms=["credit card"]).build()
        >>> find([FilterText("My CREDIT\\ncard. My credit cards.")])
        [[Found(text='CREDIT\\ncard', score=None, failure='')]]
    """

    terms: list[str] = field(default_factory=list)
    file: str | None = None
    ignore_case: bool = True
    whole_words: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        terms = self.all_terms()
        self.require(bool(terms), "it has no terms; give terms, or a file with a term on each line")
        for term in terms:
            self.require(
                isinstance(term, str) and is_term(term),
                f"the term {term!r} is empty or not a text; remove it, or put it between quotes",
            )

    @property
    def files(self) -> list[Path]:
        return [Path(self.file).expanduser()] if self.file else []

    def all_terms(self) -> list[str]:
        """The terms, with those of the file."""
        return [*self.terms, *(read_terms(self.file, f"the rule {self.name}") if self.file else [])]

    def build(self) -> Matcher:
        search = TermSearch(self.all_terms(), self.ignore_case, self.whole_words)

        def find(texts: Sequence[FilterText]) -> list[list[Found]]:
            return [[Found(one.text[slice(*span)]) for span in search.find(one.text)] for one in texts]

        return find


@dataclass(frozen=True, kw_only=True)
class Pattern(FallibleRule):
    r"""A regular expression, as the package regex reads it (a superset of Python's `re`).

    Args:
        pattern: The expression.
        ignore_case: Match in any case.
        normalize: Search in the text with compatible characters made equal and invisible ones removed (see
            `Normalizer`); with False in the text as it is, for example for invisible characters themselves.
        timeout: Seconds of processor time that the search in one text may take. Some expressions take years on some
            texts; a search that takes longer is a failure, see `on_failure`.

    Raises:
        ConfigError: If the expression is invalid, or matches the empty text and therefore every text.

    Example:
        >>> find = Pattern(name="mail", pattern=r"[\w.+-]+@[\w-]+\.\w+").build()
        >>> find([FilterText("Write to ann@example.org.")])
        [[Found(text='ann@example.org', score=None, failure='')]]
    """

    pattern: str
    ignore_case: bool = False
    normalize: bool = True
    timeout: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(f"the rule {self.name}: timeout", self.timeout)
        compiled = self._compiled()
        try:
            everything = compiled.search("", timeout=self.timeout) is not None
        except TimeoutError:
            everything = False
        self.require(
            not everything, f"the pattern {short(self.pattern)} matches the empty text, so it would match every text"
        )

    def _compiled(self) -> "regex.Pattern[str]":
        try:
            return regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"the rule {self.name}: the pattern {short(self.pattern)} is not a valid regular expression: "
                f"{first_line(error)}"
            ) from None

    def build(self) -> Matcher:
        compiled, normalizer = self._compiled(), Normalizer(fold_case=False, join_space=False)

        def find_in(one: FilterText) -> list[Found]:
            found: list[Found] = []
            try:
                searched = normalizer.normalized(one.text) if self.normalize else one.text
                for match in compiled.finditer(searched, timeout=self.timeout):
                    span = normalizer.span(one.text, *match.span()) if self.normalize else match.span()
                    found.append(Found(one.text[slice(*span)]))
                    if len(found) == MOST_MATCHES:
                        break
            except TimeoutError:
                reason = f"the pattern {short(self.pattern)} takes longer than {self.timeout:g} s of processor time"
                remedy = "Avoid repetitions within repetitions, raise timeout"
                return found or self.failed(one, reason, remedy)
            return found

        return lambda texts: [find_in(one) for one in texts]


@dataclass(frozen=True, kw_only=True)
class Classifier(Rule):
    """A sequence classifier of transformers; a text matches if the probability of a label reaches a threshold.

    Args:
        classifier: Folder or Hub id of the classifier, with its tokenizer.
        label: Name of the label, as in `id2label` of its config.
        threshold: Smallest probability that matches, above 0.
        batch_size: Number of texts that are classified at once.
        dtype: Data type of the weights.
        device: Device of the classifier.

    Raises:
        ConfigError: If a value is out of range.

    Example:
        >>> rule = Classifier(name="toxic", classifier="classifiers/toxicity", label="toxic", threshold=0.8)
    """

    classifier: str
    label: str
    threshold: float = 0.5
    batch_size: int = 16
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self)
        check_whole(f"the rule {self.name}: batch_size", self.batch_size)
        check_dtype(self.dtype)

    @property
    def files(self) -> list[Path]:
        return [Path(self.classifier).expanduser()]

    def build(self) -> Matcher:
        from rlhf_lightning.models.classifier import TextClassifier

        model = TextClassifier(self.classifier, self.label, self.dtype)
        try:
            model.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"the rule {self.name}: device {self.device!r}: {first_line(error)}") from None

        def find(texts: Sequence[FilterText]) -> list[list[Found]]:
            values = model.probabilities([one.text for one in texts], self.batch_size)
            return [
                [Found(one.text, value)] if value >= self.threshold else []
                for one, value in zip(texts, values, strict=True)
            ]

        return find


@dataclass(frozen=True, kw_only=True)
class JudgeRule(FallibleRule):
    """A judge that says whether a text breaks a rule in words; see docs/judges.md for its endpoint.

    Texts are fenced as in `JudgeReward`. A failed vote is left out if other votes of the text succeed.

    Args:
        judge: The endpoint, and how it is asked.
        rubric: The rule, in words.
        threshold: Smallest share of the votes that matches, above 0.

    Raises:
        ConfigError: If a value is out of range, or the rubric is empty.

    Example:
        >>> judge = Judge("http://127.0.0.1:8000/v1", "Qwen/Qwen3-8B", key_variable="", cache="runs/judge")
        >>> rule = JudgeRule(name="advice", judge=judge, rubric="The text gives medical advice.")
    """

    judge: Judge
    rubric: str
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self)
        self.require(bool(self.rubric.strip()), "the rubric is empty; say what a text must not do")

    def build(self) -> Matcher:
        client = self.judge.build()

        def find_in(one: FilterText, values: list[float], failures: list[str]) -> list[Found]:
            if not values:
                return self.failed(one, failures[0], "Run the same command again, change the judge's settings")
            share = fmean(values)
            return [Found(one.text, share)] if share >= self.threshold else []

        def find(texts: Sequence[FilterText]) -> list[list[Found]]:
            asked = [one for one in texts if one.text.strip()]
            votes = iter(client.ask([self._question(one) for one in asked]))
            found = []
            for one in texts:
                row = next(votes) if one.text.strip() else []
                values = [vote.value for vote in row if vote.value is not None]
                found.append(find_in(one, values, [vote.failure for vote in row]) if row else [])
            return found

        return find

    def _question(self, one: FilterText) -> Question:
        answer = '{"reason": "one or two sentences", "breaks_rule": true or false}.'
        return Question(
            SYSTEM.format(task=TASK, rubric=self.rubric, answer=answer),
            fenced({"text": one.text}, "Say whether the text breaks the rule."),
            schema({"reason": {"type": "string"}, "breaks_rule": {"type": "boolean"}}),
            _breaks_rule,
            one.label,
        )


def _breaks_rule(answer: Mapping[str, JSON]) -> float | None:
    found = answer.get("breaks_rule")
    return float(found) if isinstance(found, bool) else None


def _check_share(rule: Classifier | JudgeRule) -> None:
    """Raise `ConfigError` for a threshold that everything or nothing reaches."""
    check_finite(f"the rule {rule.name}: threshold", rule.threshold)
    rule.require(0 < rule.threshold <= 1, f"threshold is {rule.threshold}; it must be above 0 and at most 1")
