"""Saved adapters: folders that stock peft opens, with the optimizer's state if a run can go on from them."""

import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.files import read_object, scratch_of, write_json
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.saving import save_model
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.adapters import AdaptedModel, Weights
from rlhf_lightning.types import JSON

ADDRESS = re.compile(r"tinker://([0-9a-f]{16}:train:\d{1,9})/(weights|sampler_weights)/([\w-][\w.-]{0,99})", re.ASCII)
"""The address of a checkpoint. No part can name another folder: none has a slash, and none begins with a dot."""
RECORD, ADAPTER, OPTIMIZER = "checkpoint.json", "adapter_model.safetensors", "optimizer.safetensors"
TYPES = {"weights": "training", "sampler_weights": "sampler"}
"""Tinker's words for the kinds of checkpoints."""


@dataclass(frozen=True)
class Address:
    """Where a checkpoint is: `tinker://RUN/weights/NAME`, or `sampler_weights` instead of `weights`.

    Args:
        run: Id of the training run.
        kind: `weights` with the optimizer's state, `sampler_weights` without.
        name: The client's name of the checkpoint.

    Example:
        >>> str(Address.of("tinker://0123456789abcdef:train:0/weights/final"))
        'tinker://0123456789abcdef:train:0/weights/final'
    """

    run: str
    kind: str
    name: str

    @classmethod
    def of(cls, text: str) -> "Address":
        """Read an address.

        Args:
            text: The address.

        Raises:
            RequestError: If it is malformed.
        """
        found = ADDRESS.fullmatch(text)
        if found is None:
            raise RequestError(
                f"{text[:200]!r} is no checkpoint of this server. The address is tinker://RUN/weights/NAME or "
                "tinker://RUN/sampler_weights/NAME; NAME has up to 100 letters, digits, '.', '_' and '-', and begins "
                "with none of '.'",
                "path",
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True)
class Record:
    """What `checkpoint.json` says about a checkpoint.

    Attributes:
        base_model: Name of the served model.
        rank: Rank of the adapter.
        target: Its layers, see `LoRA`.
        created: When it was saved, in seconds since 1970.
        ttl_seconds: How long the client wants to keep it, in seconds; None for ever. Nothing is deleted by itself.
        user_metadata: The client's notes.
    """

    base_model: str
    rank: int
    target: Sequence[str]
    created: float = field(default_factory=time.time)
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)

    @property
    def lora(self) -> LoRA:
        """Form of the adapter."""
        return LoRA(self.rank, target=list(self.target))


class CheckpointStore:
    """The folder of the checkpoints, `ROOT/RUN/KIND/NAME`.

    Args:
        root: The folder; it is created when a checkpoint is saved.
        loaded: The served model, for its tokenizer and stop tokens.

    Example:
        >>> store = CheckpointStore(Path("runs/tinker"), loaded)  # doctest: +SKIP
        >>> store.record(Address.of("tinker://0123456789abcdef:train:0/weights/final")).rank  # doctest: +SKIP
        32
    """

    def __init__(self, root: Path, loaded: LanguageModel) -> None:
        self.root, self._loaded = root, loaded
        self._changing = threading.RLock()
        """Held while a checkpoint is replaced, deleted or described, which different threads do."""

    def folder(self, address: Address) -> Path:
        """The folder of a checkpoint, which may not exist.

        Args:
            address: Its address.
        """
        return self._run(address.run) / address.kind / address.name

    def _run(self, run: str) -> Path:
        return self.root / run.replace(":", "-")

    def write(
        self,
        address: Address,
        adapted: AdaptedModel,
        record: Record,
        optimizer: Weights | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save an adapter. The folder is renamed when it is complete.

        Args:
            address: The address.
            adapted: The model, with the adapter's weights loaded.
            record: What to say about it.
            optimizer: The optimizer's state; None for none.
            overwrite: Replace a checkpoint with this address.

        Raises:
            RequestError: If the checkpoint exists and is not to be replaced.
        """
        folder = self.folder(address)
        if folder.exists() and not overwrite:
            raise RequestError(f"{address} exists; save under another name, or with overwrite=True")
        scratch = scratch_of(folder)
        save_model(adapted.model, self._loaded.tokenizer, scratch, self._loaded.renderer.stop_token_ids)
        if optimizer is not None:
            save_file({name: value.detach().cpu() for name, value in optimizer.items()}, scratch / OPTIMIZER)
        write_json(scratch / RECORD, asdict(record))
        with self._changing:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)

    def record(self, address: Address) -> Record:
        """What is known about a checkpoint.

        Args:
            address: Its address.

        Raises:
            RequestError: If it does not exist or is damaged.
        """
        path = self.folder(address) / RECORD
        with self._changing:
            if not path.is_file():
                raise RequestError(f"there is no checkpoint {address} in this server's folder", "path", status=404)
            try:
                return _record(read_object(path))
            except (ConfigError, KeyError, TypeError, ValueError) as error:
                raise RequestError(f"{RECORD} of {address} is damaged: {first_line(error)}", "path") from None

    def weights(self, address: Address, adapted: AdaptedModel) -> Weights:
        """The weights of a checkpoint, by their names in a model.

        Args:
            address: The checkpoint.
            adapted: A model with an adapter of its form.

        Raises:
            RequestError: If the checkpoint is damaged, or belongs to another model.
        """
        stored = self._tensors(address, ADAPTER)
        found = {name: stored.get(name.replace(".default.", ".")) for name in adapted.parameters}
        for name, parameter in adapted.parameters.items():
            value = found[name]
            if value is None or value.shape != parameter.shape:
                said = "is missing" if value is None else f"has the shape {list(value.shape)}"
                raise RequestError(f"{address} does not fit the served model: {name} {said}", "path")
        return {name: value for name, value in found.items() if value is not None}

    def optimizer(self, address: Address) -> Weights:
        """The optimizer's state of a checkpoint.

        Args:
            address: The checkpoint.

        Raises:
            RequestError: If it has none.
        """
        return self._tensors(address, OPTIMIZER)

    def _tensors(self, address: Address, file: str) -> Weights:
        path = self.folder(address) / file
        if not path.is_file():
            raise RequestError(
                f"{address} has no {file}; load a checkpoint that save_state wrote, or load it without optimizer",
                "path",
            )
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{file} of {address} is damaged: {first_line(error)}", "path") from None

    def list(self, run: str) -> list[dict[str, JSON]]:
        """The checkpoints of a training run as Tinker's API describes them, oldest first.

        Args:
            run: Id of the run.
        """
        found = []
        with self._changing:
            for kind in TYPES:
                for path in self._run(run).glob(f"{kind}/[!.]*/{RECORD}"):
                    address = Address(run, kind, path.parent.name)
                    found.append((self.record(address), address))
            found.sort(key=lambda pair: pair[0].created)
            return [self.describe(address, record) for record, address in found]

    def describe(self, address: Address, record: Record) -> dict[str, JSON]:
        """A checkpoint as Tinker's API describes it.

        Args:
            address: The checkpoint.
            record: What is known about it.
        """
        folder = self.folder(address)
        return {
            "checkpoint_id": f"{address.kind}/{address.name}",
            "checkpoint_type": TYPES[address.kind],
            "time": _time(record.created),
            "tinker_path": str(address),
            "size_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
            "user_metadata": dict(record.user_metadata),
            "expires_at": None if record.ttl_seconds is None else _time(record.created + record.ttl_seconds),
        }

    def delete(self, address: Address) -> None:
        """Delete a checkpoint.

        Args:
            address: Its address.

        Raises:
            RequestError: If it does not exist.
        """
        with self._changing:
            self.record(address)
            shutil.rmtree(self.folder(address))


def _record(values: dict[str, JSON]) -> Record:
    """The content of `checkpoint.json`, after checking its types."""
    base, rank, target = values["base_model"], values["rank"], values["target"]
    created, ttl, notes = values["created"], values["ttl_seconds"], values["user_metadata"]
    if not (
        isinstance(base, str)
        and isinstance(rank, int)
        and isinstance(target, list)
        and isinstance(created, int | float)
        and isinstance(ttl, int | None)
        and isinstance(notes, dict)
    ):
        raise ValueError("a value has the wrong type")
    texts = {key: str(value) for key, value in notes.items()}
    return Record(base, rank, [str(one) for one in target], created, ttl, texts)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
