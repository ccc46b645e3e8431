"""A reward that is a function of the user's own."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.environments.user_calls import TimeLimitError, check_limit, run_calls
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.types import Episode

OFFERED = ("prompts", "completions", "episodes")


class FunctionReward(Reward):
    """A Python function, sync or async, named in YAML by its dotted path.

    It is called with the keywords that its signature names, each a list with one entry for each episode: `prompts`
    (messages), `completions` (the last response as text), `episodes`, and every column of the data. It returns as
    many numbers; None where it does not apply.

    Args:
        function: the function, or its dotted path in YAML.
        weight: of this part; 0 only measures it.
        name: under which it is logged; the function's by default.
        timeout: seconds that a call may take; it then runs in a thread.
        normalize: brings scores to a common scale before they are clipped and weighted.
        clip: the largest absolute value, after normalizing.
        skip_special_tokens: false reads responses exactly as they were sampled: with special tokens (`<|im_end|>`),
            the text that ended them, and white space at their ends.
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
                f"the reward function {self.name} wants {sorted(missing)[0]!r}; "
                f"it can have {', '.join(sorted(offered))}"
            )

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        columns = {key for episode in episodes for key in episode.row}
        self._check(columns)
        offered: dict[str, Any] = {key: [episode.row.get(key) for episode in episodes] for key in columns}
        offered |= {
            "prompts": [episode.prompt for episode in episodes],
            "completions": [self.text(episode) for episode in episodes],
            "episodes": list(episodes),
        }
        given = {k: v for k, v in offered.items() if self._takes_all or k in self._wanted}
        (outcome,) = run_calls([partial(self.function, **given)], self.timeout)
        if isinstance(outcome.error, TimeLimitError):
            raise TimeLimitError(f"the reward {self.name}: {outcome.error}") from outcome.error
        if outcome.error is not None:
            raise outcome.error
        return outcome.value
