"""Threads, order and fixtures of all tests; a tiny model, its tokenizer, and the real data if it is available."""

import gc
import logging
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported. One thread, as the models are tiny; tests/processors.py tries two.
os.environ["OMP_NUM_THREADS"] = os.environ.get("RLHF_TEST_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging as transformers_logging

from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.quickstart.model import make_tokenizer
from tests.helpers.comparisons import every_comparison as compare
from tests.helpers.comparisons import first_comparison
from tests.helpers.models import TEXTS, build_model
from tests.helpers.paths import SHARED
from tests.helpers.runs import forked_stages as forked_stages
from tests.helpers.templates import THINKING

transformers_logging.disable_progress_bar()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Forked ranks would wait for the OpenMP threads of their parent, which they do not have.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


# What takes longest comes last of the slow cases, so that what breaks in minutes is seen in minutes.
LAST = ["test_packaging", "test_docs", "test_fuzz", "test_resume", "test_soak"]


def pytest_collection_finish() -> None:
    """Exclude the libraries' million objects from garbage collection, since it would make forked ranks copy them."""
    gc.collect()
    gc.freeze()


@contextmanager
def process_restored() -> Iterator[None]:
    """Restore what a run leaves behind, which would reach the next one in the same process.

    Lightning's launcher sets variables by which a run takes itself for one of several ranks; `seed_everything` sets one
    from which the ranks of every later run seed themselves again; a run that was signaled ignores further signals.
    """
    variables = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        if os.environ != variables:
            os.environ.clear()
            os.environ.update(variables)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Restore the process after a test."""
    with process_restored():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """Restore the process after the setup of a wider fixture, which comes before `process`."""
    if fixturedef.scope == "function":
        return (yield)
    with process_restored():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run whole runs after the other tests."""

    def place(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow") and item.path.stem in LAST
        return 1 + LAST.index(item.path.stem) if slow else 0

    items.sort(key=place)


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.cuda] * (d.type == "cuda"), id=d.type) for d in DEVICES])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A CPU, and a GPU if there is one."""
    return request.param


@pytest.fixture(autouse=True)
def one_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows are compared with plain ones once per kind of model and process."""
    monkeypatch.setattr(PackedForward, "_compare", first_comparison)


@pytest.fixture
def every_comparison(one_comparison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run compares, as a user's does: for tests of the comparison, and of what it might change on resume."""
    monkeypatch.setattr(PackedForward, "_compare", compare)


@pytest.fixture(scope="session")
def loggers_at_first() -> list[tuple[logging.Logger, list[logging.Handler], int, bool]]:
    """Loggers that a command sets up, as they are before any fixture of a module has run one."""
    # Its handlers keep the stderr that they find: not that of `capsys`, which is closed after its test.
    import lightning.pytorch  # noqa: F401

    loggers = [logging.getLogger(name) for name in ("rlhf_lightning", "lightning.pytorch", "py.warnings")]
    return [(one, list(one.handlers), one.level, one.propagate) for one in loggers]


@pytest.fixture(autouse=True)
def loggers_as_they_were(loggers_at_first: Any) -> None:
    """Restore the logging that a command has set up for its process."""
    for one, handlers, level, propagate in loggers_at_first:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers, which users do not have."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real data and tokenizers is not here")
    return SHARED


@pytest.fixture(scope="session")
def session_tokenizer() -> Any:
    return make_tokenizer(TEXTS * 5)


@pytest.fixture
def tokenizer(session_tokenizer: Any) -> Any:
    import copy

    return copy.deepcopy(session_tokenizer)


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return build_model(tokenizer)


@pytest.fixture
def base(tmp_path: Path, model: Any, tokenizer: Any) -> str:
    """A model folder."""
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def thinker(tmp_path: Path, tokenizer: Any) -> str:
    """A model folder with the template THINKING."""
    tokenizer.chat_template = THINKING
    build_model(tokenizer).save_pretrained(tmp_path / "thinker")
    tokenizer.save_pretrained(tmp_path / "thinker")
    return str(tmp_path / "thinker")
