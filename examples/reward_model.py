"""A reward model trained in a script of your own: your rows, your DataLoader, your logger, no `rlhf` command."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rlhf_lightning import PreferenceModule
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.types import TokenBatch

ROWS: Any = [
    {"question": "Is it raining?", "better": "Yes, take a coat.", "worse": "Weather is a big topic."},
    {"question": "What is 2 + 3?", "better": "5", "worse": "Sums are a big topic."},
    {"question": "When does the train leave?", "better": "At nine.", "worse": "Trains are a big topic."},
    {"question": "Where is the key?", "better": "On the table.", "worse": "Keys are a big topic."},
]


class Pairs:
    """Collates rows to a `PreferenceModule` batch, chosen rows first; `loss_mask` is 1 on the responses."""

    def __init__(self, module: PreferenceModule) -> None:
        self.renderer = module.renderer

    def __call__(self, rows: list[dict[str, str]]) -> TokenBatch:
        sides = [
            self.renderer.exchange(to_messages(row["question"]), to_messages(row[side], "assistant"))
            for side in ("better", "worse")
            for row in rows
        ]
        return pad_tokens([side.ids for side in sides], [side.loss_mask for side in sides], pad_id=0)


def main(model: str, folder: str = "runs/examples/reward_model") -> tuple[pl.Trainer, PreferenceModule]:
    """Train, validate, save, score."""
    module = PreferenceModule(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    pairs = Pairs(module)
    trainer = pl.Trainer(max_epochs=4, logger=CSVLogger(folder), log_every_n_steps=1, enable_checkpointing=False)
    trainer.fit(
        module,
        DataLoader(ROWS, batch_size=2, shuffle=True, collate_fn=pairs),
        DataLoader(ROWS, batch_size=4, collate_fn=pairs),
    )
    module.save_pretrained(Path(folder) / "model")
    print(module.score(["Is it raining?"] * 2, ["No.", "Rain is a big topic."]))
    return trainer, module


if __name__ == "__main__":
    main(*sys.argv[1:])
