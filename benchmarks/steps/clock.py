"""The clock of a comparison: wall time, or CPU time, which other processes on the machine hardly change."""

import os
import time

CPU_TIME = "BENCHMARK_CPU_TIME"
"""Environment variable that selects CPU time of the process, summed over its threads."""


def now() -> float:
    """Seconds since some moment."""
    return time.process_time() if os.environ.get(CPU_TIME) else time.perf_counter()
