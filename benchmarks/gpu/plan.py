"""The checks and measurements, their sizes and targets. Imports nothing heavy."""

from dataclasses import dataclass, field, replace
from typing import Any

# Sizes of Qwen3-0.6B, from its model card.
QWEN3_06B: dict[str, Any] = {
    "vocab": 151_936,
    "hidden": 1024,
    "intermediate": 3072,
    "layers": 28,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    "vocab": 600,
    "hidden": 32,
    "intermediate": 48,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
}
CHECKS = (
    "forward-Qwen3",
    "forward-Llama",
    "forward-Mistral",
    "forward-Gemma2",
    "forward-bf16",
    "liger-Qwen3",
    "liger-Llama",
    "sampler-float32",
    "sampler-bf16",
    "sampler-graphs",
    "step-sft",
    "step-reward",
    "step-dpo",
    "step-rl",
    "qlora",
)

DENSE_BF16 = (  # operations per second from the vendors' data sheets, without sparsity; the first matching name counts
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def data_sheet(name: str) -> float | None:
    """Dense bf16 operations per second of a device, by its name; None if unknown."""
    return next((rate for part, rate in DENSE_BF16 if part in name), None)


@dataclass(frozen=True)
class Target:
    """A figure to reach: an `mfu`, or a `ratio` to the other side."""

    figure: str
    least: float

    def text(self, reached: float | None) -> str:
        """Text for the table."""
        aim = f"{self.least:.0%} MFU" if self.figure == "mfu" else f"{self.least:g} times"
        return aim if reached is None else f"{aim}: {'reached' if reached >= self.least else 'missed'}"


@dataclass(frozen=True)
class Cell:
    """One check or measurement, which runs in its own processes."""

    name: str
    piece: str
    title: str
    task: str = ""
    work: dict[str, Any] = field(default_factory=dict)
    sides: tuple[str, ...] = ("ours", "trl")
    variants: tuple[str, ...] = ("eager",)
    target: Target | None = None
    turns: int = 3
    timed: int = 6
    least: float = 45.0
    """Seconds that must be left to start it."""
    most: float = 240.0
    """Largest number of seconds that it may take."""


def _sft(tokens: int) -> Cell:
    rows = {"batch": tokens // 512, "prompt_tokens": 128, "response_tokens": 384}
    return Cell(
        f"sft-{tokens // 1024}k", "sft", f"SFT, {tokens // 1024}k tokens", "sft", rows, target=Target("mfu", 0.4)
    )


def _rollouts(rows: int) -> Cell:
    return Cell(
        f"rollouts-{rows}",
        "rollouts",
        f"rollouts, {rows} rows",
        "generate",
        {"generate_batch": rows, "prompt_tokens": 128, "new_tokens": 128},
        sides=("ours", "generate"),
        variants=("eager", "graphs"),
        target=Target("ratio", 5.0),
        turns=2,
        timed=1,
    )


PAIRS: dict[str, Any] = {"batch": 16, "prompt_tokens": 128, "response_tokens": 384}
GROUPS: dict[str, Any] = {"groups": 8, "group_size": 8, "prompt_tokens": 128, "new_tokens": 256}
CELLS = (
    *(Cell(f"check-{name}", "check", name.replace("-", ", ", 1), name, least=20, most=180) for name in CHECKS),
    *(_sft(tokens) for tokens in (2048, 8192, 16384)),
    *(_rollouts(rows) for rows in (64, 128, 256, 512)),
    Cell(
        "rl",
        "rl",
        "RL step, 8 prompts × 8 responses of 256",
        "rl",
        GROUPS,
        variants=("eager", "graphs"),
        target=Target("ratio", 3.0),
        timed=1,
        least=200,
        most=400,
    ),
    Cell("reward", "reward", "reward model, 16 pairs", "reward", PAIRS),
    Cell("dpo", "dpo", "DPO, 16 pairs", "dpo", PAIRS),
    Cell("tests", "tests", "the test suite's cases for a device", least=60, most=500),
)
PIECES = tuple(dict.fromkeys(cell.piece for cell in CELLS))

SMALL = {
    "batch": 2,
    "prompt_tokens": 6,
    "response_tokens": 6,
    "new_tokens": 4,
    "groups": 2,
    "group_size": 2,
}


def cells(pieces: tuple[str, ...], small: bool) -> list[Cell]:
    """The cells of these pieces; with `small`, few tokens and one timed step."""
    chosen = [cell for cell in CELLS if cell.piece in pieces]
    return [_small(cell) for cell in chosen] if small else chosen


def _small(cell: Cell) -> Cell:
    work = {name: SMALL.get(name, value) for name, value in cell.work.items()}
    if "generate_batch" in work:
        work["generate_batch"] //= 32
    return replace(cell, work=work, turns=1, timed=1, least=0.0)


def workload(cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    """The `Workload` of a cell: model, rows, device and precision; one epoch per turn."""
    sizes = TINY if settings["small"] else QWEN3_06B
    bf16 = settings["precision"] != "32-true"
    return {
        **sizes,
        **cell.work,
        "batches": cell.timed + 1 if cell.task in ("sft", "reward", "dpo") else 1,
        "device": settings["device"],
        "bf16": bf16,
        "bf16_weights": settings["precision"] == "bf16-true",
    }
