"""Environments of verifiers: rows, one turn, several turns, tools, rewards, and episodes that fail or are given up.

The package and what it needs are an environment of 360 MB, and its harness installs its own requirements from the
network, so these tests run where the extra verifiers is installed.
"""

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data import verifiers as tasks
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.environments.base import environment_factory
from rlhf_lightning.environments.user_calls import run_calls
from rlhf_lightning.environments.verifiers import _SERVICES, VerifiersEnv
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.types import Row

FOLDER = str(Path(__file__).parents[1] / "helpers" / "verifiers_tasks")
installed = pytest.mark.skipif(
    not tasks.is_installed(), reason="the package verifiers is not installed (extra verifiers)"
)


@pytest.fixture(autouse=True)
def taskset_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tasksets can be imported, also by tool servers, which are processes."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    yield
    for service in _SERVICES.values():
        service.close()
    _SERVICES.clear()


def rows(source: str) -> list[Row]:
    return [row.data for row in read_rows(f"verifiers:{source}", "prompt")]


def call(function: Any) -> Any:
    (outcome,) = run_calls([function], 120)
    return outcome.result()


def say(env: VerifiersEnv, text: str) -> Any:
    return call(lambda: env.step({"role": "assistant", "content": text}))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(DataError, match=r"pip install 'rlhf-lightning\[verifiers\]'"):
        rows("anything")
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-lightning\[verifiers\]'"):
        environment_factory(VerifiersEnv)


def test_a_data_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that names a taskset which no data source of the process has read is refused."""
    (tmp_path / "evil_tasks.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "Hi", "verifiers": {"taskset": "evil_tasks", "index": 0, "parameters": {}}}
    file.write_text(json.dumps(row))
    (read,) = read_rows(str(file), "prompt")
    with pytest.raises(DataError, match="not a task of a data source"):
        VerifiersEnv(read.data)
    assert not (tmp_path / "ran").exists()


@installed
def test_rows() -> None:
    found = rows("addition_tasks?tasks=5&limit=2")
    assert len(found) == 2
    assert found[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    assert found[1]["verifiers"] == {"taskset": "addition_tasks", "index": 1, "parameters": {"tasks": 5, "limit": 2}}
    with pytest.raises(DataError, match=r"guess_tasks.*has no end; add \?limit=NUMBER"):
        rows("guess_tasks")
    for source, message in (
        ("nothing_tasks", "nothing_tasks"),
        ("addition_tasks?task=a", "cannot be loaded"),
        ("addition_tasks?number=1", "number"),
        ("addition_tasks?broken=true", "broken on purpose"),
        ("addition_tasks?limit=0", "at least 1"),
    ):
        with pytest.raises(DataError, match=message):
            rows(source)


@installed
def test_one_turn() -> None:
    env = VerifiersEnv(rows("addition_tasks")[1])
    assert call(env.reset) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    result = say(env, "It is 2.")
    assert (result.reward, result.done, result.next_messages) == (2.0, True, [])
    assert result.metrics == {"length": 8.0, "reward_correct": 1.0}
    wrong = VerifiersEnv(rows("addition_tasks")[1])
    call(wrong.reset)
    assert say(wrong, "").reward == 0.0


@installed
def test_several_turns() -> None:
    env = VerifiersEnv(rows("guess_tasks?limit=4")[3], {"rounds": 3})
    assert call(env.reset) == [{"role": "user", "content": "Guess a number."}]
    first, second, third = (say(env, text) for text in ("1", "2", "3"))
    assert first.next_messages == second.next_messages == [{"role": "user", "content": "No, another one."}]
    assert (first.done, second.done, third.done) == (False, False, True)
    assert (first.reward, second.reward, third.reward) == (0.0, 0.0, 1.0)


@installed
def test_tools() -> None:
    env = VerifiersEnv(rows("calculator_tasks")[0])
    call(env.reset)
    (tool,) = env.tools
    function = tool["function"]
    assert isinstance(function, dict)
    name = function["name"]
    result = say(env, f'Let me see. <tool_call>{{"name": "{name}", "arguments": {{"a": 12, "b": 34}}}}</tool_call>')
    assert not result.done
    (message,) = result.next_messages
    assert (message["role"], message["content"]) == ("tool", "408")
    last = say(env, "It is 408.")
    assert (last.reward, last.done) == (1.0, True)


@installed
def test_limit_of_turns() -> None:
    """An episode that verifiers ends at its own limit is scored."""
    env = VerifiersEnv(rows("guess_tasks?limit=4")[3], {"rounds": 9, "agent": {"max_turns": 2}})
    call(env.reset)
    assert not say(env, "1").done
    last = say(env, "3")
    assert (last.reward, last.done) == (1.0, True)


@installed
def test_an_episode_that_is_given_up() -> None:
    env = VerifiersEnv(rows("guess_tasks?limit=2")[1])
    call(env.reset)
    rollout, channel = env._rollout, env._channel
    (service,) = _SERVICES.values()
    assert list(service.channels.values()) == [channel]
    del env
    gc.collect()

    async def ended() -> None:
        await asyncio.wait({rollout}, timeout=20)

    call(ended)
    assert rollout.cancelled()
    assert service.channels == {}
    assert channel.waiting[0].cancelled()


@installed
def test_failures() -> None:
    env = VerifiersEnv(rows("addition_tasks")[0], {"agent": {"harness": {"id": "no_such_harness"}}})
    with pytest.raises(Exception, match="no_such_harness"):
        call(env.reset)
    with pytest.raises(ConfigError, match="name it in data"):
        environment_factory(VerifiersEnv, {"config": {"taskset": {"id": "addition_tasks"}}})
    with pytest.raises(ConfigError, match="has no group"):
        environment_factory(VerifiersEnv, {"pattern": "call"})
