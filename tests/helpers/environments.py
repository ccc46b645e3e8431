"""What the environments of tests have in common."""

from typing import Any


class PromptEnv:
    """Begins with the row's prompt, and counts turns; a subclass defines `step`."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row, self.turn = row, 0

    def reset(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.row["prompt"]}]
