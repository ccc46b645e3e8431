"""Measures memory."""

from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak(step: Any) -> int:
    """Largest number of bytes allocated at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = sorted((e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"), key=_start)
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


def _start(event: Any) -> int:
    return event.start_ns()
