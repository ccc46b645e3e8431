"""Recorded episodes: tokens sampled elsewhere, with their log-probabilities and rewards or advantages."""

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_lightning.data.records import RowError, require
from rlhf_lightning.data.rendering import show_masked
from rlhf_lightning.errors import is_finite, short
from rlhf_lightning.types import JSON, Episode, Row, Tokenizer, TrainingSample


@dataclass
class Recorded:
    """A recorded episode, as an example of the data module.

    Attributes:
        training_sample: Its tokens, mask and log-probabilities.
        group: Name shared by the episodes of one prompt.
        reward: Its reward, if the advantage is to be computed.
        advantage: Its advantage, if recorded.
        row: The data row.
        index: Index of its group in the data.

    Example:
        >>> row = {"prompt_tokens": [1, 2], "response_tokens": [3], "logprobs": [-0.5], "reward": 1.0, "group": "a"}
        >>> read_recorded(row, vocabulary=8).tokens
        3
    """

    training_sample: TrainingSample
    group: str
    reward: float | None
    advantage: float | None
    row: Row
    index: int = 0
    where: str = ""
    """File and line of the data row."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the row."""
        return len(self.training_sample.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens before the first sampled one."""
        return self.training_sample.ids[: self.training_sample.loss_mask.index(1)]

    @property
    def trained(self) -> int:
        """Number of sampled tokens."""
        return self.training_sample.actions

    def counts(self) -> dict[str, float]:
        """See `TrainingSample.counts`."""
        return self.training_sample.counts()

    def show(self, tokenizer: Tokenizer) -> str:
        """The text, with the sampled tokens between ⟦ and ⟧."""
        return show_masked(tokenizer, self.training_sample.ids, self.training_sample.loss_mask)

    def episode(self, group: int) -> Episode:
        """A new episode with a copy of the recorded tokens.

        Args:
            group: Index of its group.
        """
        training_sample = TrainingSample(
            list(self.training_sample.ids),
            list(self.training_sample.loss_mask),
            list(self.training_sample.sampling_logprobs),
        )
        episode = Episode([], self.row, group, training_samples=[training_sample], stop_reason="stop")
        episode.reward = self.reward or 0.0
        episode.advantage = self.advantage
        return episode


def read_recorded(data: Row, vocabulary: int) -> Recorded:
    """Read and check a row of recorded episodes.

    A row has `tokens`, `loss_mask` (1 on sampled tokens) and `logprobs` (one per token, or one per sampled token); or
    `prompt_tokens`, `response_tokens` and `logprobs` (one per response token). It also has `reward` and `group` (a name
    shared by the episodes of one prompt), or `advantage`.

    Args:
        data: The row.
        vocabulary: Size of the vocabulary.

    Raises:
        RowError: If a field is missing, lengths differ, or a token is not in the vocabulary.
    """
    if data.get("tokens") is not None:
        require(data, "tokens", "loss_mask", "logprobs")
        flags = _list(data, "loss_mask")
        if wrong := [flag for flag in flags if not isinstance(flag, bool | int | float) or flag not in (0, 1)]:
            raise RowError(f"'loss_mask' contains {wrong[0]!r}; it must be 1 for sampled tokens, and 0 for others")
        ids, loss_mask = _list(data, "tokens"), [int(bool(flag)) for flag in flags]
    else:
        require(data, "prompt_tokens", "response_tokens", "logprobs")
        prompt, response = _list(data, "prompt_tokens"), _list(data, "response_tokens")
        ids, loss_mask = prompt + response, [0] * len(prompt) + [1] * len(response)
    if len(ids) != len(loss_mask):
        raise RowError(f"'tokens' has {len(ids)} entries, but 'loss_mask' has {len(loss_mask)}")
    if not any(loss_mask) or loss_mask[0]:
        raise RowError("at least one token must be sampled, and the first token must belong to the prompt")
    if bad := [token for token in ids if not isinstance(token, int) or not 0 <= token < vocabulary]:
        raise RowError(f"token {bad[0]!r} is not in the vocabulary, which has {vocabulary} tokens")
    tokens = [token for token in ids if isinstance(token, int)]
    if data.get("advantage") is None:
        require(data, "reward", "group")
    training_sample = TrainingSample(tokens, loss_mask, _spread(_list(data, "logprobs"), loss_mask))
    return Recorded(training_sample, str(data.get("group")), _float(data, "reward"), _float(data, "advantage"), data)


def _list(data: Row, name: str) -> list[JSON]:
    """A column that is a list."""
    value = data[name]
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RowError(f"{name!r} is {short(value)}; it must be a list")
    return list(value)


def _spread(given: list[JSON], loss_mask: list[int]) -> list[float]:
    logprobs = [float(value) for value in given if is_finite(value) and value <= 1e-3]
    if len(logprobs) < len(given):
        raise RowError("'logprobs' must be finite log-probabilities in nats, none above 0")
    if len(logprobs) == len(loss_mask):
        return [value * flag for value, flag in zip(logprobs, loss_mask, strict=True)]
    if len(logprobs) != sum(loss_mask):
        raise RowError(
            f"'logprobs' has {len(logprobs)} entries; it must have one per sampled token ({sum(loss_mask)}) or one per "
            f"token ({len(loss_mask)})"
        )
    sampled = iter(logprobs)
    return [next(sampled) if flag else 0.0 for flag in loss_mask]


def _float(data: Row, name: str) -> float | None:
    value = data.get(name)
    if value is not None and not is_finite(value):
        raise RowError(f"{name!r} is {short(value)}; it must be a finite number")
    return None if value is None else float(value)


def by_group(examples: list[Recorded]) -> list[list[Recorded]]:
    """Group recorded episodes, ordered by the first episode of each group.

    An episode with a recorded advantage forms its own group.
    """
    groups: dict[str, list[Recorded]] = {}
    for i, example in enumerate(examples):
        key = example.group if example.advantage is None else f"alone {i}"
        groups.setdefault(key, []).append(example)
    return list(groups.values())
