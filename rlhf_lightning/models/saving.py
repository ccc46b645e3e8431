"""Model folders: what a stage leaves behind, in the form that stock transformers and peft open."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.files import read_object
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.loading import is_adapter


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    stop_token_ids: Sequence[int],
    weights: dict[str, Any] | None = None,
) -> None:
    """Write weights (safetensors), config, tokenizer with chat template, and generation config.

    The folder appears at once, complete: it is written beside its place and renamed. `weights` are given where those
    of the model are split over ranks.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    given = {} if weights is None else {"state_dict": weights}
    if hasattr(model, "peft_config"):
        # Only the adapter that was trained, and no copy of the embeddings beside it.
        model.save_pretrained(scratch, selected_adapters=["default"], save_embedding_layers=False, **given)
        if str(model.peft_config["default"].task_type) == "SEQ_CLS":
            _save_scoring_base(model, scratch, folder)
    else:
        _set_generation(model, tokenizer, stop_token_ids)
        model.save_pretrained(scratch, **given)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def _save_scoring_base(model: Any, scratch: Path, folder: Path) -> None:
    """`base/` in the folder of a reward adapter: the base's weights, linked, with the config that stock libraries need.

    They take the number of labels and the padding token from the base's config, which an SFT model has otherwise: with
    a padding token that also ends responses, stock pooling would read the token before the last.
    """
    base = Path(model.peft_config["default"].base_model_name_or_path or "")
    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights beside it are those before quantising
    stored = json.loads((base / "config.json").read_text()) if (base / "config.json").is_file() else {}
    if not stored or getattr(config, "vocab_size", None) != stored.get("vocab_size"):
        return  # a Hub id, or a padding token that the base's weights have no row for: see docs/preference.md
    config.save_pretrained(scratch / "base")
    for path in base.iterdir():
        if path.is_file() and path.name not in ("config.json", "stage.json", "merged_from.json"):
            try:
                os.link(path.resolve(), scratch / "base" / path.name)
            except OSError:  # another file system
                shutil.copy2(path, scratch / "base" / path.name)
    settings = json.loads((scratch / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder.resolve() / "base")
    (scratch / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _set_generation(model: Any, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # No id of the model's own list is lost: it may end responses by what no row of the training shows.
        generation.eos_token_id = sorted({*stop_token_ids, *end_token_ids(model, tokenizer)})
        generation.pad_token_id = tokenizer.pad_token_id
        # Settings that only apply with sampling make transformers refuse to save where sampling is off.
        generation.do_sample = True


def relative_base(folder: Path) -> str | None:
    """The base of an adapter folder relative to it, where that is a folder on this machine."""
    if not is_adapter(str(folder)):
        return None
    base = Path(str(read_object(folder / "adapter_config.json").get("base_model_name_or_path")))
    return os.path.relpath(base, folder) if base.is_dir() else None


def relative_to_run(path: Any, folder: Path) -> str | None:
    """`path` relative to the model folder `RUN/STAGE/model`, where it is inside RUN: so it holds if RUN is moved."""
    run = folder.resolve().parent.parent
    inside = Path(str(path)).is_dir() and Path(str(path)).resolve().is_relative_to(run)
    return os.path.relpath(Path(str(path)).resolve(), folder.resolve()) if inside else None
