"""Memory and speed of training on a file that is larger than memory would hold as Python objects.

    python -m benchmarks.streaming --gigabytes 5 --folder FOLDER --out benchmarks/results/streaming.json

`memory` trains one epoch of SFT (a model of 30,000 parameters) on JSON lines that are written on the spot, with
`data.streaming`, and records the peak resident memory of that process. Each row has a short conversation and a column
of 128 KB that is not used, so that the time goes into reading. `speed` measures the rows per second of processor time
that the loaders alone take: in memory, streamed, written to the cache, and read from the cache. Processor time, with
that of workers, does not depend on what else the machine does.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [f"word{i}" for i in range(800)]
PADDING = 128 * 1024
BUFFER = 2000
SPEED_ROWS = 2_000


def write_rows(path: Path, size: int | None, rows: int | None, words: int, padding: int) -> int:
    """Write conversations to a file of JSON lines, up to a number of bytes or of rows; returns the number of rows."""
    draw = random.Random(0)
    filler = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=padding))
    written = number = 0
    with open(path, "w") as file:
        while (size is None or written < size) and (rows is None or number < rows):
            turns = [
                {"role": "user", "content": f"Question {number}: " + " ".join(draw.choices(WORDS, k=words // 2))},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=words // 2))},
            ]
            written += file.write(json.dumps({"messages": turns, "notes": filler}) + "\n")
            number += 1
    return number


def base_model(folder: Path) -> str:
    """A folder with a small model and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlhf_lightning.quickstart.model import make_tokenizer

    tokenizer = make_tokenizer([" ".join(WORDS), "user\nassistant\nsystem\n", "Question 0123456789:"] * 3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train(file: str, base: str, folder: str) -> dict[str, Any]:
    """Train an epoch on a streamed file."""
    import lightning.pytorch as pl

    from rlhf_lightning import SFTDataModule, SFTModule
    from rlhf_lightning.data.row_streams import Streaming

    start = peak_gb()
    data = SFTDataModule(file, batch_size=256, streaming=Streaming(shuffle_buffer=BUFFER), show_example=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    begun = time.monotonic()
    trainer.fit(SFTModule(base), data)
    seconds = time.monotonic() - begun
    counts: Any = data.row_counts()["train"]
    rows = counts["sources"]["train"]["drawn"]
    return {
        "rows": rows,
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "peak_before_gb": start,
        "steps": trainer.global_step,
    }


def _processor_seconds() -> float:
    """Processor time of this process and of the workers that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def speed(file: str, base: str, folder: str) -> dict[str, Any]:
    """Rows per second of processor time that the loaders take."""
    from rlhf_lightning import SFTDataModule
    from rlhf_lightning.data.row_streams import Streaming

    tokens = 0

    def timed(**options: Any) -> tuple[float, float]:
        nonlocal tokens
        begun = _processor_seconds()
        data = SFTDataModule(file, batch_size=32, tokenizer=base, show_example=False, seed=0, **options)
        data.setup("fit")
        ready = _processor_seconds()
        rows = 0
        for batch in data.train_dataloader():
            rows += len(batch["where"])
            tokens += int(batch["lengths"].sum())
        return ready - begun, rows / (_processor_seconds() - ready)

    cache = {"cache": f"{folder}/cache"}
    found = {
        "in memory": timed(),
        "streamed": timed(streaming=Streaming()),
        "streamed, 2 workers": timed(streaming=Streaming(workers=2)),
        "cache, written": timed(**cache),
        "cache, read": timed(**cache),
    }
    measured = {name: {"setup_cpu_s": round(s, 2), "rows_per_cpu_s": round(rate)} for name, (s, rate) in found.items()}
    return {"tokens_per_row": round(tokens / SPEED_ROWS / len(found)), **measured}


def in_process(what: str, file: Path, base: str, folder: Path) -> dict[str, Any]:
    """Run `train` or `speed` in a process of its own."""
    arguments = [str(file), base, str(folder)]
    code = f"import json; from benchmarks.streaming import {what}; print('\\n' + json.dumps({what}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def memory(gigabytes: float, folder: Path) -> dict[str, Any]:
    """Peak memory of training on a file of a size that is made on the spot, and removed."""
    base, file = base_model(folder / "base"), folder / "rows.jsonl"
    write_rows(file, int(gigabytes * 1e9), None, 16, PADDING)
    try:
        return {"file_gb": file.stat().st_size / 1e9, **in_process("train", file, base, folder)}
    finally:
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the file is written (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from rlhf_lightning.checkpointing.provenance import processor, versions

    folder = Path(tempfile.mkdtemp(dir=options.folder))
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "versions": versions()}

    def record(name: str, result: dict[str, Any]) -> None:
        found[name] = result
        options.out.write_text(json.dumps(found, indent=2) + "\n")

    try:
        rows = folder / "speed.jsonl"
        write_rows(rows, None, SPEED_ROWS, 50, 0)
        record("speed", {"rows": SPEED_ROWS, **in_process("speed", rows, base_model(folder / "base"), folder)})
        record("memory", memory(options.gigabytes, folder))
    finally:
        shutil.rmtree(folder)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
