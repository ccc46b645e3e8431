"""Checks that answers begin in training where the generation prompt ends, as they do at inference."""

from dataclasses import dataclass, field
from typing import TypedDict

from rlhf_lightning.data.call_forms import REASONING
from rlhf_lightning.data.templates import common_prefix
from rlhf_lightning.types import Message

BEFORE = 24  # characters of the common text to show


class StartFigures(TypedDict):
    """Results of `ResponseStarts` in `rlhf data check --json`."""

    answers: int
    differing: int
    prompt_ends: str
    row_has: str


@dataclass
class ResponseStarts:
    """Compares trained turns with the generation prompts that would request them.

    Attributes:
        turns: Number of turns.
        differing: Number of turns that do not begin where their prompt ends.

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
    """For the first turn that differs: the end of its prompt (`prompt`), and the text in the row instead (`row`)."""

    def take(self, prompt: str, row: str, message: Message) -> None:
        """Compare the end of a prompt with the row.

        Args:
            prompt: Text of the prompt, with the generation prompt.
            row: Text of the row, which ends with the answer.
            message: The answer.
        """
        self.turns += 1
        shared = common_prefix(prompt, row)
        opened, content = prompt[shared:].strip(), str(message.get("content") or "").strip()
        answer = row.find(content, shared) if content else -1
        # If the row has no reasoning, the template added the text before the answer.
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
            "The model would be trained in one way and prompted in another. Set data.template_kwargs so that they "
            "agree (for many templates enable_thinking: true or false), add reasoning to the rows, or set another "
            "model.chat_template."
        )
