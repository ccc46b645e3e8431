"""One side of a cell in its own process: answers commands (JSON lines) until its input ends.

python -m benchmarks.gpu.worker ours|trl|generate FOLDER WORKLOAD
"""

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any


class Worker:
    """The commands. `folder` is the model's folder, which is created if it does not exist."""

    def __init__(self, side: str, folder: Path, work: dict[str, Any]) -> None:
        from benchmarks.steps.workload import Workload

        self.side, self.folder, self.work = side, folder, Workload(**work)
        self.runners: dict[Any, Callable[[int], list[float]]] = {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The result of a command, or why it failed; memory that a failed command holds is released."""
        import torch

        options = {name: value for name, value in command.items() if name != "do"}
        try:
            return {"value": getattr(self, f"do_{command['do']}")(**options)}
        except torch.OutOfMemoryError as error:
            failed = f"out of memory: {str(error).splitlines()[0][:200]}"
        except Exception as error:  # recorded as the result of this cell
            logging.exception("%s", command)
            failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        self.runners.clear()
        self._free()
        return {"failed": failed}

    def _free(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- commands -------------------------------------------------------------------------------------------------

    def do_build(self) -> None:
        """Write the model folder, once."""
        if not self.folder.exists():
            half = self.folder.with_name(f"{self.folder.name}-under-way")  # an interrupted run leaves no partial model
            half.mkdir(parents=True, exist_ok=True)
            self.work.build(half)
            half.rename(self.folder)

    def do_device(self) -> dict[str, Any]:
        """The device and the machine."""
        import torch

        from benchmarks.quickstart import machine

        if self.work.device != "cuda":
            return {"name": "CPU", "memory_gib": None, "machine": machine()}
        properties = torch.cuda.get_device_properties(0)
        cuda = {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability())}
        return {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "machine": machine() | cuda,
        }

    def do_matmul(self) -> float:
        """Measured operations per second of a large matrix product."""
        from benchmarks.steps.worker import matmul_rate

        rate = matmul_rate(self.work)
        self._free()
        return rate

    def do_steps(self, task: str, steps: int, micro: int | None = None, graphs: bool = False) -> dict[str, Any]:
        """Seconds of each step, peak memory in GiB (None on a CPU), and whether rows are packed."""
        import torch

        work = replace(self.work, cuda_graphs=graphs)
        key = (task, micro, graphs)
        if key not in self.runners:
            self.runners[key] = self._runner(task, work, micro)
        cuda = work.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.runners[key](steps)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        self._free()  # the other side may need the memory that this one only reserves
        packs = getattr(self.runners[key], "packs", None)
        return {"seconds": seconds, "peak_gib": peak, "packs": packs}

    def _runner(self, task: str, work: Any, micro: int | None) -> Callable[[int], list[float]]:
        if self.side == "ours":
            from benchmarks.steps import ours

            return ours.runner(task, self.folder, work)
        from benchmarks.steps import trl_side

        return trl_side.runner(task, self.folder, work, micro)

    def do_needed(self, task: str) -> dict[str, float]:
        """Operations and tokens of a step: those of rows without padding; for `rl` and `generate` the sampled ones."""
        from benchmarks.steps import ours

        rows = ours.prepared(task, self.folder, self.work)
        if task in ("generate", "rl"):
            count = len(rows) * (self.work.group_size if task == "rl" else 1)
            tokens = count * self.work.new_tokens
        elif task == "sft":
            tokens = sum(row.tokens for row in rows) / self.work.batches
        else:
            tokens = sum(row.chosen.tokens + row.rejected.tokens for row in rows) / self.work.batches
        return {"operations": ours.operations(task, self.folder, self.work), "tokens": tokens}

    def do_split(self, steps: int, graphs: bool = False) -> dict[str, float]:
        """Seconds of the last of several RL steps, and of its sampling; call it after as many `do_steps`."""
        owner: Any
        if self.side == "ours":
            from rlhf_lightning.generation.local_engine import LocalEngine

            owner, name = LocalEngine, "generate"
        else:
            import trl

            owner, name = trl.GRPOTrainer, "_generate_single_turn"
        with _timed(owner, name) as calls:
            seconds = self.runners["rl", None, graphs](steps)
        if len(calls) != steps:
            raise RuntimeError(f"{owner.__name__}.{name} was called {len(calls)} times in {steps} steps")
        return {"step": seconds[-1], "sampling": calls[-1]}

    def do_profile(self, task: str, graphs: bool = False) -> dict[str, Any]:
        """Profile a step, see `profiling`."""
        from benchmarks.gpu import profiling

        found = profiling.profile(task, self.folder, replace(self.work, cuda_graphs=graphs))
        self._free()
        return found

    def do_check(self, name: str) -> dict[str, Any]:
        """Run one of `checks`."""
        import torch

        from benchmarks.gpu import checks

        torch._dynamo.reset()  # graphs of the previous check count towards the limit
        found = checks.run(name, self.work.device, self.folder.parent)
        self._free()
        return found


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Seconds of each call of a method."""
    from benchmarks.steps.ours import synchronize

    plain, calls = getattr(owner, name), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        found = plain(*args, **kwargs)
        synchronize()
        calls.append(time.perf_counter() - start)
        return found

    setattr(owner, name, timed)
    try:
        yield calls
    finally:
        setattr(owner, name, plain)


def main() -> None:
    """Serve commands until the input ends."""
    side, folder, work = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    from rlhf_lightning.cli.main import prepare_environment

    prepare_environment()
    import torch
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("highest")
    if work["device"] == "cpu":
        torch.set_num_threads(1)
    worker = Worker(side, folder, work)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
