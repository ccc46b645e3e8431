"""Measurements behind the defaults: shared prompts, packing, and the size of token groups.

    python benchmarks/sharing.py

Seconds of forward and backward of the token log-probabilities of a model with 5M parameters: a tree as one row with a
dense mask, its branches side by side against the prompt's keys (what the package does), and unshared; rows packed and
padded; token budgets. Writes `benchmarks/results/sharing.json` and prints tables.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the `rlhf` command does
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.quickstart import machine  # noqa: E402
from benchmarks.steps.workload import Workload  # noqa: E402
from rlhf_lightning.data.batching import pad_tokens  # noqa: E402
from rlhf_lightning.models import attention  # noqa: E402
from rlhf_lightning.models.packing import PackedLayout  # noqa: E402
from rlhf_lightning.models.token_logprobs import TokenLogprobs  # noqa: E402


def group(prompt: int, response: int, size: int, vocabulary: int, distinct: bool = False) -> dict[str, Any]:
    """Rows of one prompt with `size` responses; with `distinct`, each has its own prompt."""
    shared = torch.randint(0, vocabulary, (prompt,)).tolist()
    rows = []
    for _ in range(size):
        start = torch.randint(0, vocabulary, (prompt,)).tolist() if distinct else shared
        rows.append(start + torch.randint(0, vocabulary, (response,)).tolist())
    return pad_tokens(rows, [[0] * prompt + [1] * response for _ in rows], 0)


def seconds(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def step(token_logprobs: TokenLogprobs, batch: dict[str, Any], shares: bool = True) -> None:
    """Run forward and backward."""
    (attention.install if shares else attention.uninstall)(token_logprobs.packed_forward.config)
    token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs.sum().backward()
    token_logprobs.backbone.model.zero_grad()


def dense_step(token_logprobs: TokenLogprobs, batch: dict[str, Any]) -> None:
    """The same, with attention over the whole tree under one mask."""
    plain, masks = attention.packed_attention, {}

    def dense(query: Any, key: Any, value: Any, layout: PackedLayout, scaling: Any = None, **_: Any) -> Any:
        if id(layout) not in masks:
            places = torch.arange(query.shape[2])
            masks[id(layout)] = layout.allowed(places[:, None], places[None], None)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=masks[id(layout)], scale=scaling
        )
        return out.transpose(1, 2).contiguous()

    attention.packed_attention = dense
    step(token_logprobs, batch)
    attention.packed_attention = plain


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    work = Workload()
    with tempfile.TemporaryDirectory() as folder:
        work.build(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder)
    token_logprobs = TokenLogprobs(model)
    token_logprobs.packed_forward.check(1024)
    report: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "sharing": [], "budget": []}
    print("| prompt | response | group | dense | branches | unshared |\n|---|---|---|---|---|---|")
    for prompt, response, size in (
        (32, 16, 2), (125, 45, 2), (512, 128, 2), (32, 64, 4), (128, 32, 8), (128, 128, 4),
        (128, 128, 8), (128, 128, 16), (128, 128, 32), (512, 64, 8), (512, 256, 8),
    ):  # fmt: skip
        batch = group(prompt, response, size, work.vocab)
        big = TokenLogprobs(model, max_tokens_per_batch=10**6)
        big.packed_forward.check(16)
        big.packed_forward._checked = dict.fromkeys((False, True), 10**6)
        ways = {
            "dense": lambda b=batch, s=big: dense_step(s, b),
            "branches": lambda b=batch, s=big: step(s, b),
            "unshared": lambda b=batch: step(token_logprobs, b, shares=False),
        }
        found = seconds(ways, given.repeats)
        report["sharing"].append({"prompt": prompt, "response": response, "group": size, **found})
        cells = " | ".join(f"{value * 1e3:.0f} ms" for value in found.values())
        print(f"| {prompt} | {response} | {size} | {cells} |", flush=True)
    print("\n| rows | way | seconds |\n|---|---|---|")
    lengths = [115, 143, 152, 165, 174, 177, 199, 213, 219, 235, 266, 271, 281, 302, 343, 359]
    rows = [torch.randint(0, work.vocab, (n,)).tolist() for n in lengths]
    batch = pad_tokens(rows, [[0] * 90 + [1] * (len(row) - 90) for row in rows], 0)
    ways = {}
    for budget in (512, 1024, 2048, 4096):
        for shares, name in ((True, "packed"), (False, "padded")):
            one = TokenLogprobs(model, max_tokens_per_batch=budget)
            one.packed_forward._checked = dict.fromkeys((False, True), 10**6)
            ways[f"{name}, {budget} tokens"] = lambda o=one, s=shares: step(o, batch, shares=s)
    for name, value in seconds(ways, given.repeats).items():
        report["budget"].append({"way": name, "seconds": value})
        print(f"| 16 of 115 to 359 tokens | {name} | {value * 1e3:.0f} ms |")
    (ROOT / "benchmarks" / "results" / "sharing.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
