"""The fixtures of all tests: no test depends on those that ran before it in the same process."""

import os
import signal

import pytest

VARIABLE = "RLHF_TEST_LEFT_BEHIND"


def ignored(*_: object) -> None:
    """A handler of a run."""


@pytest.fixture(scope="module")
def run_of_module() -> None:
    """Leave behind what a run does."""
    os.environ[VARIABLE] = "1"
    signal.signal(signal.SIGHUP, ignored)


def test_fixture_of_a_module_restores_the_process(run_of_module: None) -> None:
    assert VARIABLE not in os.environ
    assert signal.getsignal(signal.SIGHUP) is not ignored
