"""Log-probabilities of the reference, computed once and stored in a file next to the data for this and later runs."""

import hashlib
import logging
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lightning.data.records import Source
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import replacing
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scorers import ModelScorer, by_length, padded_batches
from rlhf_lightning.models.sharding import full_tensor
from rlhf_lightning.modules.trainer_state import row_data_of

log = logging.getLogger(__name__)


def store_reference(
    scorer: ModelScorer, reference: Reference, trainer: pl.Trainer, device: torch.device, batch_size: int = 64
) -> None:
    """Set the reference log-probabilities of every prepared row, from a stored file if there is one.

    The file name is a hash of the reference's weights, the rows' tokens and the precision, so that the file is not used
    for another model, other rows or another template. All ranks must call this together.

    Args:
        scorer: Computes the log-probabilities.
        reference: The reference model of the scorer.
        trainer: The Trainer.
        device: Device to compute on.
        batch_size: Number of rows per forward pass.
    """
    if (data := row_data_of(trainer)) is None:
        return
    if data.streaming is not None or data.cache is not None:
        raise ConfigError(
            "scorer.store keeps the reference's log-probabilities of all rows in memory, which data.streaming and "
            "data.cache do not; remove one of them"
        )
    model = None
    for name, prepared in data.prepared.items():
        sides = [side for row in prepared.rows for side in row.sides]
        model = model or weights_hash(reference)
        key = rows_hash(sides, f"{model} {trainer.precision}")
        source = data.sources["train"] if data.sources.get(name) is None else data.sources[name]
        path = _folder(source, trainer) / f"{key[:24]}.safetensors"
        values = _read(path, sides)
        # Either all ranks compute or none does, because each needs the shares of the others.
        if not all(gather(values is not None)):
            values = _computed(scorer, sides, trainer, device, batch_size)
            if trainer.is_global_zero:
                _write(path, values)
                log.info("%s: log-probabilities of the reference were saved to %s", name, path)
        else:
            log.info("%s: log-probabilities of the reference were loaded from %s", name, path)
        assert values is not None
        start = 0
        for row in prepared.rows:
            row.reference = values[start : start + len(row.sides)]
            start += len(row.sides)


def weights_hash(reference: Reference) -> str:
    """SHA-256 of the weights that the reference computes with."""
    digest = hashlib.sha256()
    for name, value in reference.tensors():
        value = full_tensor(value)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rows_hash(sides: list[Rendered], prefix: str) -> str:
    """SHA-256 of a prefix and of the tokens and masks of rows.

    Args:
        sides: The rows.
        prefix: Text that the hash depends on as well.
    """
    digest = hashlib.sha256(prefix.encode())
    for side in sides:
        digest.update(torch.tensor([len(side.ids), *side.ids, *side.loss_mask], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


def _folder(source: Source | None, trainer: pl.Trainer) -> Path:
    """A folder next to the data file if that is writable, else in the folder of the run."""
    if isinstance(source, str | Path) and Path(source).is_file() and os.access(Path(source).parent, os.W_OK):
        return Path(f"{source}.reference")
    return Path(trainer.default_root_dir) / "reference"


@torch.no_grad()
def _computed(
    scorer: ModelScorer, sides: list[Rendered], trainer: pl.Trainer, device: torch.device, batch_size: int
) -> list[list[float]]:
    """Compute the log-probabilities. Each rank computes its share, rows of similar length together."""
    rank, world = data_ranks(trainer)
    ids, masks = [side.ids for side in sides], [side.loss_mask for side in sides]
    own: dict[int, list[float]] = {}
    for rows, tokens in padded_batches(ids, masks, batch_size, device, by_length(ids)[rank::world], even=True):
        with trainer.precision_plugin.forward_context():
            found = scorer.reference_logprobs(tokens)
        for i, values in zip(rows, found.float().tolist(), strict=bool(rows)):
            own[i] = values[: len(ids[i])]
    merged = {i: values for share in gather(own) for i, values in share.items()}
    return [merged[i] for i in range(len(sides))]


def _write(path: Path, values: list[list[float]]) -> None:
    flat = torch.tensor([value for row in values for value in row], dtype=torch.float32)
    with replacing(path, f"{os.getpid()}") as scratch:
        save_file({"logprobs": flat}, scratch)


def _read(path: Path, sides: list[Rendered]) -> list[list[float]] | None:
    if not path.is_file():
        return None
    flat: Tensor = load_file(path)["logprobs"]
    if len(flat) != sum(len(side.ids) for side in sides):
        return None
    return [part.tolist() for part in flat.split([len(side.ids) for side in sides])]
