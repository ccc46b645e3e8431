"""`SFTModule` fed by a LightningDataModule of your own, here from a CSV file of questions and answers."""

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from rlhf_lightning import SFTModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.rendering import Rendered, Renderer
from rlhf_lightning.types import Message, TokenBatch


class QuestionFile(pl.LightningDataModule):
    """Batches of `input_ids` and `loss_mask` (1 where a token is trained), which is all that `SFTModule` needs.

    Args:
        path: CSV with the columns `question` and `answer`.
        renderer: Turns messages into tokens and the mask.
        batch_size: Rows of a batch.
    """

    def __init__(self, path: Path, renderer: Renderer, batch_size: int = 4) -> None:
        super().__init__()
        self.path, self.renderer, self.batch_size = path, renderer, batch_size

    def setup(self, stage: str) -> None:
        """Read and render the file."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows: list[list[Message]] = [
                [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
                for row in csv.DictReader(file)
            ]
        self.rows: Any = [rendered for messages in rows for rendered in self.renderer.conversation(messages)]

    def train_dataloader(self) -> DataLoader:
        """Training rows, in a new order every epoch."""
        return DataLoader(self.rows, self.batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        """The same rows, to see the NLL decrease."""
        return DataLoader(self.rows, self.batch_size, collate_fn=self.collate)

    def collate(self, rows: list[Rendered]) -> TokenBatch:
        """Pad rows on the right to `[B, T]`; the mask excludes padding, so any id works."""
        return pad_tokens([row.ids for row in rows], [row.loss_mask for row in rows], pad_id=0)


def main(model: str, folder: str = "runs/examples/sft") -> pl.Trainer:
    """Write a small file, train on it, save the model."""
    path = Path(folder) / "questions.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("question,answer\nHow are you?,Fine. And you?\nWhat is 2 + 3?,5\nWho are you?,A model.\n")
    module = SFTModule(model)
    trainer = pl.Trainer(max_epochs=3, default_root_dir=folder, logger=False, enable_checkpointing=False)
    trainer.fit(module, QuestionFile(path, module.renderer))
    module.save_pretrained(Path(folder) / "model")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
