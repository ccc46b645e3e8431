"""Where the time of a step goes: kernels by kind, and how long the GPU waited. On a CPU, operations instead."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.steps import ours
from benchmarks.steps.workload import Workload

TOP = 12
TOKENS = {"generate": 16, "rl": 32}
"""Tokens that are drawn under the profiler: every launch is an event, and a whole round has hundreds of thousands."""

# The first that fits a name, in lower case; of kernels and of operations.
KINDS = (
    ("copies between host and device", ("memcpy htod", "memcpy dtoh", "memcpy h2d", "memcpy d2h")),
    ("attention", ("flex", "flash", "fmha", "scaled_dot_product", "attention", "mha")),
    ("optimizer", ("adam", "multi_tensor_apply")),
    (
        "products",
        (
            "gemm",
            "nvjet",
            "cutlass",
            "cublas",
            "wgmma",
            "matmul",
            "aten::mm",
            "aten::bmm",
            "aten::addmm",
            "aten::baddbmm",
        ),
    ),
)


def kind_of(name: str) -> str:
    """The kind of a kernel or an operation, by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(part in low for part in parts)), "elementwise and other")


def profile(task: str, folder: Path, work: Workload) -> dict[str, Any]:
    """Shares of a step's seconds by kind, the largest kernels (CUDA) or operations (CPU), and what is left over.

    The step is one after two others. With `generate` and `rl` fewer tokens are drawn, see `TOKENS`; how many is in
    `new_tokens`.
    """
    tokens = min(work.new_tokens, TOKENS.get(task, work.new_tokens))
    work = replace(work, new_tokens=tokens)
    recorder = Recorder(work.device == "cuda")
    run = ours.runner(task, folder, work)
    if isinstance(run, ours.Generation):
        run(2)
        recorder.start()
        run(1)
        recorder.stop()
    else:
        run(3, [Third(recorder)])
    return {"new_tokens": tokens if task in TOKENS else None, **recorder.shares()}


class Third(pl.Callback):
    """Records the third step."""

    def __init__(self, recorder: "Recorder") -> None:
        self.recorder, self.steps = recorder, 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            self.recorder.start()
        elif self.steps == 3:
            self.recorder.stop()


class Recorder:
    """torch.profiler around a stretch of work."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds = cuda, 0.0
        # With CUDA kernels alone: operations beside them would slow down what is measured.
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def start(self) -> None:
        """The work begins."""
        ours.synchronize()
        self.profiler.start()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        """The work has ended."""
        ours.synchronize()
        self.seconds = time.perf_counter() - self.begun
        self.profiler.stop()

    def shares(self) -> dict[str, Any]:
        """See `profile`."""
        if self.cuda:
            events = [e for e in self.profiler.events() if e.device_type == DeviceType.CUDA and not _annotation(e)]
            spans = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events]
            parts = [(name, end - start, 1) for name, start, end in spans]
            return summary(parts, self.seconds, busy(spans), "kernels")
        events = [event for event in self.profiler.key_averages() if event.key.startswith("aten::")]
        parts = [(event.key, event.self_cpu_time_total / 1e6, event.count) for event in events]
        return summary(parts, self.seconds, sum(seconds for _, seconds, _ in parts), "operations")


def _annotation(event: Any) -> bool:
    """A stretch that a program named, drawn on the device's line: no kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("ProfilerStep", "Optimizer."))


def busy(spans: Iterable[tuple[str, float, float]]) -> float:
    """Seconds in which at least one kernel ran; those of several streams overlap."""
    total, last = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def summary(parts: list[tuple[str, float, int]], seconds: float, working: float, unit: str) -> dict[str, Any]:
    """Shares of `seconds` by kind and by name; `idle` is what no part covers (`working` seconds are covered).

    Args:
        parts: name, seconds and number of calls of kernels or operations.
    """
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, took, calls in parts:
        kinds[kind_of(name)] += took / seconds
        names[name] = names[name][0] + took, names[name][1] + calls
    largest = sorted(names.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "seconds": seconds,
        "unit": unit,
        "shares": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "idle": max(0.0, 1 - working / seconds),
        "top": [
            {"name": name[:120], "calls": calls, "share": took / seconds, "microseconds": 1e6 * took / calls}
            for name, (took, calls) in largest
        ],
    }
