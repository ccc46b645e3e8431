"""Data of preference learning: pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_lightning.data.base import RowDataModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.conversations import Message, to_messages, tool_schemas
from rlhf_lightning.data.records import RowError, Source, require
from rlhf_lightning.data.rendering import Rendered


@dataclass
class Pair:
    """A chosen and a rejected response to one prompt, as rows whose mask is 1 on the response."""

    chosen: Rendered
    rejected: Rendered
    margin: float = 0.0

    @property
    def tokens(self) -> int:
        """Length of the longer side."""
        return max(self.chosen.tokens, self.rejected.tokens)

    @property
    def trained(self) -> int:
        """Response tokens of both sides."""
        return self.chosen.trained + self.rejected.trained

    def counts(self) -> dict[str, float]:
        """One pair."""
        return {"pairs": 1.0}

    def show(self, tokenizer: Any) -> str:
        """Both sides, the responses between ⟦ and ⟧."""
        return f"chosen: {self.chosen.show(tokenizer)}\nrejected: {self.rejected.show(tokenizer)}"


class PreferenceDataModule(RowDataModule):
    """Pairs: rows with `prompt`, `chosen`, `rejected`, each a string or messages, and optionally `margin`, `tools`.

    Without `prompt`, `chosen` and `rejected` are whole conversations, and what they share is the prompt. A batch is
    a dict whose tensors hold the chosen rows first and the rejected rows after them: `input_ids` and `mask`
    `[2B, T]`, `lengths` `[2B]`, and `margin`, `weights` `[B]`.

    Args:
        train: rows to train on; see `RowDataModule` for the further arguments.
        validation: rows to validate on.
        overlong: a pair that is too long is an error by default; `truncate` cuts its prompt on the left.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        overlong: str = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, overlong=overlong, **kwargs)

    def examples(self, name: str) -> Callable[[dict[str, Any]], list[Any]]:
        return self._pair

    def _pair(self, data: dict[str, Any]) -> list[Pair]:
        prompt, chosen, rejected = split_pair(data)
        if chosen == rejected:
            raise RowError("chosen equals rejected: there is nothing to prefer")
        tools = tool_schemas(data)
        sides = [self._side(name, prompt, side, tools) for name, side in (("chosen", chosen), ("rejected", rejected))]
        margin = data.get("margin")
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
            raise RowError(f"'margin' is {margin!r}; it must be a number")
        left, right = self._fit(sides)
        return [Pair(left, right, float(margin or 0.0))]

    def _side(self, name: str, prompt: list[Message], response: list[Message], tools: list[Any] | None) -> Rendered:
        try:
            return self.renderer.exchange(prompt, response, tools)
        except RowError as error:
            raise RowError(f"{name}: {error}") from None

    def _fit(self, sides: list[Rendered]) -> list[Rendered]:
        """Both sides cut by as many prompt tokens on the left as the longer one is over the budget."""
        excess = max(side.tokens for side in sides) - self.max_length
        if not self.too_long(excess + self.max_length):
            return sides
        if excess >= min(side.mask.index(1) for side in sides):
            raise RowError(f"a response alone is over data.max_length {self.max_length}; raise it")
        return [Rendered(side.ids[excess:], side.mask[excess:], side.text_bytes) for side in sides]

    def collate(self, rows: list[Pair], weights: list[float]) -> dict[str, Any]:
        sides = [pair.chosen for pair in rows] + [pair.rejected for pair in rows]
        return {
            **pad_tokens([side.ids for side in sides], [side.mask for side in sides], self.pad_id),
            "margin": torch.tensor([pair.margin for pair in rows]),
            "weights": torch.tensor(weights),
        }


def split_pair(data: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected messages of a row; raises `RowError`."""
    require(data, "chosen", "rejected")
    sides = [to_messages(data[name], "assistant" if data.get("prompt") else "user") for name in ("chosen", "rejected")]
    if data.get("prompt") is not None:
        prompt = to_messages(data["prompt"])
        # Some data sets repeat the prompt in both sides.
        sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
    else:
        if not all(isinstance(data[name], list) for name in ("chosen", "rejected")):
            require(data, "prompt")
        shared = _shared(*sides)
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not prompt:
        raise RowError("no 'prompt', and chosen and rejected share no first messages that could be one")
    return prompt, sides[0], sides[1]


def _shared(a: list[Message], b: list[Message]) -> int:
    same = [x == y for x, y in zip(a, b, strict=False)]
    count = same.index(False) if False in same else min(len(a), len(b)) - 1
    # An answer that both sides share belongs to the responses where nothing else is left of one of them.
    return max(0, min(count, len(a) - 1, len(b) - 1))
