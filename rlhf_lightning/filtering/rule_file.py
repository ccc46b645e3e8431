"""Reads the file of a filter's rules."""

import dataclasses
import hashlib
import re
from pathlib import Path

from rlhf_lightning.errors import ConfigError, UserError, quoted
from rlhf_lightning.files import hash_model
from rlhf_lightning.filtering.filter import REFUSAL, FilterRules
from rlhf_lightning.filtering.rules import Classifier, JudgeRule, Pattern, Rule, Terms
from rlhf_lightning.types import JSON
from rlhf_lightning.yaml_files import find_line, read_mapping

KINDS: dict[str, type[Rule]] = {
    "terms": Terms,
    "file": Terms,
    "pattern": Pattern,
    "classifier": Classifier,
    "judge": JudgeRule,
}
"""Kind of a rule by the key that says it."""


def read_rules(path: str | Path) -> FilterRules:
    """Read a YAML file with `rules`, a mapping of names to rules, and optionally `refusal`.

    A rule has the arguments of `Terms`, `Pattern`, `Classifier` or `JudgeRule`. Files and folders in it are relative to
    the current folder.

    Args:
        path: The file.

    Raises:
        ConfigError: If the file cannot be read, has no rules, or a rule is wrong; with file and line.

    Example:
        >>> filter = read_rules("rules.yaml").build()  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    settings = read_mapping(path, "the rules of a filter: ")
    if unknown := settings.keys() - {"rules", "refusal"}:
        name = sorted(unknown)[0]
        raise ConfigError(f"{find_line(path, [name])}: {name} is unknown; the file has rules, and refusal if you wish")
    listed = settings.get("rules")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(
            f"{find_line(path, ['rules'])}: there are no rules, so everything would pass; give a mapping of names to "
            "rules, for example rules: {cards: {terms: [credit card], action: drop}}"
        )
    refusal = settings.get("refusal", REFUSAL)
    if not isinstance(refusal, str):
        raise ConfigError(f"{find_line(path, ['refusal'])}: refusal is {refusal!r}; it must be a text")
    rules = [_rule(path, str(name), value) for name, value in listed.items()]
    try:
        return FilterRules(rules, refusal)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rule(path: Path, name: str, value: JSON) -> Rule:
    from jsonargparse import ArgumentError, ArgumentParser

    where = find_line(path, ["rules", name])
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: the rule {name} is {value!r}; it must be a mapping, for example {{terms: [spam]}}")
    kinds = {KINDS[key] for key in value if key in KINDS}
    if len(kinds) != 1:
        raise ConfigError(
            f"{where}: the rule {name} must have one of terms or file, pattern, classifier, and judge; it has "
            f"{quoted(value)}. Make a rule of each"
        )
    [kind] = kinds
    known = [argument.name for argument in dataclasses.fields(kind) if argument.name != "name"]
    for key in value:
        if key not in known:
            raise ConfigError(
                f"{find_line(path, ['rules', name, str(key)])}: the rule {name} has the key {key!r}, which is unknown; "
                f"a rule of this kind has {', '.join(known)}"
            )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "rule")
    try:
        arguments = parser.instantiate_classes(parser.parse_object({"rule": {"name": name, **value}}))
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ArgumentError as error:
        # For example: Parser key "rule.terms": Expected a <class 'str'>. Got value: False
        reason = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split())).replace("rule.", "")
        raise ConfigError(
            f"{where}: the rule {name}: {reason.replace('Parser key', 'key')} (a text such as no or 5 must be quoted)"
        ) from None
    found: Rule = arguments.rule
    return found


def fingerprint(path: str | Path) -> str:
    """SHA-256 of everything that a filter's decisions depend on: the file of rules, and what its rules read.

    Args:
        path: The file.

    Raises:
        ConfigError: If the file cannot be read; see `read_rules`.
    """
    rules = read_rules(path)
    digest = hashlib.sha256(Path(path).expanduser().read_bytes())
    for rule in rules.rules:
        for file in rule.files:
            digest.update(f"{file} {hash_model(file)}".encode())
    return digest.hexdigest()
