"""Whether answers begin in training as they do at inference, that is, where the generation prompt ends."""

from dataclasses import dataclass, field
from typing import TypedDict

from rlhf_lightning.data.call_forms import REASONING
from rlhf_lightning.data.templates import common_prefix
from rlhf_lightning.types import Message

BEFORE = 24  # characters of the common text to show


class StartFigures(TypedDict):
    """What `rlhf data check --json` reports of `ResponseStarts`."""

    answers: int
    differing: int
    prompt_ends: str
    row_has: str


@dataclass
class ResponseStarts:
    """Comparison of trained turns with the generation prompts that would request them.

    Attributes:
        turns: Number of turns.
        differing: Number of turns that begin otherwise than their prompt ends.

    Example:
        >>> starts = ResponseStarts()
        >>> starts.take("User: Hi Bot:", "User: Hi Bot: Hello", {"role": "assistant", "content": "Hello"})
        >>> starts.differing
        0
    """

    turns: int = 0
    differing: int = 0
    prompt: str = field(default="", init=False)
    row: str = field(default="", init=False)
    """For the first turn that differs: how its prompt ends (`prompt`), and what the row has there instead (`row`)."""

    def take(self, prompt: str, row: str, message: Message) -> None:
        """Compare a prompt's text with the row that ends with `message`."""
        self.turns += 1
        shared = common_prefix(prompt, row)
        opened, content = prompt[shared:].strip(), str(message.get("content") or "").strip()
        answer = row.find(content, shared) if content else -1
        # Text before an answer that is not the row's own thought was added by the template.
        own = any(message.get(name) for name in REASONING)
        put = row[shared:answer].strip() if answer >= 0 and not own else ""
        if not opened and not put:
            return
        self.differing += 1
        if not self.prompt:
            start = max(0, shared - BEFORE)
            end = answer + len(content) if answer >= 0 else len(row)
            self.prompt, self.row = prompt[start:], row[start : min(end, start + 4 * BEFORE)]

    def figures(self) -> StartFigures:
        """The numbers that `rlhf data check --json` reports."""
        return {"answers": self.turns, "differing": self.differing, "prompt_ends": self.prompt, "row_has": self.row}

    @property
    def message(self) -> str:
        """The warning; empty if nothing differs."""
        if not self.differing:
            return ""
        return (
            f"{self.differing} of {self.turns} trained answers do not begin where the generation prompt ends:\n"
            f"  the prompt ends with  {self.prompt!r}\n"
            f"  the row has instead   {self.row!r}\n"
            "The model would be prompted in one way and trained in another. Set data.template_kwargs so that they "
            "agree (for many templates enable_thinking: true or false), add thinking to the rows, or set another "
            "model.chat_template."
        )
