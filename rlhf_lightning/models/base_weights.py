"""The model below an adapter: its weights, compared with the base that the adapter names, and its vocabulary."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import real_path
from rlhf_lightning.models.lora import HEADS, LoRA, is_adapted, is_quantized, of_adapter, plain_name
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def check_adapted(model: nn.Module, lora: LoRA | None) -> None:
    """Raise `ConfigError` if a model object with an adapter cannot be trained or saved.

    Args:
        model: The given model, with or without an adapter.
        lora: The stage's `LoRA` settings, or None.
    """
    if not is_adapted(model):
        return
    if lora is not None:
        raise ConfigError(
            "model.lora: the model already has an adapter; leave out lora to train that adapter, or merge it first "
            "(model.merge_and_unload())"
        )
    if list(model.peft_config) != ["default"]:
        raise ConfigError(
            f"the model has the adapters {', '.join(model.peft_config)}; it must have exactly one, named 'default', "
            "which is trained and saved"
        )
    check_kind(model.peft_config["default"])


def check_trainable(model: nn.Module) -> None:
    """Raise `ConfigError` if the adapter of a model passed as an object would not be trained."""
    if not is_adapted(model):
        return
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ConfigError(
            "the model's adapter is merged (merge_adapter), so it gets no gradient; call unmerge_adapter() to continue "
            "training it, or merge_and_unload() to train all weights"
        )
    if not any(p.requires_grad for name, p in model.named_parameters() if of_adapter(name, model.peft_config)):
        raise ConfigError(
            "the model's adapter has no trainable weight; load it with PeftModel.from_pretrained(..., "
            "is_trainable=True), and leave it enabled"
        )


def check_kind(config: "PeftConfig", name: str = "the adapter") -> None:
    """Raise `ConfigError` for adapters without weights in layers, such as prompt or prefix tuning."""
    if config.is_prompt_learning:
        raise ConfigError(
            f"{name} is of type {config.peft_type}, which has no weights in the layers; use LoRA or a similar type"
        )


# -- weights ----------------------------------------------------------------------------------------------------------


def plain_weights(model: "PeftModel", weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of the model below an adapter, by their names without the adapter.

    Args:
        model: A `PeftModel`.
        weights: The model's gathered state dict, if it is sharded.
    """
    prefix = "base_model.model."
    found = model.get_base_model().state_dict() if weights is None else weights
    named = {name.removeprefix(prefix) if weights is not None else name: value for name, value in found.items()}
    return {plain_name(name): value for name, value in named.items() if not of_adapter(name, model.peft_config)}


def keeps_base(model: nn.Module) -> bool:
    """True if the weights below a model's adapter equal those of the base that it names, or there is no adapter.

    Raises:
        ConfigError: If they differ but are in 4 bits, so that they cannot be saved.
    """
    if not is_adapted(model):
        return True
    kept = {name: p for name, p in plain_weights(model).items() if not is_quantized(model) or _is_plain(p)}
    name = str(model.peft_config["default"].base_model_name_or_path or "")
    if stored_in(name, kept):
        return True
    if is_quantized(model):
        raise ConfigError(
            f"the model object is in 4 bits, and its embeddings differ from those of {name or 'any folder'}, so its "
            "adapter could not be loaded again. Save the changed model first, and start from its folder with "
            "lora.quantize"
        )
    log.info(
        "the weights below the adapter differ from those of %s; they are saved in base/ in the adapter's folder",
        name or "any folder",
    )
    return False


def _is_plain(value: Tensor) -> bool:
    """True for a floating-point matrix that is not quantized."""
    return value.is_floating_point() and value.dim() == 2 and not hasattr(value, "quant_state")


def stored_in(source: str, weights: dict[str, Tensor]) -> bool:
    """True if the files of a model folder, or of a downloaded Hub id, contain these weights, up to a cast.

    Args:
        source: Folder or Hub id.
        weights: Weights to look for, by name.
    """
    folder = _local(source)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    missing = dict(weights)
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in set(stored.keys()) & set(missing):
                weight = missing.pop(name)
                if list(stored.get_slice(name).get_shape()) != list(weight.shape):
                    return False
                if not torch.equal(stored.get_tensor(name).to(weight.dtype), weight.detach().cpu()):
                    return False
    # A tied weight is stored under one of its names, and a score head belongs to the adapter.
    there = {value.data_ptr() for name, value in weights.items() if name not in missing}
    return bool(files) and all(
        value.data_ptr() in there or name.split(".")[0] in HEADS for name, value in missing.items()
    )


def _local(source: str) -> Path | None:
    """Local folder of a source; None if it is not on this machine."""
    if not source or Path(source).is_dir():
        return Path(source) if source else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None  # the weights cannot be compared, so they are saved with the adapter


def write_base(model: "PeftModel", scratch: Path, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save the model below an adapter in full to `base/` in the adapter's folder, and point the adapter to it.

    Args:
        model: A `PeftModel`.
        scratch: Temporary path of the adapter's folder.
        folder: Final path of the adapter's folder.
        weights: The model's gathered state dict, if it is sharded.

    Raises:
        ConfigError: If the weights are quantized, so that they cannot be saved.
    """
    base = model.get_base_model()
    if is_quantized(model):
        raise ConfigError(
            "the weights below the adapter differ from those of its base, but 4-bit weights cannot be saved; save the "
            "changed model first, and start from its folder"
        )
    base.save_pretrained(scratch / "base", state_dict=plain_weights(model, weights))
    name_base(scratch, folder, init_lora_weights=True)


def link_base(config: "PretrainedConfig", source: Path, scratch: Path, folder: Path) -> None:
    """Hard-link the files of `source` into `base/` in an adapter's folder, with another config.

    Args:
        config: The config to write there.
        source: Folder of the base.
        scratch: Where the adapter's folder is being written.
        folder: Where it will be moved to.
    """
    config.save_pretrained(scratch / "base")
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", "stage.json", "merged_from.json"):
            try:
                os.link(real_path(path), scratch / "base" / path.name)
            except OSError:  # on another file system
                shutil.copy2(path, scratch / "base" / path.name)
    name_base(scratch, folder)


def name_base(scratch: Path, folder: Path, **changes: JSON) -> None:
    """Point the adapter in `scratch` to the `base/` folder inside it.

    Args:
        scratch: Temporary path of the adapter's folder.
        folder: Final path of the adapter's folder.
        **changes: Other keys of `adapter_config.json` to change. PiSSA and OLoRA subtract an initial update from the
            base. It is already subtracted from the saved base, so `init_lora_weights` must be reset.
    """
    settings = json.loads((scratch / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": str(real_path(folder) / "base"), "revision": None}
    settings |= {name: value for name, value in changes.items() if name in settings}
    (scratch / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# -- vocabulary -------------------------------------------------------------------------------------------------------


def stored_embeddings(config: "PeftConfig", folder: Path | str) -> bool:
    """True if an adapter's file contains embeddings of the model below it (peft's `save_embedding_layers`)."""
    names = [name.replace(".base_layer", "") for name in adapter_shapes(folder)]
    own = set(getattr(config, "modules_to_save", None) or ())
    return any(
        name.endswith(f".{end}.weight") and end not in own
        for name in names
        for end in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
    )


def fit_rows(base: "PreTrainedModel", config: "PeftConfig", folder: Path | str) -> None:
    """Resize a base to the vocabulary of an adapter.

    Args:
        base: The base model.
        config: Config of the adapter.
        folder: Folder of the adapter.

    Raises:
        ConfigError: If some of the new rows are neither in the adapter nor in the base.
    """
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    rows, tied = embedding.weight.shape[0], head is not None and head.weight is embedding.weight
    names = {module: name for name, module in base.named_modules()}
    brought: dict[str, int] = {}  # number of rows of the embedding and of the head in the adapter's file
    wanted = rows
    for name, shape in adapter_shapes(folder).items():
        place, _, rest = name.removeprefix("base_model.model.").replace(".base_layer", "").rpartition(".")
        if rest == "weight" and place in (names[embedding], names.get(head)):
            brought[place] = shape[0]
        elif rest == "lora_embedding_A" and place == names[embedding]:
            wanted = shape[1]
    wanted = max([max(brought.values(), default=wanted), *(index + 1 for index in _token_indices(config))])
    if wanted == rows:
        return
    # Trainable tokens contain their rows of the embedding, and of a head that is tied to it.
    tokens, new = set(_token_indices(config)), set(range(rows, wanted))
    lost = names[embedding] not in brought and not (tied and brought) and bool(new - tokens)
    lost |= head is not None and not tied and names[head] not in brought and not _of_head(config, names[head], new)
    if lost:
        raise ConfigError(
            f"the adapter {str(folder)!r} has a vocabulary of {wanted} tokens, but its base has {rows}, and neither "
            "contains all of the additional embeddings. Save them with the adapter (peft's "
            "save_embedding_layers=True), or set base_model_name_or_path to the resized base"
        )
    base.resize_token_embeddings(wanted, mean_resizing=False)


def _of_head(config: "PeftConfig", name: str, rows: set[int]) -> bool:
    """True if the trainable tokens of an untied head include these rows."""
    indices = getattr(config, "trainable_token_indices", None)
    found = [part for key, part in indices.items() if name.endswith(key)] if isinstance(indices, dict) else []
    return rows <= {index for part in found for index in part}


def _token_indices(config: "PeftConfig") -> Iterator[int]:
    """Ids of the adapter's trainable tokens."""
    indices = getattr(config, "trainable_token_indices", None) or ()
    for part in indices.values() if isinstance(indices, dict) else [indices]:
        yield from part


def adapter_shapes(folder: Path | str) -> dict[str, list[int]]:
    """Shapes of the weights in an adapter's file, by name; empty if there is no file in the folder."""
    path, older = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_model.bin"
    if path.is_file():
        with safe_open(path, "pt") as stored:
            return {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    if older.is_file():
        weights: dict[str, Tensor] = torch.load(older, map_location="meta", weights_only=True)
        return {name: list(weight.shape) for name, weight in weights.items()}
    return {}


def untie(base: "PreTrainedModel") -> None:
    """Give a tied head its own weights, and record this in the config."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    inner = head.base_layer if hasattr(head, "base_layer") else head
    inner.weight = nn.Parameter(embedding.weight.detach().clone())
    base.config.tie_word_embeddings = False
    base.config.get_text_config().tie_word_embeddings = False
