"""CPU seconds of the paths that are special to a CPU, each beside what it replaces, measured in turns.

    python benchmarks/cpu.py [WORD …]

One thread; the least of several turns, so that other processes matter little. Writes `benchmarks/results/cpu.json`;
with words, only the cases whose names contain one of them are measured, and the others stay in the file.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf_lightning.cli.main import prepare_environment  # noqa: E402

prepare_environment()  # as the `rlhf` command does before it imports torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from benchmarks.quickstart import machine  # noqa: E402
from benchmarks.steps.ours import Training  # noqa: E402
from benchmarks.steps.workload import Workload  # noqa: E402
from rlhf_lightning.models.auto_precision import measure_precision  # noqa: E402
from rlhf_lightning.models.logits import HeadLogprobsFunction, TokenLogprobsFunction  # noqa: E402
from rlhf_lightning.models.lora import LoRA, base_of  # noqa: E402
from rlhf_lightning.models.packed_forward import PackedForward  # noqa: E402
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix  # noqa: E402
from rlhf_lightning.models.precision import rounded_factors  # noqa: E402
from rlhf_lightning.models.short_attention import short_attention  # noqa: E402

TURNS = 5
Ways = dict[str, Callable[[], Tensor | None]]


def seconds(ways: Ways) -> dict[str, float]:
    """Least CPU seconds of each function, called in turns after one call each."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                found[name].append(time.process_time() - start)
    return {name: min(values) for name, values in found.items()}


def product(size: int) -> Ways:
    """A product of float32 matrices by PyTorch's default library and, with the same rounding error, by oneDNN."""
    left, right = torch.randn(2, size, size)

    def by_onednn() -> Tensor:
        with rounded_factors():
            return left @ right

    exact = left.double() @ right.double()
    if (by_onednn() - exact).norm() > 1e-5 * exact.norm():
        raise SystemExit("this processor has AMX, with which oneDNN rounds factors to bfloat16")
    return {"default": lambda: left @ right, "oneDNN": by_onednn}


def head(tokens: int, hidden: int, vocabulary: int) -> Ways:
    """Log-probabilities and their gradients, from logits in float32, and in blocks of rows with rounded factors."""
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden).mul_(0.05).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def wide() -> None:
        logprobs, _, _ = TokenLogprobsFunction.apply(F.linear(states, weight), targets, 1.0, False)
        torch.autograd.grad(logprobs.sum(), (states, weight))

    def fused() -> None:
        logprobs, _, _ = HeadLogprobsFunction.apply(states, weight, targets, 1.0, False)
        torch.autograd.grad(logprobs.sum(), (states, weight))

    return {"float32": wide, "fused": fused}


def attention(tokens: int, heads: int, key_heads: int, size: int = 64) -> Ways:
    """Causal attention of a row in bfloat16, forward and backward: PyTorch's kernel and that for short rows."""
    states = [
        torch.randn(1, count, tokens, size, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    query, key, value = states
    repeats = heads // key_heads

    def kernel() -> None:
        wide = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(query, *wide, is_causal=True)
        torch.autograd.grad(out, states, torch.ones_like(out))

    def short() -> None:
        out = short_attention(query, key, value, PackedLayout([SharedPrefix((0,), tokens, (0,))], query.device))
        torch.autograd.grad(out, states, torch.ones_like(out))

    return {"PyTorch": kernel, "short": short}


def layers(adapted: bool) -> Ways:
    """Six layers of SmolLM2-135M's sizes under autocast, forward and backward: the model's own modules, and fused.

    The rows are 8 pairs with a prompt of 100 and answers of 50 tokens, of which the last token is wanted.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model: Any = LlamaForCausalLM(config)
    if adapted:
        model = get_peft_model(model, LoRA(rank=16).config(model, "CAUSAL_LM"))
    forward = PackedForward(model, base_of(model).get_decoder())
    ids = torch.randint(0, 64, (8, 1, 150)).repeat(1, 2, 1)
    ids[:, :, 100:] = torch.randint(0, 64, (8, 2, 50))
    rows, wanted = ids.flatten(0, 1), torch.arange(150).expand(16, -1) == 149

    def step(fused: bool) -> None:
        forward._fuses = fused
        with torch.autocast("cpu", torch.bfloat16):
            total = forward(rows, wanted, torch.full((16,), 100)).states.sum()
        torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    return {"own modules": lambda: step(False), "fused": lambda: step(True)}


def last_layer(task: str, bf16: bool, root: Path) -> Ways:
    """Steps of the 5M model of `step.py`, with the last layer at all positions and at the needed ones."""
    folder, work = root / f"{task}-{bf16}" / "model", Workload(bf16=bf16)
    work.build(folder)
    run = Training(task, folder, work)
    run(1)
    forward = run.module.packed_forward
    last = forward._last

    def step(reduced: bool) -> None:
        forward._last = last if reduced else None
        run(1)

    return {"all positions": lambda: step(False), "needed positions": lambda: step(True)}


def main() -> None:
    """Measure, print and write."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    path, words = ROOT / "benchmarks" / "results" / "cpu.json", sys.argv[1:]
    found: dict[str, dict[str, float]] = json.loads(path.read_text())["cpu_seconds"] if words else {}
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            "float32 product, 2,048 × 2,048": lambda: product(2048),
            "head, 500 tokens, hidden 576, vocabulary 49,152": lambda: head(500, 576, 49_152),
            "head, 700 tokens, hidden 256, vocabulary 8,192": lambda: head(700, 256, 8192),
            **{
                f"attention, {tokens} tokens, 9 heads, 3 key heads": lambda tokens=tokens: attention(tokens, 9, 3)
                for tokens in (64, 170, 320, 512)
            },
            "layers, all weights trained": lambda: layers(adapted=False),
            "layers, LoRA": lambda: layers(adapted=True),
            **{
                f"{task} step, 5M, {'bf16-mixed' if bf16 else '32-true'}": lambda task=task, bf16=bf16: last_layer(
                    task, bf16, Path(scratch)
                )
                for task in ("reward", "sft")
                for bf16 in (False, True)
            },
        }
        for name, ways in cases.items():
            if words and not any(word in name for word in words):
                continue
            found[name] = seconds(ways())
            before, after = found[name].values()
            print(f"{name}: {found[name]}, ratio {before / after:.2f}", flush=True)
    report = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "threads": 1,
        "precision auto": str(measure_precision()),
        "cpu_seconds": found,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
