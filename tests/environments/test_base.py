"""Limits and environments that are refused."""

from typing import Any

import pytest

from rlhf_lightning.environments.base import Limits, environment_factory
from rlhf_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_turns": 0}, "limits.max_turns is 0"),
        ({"max_tokens": 0}, "limits.max_tokens is 0"),
        ({"step_timeout": 0.0}, "limits.step_timeout is 0.0"),
        ({"step_timeout": float("nan")}, "limits.step_timeout is nan"),
        ({"on_error": "ignore"}, "limits.on_error is 'ignore'; it must be one of fail, retry, drop"),
        ({"on_error": "retry", "retries": 0}, "limits.retries is 0"),
    ],
)
def test_invalid_limits_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**options)


def test_invalid_environments_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"model.environment 'nowhere.Env' cannot be imported"):
        environment_factory("nowhere.Env")
    with pytest.raises(ConfigError, match="environment_args is set"):
        environment_factory(None, {"a": 1})
    with pytest.raises(ConfigError, match="not a class or function"):
        environment_factory("rlhf_lightning.environments.base.ON_ERROR")
