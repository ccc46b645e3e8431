"""Typed access to attributes of the Trainer that Lightning sets outside the class, where type checkers miss them."""

import lightning.pytorch as pl

from rlhf_lightning.data.base import RowDataModule


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of a trainer."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def is_trial(trainer: pl.Trainer) -> bool:
    """True in a `fast_dev_run`, which must write no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def overfits(trainer: pl.Trainer) -> bool:
    """True with `overfit_batches`."""
    return bool(trainer.overfit_batches)  # type: ignore[attr-defined]


def row_data_of(trainer: pl.Trainer | None) -> RowDataModule | None:
    """The trainer's data module if it belongs to this package, else None."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, RowDataModule) else None
