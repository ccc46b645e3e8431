"""How the data modules turn rows into tokens."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.data.ended_templates import unwrapped
from rlhf_lightning.data.records import RowError, SkippedRow
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings, shared_by_all
from rlhf_lightning.data.response_starts import ResponseStarts
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import Row, Tokenizer

log = logging.getLogger(__name__)


class RenderedData(pl.LightningDataModule):
    """The part of the data modules that turns rows into tokens: the tokenizer, the renderer, and their settings."""

    trainer: pl.Trainer | None
    tokenizer: Any
    format: str | None
    template_kwargs: dict[str, Any] | None
    system: str | None
    tools: list[Any] | str | None
    max_length: int
    overlong: str
    start: str | Path | None
    """Model that rows are rendered for, if there is no trainer with a module."""
    shared: Row
    """`system` and `tools`, if all rows of `train` share them."""
    _renderer: Renderer | None
    _truncated: int
    _repeated: int
    """Number of rows whose responses begin with the text of the prompt."""

    @property
    def renderer(self) -> Renderer:
        """The renderer with `tokenizer` or that of the trainer's module, and the settings of its model's training.

        Raises:
            ConfigError: If there is no tokenizer, or it differs from that of the model, which is saved with the model.
        """
        if self._renderer is None:
            tokenizer, module = self.tokenizer, self.trainer.lightning_module if self.trainer else None
            if tokenizer is None:
                if module is None:
                    raise ConfigError(
                        "the data module has no tokenizer; pass one, or use it in a Trainer with a module that has one"
                    )
                tokenizer = module.tokenizer
            elif isinstance(tokenizer, str | Path) or not hasattr(tokenizer, "apply_chat_template"):
                tokenizer = load_tokenizer(tokenizer)
            asking = self.asking
            rank_zero_only(asking.log)()
            own = module is None or (self.tokenizer is None and getattr(module, "own_tokenizer", True))
            self._renderer = asking.renderer(tokenizer, self._model_stops(), plain=False, own_tokenizer=own)
            of_model = getattr(module, "tokenizer", None)
            if self.tokenizer is not None and of_model is not None:
                _refuse_other_tokenizer(self._renderer, of_model)
        return self._renderer

    def _model_stops(self) -> list[int]:
        """Ids that end a response according to the generation config of the trainer's model."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, "end_token_ids", [])

    @property
    def asking(self) -> RenderingSettings:
        """The rendering settings that the trainer's model was trained with, and those set here that replace them."""
        module = self.trainer.lightning_module if self.trainer else None
        given = {name: getattr(self, name) for name in ("format", "template_kwargs", "system", "tools")}
        return RenderingSettings.of(getattr(module, "start_source", self.start), **given)

    @rank_zero_only
    def _warn_of_differences(self, asking: RenderingSettings, openings: ResponseStarts | None) -> None:
        """Warn if settings differ from those of the model's training, or answers do not begin where prompts end."""
        asking.warn("all rows have the {} {}, but {} was trained with {}")
        if openings is not None and openings.message:
            log.warning("%s", openings.message)

    def _record_shared(self) -> None:
        """Record the system message and tools that all training rows share; warn if the model's training had others."""
        asked, openings = self.renderer.asked, self.renderer.openings
        self.renderer.asked = self.renderer.openings = None
        if asked is None:
            return
        self.shared = shared_by_all(asked)
        own = {key: value for key, value in self.shared.items() if value != getattr(self.renderer, key)}
        self._warn_of_differences(replace(self.asking, given=own), openings)

    @property
    def pad_id(self) -> int:
        """Token id of the padding. Masks never depend on it, so any id works."""
        pad = self.renderer.tokenizer.pad_token_id
        return self.renderer.stop_token_ids[0] if pad is None else pad

    def too_long(self, length: int, name: str = "data.max_length", can_truncate: bool = True) -> bool:
        """True if a row must be truncated; counts such rows.

        Args:
            length: Number of tokens of the row.
            name: Name of the limit, for the message.
            can_truncate: False if rows of this kind cannot be truncated.

        Raises:
            RowError: If the row is too long and must not be truncated.
            SkippedRow: If the row is too long and must be skipped.
        """
        if length <= self.max_length:
            return False
        if self.overlong == "truncate" and can_truncate:
            self._truncated += 1
            return True
        ways = "truncate or skip" if can_truncate else "skip"
        kind = SkippedRow if self.overlong == "skip" else RowError
        raise kind(f"{length} tokens exceed {name} {self.max_length}; raise it, or set data.overlong: {ways}")


def _refuse_other_tokenizer(renderer: Renderer, of_model: Tokenizer) -> None:
    """Raise `ConfigError` if rows are rendered with another vocabulary or template than the saved model will have."""
    given = renderer.tokenizer
    if given is of_model:
        return
    if given.get_vocab() != of_model.get_vocab():
        what, setting = "vocabulary", "model.tokenizer"
    elif renderer.format == "chat" and unwrapped(given.chat_template) != unwrapped(of_model.chat_template):
        what, setting = "chat template", "model.chat_template"
    else:
        return
    raise ConfigError(
        f"data.tokenizer has another {what} than the model's tokenizer, which is saved with the model. Leave it "
        f"out, or set {setting} instead"
    )
