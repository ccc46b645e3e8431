"""One side of the comparison in its own process, which waits while the other side works.

Reads commands as JSON lines: `{"task": …, "steps": …}` and so on; answers each with a JSON line.
"""

import gc
import json
import logging
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve commands until the input ends."""
    side, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    if side == "ours":
        from rlhf_lightning.cli.main import prepare_environment

        prepare_environment()  # as the `rlhf` command does before it imports torch
    import torch
    from transformers.utils import logging as transformers_logging

    from benchmarks.steps.sides import OUT_OF_MEMORY
    from benchmarks.steps.workload import Workload

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(settings.pop("threads"))
    if gib := settings.pop("gib"):
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)
    state: dict[Any, Any] = {}
    work = Workload(**settings)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), side, folder, work, state)
        except (MemoryError, RuntimeError) as error:
            # On a CPU, torch raises a plain exception.
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "t allocate memory" not in str(error):
                raise
            state.clear()
            answer = OUT_OF_MEMORY
        print(json.dumps(answer), file=answers, flush=True)


def _answer(command: dict[str, Any], side: str, folder: Path, work: Any, state: dict[Any, Any]) -> Any:
    task, micro, changes = command["task"], command.get("micro"), command.get("changes", {})
    work = type(work)(**{**vars(work), **changes})
    if task == "memory":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if task == "libraries":
        if side == "ours":
            from benchmarks.steps import ours
        else:
            from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401
        return _answer({"task": "memory"}, side, folder, work, state)
    if task == "hold":  # tests the memory limit
        import torch

        return torch.ones(int(command["gib"] * 2**28)).nbytes / 2**30
    if task == "matmul":
        return matmul_rate(work)
    if task == "lightning":
        from benchmarks.steps import ours

        return ours.lightning_cost(20, folder.parent, work)
    if task == "rows":
        from benchmarks.steps import ours

        return ours.operations(command["of"], folder, work)
    if task == "profile":
        from benchmarks.steps import ours

        return ours.profile(command["of"], folder, work)
    key = (task, micro, *changes.items())
    if key not in state:
        state.clear()  # only one model with its optimizer at a time; the first step of a turn is not timed
        gc.collect()
        if side == "ours":
            from benchmarks.steps import ours

            state[key] = ours.runner(task, folder, work)
        else:
            from benchmarks.steps import trl_side

            state[key] = trl_side.runner(task, folder, work, micro)
    return state[key](command["steps"])


def matmul_rate(work: Any) -> float:
    """Floating-point operations per second of a large matrix product in the run's precision; a median."""
    import torch

    from benchmarks.steps.clock import now
    from benchmarks.steps.ours import synchronize

    size = 1024 if work.device == "cpu" else 8192
    dtype = torch.bfloat16 if work.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=work.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(60):
        start = now()
        a @ b
        synchronize()
        seconds.append(now() - start)
    return 2 * size**3 / sorted(seconds)[30]


if __name__ == "__main__":
    main()
