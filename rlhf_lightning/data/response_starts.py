"""Whether answers begin in training as they begin at inference: where the generation prompt of the template ends."""

from dataclasses import dataclass, field

from rlhf_lightning.data.conversations import Message

BEFORE = 24  # characters shown of what both have
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass
class ResponseStarts:
    """Trained turns beside the generation prompts that would ask for them."""

    turns: int = 0
    differing: int = 0
    prompt: str = field(default="", init=False)
    row: str = field(default="", init=False)
    """Of the first turn that differs: how its prompt ends, and what the row has in that place."""

    def take(self, prompt: str, row: str, message: Message) -> None:
        """Compare the text of a prompt with that of the row which ends with the message."""
        self.turns += 1
        shared = _shared(prompt, row)
        opened, content = prompt[shared:].strip(), str(message.get("content") or "").strip()
        answer = row.find(content, shared) if content else -1
        # What stands before an answer, and is no thought of the row's own, was put there by the template.
        own = any(message.get(name) for name in THOUGHTS)
        put = row[shared:answer].strip() if answer >= 0 and not own else ""
        if not opened and not put:
            return
        self.differing += 1
        if not self.prompt:
            start = max(0, shared - BEFORE)
            end = answer + len(content) if answer >= 0 else len(row)
            self.prompt, self.row = prompt[start:], row[start : min(end, start + 4 * BEFORE)]

    def figures(self) -> dict[str, object]:
        """As `rlhf data check --json` gives it."""
        return {"answers": self.turns, "differing": self.differing, "prompt_ends": self.prompt, "row_has": self.row}

    @property
    def message(self) -> str:
        """What is to be said of it; empty where all agree."""
        if not self.differing:
            return ""
        return (
            f"{self.differing} of {self.turns} trained answers begin otherwise than the model is asked for them:\n"
            f"  a prompt ends with  {self.prompt!r}\n"
            f"  the row has there   {self.row!r}\n"
            "The model is asked in one way and trained in another. Set data.template_kwargs so that they agree (for "
            "many templates enable_thinking: true or false), give the rows a thought, or name another "
            "model.chat_template."
        )


def _shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
