"""Data module for supervised fine-tuning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_lightning.data.base import RowDataModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.cache import StoredExample
from rlhf_lightning.data.columns import refuse_beside_text, refuse_unused_answer, refuse_unwanted
from rlhf_lightning.data.conversations import conversation, has_conversation, tool_schemas, used_columns
from rlhf_lightning.data.prompts import Prompt, PromptBatch, collate_prompts, prompt_example
from rlhf_lightning.data.records import LocatedRow, Reading, RowError, Source, read_rows
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.selection import TRAIN_ON
from rlhf_lightning.data.splits import RowKey, is_blank, opening, row_key, said
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON, Row, SFTBatch


class SFTDataModule(RowDataModule[Rendered | Prompt, SFTBatch | PromptBatch]):
    """Data module of conversations, prompts with completions, or plain text.

    A row has one of: `messages`; `conversations` (from/value); `prompt` + `completion`; `instruction` (+ `input`) +
    `output`; `text`. Messages are objects with role and content, or alternating strings. A batch is a dict with
    `input_ids` and `loss_mask` `[B, T]`, `lengths` and `text_bytes` `[B]`, and `denominators`. Rows of `predict` are
    prompts to answer: `prompt`, or a conversation, for which the last assistant turn is generated again. Further
    arguments are those of `RowDataModule`.

    Args:
        train: Rows to train on.
        validation: Rows to validate on.
        train_on: `all_assistant` turns, `last_assistant`, `all_messages`, `everything` (including the template's own
            tokens), or `trainable` (messages with `trainable: true`).
        overlong: What to do with rows above `max_length`; by default they are truncated on the right, and counted.
        **kwargs: Arguments of `RowDataModule`.

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        >>> rows = [{"prompt": "What is 2 + 2?", "completion": "4"}]
        >>> data = SFTDataModule(train=rows, batch_size=4, max_length=1024)
        >>> data.train_on
        'all_assistant'
    """

    stage_kind = "sft"

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        train_on: str = "all_assistant",
        overlong: str = "truncate",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, overlong=overlong, **kwargs)
        if train_on not in TRAIN_ON:
            raise ConfigError(f"data.train_on is {train_on!r}; it must be one of {', '.join(TRAIN_ON)}")
        self.train_on = train_on

    def stored(self, example: Rendered | Prompt) -> StoredExample:
        assert isinstance(example, Rendered)
        return StoredExample([example], where=example.where)

    def restored(self, stored: StoredExample) -> Rendered:
        (row,) = stored.sides
        row.where = stored.where
        return row

    def cache_facts(self) -> dict[str, JSON]:
        return {**super().cache_facts(), "train_on": self.train_on}

    def examples(self, name: str) -> Callable[[Row], Sequence[Rendered | Prompt]]:
        return self._prompts if name == "predict" else self._rows

    def read(self, source: Source, name: str, reading: Reading) -> list[LocatedRow]:
        # Rows of `predict` are prompts, and may be lines of text.
        return read_rows(source, "prompt" if name == "predict" else None, reading, name)

    def _prompts(self, data: Row) -> list[Prompt]:
        prompt = prompt_example(self.renderer, data)
        self.too_long(prompt.tokens, can_truncate=False)
        return [prompt]

    def used_columns(self, name: str, data: Row) -> set[str] | None:
        return None if name == "predict" else used_columns(data)

    def _rows(self, data: Row) -> list[Rendered]:
        if has_conversation(data) or data.get("text") is not None:
            refuse_unwanted(data)
        if data.get("text") is not None and not has_conversation(data):
            if not isinstance(data["text"], str) or not data["text"].strip():
                raise RowError("'text' must not be blank")
            refuse_beside_text(data)
            rows = [self.renderer.text(data["text"])]
        else:
            if self.renderer.format == "raw" and self.train_on not in ("all_assistant", "last_assistant"):
                raise ConfigError(
                    f"data.train_on is {self.train_on}, but format raw always trains the last message. Leave it out, "
                    "or use the column 'text', which trains every token"
                )
            messages, tools = conversation(data), tool_schemas(data)
            refuse_unused_answer(data, messages)
            self.renderer.refuse_lost(messages, tools)
            rows = self.renderer.conversation(messages, tools, self.train_on)
        return [self._fit(row) for row in rows]

    def key(self, data: Row) -> RowKey:
        if data.get("text") is not None and not has_conversation(data):
            return row_key(str(data["text"]).strip(), None)
        messages = conversation(data)
        start = opening(messages)
        prompt = messages[:start]
        return row_key([said(prompt), tool_schemas(data)], said(messages[start:]), is_blank(prompt))

    def _fit(self, row: Rendered) -> Rendered:
        if not self.too_long(row.tokens):
            return row
        cut = Rendered(row.ids[: self.max_length], row.loss_mask[: self.max_length])
        if not cut.trained:
            raise RowError(f"no token is trained: the prompt alone exceeds data.max_length {self.max_length}; raise it")
        # Estimate the remaining bytes from the fraction of tokens; only bits per byte depends on them.
        cut.text_bytes = round(row.text_bytes * cut.trained / row.trained)
        return cut

    def collate(self, rows: list[Rendered | Prompt], weights: list[float]) -> SFTBatch | PromptBatch:
        if isinstance(rows[0], Prompt):
            return collate_prompts([row for row in rows if isinstance(row, Prompt)], weights)
        rendered = [row for row in rows if isinstance(row, Rendered)]
        weight = torch.tensor(weights)
        tokens = pad_tokens([row.ids for row in rendered], [row.loss_mask for row in rendered], self.pad_id)
        tokens["loss_mask"] *= weight[:, None]
        return {**tokens, "text_bytes": torch.tensor([float(row.text_bytes) for row in rendered]) * weight}
