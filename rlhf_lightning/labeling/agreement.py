"""What a labeling session says about itself: agreement of the annotators, position bias, time, and models compared."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import median

from rlhf_lightning.errors import missing_package
from rlhf_lightning.labeling.comparisons import Comparison
from rlhf_lightning.labeling.store import CHOICES, Decision, Decisions
from rlhf_lightning.objectives.intervals import wilson
from rlhf_lightning.types import JSON

VERDICTS = 4
"""Number of verdicts: the first answer, the second one, tie, both bad. A skip is no verdict."""
BOTH_BAD = 3


@dataclass(frozen=True)
class Rate:
    """A rate with its 95% Wilson interval, and the number of decisions it is measured on."""

    rate: float | None
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: float, count: int) -> "Rate":
        """The rate of `hits` among `count`."""
        low, high = wilson(hits / count if count else 0.0, count)
        return cls(hits / count if count else None, low, high, count)


@dataclass(frozen=True)
class AnnotatorFacts:
    """What one annotator did."""

    choices: dict[str, int]
    """Number of decisions by choice."""
    seconds: float
    """Median time per decision."""
    chose_a: Rate
    """How often A was chosen among the choices of A or B. The order is random, so it should be near 0.5."""


@dataclass(frozen=True)
class PairAgreement:
    """Agreement of two annotators on the comparisons that both decided."""

    annotators: tuple[str, str]
    agreed: Rate
    cohen_kappa: float | None


@dataclass(frozen=True)
class LabelReport:
    """A report on a labeling session.

    A coefficient is None if nobody decided the same comparisons, or if it is not defined because all decisions are
    equal. All of them compare four verdicts: first answer, second answer, tie, both bad; a skip is a missing value.

    Attributes:
        comparisons: Number of comparisons.
        pairs: Number of decisions that prefer one answer.
        annotators: What each annotator did, by name.
        agreement: Agreement of each two annotators.
        fleiss_kappa: Fleiss' kappa over the comparisons with `fleiss_raters` decisions.
        fleiss_raters: Number of decisions per comparison for which there are most of them; 0 if none has two.
        fleiss_count: Number of these comparisons.
        krippendorff_alpha: Krippendorff's alpha for nominal values, over all comparisons with two or more decisions.
        krippendorff_count: Number of these comparisons.
        chose_a: How often A was chosen among all choices of A or B; see `AnnotatorFacts`.
        models: For each two models, how often the first one was preferred; ties count half, two bad answers not.
    """

    comparisons: int
    pairs: int
    annotators: dict[str, AnnotatorFacts]
    agreement: list[PairAgreement]
    fleiss_kappa: float | None
    fleiss_raters: int
    fleiss_count: int
    krippendorff_alpha: float | None
    krippendorff_count: int
    chose_a: Rate
    models: dict[str, Rate]

    def record(self) -> dict[str, JSON]:
        """The report as plain values."""
        return asdict(self)


def label_report(comparisons: dict[str, Comparison], decisions: Decisions) -> LabelReport:
    """Measure a labeling session.

    Args:
        comparisons: The comparisons by id.
        decisions: The decisions.

    Raises:
        ConfigError: If two annotators decided the same comparisons and the package krippendorff is missing.
    """
    made = [decision for by in decisions.values() for decision in by.values()]
    names = [name for name, by in decisions.items() if by]
    verdicts = {name: {one.comparison: one.verdict for one in decisions[name].values()} for name in names}
    judged = {name: {key: v for key, v in found.items() if v is not None} for name, found in verdicts.items()}
    ratings = {key: [found[key] for found in judged.values() if key in found] for key in comparisons}
    several = [found for found in ratings.values() if len(found) > 1]
    raters = Counter(len(found) for found in several)
    most = max(raters, key=lambda count: (raters[count], count), default=0)
    return LabelReport(
        comparisons=len(comparisons),
        pairs=sum(decision.preferred is not None for decision in made),
        annotators={name: _facts(list(decisions[name].values())) for name in names},
        agreement=[
            found for one, other in combinations(names, 2) if (found := _agreement(one, other, judged)) is not None
        ],
        fleiss_kappa=_fleiss([found for found in several if len(found) == most]) if most else None,
        fleiss_raters=most,
        fleiss_count=raters[most],
        krippendorff_alpha=_krippendorff(judged, [key for key, found in ratings.items() if len(found) > 1]),
        krippendorff_count=len(several),
        chose_a=_chose_a(made),
        models=_models(comparisons, made),
    )


def _facts(made: Sequence[Decision]) -> AnnotatorFacts:
    counts = Counter(decision.choice for decision in made)
    return AnnotatorFacts(
        {choice: counts[choice] for choice in CHOICES}, median(one.seconds for one in made), _chose_a(made)
    )


def _chose_a(made: Sequence[Decision]) -> Rate:
    chosen = [decision.choice == "A" for decision in made if decision.choice in ("A", "B")]
    return Rate.of(sum(chosen), len(chosen))


def _agreement(one: str, other: str, judged: dict[str, dict[str, int]]) -> PairAgreement | None:
    """Agreement of two annotators; None if they decided no comparison in common."""
    import torch
    from torchmetrics.functional.classification import multiclass_cohen_kappa

    common = [key for key in judged[one] if key in judged[other]]
    if not common:
        return None
    first, second = (torch.tensor([judged[name][key] for key in common]) for name in (one, other))
    kappa = multiclass_cohen_kappa(first, second, num_classes=VERDICTS).item()
    agreed = int((first == second).sum())
    return PairAgreement((one, other), Rate.of(agreed, len(common)), _finite(kappa))


def _fleiss(ratings: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa of comparisons with equally many verdicts; None if all verdicts are equal."""
    if len({verdict for found in ratings for verdict in found}) < 2:
        return None
    import torch
    from torchmetrics.functional.nominal import fleiss_kappa

    counts = torch.tensor([[found.count(verdict) for verdict in range(VERDICTS)] for found in ratings])
    return _finite(fleiss_kappa(counts, mode="counts").item())


def _krippendorff(judged: dict[str, dict[str, int]], common: Sequence[str]) -> float | None:
    """Krippendorff's alpha for nominal values; a missing verdict is NaN."""
    values = {found[key] for found in judged.values() for key in common if key in found}
    if len(values) < 2:  # no disagreement is possible, by chance or otherwise
        return None
    try:
        import krippendorff
    except ModuleNotFoundError as error:
        raise missing_package(error, "rlhf label", "label") from None
    table = [[float(found.get(key, math.nan)) for key in common] for found in judged.values()]
    return _finite(float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")))


def _models(comparisons: dict[str, Comparison], made: Sequence[Decision]) -> dict[str, Rate]:
    """How often the first of two models was preferred, by `first over second`."""
    wins: dict[tuple[str, str], list[float]] = {}
    for decision in made:
        names = [str(one.source.get("model") or "") for one in comparisons[decision.comparison].candidates]
        verdict = decision.verdict
        if verdict is None or verdict == BOTH_BAD or names[0] == names[1] or not all(names):
            continue
        value = (1.0, 0.0, 0.5)[verdict]  # how much the first answer won
        first, second = sorted(names)
        wins.setdefault((first, second), []).append(value if names[0] == first else 1 - value)
    return {f"{one} over {other}": Rate.of(sum(found), len(found)) for (one, other), found in wins.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
