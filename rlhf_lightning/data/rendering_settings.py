"""Rendering settings of a saved model: recorded in its `stage.json` in training, and used when it runs again."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.data.conversations import tool_schemas
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, cut
from rlhf_lightning.files import is_file, read_record, read_stage
from rlhf_lightning.types import JSON, ModelSource, Row, Tokenizer, ToolSchema

log = logging.getLogger(__name__)
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULTS: Row = {"format": "chat", "template_kwargs": {}, "system": None, "tools": None, "stop": []}
"""Default values, for settings that neither the user nor a record specifies."""

_KINDS: dict[str, tuple[type, type | None]] = {
    "format": (str, None),
    "template_kwargs": (dict, str),
    "system": (str, None),
    "tools": (list, dict),
    "stop": (list, str),
    "stop_token_ids": (list, int),
}


@dataclass(frozen=True)
class RenderingSettings:
    """How a model's conversations are rendered: by the record in its folder, and the user's settings that replace it.

    Args:
        source: The model's folder or Hub id, or the model.
        record: `rendering` in `stage.json`; empty for a model that was not trained by this package.
        given: Settings that replace those of the record.

    Example:
        >>> settings = RenderingSettings.of("no-such-folder", format="raw")
        >>> settings.differences()
        {}
    """

    source: str
    record: Row
    given: Row

    @classmethod
    def of(cls, source: ModelSource, **given: JSON) -> "RenderingSettings":
        """Read the record of a model, and combine it with settings that replace it.

        Args:
            source: The model's folder or Hub id, or the model.
            **given: Settings with the keys of `DEFAULTS`; None for settings that are not set.
        """
        name = source if isinstance(source, str | Path) else getattr(source, "name_or_path", None) or ""
        wanted: Row = {key: value for key, value in given.items() if value is not None}
        if "tools" in wanted:
            wanted["tools"] = [*load_tools(wanted["tools"])]
        return cls(str(name), recorded(name), wanted)

    def renderer(
        self, tokenizer: Tokenizer, stop_token_ids: Iterable[int] = (), plain: bool = True, own_tokenizer: bool = True
    ) -> Renderer:
        """Make a renderer with these settings.

        Args:
            tokenizer: The model's tokenizer.
            stop_token_ids: Additional ids that end a response, usually those of the model's generation config.
            plain: Use format `raw` if no format is set and the tokenizer has no chat template.
            own_tokenizer: True if it is the tokenizer of the record, so that recorded token ids are valid.

        Raises:
            ConfigError: If the settings contradict each other or the tokenizer.
        """
        settings: dict[str, Any] = {**self.record, **self.given}
        ids = {*stop_token_ids, *(settings.pop("stop_token_ids", []) if own_tokenizer else [])}
        if "format" not in settings and plain and not tokenizer.chat_template:
            settings["format"] = "raw"
        if settings.get("format") == "raw":
            if "tools" not in self.given:
                settings.pop("tools", None)
            if self.given.get("template_kwargs"):
                raise ConfigError(
                    f"template_kwargs {_shown(self.given['template_kwargs'])} have no effect, because format is raw "
                    f"({self._why_raw()}). Leave them out, or set format: chat"
                )
            settings.pop("template_kwargs", None)
        return Renderer(tokenizer, **{**settings, "stop_token_ids": ids})

    def _why_raw(self) -> str:
        """The reason why the format is raw, for a message."""
        if "format" in self.given:
            return "as set"
        return f"as {self.source} was trained" if "format" in self.record else "the tokenizer has no chat template"

    def differences(self) -> dict[str, tuple[JSON, JSON]]:
        """Settings that differ from the record, as (given, recorded)."""
        found = {}
        for key, value in self.given.items():
            before = self.record.get(key, DEFAULTS.get(key))
            if self.record and _plain(value) != _plain(before):
                found[key] = value, before
        return found

    def describe(self) -> str:
        """The settings in one line; empty if they are the defaults."""
        differences, parts, told = self.differences(), [], []
        if not self.record and "kind" in read_stage(self.source):
            parts.append(
                f"stage.json of {self.source} does not record how the model was prompted in training; using defaults"
            )
        kept = {key: value for key, value in self.record.items() if key in DEFAULTS and key not in self.given}
        if said := ", ".join(f"{key} {_shown(value)}" for key, value in kept.items() if not _usual(key, value)):
            parts.append(f"prompting as in the training of {self.source}: {said}")
        for key, value in self.given.items():
            if key in differences:
                told.append(f"{key} {_shown(value)} (trained with {_shown(differences[key][1])})")
            elif not _usual(key, value):
                told.append(f"{key} {_shown(value)}")
        if told:
            parts.append(f"{'' if parts else f'prompts {self.source} '}with {', '.join(told)}")
        return ", ".join(parts)

    def log(self) -> None:
        """Log settings that are not the defaults, and warn about differences from the record."""
        self.warn()
        if said := self.describe():
            log.info("%s", said)

    def warn(self, text: str = "data.{} is {}, but {} was trained with {}; using the setting") -> None:
        """Warn about settings that the model was not trained with.

        Args:
            text: The message, with places for setting, value, source and recorded value.
        """
        for key, (value, before) in self.differences().items():
            log.warning("%s", text.format(key, _shown(value), self.source, _shown(before)))


def recorded(source: ModelSource) -> Row:
    """The recorded rendering settings of a model's training, as arguments of `Renderer`.

    Raises:
        ConfigError: If its `stage.json` is damaged.
    """
    stage = read_stage(source) if isinstance(source, str | Path) else {}
    if not stage and isinstance(source, str) and _ON_HUB.fullmatch(source) and not Path(source).exists():
        stage = _stage_on_hub(source)
    rendering = stage.get("rendering") or {}
    if not isinstance(rendering, dict):
        raise ConfigError(f"stage.json of {source}: rendering is {rendering!r}; it must be a mapping. Restore the file")
    found: Row = {key: rendering[key] for key in _KINDS if rendering.get(key) is not None}
    for key, value in found.items():
        kind, inner = _KINDS[key]
        items: list[JSON] = list(value) if inner and isinstance(value, list | dict) else []
        if not isinstance(value, kind) or (inner and not all(isinstance(item, inner) for item in items)):
            raise ConfigError(
                f"stage.json of {source}: rendering.{key} is {value!r:.100}, which is not valid; restore the file"
            )
    return found


def _stage_on_hub(name: str) -> Row:
    """The `stage.json` of a Hub repository; empty if there is none. Loading the model reports a missing repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return read_record(Path(hf_hub_download(name, "stage.json")))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):  # also if not in the cache and without a network
        return {}


def load_tools(value: JSON) -> list[ToolSchema]:
    """Tool schemas from a list, JSON text or a JSON file; empty for none.

    Raises:
        ConfigError: If they cannot be read.
    """
    if isinstance(value, str) and not value.lstrip().startswith("["):
        path = Path(value).expanduser()
        if not is_file(path):
            raise ConfigError(f"tools {value!r}: neither a file nor a JSON list of tools")
        value = path.read_text(encoding="utf-8-sig")
    try:
        return tool_schemas({"tools": value}) or []
    except RowError as error:
        raise ConfigError(str(error)) from None


def shared_by_all(asked: set[tuple[str | None, str]]) -> Row:
    """The system message and the tools that all conversations in `Renderer.asked` share."""
    systems, tools = {system for system, _ in asked}, {schemas for _, schemas in asked}
    found: Row = {}
    if len(systems) == 1 and (system := systems.pop()):
        found["system"] = system
    if len(tools) == 1 and (schemas := json.loads(tools.pop())):
        found["tools"] = schemas
    return found


def _plain(value: JSON) -> JSON:
    return value or None


def _usual(key: str, value: JSON) -> bool:
    """True if a setting has its default value."""
    return bool(_plain(value) == _plain(DEFAULTS[key]))


def _shown(value: JSON) -> str:
    """A value for a message, shortened."""
    return cut(repr(value), 200) if value or value == {} else "none"
