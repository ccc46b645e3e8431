"""Fixtures for interrupted runs."""

import json
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from tests.helpers.models import build_model
from tests.helpers.resume import (
    LIMIT,
    Setting,
    command_of,
    counting,
    results,
    within,
)
from tests.helpers.runs import complete


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Callable[..., Any]:
    """The command of a setting, its uninterrupted result, and the calls made in it; computed once.

    No call is counted in the runs that tests compare with it, so a count that changed the result would be seen.
    """
    made: dict[Setting, Any] = {}

    def make(*of: Any) -> Any:
        setting = Setting(*of)
        if setting not in made:
            folder = tmp_path_factory.mktemp(setting.kind)
            build_model(session_tokenizer).save_pretrained(folder / "base")
            session_tokenizer.save_pretrained(folder / "base")
            args = command_of(setting, str(folder / "base"), folder)
            count = within(setting, {kind: counting(kind, folder) for kind in setting.stages})
            begun = time.monotonic()
            complete([*args, setting.flag, str(folder / "whole")], folder / "whole.txt", before=count, limit=LIMIT)
            seconds = time.monotonic() - begun
            ranks = product(setting.stages, range(setting.devices))
            calls = {(kind, rank): json.loads((folder / f"{kind}-{rank}.json").read_text()) for kind, rank in ranks}
            made[setting] = args, results(setting, folder / "whole"), {"calls": calls, "seconds": seconds}
        return made[setting]

    return make
