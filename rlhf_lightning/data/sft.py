"""Data of supervised fine-tuning."""

from collections.abc import Callable
from typing import Any

import torch

from rlhf_lightning.data.base import RowDataModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.columns import refuse_beside_text, refuse_unwanted
from rlhf_lightning.data.conversations import conversation, has_conversation, tool_schemas, used_columns
from rlhf_lightning.data.prompts import Prompt, collate_prompts, prompt_example
from rlhf_lightning.data.records import Reading, Row, RowError, Source, read_rows
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.selection import TRAIN_ON
from rlhf_lightning.data.splits import RowKey, is_blank, opening, row_key, said
from rlhf_lightning.errors import ConfigError


class SFTDataModule(RowDataModule):
    """Conversations, prompts with completions, or plain text.

    A row is one of: `messages`; `conversations` (from/value); `prompt` + `completion`; `instruction` (+ `input`) +
    `output`; `text`. Messages are objects with role and content, or alternating strings. A batch is a dict:
    `input_ids` and `loss_mask` `[B, T]`, `lengths` and `text_bytes` `[B]`, `denominators`. Rows of `predict` are
    prompts to answer: `prompt`, or a conversation, answered in place of its last assistant turn.

    Args:
        train: rows to train on; see `RowDataModule` for the further arguments.
        validation: rows to validate on.
        train_on: `all_assistant` turns, `last_assistant`, `all_messages`, `everything` (the template's own tokens
            too), or `trainable` (messages that carry `trainable: true`).
        overlong: long rows are cut on the right by default, and counted.
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
            raise ConfigError(f"data.train_on is {train_on!r}; one of {', '.join(TRAIN_ON)}")
        self.train_on = train_on

    def examples(self, name: str) -> Callable[[dict[str, Any]], list[Any]]:
        return self._prompts if name == "predict" else self._rows

    def read(self, source: Source, name: str, reading: Reading) -> list[Row]:
        # Rows of `predict` are prompts, which may be lines of text.
        return read_rows(source, "prompt" if name == "predict" else None, reading, name)

    def _prompts(self, data: dict[str, Any]) -> list[Prompt]:
        prompt = prompt_example(self.renderer, data)
        self.too_long(prompt.tokens, can_truncate=False)
        return [prompt]

    def used_columns(self, name: str, data: dict[str, Any]) -> set[str] | None:
        return None if name == "predict" else used_columns(data)

    def _rows(self, data: dict[str, Any]) -> list[Rendered]:
        if has_conversation(data) or data.get("text") is not None:
            refuse_unwanted(data)
        if data.get("text") is not None and not has_conversation(data):
            if not isinstance(data["text"], str) or not data["text"].strip():
                raise RowError("'text' must be text, and not blank")
            refuse_beside_text(data)
            rows = [self.renderer.text(data["text"])]
        else:
            if self.renderer.format == "raw" and self.train_on not in ("all_assistant", "last_assistant"):
                raise ConfigError(
                    f"data.train_on is {self.train_on}, and with format raw the last message is what is trained: leave "
                    "it out, or give such rows as 'text', all of which is trained"
                )
            messages, tools = conversation(data), tool_schemas(data)
            self.renderer.refuse_lost(messages, tools)
            rows = self.renderer.conversation(messages, tools, self.train_on)
        return [self._fit(row) for row in rows]

    def key(self, data: dict[str, Any]) -> RowKey:
        if data.get("text") is not None and not has_conversation(data):
            return row_key(str(data["text"]).strip(), None)
        messages = conversation(data)
        asked = opening(messages)
        prompt = messages[:asked]
        return row_key([said(prompt), tool_schemas(data)], said(messages[asked:]), is_blank(prompt))

    def _fit(self, row: Rendered) -> Rendered:
        if not self.too_long(row.tokens):
            return row
        cut = Rendered(row.ids[: self.max_length], row.loss_mask[: self.max_length])
        if not cut.trained:
            raise RowError(f"no trained token within data.max_length {self.max_length}: the prompt alone is as long")
        # The bytes of what is left are estimated by its share of tokens; only the bits per byte depend on it.
        cut.text_bytes = round(row.text_bytes * cut.trained / row.trained)
        return cut

    def collate(self, rows: list[Any], weights: list[float]) -> dict[str, Any]:
        if isinstance(rows[0], Prompt):
            return collate_prompts(rows, weights)
        batch: dict[str, Any] = pad_tokens([row.ids for row in rows], [row.loss_mask for row in rows], self.pad_id)
        weight = torch.tensor(weights)
        batch["loss_mask"] *= weight[:, None]
        batch["text_bytes"] = torch.tensor([float(row.text_bytes) for row in rows]) * weight
        return batch
