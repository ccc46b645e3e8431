"""Reads the tokens and texts that end a response from a model's generation config."""

import logging
from pathlib import Path

from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import read_object
from rlhf_lightning.models.loading import adapter_base, is_adapter, loading
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.sharding import full_shape
from rlhf_lightning.types import JSON, Tokenizer

log = logging.getLogger(__name__)
_WARNED: set[str] = set()


def end_token_ids(source: nn.Module | str | Path, tokenizer: Tokenizer | None = None) -> list[int]:
    """Ids that end a response according to a model's generation config, as `generate` and vLLM read it.

    Args:
        source: A model, its folder or Hub id, or the folder of an adapter; an adapter's ids are added to those of its
            base.
        tokenizer: Its ids are valid even if the base has fewer embeddings.

    Returns:
        Sorted ids. Ids outside the vocabulary are dropped with a warning.

    Raises:
        ConfigError: If an id is not an integer.
    """
    if isinstance(source, nn.Module):
        model = base_of(source)
        rows = full_shape(model.get_input_embeddings().weight)[0] if hasattr(model, "get_input_embeddings") else 0
        config = getattr(model, "generation_config", None)
        return _checked(getattr(config, "eos_token_id", None), rows, tokenizer, "the model's generation_config")
    folder = Path(str(source)).expanduser()
    if is_adapter(str(folder)):
        own = folder / "generation_config.json"
        found = end_token_ids(adapter_base(folder), tokenizer)
        named = read_object(own).get("eos_token_id") if own.is_file() else None
        # An adapter may have tokens without rows in its base, so its own ids are not compared with the base's rows.
        return sorted({*found, *_checked(named, 0, tokenizer, str(own))})
    if not folder.is_dir():
        return _of_hub(str(source), tokenizer)
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    own = folder / "generation_config.json"
    return _named(config, read_object(own) if own.is_file() else None, tokenizer, str(folder))


def stop_texts(model: nn.Module) -> list[str]:
    """Texts that end a response according to a model's generation config (`stop_strings`)."""
    found = getattr(getattr(base_of(model), "generation_config", None), "stop_strings", None) or []
    return [found] if isinstance(found, str) else [text for text in found if isinstance(text, str) and text]


def _of_hub(name: str, tokenizer: Tokenizer | None) -> list[int]:
    """End-of-response ids of a model on the Hub."""
    from transformers import GenerationConfig, PretrainedConfig

    with loading(f"the configuration of the model {name!r}"):
        config = PretrainedConfig.get_config_dict(name)[0]  # the raw dictionary, so that no code of the model runs
    try:
        generation = {"eos_token_id": GenerationConfig.from_pretrained(name).eos_token_id}
    except OSError:  # there is no generation config
        generation = None
    return _named(config, generation, tokenizer, name)


def _named(
    config: dict[str, JSON], generation: dict[str, JSON] | None, tokenizer: Tokenizer | None, where: str
) -> list[int]:
    """Ids from a generation config, or from the model's config if there is none, as in transformers."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    size = config.get("vocab_size") or text.get("vocab_size")
    rows = size if isinstance(size, int) else 0
    if generation is not None:
        return _checked(generation.get("eos_token_id"), rows, tokenizer, f"{where}/generation_config.json")
    named = text.get("eos_token_id") if config.get("eos_token_id") is None else config["eos_token_id"]
    return _checked(named, rows, tokenizer, f"{where}/config.json")


def _checked(named: JSON | Tensor, rows: int, tokenizer: Tokenizer | None, where: str) -> list[int]:
    """Valid ids of an `eos_token_id`, which may be an integer, a list of integers, or None."""
    if named is None:
        return []
    listed = named.tolist() if isinstance(named, Tensor) else named
    ids = list(listed) if isinstance(listed, list | tuple) else [listed]
    valid = [value for value in ids if isinstance(value, int) and not isinstance(value, bool)]
    if wrong := [value for value in ids if isinstance(value, bool) or not isinstance(value, int)]:
        raise ConfigError(
            f"{where}: eos_token_id is {named!r}, but {wrong[0]!r} is not a token id; it must be an integer, or a list "
            "of integers"
        )
    rows = max(rows, len(tokenizer) if tokenizer is not None else 0)
    outside = [value for value in valid if value < 0 or (rows and value >= rows)]
    if outside and (said := f"{where}: eos_token_id {', '.join(map(str, outside))}") not in _WARNED:
        _WARNED.add(said)
        log.warning("%s is outside the vocabulary of %s tokens; it is ignored", said, rows or "the tokenizer's")
    return sorted({value for value in valid if value not in outside})
