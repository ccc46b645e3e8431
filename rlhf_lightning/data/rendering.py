"""Renders conversations to tokens and a loss mask. All text is tokenized here."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rlhf_lightning.data.columns import refuse_untrained
from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.data.message_checks import MessageChecks
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.response_starts import ResponseStarts
from rlhf_lightning.data.selection import refuse_blank, select
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.data.tokenizers import added_tokens
from rlhf_lightning.data.tool_calls import Written
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON, Counts, Message, Row, Tokenizer, ToolSchema

log = logging.getLogger(__name__)


@dataclass
class Rendered:
    """A row of tokens. `loss_mask[t]` is 1 if token t is trained (predicted from the tokens before it), else 0.

    Example:
        >>> row = Rendered(ids=[1, 5, 6, 2], loss_mask=[0, 0, 1, 1])
        >>> row.tokens, row.trained
        (4, 2)
    """

    ids: list[int]
    loss_mask: list[int]
    text_bytes: int = 0
    """Number of UTF-8 bytes of the trained text without markers; the denominator of bits per byte."""
    where: str = field(default="", compare=False, repr=False)
    """File and line of the row, if known."""

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return len(self.ids)

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return sum(self.loss_mask)

    def counts(self) -> Counts:
        """The row's contribution to the denominators of its optimizer step."""
        return {"tokens": float(self.trained)}

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of the row, with trained pieces between ⟦ and ⟧."""
        return show_masked(tokenizer, self.ids, self.loss_mask)

    def trimmed(self) -> "Rendered":
        """The row without the tokens after the last trained token, which no loss depends on."""
        end = len(self.loss_mask) - self.loss_mask[::-1].index(1) if 1 in self.loss_mask else 0
        return Rendered(self.ids[:end], self.loss_mask[:end], self.text_bytes)


class Renderer:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        format: `chat` renders with the chat template (a string is one user message); `raw` concatenates text.
        template_kwargs: Arguments of the template, for example `{"enable_thinking": False}`.
        stop_token_ids: Additional ids that end a response, usually those of the model's generation config.
        system: System message for conversations without one.
        tools: Tools for conversations without any.
        stop: Default stop texts of a sampler, in addition to the template's end of a turn.

    If the template does not end assistant turns, the tokenizer's eos_token is appended to them.

    Raises:
        ConfigError: If there is no chat template (for `chat`), or no token that ends a turn.

    Example:
        ```python
        renderer = Renderer(AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        (row,) = renderer.conversation(messages)
        print(row.show(renderer.tokenizer))
        ```
    """

    asked: set[tuple[str | None, str]] | None = None
    """If a set, the system message and the tools (as JSON) of each conversation are added to it."""
    openings: ResponseStarts | None = None
    """If set, it compares the beginning of each trained answer with the end of its prompt."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        format: str = "chat",
        template_kwargs: Row | None = None,
        stop_token_ids: Iterable[int] = (),
        system: str | None = None,
        tools: list[ToolSchema] | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        if format not in ("chat", "raw"):
            raise ConfigError(f"format is {format!r}; it must be 'chat' or 'raw'")
        self.tokenizer = tokenizer
        self.format, self.template_kwargs = format, template_kwargs or {}
        self.system, self.tools, self.stop = system or None, tools or None, tuple(stop)
        if format == "raw" and self.tools:
            raise ConfigError("tools need a chat template, but format is raw; leave out the tools, or set format: chat")
        self.template = ChatTemplate(tokenizer, template_kwargs)
        if format == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no chat template. "
                "Set model.chat_template: FILE.jinja, or data.format: raw for plain text."
            )
        self.checks = MessageChecks(self.template) if format == "chat" else None
        self.stop_token_ids: list[int] = []
        """Ids that end a response: those at the end of turns, the tokenizer's eos_token, and the given ids."""
        self.also_stop_at(stop_token_ids)
        self.turn_end_ids, self.stop_strings = self._stops()
        """Ids and texts that rendered turns end with."""
        self.also_stop_at(self.turn_end_ids)
        self.prefix_ids, self.suffix_ids = added_tokens(tokenizer)

    def also_stop_at(self, ids: Iterable[int]) -> None:
        """Add ids that end a response."""
        self.stop_token_ids = sorted({*self.stop_token_ids, *ids})

    def settings(self) -> Row:
        """Settings for `stage.json`, with which the same tokenizer renders in the same way."""
        return {
            "format": self.format,
            "template_kwargs": self.template_kwargs,
            "system": self.system,
            "tools": None if self.tools is None else [*self.tools],
            "stop": [*self.stop],
            "stop_token_ids": [*self.stop_token_ids],
        }

    def completed(
        self, messages: list[Message], tools: list[ToolSchema] | None = None
    ) -> tuple[list[Message], list[ToolSchema] | None]:
        """Add the default system message and tools to a conversation that has none."""
        system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
        if system is None and self.system is not None:
            system, messages = self.system, [{"role": "system", "content": self.system}, *messages]
        tools = tools or self.tools
        if self.asked is not None:
            self.asked.add((system, json.dumps(tools, sort_keys=True)))
        return messages, tools

    def _stops(self) -> tuple[list[int], list[str]]:
        """Ids and texts that rendered turns end with."""
        eos = self.tokenizer.eos_token_id
        ids = set() if eos is None else {eos}
        turn_end = self.template.turn_end if self.format == "chat" else None
        markers = self.template.end_markers if self.format == "chat" else []
        ids |= {self.tokenizer.convert_tokens_to_ids(marker) for marker in markers}
        if not ids and not self.stop_token_ids:
            raise ConfigError(
                f"the tokenizer {self.tokenizer.name_or_path or ''} has no eos_token, and its template does not end "
                "turns with a special token, so a model trained with it would never stop. Set eos_token in "
                "tokenizer_config.json."
            )
        if self.format == "chat" and not self.template.ends_turns:
            log.info("the chat template does not end assistant turns; %s is appended", self.tokenizer.eos_token)
        by_text = turn_end and self.template.first_marker(turn_end) is None
        return sorted(ids), [turn_end] if turn_end and by_text else []

    # -- rendering ------------------------------------------------------------------------------------------------

    def conversation(
        self, messages: list[Message], tools: list[ToolSchema] | None = None, train_on: str = "all_assistant"
    ) -> list[Rendered]:
        """Render a conversation.

        Args:
            messages: The conversation.
            tools: Tools of the conversation.
            train_on: See `SFTDataModule`.

        Returns:
            One row; or one row per assistant turn, if the template renders earlier turns differently.

        Raises:
            RowError: If the template refuses the messages, or no token is trained.
        """
        messages, tools = self.completed(messages, tools)
        self._note_lost(messages, tools)
        if self.format == "raw":
            refuse_untrained(messages[-1:], "with format raw the last message is always trained")
            return [self._raw(messages)]
        if train_on == "everything":
            refuse_untrained(messages, "data.train_on is everything")
            text = self.template.render(messages, tools)
            self._show_opening(messages, tools, [message["role"] == "assistant" for message in messages])
            return [_checked(self._tokenize(text, [(0, len(text))]))]
        selected = select(messages, train_on)
        if any(message.get("trainable") and not chosen for message, chosen in zip(messages, selected, strict=True)):
            self.template.forms.once(
                "trainable",
                f"the marks of trained messages are ignored, because data.train_on is {train_on}; set it to trainable",
            )
        refuse_blank(messages, selected)
        return [_checked(row).trimmed() for row in self._rows(messages, tools, selected)]

    def text(self, text: str) -> Rendered:
        """Render plain text with every token trained, followed by the eos_token."""
        if self.asked is not None:
            self.asked.add((None, "null"))
        ids = self._ended(self._begun(self._ids(text)))
        return _checked(Rendered(ids, [1] * len(ids), len(text.encode())))

    def prompt(self, messages: list[Message], tools: list[ToolSchema] | None = None) -> list[int]:
        """Token ids of a prompt with the generation prompt, from which the sampler continues.

        Raises:
            RowError: If the prompt has no tokens.
        """
        if not (ids := self.prompt_ids(self.prompt_text(messages, tools))):
            raise RowError("the prompt is empty: the model needs at least one token to continue from")
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt's text. A template writes the bos_token itself; to raw text, the tokenizer adds it."""
        return self.raw_ids(text) if self.format == "raw" else self._ids(text)

    def raw_ids(self, text: str) -> list[int]:
        """Token ids of a text that is continued without a template, with the tokenizer's own prefix (a bos_token)."""
        return self._begun(self._ids(text))

    def prompt_text(self, messages: list[Message], tools: list[ToolSchema] | None = None) -> str:
        """The text of a prompt with the generation prompt."""
        messages, tools = self.completed(messages, tools)
        if self.format == "raw":
            return _plain(messages)
        self._note_lost(messages, tools)
        return self.template.render(messages, tools, add_generation_prompt=True)

    def exchange(
        self,
        prompt: list[Message],
        response: list[Message],
        tools: list[ToolSchema] | None = None,
        allow_blank: bool = False,
    ) -> Rendered:
        """Render prompt and response as one row, which ends with the response; the mask is 1 on the response.

        Args:
            prompt: Messages of the prompt.
            response: Messages of the response.
            tools: Tools of the conversation.
            allow_blank: Allow a response without content.

        Raises:
            RowError: If the response has no assistant message, or the template renders its earlier turns differently.
        """
        prompt, tools = self.completed(prompt, tools)
        messages = prompt + response
        self._note_lost(messages, tools)
        refuse_untrained(response, "a response is always trained and scored as a whole")
        if self.format == "raw":
            return self._raw(messages, len(prompt))
        selected = [i >= len(prompt) and m["role"] == "assistant" for i, m in enumerate(messages)]
        if not any(selected):
            raise RowError(f"the response has no assistant message; its roles are {[m['role'] for m in response]}")
        if not allow_blank:
            refuse_blank(messages, selected)
        rows = self._rows(messages, tools, selected)
        if len(rows) > 1:
            raise RowError("the response has several turns, but this chat template renders earlier turns differently")
        return _checked(rows[0]).trimmed()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response up to its stop token or stop text, without special tokens."""
        ids = list(ids)
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.stop_strings:
            text = text.partition(stop)[0]
        return text.strip()

    def refuse_lost(self, messages: list[Message], tools: list[ToolSchema] | None) -> None:
        """Raise `RowError` if the template would silently leave out a part of the row, or render it a second time."""
        if lost := self._lost(messages, tools):
            raise RowError(lost)
        if self.checks is not None and (twice := self.checks.rendered_before(messages)):
            raise RowError(twice)

    def _note_lost(self, messages: list[Message], tools: list[ToolSchema] | None) -> None:
        """Warn once instead, for conversations with a policy or an environment, which cannot be refused."""
        if lost := self._lost(messages, tools):
            self.template.forms.once(lost, lost)
        if self.checks is not None:
            self.checks.note(messages)

    def _lost(self, messages: list[Message], tools: list[ToolSchema] | None) -> str | None:
        """A message about the part that would be left out; None if there is none."""
        if self.format == "raw":
            return "format raw does not render tools; ignore the column with columns: {tools: null}" if tools else None
        return self.template.forms.left_out(messages, tools)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def _rows(self, messages: list[Message], tools: list[ToolSchema] | None, selected: list[bool]) -> list[Rendered]:
        """Tokenize the selected turns."""
        rows, found = [], self.template.spans(messages, tools, selected)
        self._note_stripped(messages, selected, [text[start:end] for text, spans, _ in found for start, end in spans])
        for text, spans, ended in found:
            rows.append(self._tokenize(text, spans))
            if not ended and (rows[-1].ids[-1:] != [self._eos()] or not rows[-1].loss_mask[-1]):
                rows[-1].ids.append(self._eos())
                rows[-1].loss_mask.append(1)
        self._show_opening(messages, tools, selected)
        return rows

    def _note_stripped(self, messages: list[Message], selected: list[bool], trained_texts: list[str]) -> None:
        """Warn once if the template leaves out a part of a trained turn, usually reasoning."""
        chosen = [message for message, flag in zip(messages, selected, strict=True) if flag]
        for message, text in zip(chosen, trained_texts, strict=True):
            content = message["content"]
            if message["role"] != "assistant" or message.get("tool_calls") or not content or content.strip() in text:
                continue
            pieces = [piece for piece in re.split(r"\s+|</?think>", content) if piece]
            if lost := next((piece for piece in pieces if piece not in text), None):
                self.template.forms.once(
                    "stripped",
                    f"the chat template leaves out a part of the assistant's message, for example {lost[:60]!r}, "
                    f"so it is not trained. The template renders {content[:60]!r} as {text[:60]!r}. Set "
                    "model.chat_template to a template that keeps it",
                )

    def _show_opening(self, messages: list[Message], tools: list[ToolSchema] | None, selected: list[bool]) -> None:
        """Compare the last trained answer in `openings`. This is cheap, because the renderings are cached."""
        last = max((i for i, chosen in enumerate(selected) if chosen), default=-1)
        if self.openings is None or last < 1 or messages[last]["role"] != "assistant":
            return
        with suppress(RowError):  # the template has no generation prompt at this position
            prompt = self.template.render(messages[:last], tools, add_generation_prompt=True)
            self.openings.take(prompt, self.template.render(messages[: last + 1], tools), messages[last])

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Tokenize a text, with the tokens within the (start, end) spans trained."""
        spans = [(start, end) for start, end in spans if start < end]
        text_bytes = sum(self.template.content_bytes(text[start:end]) for start, end in spans)
        return self._whole(text, spans, text_bytes) or self._pieces(text, spans, text_bytes)

    def _whole(self, text: str, spans: list[tuple[int, int]], text_bytes: int) -> Rendered | None:
        """Tokenize the text as a whole; None if a token crosses the edge of a span, or there are no offsets."""
        if not self.tokenizer.is_fast:
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        loss_mask = []
        for start, end in encoded["offset_mapping"]:
            trained = 0
            for a, b in spans:
                if start < a < end or start < b < end:
                    return None
                if a <= start < end <= b:
                    trained = 1
            loss_mask.append(trained)
        return Rendered(list(encoded["input_ids"]), loss_mask, text_bytes)

    def _pieces(self, text: str, spans: list[tuple[int, int]], text_bytes: int) -> Rendered:
        """Tokenize spans separately, so that the prompt has the same ids as at inference."""
        row = Rendered([], [], text_bytes)
        position = 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, trained in ((text[position:start], 0), (text[start:end], 1)):
                ids = self._ids(piece)
                row.ids += ids
                row.loss_mask += [trained] * len(ids)
            position = end
        return row

    def _raw(self, messages: list[Message], response_from: int | None = None) -> Rendered:
        """Render concatenated text, trained from message `response_from` on (by default the last message)."""
        split = len(messages) - 1 if response_from is None else response_from
        completion = _plain(messages[split:])
        context, target = self._ids(_plain(messages[:split])), self._ids(completion)
        ids = self._begun(context + target)
        prompt = len(ids) - len(target)
        ids = self._ended(ids) if target else [*ids, self._eos()]
        return _checked(Rendered(ids, [0] * prompt + [1] * (len(ids) - prompt), len(completion.encode()))).trimmed()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _begun(self, ids: list[int]) -> list[int]:
        """Add the tokenizer's own prefix (a bos_token) to the ids of raw text, unless they begin with it."""
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else [*self.prefix_ids, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """Add the tokenizer's own suffix and the eos_token to the ids of raw text, unless they end with it."""
        if ids[-1:] != [self._eos()]:
            ids = [*ids, *self.suffix_ids]
        return ids if ids[-1:] == [self._eos()] else [*ids, self._eos()]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no eos_token, but rows of text must end with it; set one")
        return self.tokenizer.eos_token_id


def _checked(row: Rendered) -> Rendered:
    """Mask the first token of a row, and check that any token is trained."""
    if row.loss_mask:
        row.loss_mask[0] = 0  # the first token has no tokens before it to be predicted from
    if 1 not in row.loss_mask:
        raise RowError("no token is trained: the trained text is empty")
    return row


def _plain(messages: list[Message]) -> str:
    """Concatenated contents of messages."""
    if any(message.get("tool_calls") and not isinstance(message["content"], Written) for message in messages):
        raise RowError("format raw cannot render tool calls; write them into the content, or use format chat")
    return "".join(message["content"] or "" for message in messages)


def as_prompt(value: JSON) -> list[Message]:
    """The messages of a prompt column (string or messages).

    Raises:
        RowError: If they end with an assistant turn, so that there is nothing to answer.
    """
    messages = to_messages(value)
    if messages[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant message, so there is nothing to answer")
    return messages


def masked_pieces(tokenizer: Tokenizer, ids: list[int], loss_mask: list[int]) -> list[tuple[str, bool]]:
    """Text of a row in pieces, each with a flag if it is trained.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids of the row.
        loss_mask: 1 for trained tokens, 0 elsewhere.
    """
    pieces, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or loss_mask[i] != loss_mask[start]:
            pieces.append((tokenizer.decode(ids[start:i], skip_special_tokens=False), bool(loss_mask[start])))
            start = i
    return pieces


def show_masked(tokenizer: Tokenizer, ids: list[int], loss_mask: list[int]) -> str:
    """Text of a row, with trained pieces between ⟦ and ⟧; see `masked_pieces`."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in masked_pieces(tokenizer, ids, loss_mask))
