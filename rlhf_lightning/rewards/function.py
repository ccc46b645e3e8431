"""A reward that calls a user's function."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.environments.user_calls import TimeLimitError, check_limit, run_calls
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.types import JSON, Episode, Message

OFFERED = ("prompts", "completions", "episodes")


class FunctionReward(Reward):
    """A Python function as a reward, sync or async.

    It is called with the keyword arguments that its signature names, each a list with one entry per episode: `prompts`
    (messages), `completions` (the last response as text), `episodes`, and any column of the data. It returns one number
    per episode, or None where it does not apply.

    Args:
        function: The function, or its dotted path in YAML.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging; by default the function's name.
        timeout: Seconds that a call may take. If set, the function runs in a thread.
        normalize: Normalizes scores before they are clipped and weighted.
        clip: Largest absolute value after normalization.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Example:
        >>> def exact(completions, answer):
        ...     return [float(text.strip() == right) for text, right in zip(completions, answer)]
        >>> reward = FunctionReward(exact)
        >>> reply = [{"role": "assistant", "content": "4"}]
        >>> reward.score([Episode(prompt=[], row={"answer": "4"}, group=0, responses=reply)])
        [1.0]
    """

    def __init__(
        self,
        function: Callable,
        weight: float = 1.0,
        name: str | None = None,
        timeout: float | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name or getattr(function, "__name__", None), normalize, clip)
        self.skip_special_tokens = skip_special_tokens
        check_limit(f"the timeout of the reward {self.name}", timeout)
        self.function, self.timeout = function, timeout
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._wanted = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self._required = {p.name for p in parameters if p.name in self._wanted and p.default is p.empty}

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._check({key for prompt in prompts for key in prompt.row})

    def _check(self, columns: set[str]) -> None:
        offered = columns | set(OFFERED)
        if missing := self._required - offered:
            raise ConfigError(
                f"the reward function {self.name} requires the argument {sorted(missing)[0]!r}, which is not a column "
                f"of the data; available are {', '.join(sorted(offered))}"
            )

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        columns = {key for episode in episodes for key in episode.row}
        self._check(columns)
        offered: dict[str, Sequence[JSON | list[Message] | Episode]] = {
            **{key: [episode.row.get(key) for episode in episodes] for key in columns},
            "prompts": [episode.prompt for episode in episodes],
            "completions": [self.text(episode) for episode in episodes],
            "episodes": list(episodes),
        }
        given = {k: v for k, v in offered.items() if self._takes_all or k in self._wanted}
        (outcome,) = run_calls([partial(self.function, **given)], self.timeout)
        if isinstance(outcome.error, TimeLimitError):
            raise TimeLimitError(f"the reward {self.name}: {outcome.error}") from outcome.error
        scores: Sequence[float | None] = outcome.result()
        return scores
