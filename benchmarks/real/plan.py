"""What is trained: parts with their settings, and the cells (a part, a side and a seed) that run in processes."""

from dataclasses import asdict, dataclass, replace
from typing import TypedDict

SIDES = ("ours", "trl")


@dataclass(frozen=True)
class Part:
    """A stage with the settings that both sides get.

    Attributes:
        kind: `sft`, `reward`, `dpo`, `grpo` or `ppo`.
        task: Prompts of policy RL: `instructions` or `arithmetic`.
        steps: Optimizer steps, which in policy RL are rounds.
        batch: Rows per step; prompts per round in policy RL.
        group: Responses to a prompt.
        max_tokens: Token budget of a response.
        rate: Learning rate of AdamW, constant.
        beta: DPO's beta, or the coefficient of the KL.
        held_out: Number of rows that are measured on.
        epochs: Passes over the training rows.
    """

    kind: str
    steps: int
    batch: int
    rate: float
    held_out: int
    task: str = ""
    group: int = 1
    max_tokens: int = 0
    beta: float = 0.0
    epochs: int = 1

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that have it; TRL 1.16 has no PPO trainer."""
        return SIDES[:1] if self.kind == "ppo" else SIDES

    @property
    def policy_rl(self) -> bool:
        """True for policy RL."""
        return self.kind in ("grpo", "ppo")

    @property
    def rows(self) -> int:
        """Number of training rows."""
        return self.steps * self.batch // self.epochs


_INSTRUCTIONS = {"task": "instructions", "group": 4, "max_tokens": 24, "held_out": 48, "beta": 0.02}
_ARITHMETIC = {"task": "arithmetic", "group": 8, "max_tokens": 16, "held_out": 64, "beta": 0.02}

PARTS = {
    "sft": Part("sft", steps=10, batch=8, rate=4e-4, held_out=32, max_tokens=48),
    "reward": Part("reward", steps=30, batch=8, rate=2e-4, held_out=64, epochs=3),
    "dpo": Part("dpo", steps=8, batch=8, rate=2e-4, held_out=48, beta=0.1),
    "grpo-instructions": Part("grpo", steps=12, batch=4, rate=4e-4, **_INSTRUCTIONS),
    "grpo-arithmetic": Part("grpo", steps=12, batch=4, rate=4e-4, **_ARITHMETIC),
    "ppo-instructions": Part("ppo", steps=12, batch=4, rate=4e-4, **_INSTRUCTIONS),
    "ppo-arithmetic": Part("ppo", steps=12, batch=4, rate=4e-4, **_ARITHMETIC),
}
KINDS = tuple(dict.fromkeys(part.kind for part in PARTS.values()))
RANK, ALPHA = 16, 32
"""Of the adapters, on attention and MLP, which are all that is trained (and the head of the reward model)."""


class Settings(TypedDict):
    """Settings of a training run of one side."""

    precision: str
    """`32-true` or `bf16-mixed`."""
    micro: int | None
    """Rows of a micro-batch; None for the whole batch."""


@dataclass(frozen=True)
class Cell:
    """A training run.

    Attributes:
        part: Name of the part.
        settings: Settings of the part.
        side: `ours` or `trl`.
        seed: Seed of rows, adapters and samples.
        model: Folder of the start model.
        data: Folder of the data files.
        threads: Threads of torch.
        precision: `32-true` or `bf16-mixed`.
        micro: Rows of a micro-batch, for TRL; None for the whole batch.
    """

    part: str
    settings: Part
    side: str
    seed: int
    model: str
    data: str
    threads: int
    precision: str = "32-true"
    micro: int | None = None

    @property
    def total(self) -> int:
        """Rows of a step: conversations, pairs or responses."""
        return self.settings.batch * self.settings.group

    def tried(self, steps: int) -> "Cell":
        """The same with fewer steps and without held-out rows, for a trial of its speed."""
        return replace(self, settings=replace(self.settings, steps=steps, held_out=0, epochs=1))

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, object]) -> "Cell":
        """From plain values."""
        return cls(**{**values, "settings": Part(**values["settings"])})


def precisions(cell: Cell) -> list[Settings]:
    """The settings that are tried first, for TRL with a quarter of the batch."""
    micro = None if cell.side == "ours" else max(1, cell.total // 4)
    return [{"precision": "bf16-mixed", "micro": micro}, {"precision": "32-true", "micro": micro}]
