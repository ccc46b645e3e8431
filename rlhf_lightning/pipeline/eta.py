"""What a pipeline says of time: how long it has run, which stages are left, and how long they took before."""

import time
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.files import duration
from rlhf_lightning.pipeline.plan import Plan, Stage


class Eta:
    """Started with the pipeline.

    Args:
        plan: its stages. entries: of the manifest as the pipeline found it, with the seconds of stages that ran before.
    """

    def __init__(self, plan: Plan, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.started = time.monotonic()
        self.names = [stage.name for stage in plan.stages]
        self.known = {name: float(entry["seconds"]) for name, entry in entries.items() if entry.get("seconds")}

    def before(self, stage: Stage) -> str:
        """What to say when a stage begins: time since the start, and what is left after it, with its last duration."""
        rest = self.names[self.names.index(stage.name) + 1 :]
        said = [f"{duration(time.monotonic() - self.started)} so far"]
        if stage.name in self.known:
            said.append(f"took {duration(self.known[stage.name])} last time")
        if rest:
            said.append(f"then {', '.join(rest)}")
        if rest and all(name in self.known for name in (stage.name, *rest)):
            said.append(f"about {duration(sum(self.known[name] for name in (stage.name, *rest)))} left")
        return "; ".join(said)
