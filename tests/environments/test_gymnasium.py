"""Environments with gymnasium's interface: observations, actions, rewards and refusals."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.environments import gymnasium as ours
from rlhf_lightning.environments.base import Limits, environment_factory
from rlhf_lightning.environments.gymnasium import GymnasiumEnv
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.types import Row

installed = pytest.mark.skipif(
    find_spec("gymnasium") is None, reason="the package gymnasium is not installed (extra gymnasium)"
)
LAKE: dict[str, Any] = {
    "environment": "FrozenLake-v1",
    "arguments": {"render_mode": "ansi", "is_slippery": False},
    "actions": ["left", "down", "right", "up"],
}


class Countdown:
    """Say the number before the last one; it begins with the seed."""

    closed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.number = seed or 0
        return f"{self.number}", {}

    def step(self, action: str | int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action == str(self.number - 1)
        self.number -= 1
        return f"{self.number}", float(right), self.number == 1, not right, {}

    def close(self) -> None:
        Countdown.closed += 1


def say(env: GymnasiumEnv, text: str) -> Any:
    return env.step({"role": "assistant", "content": text})


def test_a_class_with_text() -> None:
    env = GymnasiumEnv({"prompt": "Count down.", "seed": 3}, Countdown)
    assert env.reset() == [{"role": "user", "content": "Count down.\n\n3"}]
    before = Countdown.closed
    first, last = say(env, " 2 "), say(env, "1")
    assert (first.reward, first.done, first.next_messages) == (1.0, False, [{"role": "user", "content": "2"}])
    assert (last.reward, last.done, last.next_messages) == (1.0, True, [])
    assert Countdown.closed == before + 1
    assert last.metrics == {"invalid_actions": 0.0, "truncated": 0.0}


def test_an_episode_that_is_cut_off() -> None:
    env = GymnasiumEnv({"prompt": "Count down.", "seed": 3}, Countdown)
    env.reset()
    result = say(env, "7")
    assert (result.reward, result.done, result.metrics["truncated"]) == (0.0, True, 1.0)


def test_a_pattern_and_an_empty_answer() -> None:
    env = GymnasiumEnv({"prompt": "Count down.", "seed": 3}, Countdown, pattern="<say>(.*?)</say>", invalid_reward=-0.5)
    env.reset()
    missed = say(env, "2")
    assert (missed.reward, missed.done, missed.metrics["invalid_actions"]) == (-0.5, False, 1.0)
    assert "no action" in missed.next_messages[0]["content"]
    assert say(env, "<say>9</say> or <say>\n2</say>").reward == 1.0


def test_seeds() -> None:
    """Without a seed, equal rows begin alike and others do not; a row's conversation stays as it is."""

    def first(row: Row) -> str:
        return GymnasiumEnv(row, Countdown).reset()[-1]["content"] or ""

    assert first({"prompt": "Hi"}) == first({"prompt": "Hi"}) != first({"prompt": "Ho"})
    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": "Go."}]
    assert GymnasiumEnv({"prompt": chat, "seed": 2}, Countdown).reset() == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "Go.\n\n2"},
    ]
    system = [{"role": "system", "content": "Count."}]
    assert GymnasiumEnv({"prompt": system, "seed": 2}, Countdown).reset()[1] == {"role": "user", "content": "2"}
    with pytest.raises(TypeError, match="seed is 'a'"):
        first({"prompt": "Hi", "seed": "a"})


@installed
def test_a_registered_environment() -> None:
    import gymnasium

    theirs = gymnasium.make("FrozenLake-v1", render_mode="ansi", is_slippery=False)
    theirs.reset(seed=1)
    env = GymnasiumEnv({"prompt": "Walk.", "seed": 1}, **LAKE)
    assert env.reset() == [{"role": "user", "content": "Walk.\n\n[S]FFF\nFHFH\nFFFH\nHFFG"}]
    assert say(env, "jump").next_messages[0]["content"].endswith("Actions are left, down, right, up.")
    assert say(env, "Right").next_messages[0]["content"] == "(Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"
    rewards = [say(env, move).reward for move in ("right", "down", "down", "down")]
    last = say(env, "right")
    assert (rewards, last.reward, last.done) == ([0.0] * 4, 1.0, True)
    assert last.metrics == {"invalid_actions": 1.0, "truncated": 0.0}


@installed
def test_numbers_as_actions() -> None:
    env = GymnasiumEnv({"prompt": "Walk.", "seed": 1}, "FrozenLake-v1", {"render_mode": "ansi", "is_slippery": False})
    env.reset()
    assert "numbers from 0 to 3" in say(env, "4").next_messages[0]["content"]
    assert say(env, "2").next_messages[0]["content"].startswith("(Right)")
    without = GymnasiumEnv({"prompt": "Walk."}, "FrozenLake-v1")
    with pytest.raises(TypeError, match="render_mode: ansi"):
        without.reset()


@installed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "FrozenLak-v1"}, "Did you mean 'FrozenLake-v1'"),
        ({"environment": "nowhere.Game"}, "cannot be imported"),
        ({"arguments": {"size": 4}}, "cannot be made"),
        ({"actions": ["left"]}, "has 1 names, but the environment has 4 actions"),
        ({"pattern": "("}, "not a valid regular expression"),
    ],
)
def test_unsuitable_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment_factory(GymnasiumEnv, {**LAKE, **changes})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._maker.cache_clear()
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-lightning\[gymnasium\]'"):
        environment_factory(GymnasiumEnv, LAKE)
    environment_factory(GymnasiumEnv, {"environment": "tests.environments.test_gymnasium.Countdown"})
    ours._maker.cache_clear()


def test_training(base: str, tmp_path: Path) -> None:
    """The rewards of the steps are those of the episodes."""
    module = PolicyRLModule(
        base,
        environment=GymnasiumEnv,
        environment_args={"environment": Countdown, "invalid_reward": -1.0},
        limits=Limits(max_turns=2),
        sampler=Sampler(max_tokens=4),
    )
    rows = [{"prompt": "Count down.", "seed": 4}, {"prompt": "Count down.", "seed": 5}]
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    trainer.fit(module, PromptDataModule(rows, prompts_per_round=2, group_size=2))
    assert len(module.last_episodes) == 4
    for episode in module.last_episodes:
        first = (episode.responses[0]["content"] or "").strip()
        right = first == str(int(str(episode.row["seed"])) - 1)
        assert episode.metrics["truncated"] == float(bool(first) and not right)
        assert episode.reward == sum(-1.0 for m in episode.responses if not (m["content"] or "").strip()) + right
