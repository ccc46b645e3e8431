"""SFT on a mixture of two files that are streamed, so that memory does not grow with them."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.data.row_streams import Streaming


def main(model: str, folder: str = "runs/examples/large_files") -> tuple[pl.Trainer, SFTDataModule]:
    """Write two files, train on three rows of one for each row of the other, and print what was used."""
    sums, greetings = Path(folder) / "sums.jsonl", Path(folder) / "greetings.parquet"
    sums.parent.mkdir(parents=True, exist_ok=True)
    with sums.open("w") as file:
        for i in range(300):
            file.write(json.dumps({"prompt": f"What is {i} + 1?", "completion": str(i + 1)}) + "\n")
    rows = [{"prompt": f"Hello, I am number {i}.", "completion": "Hello!"} for i in range(80)]
    pq.write_table(pa.Table.from_pylist(rows), greetings, row_group_size=20)
    data = SFTDataModule(
        {"sums": {"source": sums, "weight": 3}, "greetings": {"source": greetings}},
        batch_size=8,
        streaming=Streaming(shuffle_buffer=50),
    )
    trainer = pl.Trainer(max_steps=20, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(SFTModule(model), data)
    print(json.dumps(data.row_counts()["train"], indent=2))
    return trainer, data


if __name__ == "__main__":
    main(*sys.argv[1:])
