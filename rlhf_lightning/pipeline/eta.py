"""Timing of a pipeline: elapsed time, remaining stages, and estimates from the durations of the last run."""

import time
from collections.abc import Mapping

from rlhf_lightning.files import duration
from rlhf_lightning.pipeline.plan import Plan, Stage
from rlhf_lightning.report.records import StageEntry


class Eta:
    """Tracks the time of a pipeline from its start.

    Args:
        plan: The plan.
        entries: Entries of the existing manifest, with the seconds that each finished stage took.

    Example:
        >>> from pathlib import Path
        >>> stages = [Stage("sft", "sft", {}), Stage("policy", "policy", {})]
        >>> Eta(Plan("mine", stages, Path("runs/mine")), {}).before(stages[0])
        '0 s so far; then policy'
    """

    def __init__(self, plan: Plan, entries: Mapping[str, StageEntry]) -> None:
        self.started = time.monotonic()
        self.names = [stage.name for stage in plan.stages]
        self.known = {name: float(entry["seconds"]) for name, entry in entries.items() if entry.get("seconds")}

    def before(self, stage: Stage) -> str:
        """Message for the start of a stage: elapsed time, remaining stages, and estimates from the last run."""
        rest = self.names[self.names.index(stage.name) + 1 :]
        said = [f"{duration(time.monotonic() - self.started)} so far"]
        if stage.name in self.known:
            said.append(f"took {duration(self.known[stage.name])} last time")
        if rest:
            said.append(f"then {', '.join(rest)}")
        if rest and all(name in self.known for name in (stage.name, *rest)):
            said.append(f"about {duration(sum(self.known[name] for name in (stage.name, *rest)))} left")
        return "; ".join(said)
