"""Text environments with gymnasium's interface (`reset`, `step`) as environments of the policy."""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from typing import Protocol, TypeAlias

from rlhf_lightning.data.prompts import prompt_messages
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.errors import ConfigError, quoted, short
from rlhf_lightning.imports import imported
from rlhf_lightning.types import JSON, Message, Row

HIGHLIGHTED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", re.DOTALL)
"""Text that `render_mode: ansi` colors, such as the place of the player."""
Observation: TypeAlias = object
"""What `reset` and `step` return first: text, or anything of an environment whose `render()` returns text."""


class TextEnvironment(Protocol):
    """The part of `gymnasium.Env` that is used. A class of your own needs no more than these two methods.

    Further attributes are used where they exist: `render()` returns the text to show if the observation is not text,
    `action_space.n` is the number of actions (otherwise an action is text), `close()` is called at the end.

    Example:
        ```python
        class Echo:
            def reset(self, *, seed=None, options=None):
                return "Say hello.", {}

            def step(self, action):
                return "", float(action == "hello"), True, False, {}
        ```
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, JSON] | None = None
    ) -> tuple[Observation, Mapping[str, object]]:
        """Begin an episode: the observation and further facts."""

    def step(self, action: str | int) -> tuple[Observation, float, bool, bool, Mapping[str, object]]:
        """Act: the observation, the reward, whether the episode ended, whether it was cut off, and further facts."""


class GymnasiumEnv:
    """An episode of a gymnasium environment: observations are user messages, and the policy's messages are actions.

    The row's prompt comes first, with the first observation below it. The row's `seed` (a whole number) is passed to
    `reset`; without one it is computed from the row, so that an episode begins alike for all responses of a group.

    Logs `env_invalid_actions` and `env_truncated`.

    Args:
        row: The data row.
        environment: A name that `gymnasium.make` knows (`FrozenLake-v1`), or a class or function with the interface of
            `TextEnvironment`, or its dotted path.
        arguments: Keyword arguments of the environment. One without text observations needs `render_mode: ansi`; text
            that is highlighted there is put in brackets.
        actions: Names of the actions 0, 1, … of an environment with a number of actions. Without names, the policy
            answers with the number.
        pattern: Regular expression that finds the action in a message: its last match, or that match's first group. By
            default the whole message is the action.
        invalid_reward: Reward of a message without a valid action, which leaves the environment unchanged.

    Example:
        ```yaml
        model:
          environment: rlhf_lightning.environments.gymnasium.GymnasiumEnv
          environment_args:
            environment: FrozenLake-v1
            arguments: {render_mode: ansi, is_slippery: false}
            actions: [left, down, right, up]
        ```
    """

    def __init__(
        self,
        row: Row,
        environment: str | Callable[..., TextEnvironment],
        arguments: Mapping[str, JSON] | None = None,
        actions: Sequence[str] = (),
        pattern: str = "",
        invalid_reward: float = 0.0,
    ) -> None:
        self.row, self.actions, self.invalid_reward = row, list(actions), invalid_reward
        self.env = _maker(environment)(**(arguments or {}))
        self.pattern = re.compile(pattern, re.DOTALL) if pattern else None
        self.count: int | None = getattr(getattr(self.env, "action_space", None), "n", None)
        self.invalid = 0

    @classmethod
    def check(
        cls,
        environment: str | Callable[..., TextEnvironment],
        arguments: Mapping[str, JSON] | None = None,
        actions: Sequence[str] = (),
        pattern: str = "",
        invalid_reward: float = 0.0,
    ) -> None:
        """Check the arguments when the configuration is read, by making the environment once.

        Raises:
            ConfigError: If it cannot be made, or another argument is invalid.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"GymnasiumEnv.pattern {pattern!r} is not a valid regular expression: {error}") from None
        try:
            env = _maker(environment)(**(arguments or {}))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"GymnasiumEnv.environment {environment!r} cannot be made: {error}") from error
        count = getattr(getattr(env, "action_space", None), "n", None)
        if actions and count != len(actions):
            raise ConfigError(f"GymnasiumEnv.actions has {len(actions)} names, but the environment has {count} actions")
        _close(env)

    def reset(self) -> list[Message]:
        """The row's prompt and the first observation."""
        seed = self.row.get("seed")
        if seed is None:
            seed = zlib.crc32(json.dumps(self.row, sort_keys=True, default=str).encode())
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"the row's seed is {seed!r}; it must be a whole number")
        observation, _ = self.env.reset(seed=seed)
        *before, last = prompt_messages(self.row)
        shown = self._text(observation)
        if last["role"] != "user":
            return [*before, last, {"role": "user", "content": shown}]
        return [*before, {**last, "content": f"{last['content']}\n\n{shown}"}]

    def step(self, message: Message) -> StepResult:
        """Act as the message says."""
        action = self._action((message["content"] or "").strip())
        if action is None:
            self.invalid += 1
            return StepResult(self.invalid_reward, False, [self._user(self._advice())], self._metrics(False))
        observation, reward, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:
            _close(self.env)
            return StepResult(float(reward), True, [], self._metrics(bool(truncated)))
        return StepResult(float(reward), False, [self._user(self._text(observation))], self._metrics(False))

    def _metrics(self, truncated: bool) -> dict[str, float]:
        return {"invalid_actions": float(self.invalid), "truncated": float(truncated)}

    def _user(self, text: str) -> Message:
        return {"role": "user", "content": text}

    def _advice(self) -> str:
        if self.count is None:
            return "Your message has no action. Answer in the form that was described."
        names = ", ".join(self.actions) if self.actions else f"the numbers from 0 to {self.count - 1}"
        return f"Your message has no valid action. Actions are {names}."

    def _action(self, text: str) -> str | int | None:
        """The action in a message; None if there is none."""
        if self.pattern is not None:
            found = list(self.pattern.finditer(text))
            text = (found[-1].group(1 if self.pattern.groups else 0) or "").strip() if found else ""
        if self.count is None:
            return text or None
        if self.actions:
            names = [name.lower() for name in self.actions]
            return names.index(text.lower()) if text.lower() in names else None
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < self.count else None

    def _text(self, observation: Observation) -> str:
        """What the policy sees."""
        if isinstance(observation, str):
            return observation
        # Colors cannot be shown to a language model, but may be all that marks a place.
        render = getattr(self.env, "render", None)
        shown = render() if render is not None else None
        if not isinstance(shown, str):
            raise TypeError(
                f"the observation is {short(observation)}, and render() returned {short(shown)}; one of them must be "
                "text. Many environments of gymnasium render text with arguments: {render_mode: ansi}"
            )
        return HIGHLIGHTED.sub(r"[\1]", shown).strip()


def _close(env: TextEnvironment) -> None:
    if (close := getattr(env, "close", None)) is not None:
        close()


@lru_cache(maxsize=64)
def _maker(environment: str | Callable[..., TextEnvironment]) -> Callable[..., TextEnvironment]:
    """The function that makes an environment."""
    if not isinstance(environment, str):
        return environment
    if "." in environment and "/" not in environment and not re.search(r"-v\d+$", environment):
        found: Callable[..., TextEnvironment] = imported(environment, "GymnasiumEnv.environment")
        return found
    try:
        gymnasium = import_module("gymnasium")
    except ImportError as error:
        raise ConfigError(
            f"GymnasiumEnv.environment {environment!r} needs the package gymnasium, which cannot be imported "
            f"({error}). Install it with pip install 'rlhf-lightning[gymnasium]', or give the dotted path of a class"
        ) from None
    if environment not in gymnasium.registry and ":" not in environment:
        close = get_close_matches(environment, gymnasium.registry, 3)
        raise ConfigError(
            f"gymnasium has no environment {environment!r}. "
            + (f"Did you mean {quoted(close)}?" if close else "Import the package that registers it, as package:NAME")
        )

    def make(**arguments: JSON) -> TextEnvironment:
        made: TextEnvironment = gymnasium.make(environment, **arguments)
        return made

    return make
