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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Callable[..., Any]:
    """The command of a setting, its uninterrupted result, and the calls made in it; computed once."""
    made: dict[Setting, Any] = {}

    def make(*of: Any) -> Any:
        setting = Setting(*of)
        if setting not in made:
            folder = tmp_path_factory.mktemp(setting.kind)
            build_model(session_tokenizer).save_pretrained(folder / "base")
            session_tokenizer.save_pretrained(folder / "base")
            args = command_of(setting, str(folder / "base"), folder)
            complete(
                [*args, setting.flag, str(folder / "whole")],
                folder / "whole.txt",
                before=within(setting, {}),
                limit=LIMIT,
            )
            count = within(setting, {kind: counting(kind, folder) for kind in setting.stages})
            begun = time.monotonic()
            complete([*args, setting.flag, str(folder / "counted")], folder / "counted.txt", before=count, limit=LIMIT)
            seconds = time.monotonic() - begun
            expected = results(setting, folder / "whole")
            assert results(setting, folder / "counted") == expected
            ranks = product(setting.stages, range(setting.devices))
            calls = {(kind, rank): json.loads((folder / f"{kind}-{rank}.json").read_text()) for kind, rank in ranks}
            made[setting] = args, expected, {"calls": calls, "seconds": seconds}
        return made[setting]

    return make
