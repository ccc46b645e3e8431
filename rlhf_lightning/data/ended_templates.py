"""Makes the chat template of a reward model's folder end with the last turn, where the score is read.

Stock pooling reads the score at the last non-padding token. Many templates write more text after the end of a turn
(ChatML a line break), but the score was trained at the end of the turn. A reward model's folder therefore gets a
wrapped template: if a conversation ends with the assistant and no generation prompt is requested, it cuts off
everything after the end of that turn. Otherwise it renders as before. This package unwraps the template when it reads
such a folder.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.templates import FIXED_DATE, TEMPLATE_FAILURES, ChatTemplate
from rlhf_lightning.types import JSON, Message, TemplateSource, Tokenizer

log = logging.getLogger(__name__)
_HEAD = "{#- rlhf-lightning: this template ends with the last turn, where the score is read. -#}\n"
_OPEN = "{% set rlhf_text %}\n"  # transformers drops line breaks after tags
_CLOSE = "{{ '' }}{% endset %}"
_NEWLINE = "{#- a line break stood here, which Jinja leaves out -#}"
_EXAMPLE_CHAT: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good\nday."}]
_SAMPLES: list[list[Message]] = [
    _EXAMPLE_CHAT,
    [*_EXAMPLE_CHAT, *_EXAMPLE_CHAT],
    [{"role": "system", "content": "Be kind."}, *_EXAMPLE_CHAT],
]


@contextmanager
def ended(tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[None]:
    """Context manager in which a tokenizer's template ends with the last turn, to save it.

    Args:
        tokenizer: The tokenizer.
        template: Its chat template; None to change nothing.
    """
    before = tokenizer.chat_template
    if template is not None and before:
        sources = before if isinstance(before, dict) else {"default": before}
        wrapped = {name: _wrapped(source, template) for name, source in sources.items()}
        after = wrapped if isinstance(before, dict) else wrapped["default"]
        if _agrees(tokenizer, after, template):
            tokenizer.chat_template = after
        else:
            log.warning(
                "the chat template cannot be changed to end with the turn; before scoring with stock libraries, cut "
                "off the text after the end of the answer, see docs/preference.md"
            )
    try:
        yield
    finally:
        tokenizer.chat_template = before


def unwrapped(template: TemplateSource) -> TemplateSource:
    """A chat template as it was before `ended`; any other template is returned unchanged."""
    if isinstance(template, dict):
        return {name: _inner(source) for name, source in template.items()}
    return None if template is None else _inner(template)


def _inner(template: str) -> str:
    if not template.startswith(_HEAD):
        return template
    inner, _, rest = template.partition(_OPEN)[2].rpartition(_CLOSE)
    return inner + "\n" * rest.startswith(_NEWLINE)


def _wrapped(source: str, template: ChatTemplate) -> str:
    """The source of a template, wrapped to end with the last turn."""
    if source.startswith(_HEAD):
        return source
    given = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in template.given.items()
    )
    # Jinja drops a line break at the end of a template, but here the template continues.
    broken = source.endswith("\n")
    return (
        _HEAD
        + (FIXED_DATE if "strftime_now" in source else "")
        + given
        + _OPEN
        + source.removesuffix("\n")
        + _CLOSE
        + _NEWLINE * broken
        + "\n{%- if not add_generation_prompt and messages and messages[-1].role == 'assistant' %}"
        + _cut(template)
        + "\n{%- endif %}\n{{- rlhf_text }}"
    )


def _cut(template: ChatTemplate) -> str:
    """Jinja code that cuts a text at the end of the turn, or appends the eos_token if the template ends no turns."""
    if not template.ends_turns:
        return "\n{%- set rlhf_text = rlhf_text ~ eos_token %}"
    rest, stripped = template.after_turn, "\n{%- set rlhf_text = rlhf_text.rstrip() %}"
    if not rest:
        return stripped
    shown = _literal(rest)
    return (
        f"{stripped}\n{{%- if rlhf_text.endswith({shown}) %}}"
        f"{{% set rlhf_text = rlhf_text[:-{len(rest)}].rstrip() %}}{{% endif %}}"
    )


def _literal(value: JSON) -> str:
    """A value as a Jinja literal."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _agrees(tokenizer: Tokenizer, wrapped: str | dict[str, str], template: ChatTemplate) -> bool:
    """True if the wrapped template ends texts with the turn, and is unchanged with a generation prompt."""
    from jinja2 import TemplateError

    for messages in _SAMPLES:
        try:
            whole = template.render(messages)
            end = template.span(messages, len(messages) - 1, whole, None)[1]
            asked = template.render(messages[:-1], add_generation_prompt=True)
        except RowError:
            continue  # for example, a template without system messages
        wanted = whole[:end] if template.ends_turns else whole + (tokenizer.eos_token or "")
        try:
            found = _stock(tokenizer, messages, wrapped, False)
            prompt = _stock(tokenizer, messages[:-1], wrapped, True)
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            log.debug("the wrapped chat template fails: %s", error)
            return False
        if found != wanted or prompt != asked:
            return False
    return True


def _stock(tokenizer: Tokenizer, messages: list[Message], source: str | dict[str, str], prompt: bool) -> str:
    source = source.get("default", next(iter(source.values()))) if isinstance(source, dict) else source
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
