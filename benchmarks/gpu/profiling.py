"""Where the time of a step goes: kernels by kind, and idle time of the GPU. On a CPU, operations instead of kernels."""

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
"""Tokens sampled under the profiler. Every launch is an event, and a whole round has hundreds of thousands."""

# The first pattern that occurs in the lower-case name of a kernel or an operation counts.
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
    """Kind of a kernel or an operation, by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(part in low for part in parts)), "elementwise and other")


def profile(task: str, folder: Path, work: Workload) -> dict[str, Any]:
    """Fractions of a step's time by kind, the largest kernels (CUDA) or operations (CPU), and the rest.

    The step follows two others. With `generate` and `rl` fewer tokens are sampled, see `TOKENS`; their number is in
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
    """torch.profiler around a part of the work."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds = cuda, 0.0
        # Only CUDA kernels, since recording operations too would slow down the measured work.
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def start(self) -> None:
        """Start recording."""
        ours.synchronize()
        self.profiler.start()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        """Stop recording."""
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
    """True for a named range on the device's timeline, which is not a kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("ProfilerStep", "Optimizer."))


def busy(spans: Iterable[tuple[str, float, float]]) -> float:
    """Seconds in which at least one kernel ran; kernels of several streams may overlap."""
    total, last = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def summary(parts: list[tuple[str, float, int]], seconds: float, working: float, unit: str) -> dict[str, Any]:
    """Fractions of `seconds` by kind and by name; `idle` is the fraction that no part covers (`working` is covered).

    Args:
        parts: Name, seconds and number of calls of kernels or operations.
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
