"""A filter of data and of generated answers by rules: terms, regular expressions, classifiers, judges."""

from rlhf_lightning.filtering.filter import Filter, FilterRules
from rlhf_lightning.filtering.reward import FilterReward
from rlhf_lightning.filtering.row_filter import RuleFilter
from rlhf_lightning.filtering.rule_file import read_rules
from rlhf_lightning.filtering.rules import Classifier, FilterText, JudgeRule, Pattern, Rule, Terms

__all__ = [
    "Classifier",
    "Filter",
    "FilterReward",
    "FilterRules",
    "FilterText",
    "JudgeRule",
    "Pattern",
    "Rule",
    "RuleFilter",
    "Terms",
    "read_rules",
]
