"""The filter: applies rules to texts, and decides about each."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.errors import ConfigError, cut
from rlhf_lightning.filtering.rules import LONGEST, FilterText, Matcher, Rule
from rlhf_lightning.types import FilterDecision, FilterMatch

REFUSAL = "This text was withheld by a filter."


@dataclass(frozen=True)
class FilterRules:
    """The rules of a filter.

    Args:
        rules: The rules, each with a name of its own.
        refusal: Text that is shown instead of an answer that is withheld.

    Raises:
        ConfigError: If there are no rules, or two have the same name.

    Example:
        >>> rules = FilterRules([Terms(name="cards", terms=["credit card"])])
        >>> rules.build().check("My credit card is green.").action
        'drop'
    """

    rules: Sequence[Rule]
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        if not names:
            raise ConfigError("a filter has no rules, so it would let everything pass; give at least one rule")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two rules of a filter have the name {twice[0]!r}; rename one")
        if not self.refusal.strip():
            raise ConfigError("refusal is empty; give the text that is shown instead of an answer that is withheld")

    def build(self) -> "Filter":
        """Load classifiers and check the keys of judges.

        Raises:
            ConfigError: If a rule cannot be loaded.
        """
        return Filter(self, [rule.build() for rule in self.rules])


class Filter:
    """Applies the rules of a filter.

    Args:
        rules: The settings.
        matchers: What applies each rule.

    Example:
        >>> filter = FilterRules([Terms(name="spam", terms=["buy now"], action="mark")]).build()
        >>> filter.check("Buy now!").rules
        ['spam']
    """

    def __init__(self, rules: FilterRules, matchers: Sequence[Matcher]) -> None:
        self.rules, self.matchers = rules, matchers

    @property
    def refusal(self) -> str:
        """Text that is shown instead of an answer that is withheld."""
        return self.rules.refusal

    def check(self, text: str, role: str | None = None) -> FilterDecision:
        """Decide about a text.

        Args:
            text: The text.
            role: `user` for what is asked and `assistant` for an answer, so that rules with `roles` apply to the right
                one; None to apply every rule.

        Raises:
            UserError: If a rule cannot be applied, and its `on_failure` is `fail`.
        """
        [decision] = self.check_rows([[FilterText(text, role)]])
        return decision

    def check_rows(self, rows: Sequence[Sequence[FilterText]]) -> list[FilterDecision]:
        """Decide about rows of several texts each.

        Args:
            rows: The texts of each row.

        Returns:
            A decision for each row, over all of its texts.

        Raises:
            UserError: If a rule cannot be applied, and its `on_failure` is `fail`.
        """
        matches: list[list[FilterMatch]] = [[] for _ in rows]
        for rule, matcher in zip(self.rules.rules, self.matchers, strict=True):
            chosen = [
                (number, one)
                for number, row in enumerate(rows)
                for one in row
                if rule.roles is None or one.role is None or one.role in rule.roles
            ]
            for (number, one), found in zip(chosen, matcher([one for _, one in chosen]), strict=True):
                matches[number] += [
                    FilterMatch(
                        rule.name, rule.action, cut(each.text, LONGEST), one.where, one.role, each.score, each.failure
                    )
                    for each in found
                ]
        return [FilterDecision(tuple(row)) for row in matches]
