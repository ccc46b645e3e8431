"""Environments of an OpenEnv server, which runs in the test."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.environments.base import Limits
from rlhf_lightning.environments.gymnasium import GymnasiumEnv
from rlhf_lightning.environments.openenv import OpenEnv
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from tests.helpers.training import trainer
from tests.helpers.web import started


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on which a message with the number before the last one is right; it begins with the seed."""
    core = pytest.importorskip("openenv.core", reason="openenv-core is not installed (extra openenv)")
    from openenv.core.env_server.http_server import create_fastapi_app

    class Said(core.Action):  # type: ignore[misc, name-defined]
        message: str

    class Shown(core.Observation):  # type: ignore[misc, name-defined]
        number: str

    class Countdown(core.Environment):  # type: ignore[misc, name-defined]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Shown:
            self.number = (seed or 0) % 10
            return Shown(number=str(self.number))

        def step(self, action: Said, timeout_s: float | None = None, **options: Any) -> Shown:
            right = action.message == str(self.number - 1)
            self.number -= 1
            return Shown(number=str(self.number), reward=float(right) if right else None, done=self.number < 1)

        @property
        def state(self) -> Any:
            return core.State()

    app = create_fastapi_app(Countdown, Said, Shown, max_concurrent_envs=64)
    with started(uvicorn.Server(uvicorn.Config(app, log_config=None))) as address:
        yield address.rstrip("/")


def arguments(url: str, **changes: str) -> dict[str, Any]:
    given = {"url": url, "action": "message", "observation": "number", **changes}
    return {"environment": "rlhf_lightning.environments.openenv.OpenEnv", "arguments": given}


def test_an_episode_on_a_server(url: str) -> None:
    env = GymnasiumEnv({"prompt": "Count down.", "seed": 2}, **arguments(url))
    assert env.reset() == [{"role": "user", "content": "Count down.\n\n2"}]
    first, last = (env.step({"role": "assistant", "content": text}) for text in ("1", "7"))
    assert (first.reward, first.done, first.next_messages) == (1.0, False, [{"role": "user", "content": "1"}])
    assert (last.reward, last.done, last.next_messages) == (0.0, True, [])


def test_a_policy_trains_with_a_server(url: str, base: str, tmp_path: Path) -> None:
    """Episodes of a round have sessions of their own."""
    module = PolicyRLModule(
        base,
        environment="rlhf_lightning.environments.gymnasium.GymnasiumEnv",
        environment_args=arguments(url),
        sampler=Sampler(max_tokens=4),
        limits=Limits(max_turns=2),
    )
    rows = [{"prompt": "Count down.", "seed": seed} for seed in (1, 2)]
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, PromptDataModule(rows, prompts_per_round=1, group_size=2))
    assert run.global_step == 2


def test_fields_that_are_not_there_are_named(url: str) -> None:
    env = GymnasiumEnv({"prompt": "Count down."}, **arguments(url, observation="text"))
    with pytest.raises(TypeError, match=r"the observation has no text 'text'; its fields are .*number"):
        env.reset()
    env = GymnasiumEnv({"prompt": "Count down."}, **arguments(url, action="text"))
    env.reset()
    with pytest.raises(RuntimeError, match="message"):
        env.step({"role": "assistant", "content": "1"})


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core", None)
    with pytest.raises(ConfigError, match=r"OpenEnv needs the package .*pip install 'rlhf-lightning\[openenv\]'"):
        OpenEnv("http://127.0.0.1:1", "message", "text")
