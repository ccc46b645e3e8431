"""Environments of OpenEnv servers."""

from collections.abc import Mapping

from rlhf_lightning.errors import missing_package, quoted
from rlhf_lightning.types import JSON


class OpenEnv:
    """An episode of an environment that a server of OpenEnv runs, for `GymnasiumEnv`.

    The observation that is shown, and the action that the policy's message becomes, are fields of the environment's
    own classes: see `/schema` of the server.

    Args:
        url: Address of the server.
        action: Name of the field of an action that gets the text.
        observation: Name of the field of an observation that has the text.
        timeout: Seconds that the server may take to answer.

    Raises:
        ConfigError: If openenv-core is not installed.

    Example:
        ```yaml
        model:
          environment: rlhf_lightning.environments.gymnasium.GymnasiumEnv
          environment_args:
            environment: rlhf_lightning.environments.openenv.OpenEnv
            arguments: {url: "http://127.0.0.1:8000", action: message, observation: echoed_message}
        ```
    """

    def __init__(self, url: str, action: str, observation: str, timeout: float = 60.0) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ModuleNotFoundError as error:
            raise missing_package(error, "OpenEnv", "openenv") from None
        self.action, self.observation = action, observation
        self._client = GenericEnvClient(base_url=url, message_timeout_s=timeout).sync()

    def reset(self, *, seed: int | None = None, options: dict[str, JSON] | None = None) -> tuple[str, dict[str, JSON]]:
        """Open a session, and begin an episode in it.

        Args:
            seed: Seed of the episode.
            options: Further arguments of the environment's `reset`.
        """
        return self._text(self._client.reset(seed=seed, **(options or {})).observation), {}

    def step(self, action: str | int) -> tuple[str, float, bool, bool, dict[str, JSON]]:
        """Act.

        Args:
            action: The policy's message.
        """
        result = self._client.step({self.action: action})
        text = "" if result.done else self._text(result.observation)
        return text, float(result.reward or 0), bool(result.done), False, {}

    def close(self) -> None:
        """Close the session."""
        self._client.close()

    def _text(self, observation: Mapping[str, JSON]) -> str:
        text = observation.get(self.observation)
        if not isinstance(text, str):
            raise TypeError(
                f"the observation has no text {self.observation!r}; its fields are {quoted(observation, none='none')}"
            )
        return text
