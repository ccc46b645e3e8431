"""Writes model folders that stock transformers and peft can load."""

import copy
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rlhf_lightning.data.ended_templates import ended
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.files import adapted_base, read_object, real_path, scratch_of, write_json
from rlhf_lightning.models.base_weights import link_base, write_base
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.loading import is_adapter
from rlhf_lightning.models.lora import base_of, is_adapted
from rlhf_lightning.models.model_card import CARD, edited_card, write_card
from rlhf_lightning.types import JSON, Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def save_model(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Tokenizer,
    folder: Path,
    stop_token_ids: Sequence[int],
    weights: dict[str, Tensor] | None = None,
    base_kept: bool = True,
    facts: Mapping[str, JSON] | None = None,
    stop: Sequence[str] = (),
    template: ChatTemplate | None = None,
) -> None:
    """Write weights (safetensors), config, tokenizer with chat template, generation config and model card.

    The folder is written under a temporary name and renamed, so that it is never incomplete.

    Args:
        model: A Hugging Face model or a `PeftModel`.
        tokenizer: Its tokenizer.
        folder: The folder to write.
        stop_token_ids: Ids that end a response.
        weights: The gathered state dict, if the model is sharded.
        base_kept: True if the weights below an adapter equal those of the base that it names; otherwise they are also
            saved.
        facts: Contents of `stage.json`; None for no such file.
        stop: Texts that end a response.
        template: For a reward model, the chat template, which is saved such that it ends with the response.
    """
    scratch = scratch_of(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    given = {} if weights is None else {"state_dict": weights}
    adapted = is_adapted(model)
    with _own_generation_config_aside(base_of(model)):
        if adapted:
            # Only the trained adapter. Embeddings that differ from those of the base are saved with the base.
            model.save_pretrained(scratch, selected_adapters=["default"], save_embedding_layers=False, **given)
            _save_base(model, scratch, folder, base_kept, weights)
        else:
            model.save_pretrained(scratch, **given)
    _save_generation(model, tokenizer, stop_token_ids, stop, scratch)
    if adapted and not base_kept:
        _save_generation(model, tokenizer, stop_token_ids, stop, scratch / "base")
    elif adapted:
        _tell_stock_peft(model, scratch)
    with ended(tokenizer, template):
        tokenizer.save_pretrained(scratch)
    (scratch / CARD).unlink(missing_ok=True)  # peft's empty card
    if (edited := edited_card(folder)) is not None:
        (scratch / CARD).write_text(edited, encoding="utf-8", errors="surrogateescape")
    if facts is not None:
        write_card(scratch, facts)
        write_json(scratch / "stage.json", {**facts, "base": relative_base(scratch)})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def _save_base(model: "PeftModel", scratch: Path, folder: Path, kept: bool, weights: dict[str, Tensor] | None) -> None:
    """Write `base/` into an adapter's folder, if stock libraries cannot use the base that it names.

    Weights that no folder contains (a model passed as an object, an in-memory merge, new vocabulary rows) are written.
    For a reward adapter, the files of the base are linked, with the config of the reward model. Stock libraries read
    the number of labels and the padding token from the base's config, and those of an SFT model differ: with a padding
    token that also ends responses, stock pooling would read the token before the last one.
    """
    if not kept:
        write_base(model, scratch, folder, weights)
    elif str(model.peft_config["default"].task_type) == "SEQ_CLS":
        base = Path(model.peft_config["default"].base_model_name_or_path or "")
        config = copy.deepcopy(model.get_base_model().config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the linked weights are not quantized
        if (base / "config.json").is_file():  # for a Hub id, see docs/preference.md
            link_base(config, base, scratch, folder)


def _save_generation(
    model: nn.Module, tokenizer: Tokenizer, stop_token_ids: Sequence[int], stop: Sequence[str], to: Path
) -> None:
    """Save the base's generation config, also next to an adapter, with the ids and texts that end a response.

    This bypasses transformers' validation, which refuses a changed config with a temperature if sampling is off; many
    published configs have that.
    """
    base = base_of(model)
    generation = copy.deepcopy(getattr(base, "generation_config", None))
    if generation is None or not base.can_generate():
        return
    # Keep the model's own ids, because responses may end with a token that no training row contains.
    generation.eos_token_id = sorted({*stop_token_ids, *end_token_ids(model, tokenizer)})
    generation.pad_token_id = tokenizer.pad_token_id
    generation._from_model_config = False  # it now contains more than the model's config
    if texts := [*(generation.stop_strings or []), *stop]:
        generation.stop_strings = list(dict.fromkeys(texts))
    generation.to_json_file(to / "generation_config.json", keys_to_pop=["compile_config"])


@contextmanager
def _own_generation_config_aside(model: "PreTrainedModel") -> Iterator[None]:
    """Context manager that detaches the generation config while a model is saved; `_save_generation` writes it."""
    own = getattr(model, "generation_config", None)
    try:
        if own is not None:
            model.generation_config = type(own)()
        yield
    finally:
        if own is not None:
            model.generation_config = own


def _tell_stock_peft(model: "PeftModel", scratch: Path) -> None:
    """Warn if stock peft would stop at other tokens: it reads the base's generation config, not the adapter's."""
    own = scratch / "generation_config.json"
    if not own.is_file():
        return
    stored = Path(str(model.peft_config["default"].base_model_name_or_path)) / "generation_config.json"
    ends, before = _eos_token_ids(own), _eos_token_ids(stored)
    if not set(ends) <= set(before):
        log.info(
            "stock peft stops at the tokens of the base's generation config (%s), not at those of training (%s), which "
            "are in generation_config.json next to the adapter; see docs/stages.md",
            before,
            ends,
        )


def _eos_token_ids(path: Path) -> list[JSON]:
    """`eos_token_id` of a generation config; None for a missing one."""
    found = read_object(path).get("eos_token_id") if path.is_file() else None
    return found if isinstance(found, list) else [found]


def relative_base(folder: Path) -> str | None:
    """The path of an adapter's base relative to the adapter's folder, if the base is a folder on this machine."""
    if not is_adapter(str(folder)):
        return None
    base = Path(str(adapted_base(folder)))
    return os.path.relpath(base, folder) if base.is_dir() else None


def relative_to_run(path: str | Path, folder: Path) -> str | None:
    """`path` relative to the model folder `RUN/STAGE/model`, so that RUN can be moved; None if it is outside RUN."""
    run = real_path(folder).parent.parent
    inside = Path(str(path)).is_dir() and real_path(str(path)).is_relative_to(run)
    return os.path.relpath(real_path(str(path)), real_path(folder)) if inside else None
