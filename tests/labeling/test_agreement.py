"""The report on a labeling session, compared with the formulas of the original papers."""

import builtins
from collections import Counter
from itertools import combinations, permutations
from typing import Any

import pytest

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.labeling.agreement import label_report
from rlhf_lightning.labeling.store import Choice, Decision, Decisions
from tests.helpers.labels import comparison

CHOICES: list[Choice] = ["A", "B", "tie", "both_bad", "skip"]
ITEMS = {comparison(index).id: comparison(index) for index in range(40)}


def made(**choices: str) -> Decisions:
    """Decisions by annotator, a letter per comparison: A, B, t(ie), x (both bad), s(kip), - (none)."""
    found: Decisions = {}
    for name, letters in choices.items():
        for index, letter in enumerate(letters):
            if letter != "-":
                choice = CHOICES["ABtxs".index(letter)]
                one = comparison(index).id
                found.setdefault(name, {})[one] = Decision(one, name, choice, 0, seconds=float(index))
    return found


def cohen(one: str, other: str) -> float:
    """Cohen 1960."""
    count = len(one)
    observed = sum(a == b for a, b in zip(one, other, strict=True)) / count
    expected = sum(one.count(v) * other.count(v) for v in set(one)) / count**2
    return (observed - expected) / (1 - expected)


def fleiss(ratings: list[str]) -> float:
    """Fleiss 1971."""
    raters = len(ratings[0])
    shares = Counter("".join(ratings))
    agreement = [sum(n * (n - 1) for n in Counter(found).values()) / (raters * (raters - 1)) for found in ratings]
    observed = sum(agreement) / len(ratings)
    expected = sum((n / (raters * len(ratings))) ** 2 for n in shares.values())
    return (observed - expected) / (1 - expected)


def krippendorff(ratings: list[str]) -> float:
    """Krippendorff 2011, from the coincidence matrix."""
    matrix: Counter[tuple[str, str]] = Counter()
    for found in ratings:
        for pair in permutations(range(len(found)), 2):
            matrix[found[pair[0]], found[pair[1]]] += 1 / (len(found) - 1)  # type: ignore[assignment]
    totals: Counter[str] = Counter()
    for (value, _), count in matrix.items():
        totals[value] += count
    n = sum(totals.values())
    observed = sum(count for (a, b), count in matrix.items() if a != b) / n
    expected = sum(totals[a] * totals[b] for a in totals for b in totals if a != b) / (n * (n - 1))
    return 1 - observed / expected


ANN = "AABBtxABABtAABxxBABA"
BEN = "AABAtxABBBtAABxtBBBA"
CLEO = "ABBBttABABtABBxxBABA"


def test_coefficients_are_those_of_the_papers() -> None:
    report = label_report(ITEMS, made(Ann=ANN, Ben=BEN, Cleo=CLEO))
    by = {pair.annotators: pair for pair in report.agreement}
    for (one, first), (other, second) in combinations({"Ann": ANN, "Ben": BEN, "Cleo": CLEO}.items(), 2):
        assert by[one, other].cohen_kappa == pytest.approx(cohen(first, second), abs=1e-5)
        assert by[one, other].agreed.rate == sum(a == b for a, b in zip(first, second, strict=True)) / 20
    ratings = ["".join(found) for found in zip(ANN, BEN, CLEO, strict=True)]
    # torchmetrics adds 1e-5 to the denominator.
    assert report.fleiss_kappa == pytest.approx(fleiss(ratings), abs=5e-5)
    assert (report.fleiss_raters, report.fleiss_count) == (3, 20)
    assert report.krippendorff_alpha == pytest.approx(krippendorff(ratings), abs=1e-9)


def test_missing_decisions_and_skips() -> None:
    ann, ben, cleo = "AABBtxA-s", "AABAtsAB-", "AB-BxxAB-"
    report = label_report(ITEMS, made(Ann=ann, Ben=ben, Cleo=cleo))
    ratings = ["".join(found).replace("-", "").replace("s", "") for found in zip(ann, ben, cleo, strict=True)]
    several = [found for found in ratings if len(found) > 1]
    assert report.krippendorff_alpha == pytest.approx(krippendorff(several), abs=1e-9)
    assert report.krippendorff_count == len(several) == 8
    three = [found for found in several if len(found) == 3]
    assert (report.fleiss_raters, report.fleiss_count) == (3, len(three))
    assert report.fleiss_kappa == pytest.approx(fleiss(three), abs=5e-5)
    assert report.annotators["Ann"].choices == {"A": 3, "B": 2, "tie": 1, "both_bad": 1, "skip": 1}
    assert report.annotators["Ann"].seconds == 3.5  # of 0 to 6 and 8


def test_agreement_compares_answers_and_not_positions() -> None:
    """Ann saw the answers in the other order, and prefers the same ones."""
    decisions = made(Ben="ABAB")
    decisions["Ann"] = {
        one: Decision(one, "Ann", "B" if made.choice == "A" else "A", 1, 1.0) for one, made in decisions["Ben"].items()
    }
    assert label_report(ITEMS, decisions).krippendorff_alpha == 1


def test_position_bias_and_models() -> None:
    decisions = made(Ann="AAAAAAAABBtx")
    report = label_report(ITEMS, decisions)
    assert report.chose_a.rate == 0.8
    assert report.chose_a.count == 10
    assert report.chose_a.low == pytest.approx(0.49, abs=0.005)  # Wilson
    assert report.models["m0 over m1"].rate == 8.5 / 11
    assert report.models["m0 over m1"].count == 11
    assert report.pairs == 10


def test_coefficients_that_are_not_defined() -> None:
    report = label_report(ITEMS, made(Ann="AAA", Ben="AAA"))
    assert (report.agreement[0].cohen_kappa, report.fleiss_kappa, report.krippendorff_alpha) == (None, None, None)
    alone = label_report(ITEMS, made(Ann="AB", Ben="--A"))
    assert (alone.agreement, alone.fleiss_raters, alone.krippendorff_count) == ([], 0, 0)
    assert label_report(ITEMS, {}).chose_a.rate is None


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "krippendorff":
            raise ModuleNotFoundError("No module named 'krippendorff'", name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs the package krippendorff; .*'rlhf-lightning\[label\]'"):
        label_report(ITEMS, made(Ann="AB", Ben="AA"))
