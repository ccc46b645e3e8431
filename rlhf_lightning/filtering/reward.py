"""A filter as a reward: a penalty for responses that match a rule."""

import logging
from collections.abc import Sequence

from torch import nn

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.filtering.filter import Filter, FilterRules
from rlhf_lightning.filtering.rows import message_texts
from rlhf_lightning.filtering.rule_file import read_rules
from rlhf_lightning.filtering.rules import FilterText, Terms
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.types import Episode, Row

log = logging.getLogger(__name__)


class FilterReward(Reward):
    """`penalty` for an episode in which a message of the policy is dropped or blocked by a filter, else 0.

    Marks do not change the score. Per round the fraction of episodes is logged that a rule drops or blocks
    (`reward_NAME_filtered`), that is only marked (`reward_NAME_marked`), and that matches each rule
    (`reward_NAME_RULE`). All of the policy's messages are checked, with their reasoning and tool calls. With `weight:
    0` the filter is only measured.

    Args:
        rules: File of rules; see `read_rules`.
        penalty: Score of an episode that is dropped or blocked, below 0.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.

    Raises:
        ConfigError: If the file is wrong, or `penalty` is not negative.

    Example:
        >>> reward = FilterReward("rules.yaml", penalty=-2.0)  # doctest: +SKIP
    """

    def __init__(self, rules: str, penalty: float = -1.0, weight: float = 1.0, name: str = "filter") -> None:
        super().__init__(weight, name)
        check_finite(f"the penalty of the reward {name}", penalty)
        if penalty >= 0:
            raise ConfigError(f"the penalty of the reward {name} is {penalty}; it must be below 0")
        self.rules, self.penalty = read_rules(rules), penalty
        if taken := {"filtered", "marked"} & {rule.name for rule in self.rules.rules}:
            raise ConfigError(f"{rules}: a rule has the name {min(taken)!r}, which is that of a metric; rename it")

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        """Warn of terms that no response can contain. The file may be for data, too, so they are not refused."""
        if rows:
            return  # the terms do not depend on rows
        for rule in self.rules.rules:
            for term in rule.all_terms() if isinstance(rule, Terms) else ():
                if found := next((text for text in texts if text.lower() in term.lower()), None):
                    log.warning(
                        "The reward %s: the term %r of the rule %s matches no response, because %r is removed from "
                        "responses before they are checked",
                        self.name,
                        term,
                        rule.name,
                        found,
                    )

    def build(self, renderer: Renderer) -> "FilterScores":
        return FilterScores(self, self.rules, self.rules.build())


class FilterScores:
    """The scores of a filter.

    Args:
        reward: The settings.
        rules: The rules.
        filter: The filter.
    """

    models: Sequence[nn.Module] = ()

    def __init__(self, reward: FilterReward, rules: FilterRules, filter: Filter) -> None:
        self.reward, self.rules, self.filter = reward, rules, filter

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """See `Reward.score`."""
        name = self.reward.name
        decisions = self.filter.check_rows([self._texts(episode) for episode in episodes])
        for episode, decision in zip(episodes, decisions, strict=True):
            episode.details[f"{name}_filtered"] = float(decision.withheld)
            episode.details[f"{name}_marked"] = float(decision.action == "mark")
            for rule in self.rules.rules:
                episode.details[f"{name}_{rule.name}"] = float(rule.name in decision.rules)
        return [self.reward.penalty if decision.withheld else 0.0 for decision in decisions]

    def _texts(self, episode: Episode) -> list[FilterText]:
        messages = [message for message in episode.responses if message["role"] == "assistant"]
        return message_texts(messages, episode.label)
