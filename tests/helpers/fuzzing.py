"""Runs commands in this process on malformed input: defines a clear error, and counts cases by kind and outcome."""

import io
import json
import os
import re
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from rlhf_lightning.cli.main import main
from rlhf_lightning.files import write_json
from tests.helpers.cli import stage_config
from tests.helpers.models import build_model

LIMIT = 60
"""Seconds that a case may take; none is near it."""
FINDING = bool(os.environ.get("RLHF_FUZZ_SHRINK"))
"""Shrink a case that fails to a small one: for looking for faults by hand."""


REWARD = [{"class_path": "rlhf_lightning.rewards.KeywordReward", "init_args": {"keywords": ["a"]}}]


class Hang(Exception):
    """A case that did not end in time."""


@dataclass
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@dataclass
class Tally:
    """Cases by kind and outcome; repeated cases count once."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, kind: str, outcome: str, case: Any) -> None:
        """Count one case."""
        if (text := f"{kind}:{case!r}") not in self.seen:
            self.seen.add(text)
            self.counts.setdefault(kind, Counter())[outcome] += 1


def write_report(tally: Tally) -> None:
    """Write the counts into the report that RLHF_FUZZ_REPORT names, replacing those of the same kinds."""
    if not (place := os.environ.get("RLHF_FUZZ_REPORT")):
        return
    path = Path(place)
    table = json.loads(path.read_text())["outcomes"] if path.exists() else {}
    table |= {kind: dict(sorted(found.items())) for kind, found in tally.counts.items()}
    total = sum(sum(found.values()) for found in table.values())
    write_json(path, {"malformed_inputs": total, "outcomes": dict(sorted(table.items()))})


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `Hang` if the block takes longer."""

    def ring(*_: Any) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rlhf(*args: Any) -> Result:
    """Run a command in this process: its exit code and output. Exceptions that are not the project's are raised."""
    out, err = io.StringIO(), io.StringIO()
    with time_limit(LIMIT), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            return Result(stop.code if isinstance(stop.code, int) else 1, out.getvalue(), err.getvalue())
    raise AssertionError("the command did not exit")


def refused(result: Result, *names: str) -> str:
    """The message of a refused command: exit code 2, no traceback, and one of `names` in the message."""
    assert result.code == 2, f"exit code {result.code}\n{result.out[-2000:]}\n{result.err[-2000:]}"
    assert "Traceback" not in result.err + result.out, result.err
    _, *found = re.split(r"^error: ", result.err, flags=re.MULTILINE)
    assert found, result.err
    message = found[-1].strip()
    assert len(message) > 15, result.err
    assert not names or any(name in message for name in names), f"none of {names} in: {message}"
    return message


def bad_rows(result: Result) -> list[dict[str, str]]:
    """The rows that `data check --json` lists as bad; empty if it refuses the whole file."""
    if result.code == 2:
        return []
    return json.loads(result.out)["bad"]


def fuzz(cases: SearchStrategy, check: Callable[[Any], None], count: int) -> None:
    """Check a number of cases, the same ones in every run."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, *((Phase.shrink,) if FINDING else ())),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases)
    def run(case: Any) -> None:
        check(case)

    run()


class Place:
    """A folder with good files and one damaged file."""

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self.case = root, root / "case"
        self.base = str(root / "base")
        build_model(tokenizer).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)

    def clear(self) -> Path:
        """The folder of the case, empty."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        return self.case

    def config(self, kind: str, **data: Any) -> dict[str, Any]:
        """A config that runs."""
        settings = stage_config(kind, self.base, self.root, **data)
        settings["trainer"] |= {"max_steps": 1, "enable_progress_bar": False}
        if kind == "policy":
            settings["model"]["rewards"] = REWARD
        return settings
