"""Where models and tokenizers come from: a folder, a Hub id, or an object in hand; with or without LoRA."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import hash_folder, is_file, read_object, read_stage, write_json
from rlhf_lightning.models.base_weights import (
    check_adapted,
    check_kind,
    fit_rows,
    keeps_base,
    stored_embeddings,
    untie,
)
from rlhf_lightning.models.lora import HEADS, LoRA, base_of, is_quantised
from rlhf_lightning.models.sharding import layers_of
from rlhf_lightning.untrusted import check_files, refuse_chain

log = logging.getLogger(__name__)
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)

UNREACHED = re.compile(
    "couldn't connect to 'https|is not a local folder and is not a valid model identifier|offline mode"
)
"""What the libraries say of a name that is no folder here, and that the Hub does not answer for."""


@dataclass
class Start:
    """What a stage starts from.

    Args:
        source: folder, Hub id or `PreTrainedModel`. task: `CAUSAL_LM` or `SEQ_CLS`.
        dtype: of the weights; the checkpoint's own would otherwise be kept, and bfloat16 weights train badly.
        options: further arguments of `from_pretrained` (`attn_implementation`, `trust_remote_code`, …).
    """

    source: Any
    task: str = "CAUSAL_LM"
    lora: LoRA | None = None
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    fresh_adapter: bool = field(default=False, init=False)
    """After loading: whether the model's adapter was made now, and so is the identity."""
    base_kept: bool = field(default=True, init=False)
    """After loading with an adapter: whether the weights below it are those of the base that it names."""

    def load(self, workdir: Path | None = None) -> nn.Module:
        """The model, ready to train.

        An adapter of equal rank and targets is continued. Any other adapter is merged first; `workdir` is where the
        merged model is written, which a new adapter needs as its base.

        Raises:
            ConfigError: nothing there, or not loadable.
        """
        if isinstance(self.source, nn.Module):
            if self._quantised and not is_quantised(self.source):
                raise ConfigError("lora.quantize: the model is an object; load it quantised, or give its folder")
            check_adapted(self.source, self.lora)
            heads = getattr(base_of(self.source), "get_output_embeddings", None)
            if self.task == "CAUSAL_LM" and heads is not None and heads() is None:
                raise ConfigError(f"{type(base_of(self.source)).__name__} has no head of tokens: name a causal model")
            model = self._with_lora(self.source)
            self.base_kept = keeps_base(model)
            return model
        folder = check_source(self.source, self.options)
        if not is_adapter(folder):
            return self._with_lora(self._pretrained(folder))
        return self._from_adapter(Path(folder), workdir)

    @property
    def _quantised(self) -> bool:
        return self.lora is not None and self.lora.quantize is not None

    def _from_adapter(self, folder: Path, workdir: Path | None) -> nn.Module:
        config = adapter_config(folder)
        base_path, task = adapter_base(folder), str(config.task_type)
        if self._quantised and task == self.task:
            quantised = self._pretrained(base_path)
            if self.lora and self.lora.continues(config, quantised) and not stored_embeddings(config, folder):
                log.info("continuing the adapter of %s", folder)
                return with_adapter(quantised, folder, is_trainable=True)
            del quantised
        # Merged in float32: in a lower precision the sum of base and update would be rounded twice.
        base = Start(base_path, task, dtype="float32", options=self.options)._pretrained(base_path)
        dtype = getattr(torch, self.dtype)
        if self.lora and not self._quantised and task == self.task and self.lora.continues(config, base):
            log.info("continuing the adapter of %s", folder)
            self.base_kept = not stored_embeddings(config, folder)
            return with_adapter(base.to(dtype), folder, is_trainable=True)
        merged = merge(with_adapter(base, folder)).to(dtype)
        if workdir is None and task == self.task and not self._quantised:
            self.base_kept = False  # it is in no folder
            return self._with_lora(merged)
        if workdir is None:
            raise ConfigError(f"{folder} is an adapter; merge it first (rlhf export) to use it as {self.task}")
        log.info("merging the adapter %s into %s", folder, workdir / "merged")
        _write_once(merged, workdir / "merged", folder)
        return self._with_lora(self._pretrained(str(workdir / "merged")))

    def _pretrained(self, source: str) -> Any:
        import transformers

        auto = getattr(transformers, AUTO_CLASSES[self.task])
        # An adapter remembers the path of its base: a relative one would hold only in this working directory.
        source = str(Path(source).resolve()) if Path(source).is_dir() else source
        # Said, since transformers would otherwise ask at the terminal.
        options = {"trust_remote_code": False, **self.options, **(self.lora.quantization() if self.lora else {})}
        if self.task == "SEQ_CLS":
            options["num_labels"] = 1
        check_files(source, self.options, weights=True)
        with loading(f"the model {source!r}"):
            model, info = auto.from_pretrained(
                source, dtype=getattr(torch, self.dtype), output_loading_info=True, **options
            )
        if self.task == "CAUSAL_LM" and _sees_ahead(model.config):
            raise ConfigError(
                f"the model {source!r} is an encoder ({model.config.model_type}), whose tokens see those after them: "
                "it cannot learn to write. Name a causal model; if it is one, model.model_options: {is_decoder: true}"
            )
        # A head of scores may be new. Anything else that is missing was given random weights, with but a warning.
        if missing := [n for n in info["missing_keys"] if self.task != "SEQ_CLS" or n.split(".")[0] not in HEADS]:
            raise ConfigError(
                f"the model {source!r} lacks {len(missing)} of its weights (for example {sorted(missing)[0]}): its "
                "files are incomplete, or config.json is that of another model"
            )
        return model

    def _with_lora(self, model: Any) -> nn.Module:
        if self.lora is None:
            return model
        from peft import get_peft_model

        self.fresh_adapter = True
        return get_peft_model(model, self.lora.config(model, self.task))


def _sees_ahead(config: Any) -> bool:
    """Whether a model is of a kind that reads both ways, and is not set to read one way."""
    from transformers.models.auto import modeling_auto as auto

    kinds = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    return config.model_type in kinds and not getattr(config, "is_decoder", False)


def _write_once(model: Any, folder: Path, adapter: Path) -> None:
    """Save a merged model, unless it is there already: from this very adapter (by hash), written by another rank.

    What stands beside the adapter (tokenizer, chat template, generation config, how it was asked) goes with it.
    """
    source = hash_folder(adapter)
    if _merged_from(folder) == source:
        return
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(scratch)
    for path in adapter.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name not in ("README.md", "stage.json"):
            shutil.copy2(path, scratch / path.name)
    stage = read_stage(adapter)
    write_json(scratch / "stage.json", {key: stage[key] for key in ("stop_token_ids", "rendering") if key in stage})
    write_json(scratch / "merged_from.json", {"adapter": source})
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(scratch, folder)
    except OSError:
        if _merged_from(folder) != source:
            raise
        shutil.rmtree(scratch)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say of a failed load what could not be loaded: the libraries raise almost anything for a damaged folder."""
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "ignore_mismatched_sizes" in reason:  # transformers writes which ones to its log only
            reason = "weights of other shapes than config.json says"
        if "trust_remote_code" in str(error):
            reason = "it brings code; to run that, set model.model_options: {trust_remote_code: true}"
        remedy = "Restore its files, or name another"
        if found := re.search(r"configuration class <class '[\w.]*\.(\w+)Config'> .*AutoModelFor(\w+)", reason):
            kinds = {"CausalLM": "writes text from left to right", "SequenceClassification": "gives a text a score"}
            reason, remedy = (
                f"of {found[1]}, transformers has none that {kinds.get(found[2], found[2])}",
                "Name another",
            )
        elif UNREACHED.search(str(error)):
            reason = f"no such folder (seen from {Path.cwd()}), and the Hub has none of this name or is out of reach"
            remedy = "Name a folder that is there"
        elif isinstance(error, ImportError):
            remedy = "Install that, or name a model that needs it not"
        elif "unexpected keyword argument" in reason:
            remedy = "See model.model_options"
        raise ConfigError(f"{what} cannot be loaded: {reason.rstrip('. ')}. {remedy}.") from error


def adapter_config(folder: Path | str) -> Any:
    """peft's config of an adapter; raises `ConfigError`."""
    from peft import PeftConfig

    if Path(folder).is_dir():
        read_object(Path(folder) / "adapter_config.json")
    with loading(f"the adapter {str(folder)!r}"):
        config = PeftConfig.from_pretrained(folder)
    check_kind(config, f"the adapter {str(folder)!r}")
    return config


def with_adapter(base: Any, folder: Path | str, **options: Any) -> Any:
    """A base with an adapter; raises `ConfigError` where it does not fit, or weights of it are missing."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = Path(folder) / "adapter_model.safetensors"
    with loading(f"the adapter {str(folder)!r}"):
        fit_rows(base, adapter_config(folder), folder)
        model = PeftModel.from_pretrained(base, folder, **options)
        if not weights.exists():
            return model
        with safe_open(weights, "pt") as stored:
            missing = set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(stored.keys())
    if missing:
        raise ConfigError(
            f"the adapter {str(folder)!r} lacks {len(missing)} weights (for example {sorted(missing)[0]})"
        )
    return model


def _merged_from(folder: Path) -> str | None:
    path = folder / "merged_from.json"
    return read_object(path).get("adapter") if path.is_file() else None


def check_source(source: Any, options: Mapping[str, Any] | None = None) -> str:
    """A model source as text, with the mistakes that are common refused, and folders that ask for more than reading.

    Raises:
        ConfigError: see `untrusted.check_files`, which `options` (of `from_pretrained`) are for.
    """
    text = os.path.expanduser(str(source))
    if text.endswith(".ckpt"):
        raise ConfigError(
            f"{text} is a Lightning checkpoint, which only resumes its own stage (--ckpt_path). "
            "Start from the stage's model folder, for example runs/NAME/sft/model."
        )
    path = Path(text)
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if looks_local and not path.exists():
        raise ConfigError(f"model {text!r}: no such folder (seen from {Path.cwd()})")
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        inside = f"; did you mean {path / 'model'}?" if (path / "model").is_dir() else ""
        raise ConfigError(f"model {text!r}: the folder has neither config.json nor adapter_config.json{inside}")
    if path.exists() and not path.is_dir():
        is_file(path)
    check_files(text, options)
    return text


def is_adapter(source: str) -> bool:
    """Whether a folder holds a peft adapter."""
    return (Path(source) / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str:
    """The base of an adapter; where a run was moved, the place that `stage.json` gives relative to the folder."""
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{folder}: adapter_config.json names no base (base_model_name_or_path is {base!r})")
    relative = read_stage(folder).get("base")
    if relative and not Path(base).exists() and (folder / relative).exists():
        base = str((folder / relative).resolve())
    if not Path(base).exists() and Path(base).name == "base" and (folder / "base" / "config.json").is_file():
        base = str((folder / "base").resolve())  # kept in the adapter's own folder, which was moved
    refuse_chain(Path(base), folder)
    try:
        return check_source(base)
    except ConfigError as error:
        raise ConfigError(f"{folder} is an adapter, and its base is not there: {error}") from None


def merge(model: Any) -> Any:
    """An adapter merged into its base. Where it adapts one of two tied weights they are untied, in the config too."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = [part for part in (head, embedding) if hasattr(part, "base_layer")]
    if adapted and head is not None and head.weight is embedding.weight:
        untie(base)  # merging into the one would change the other as well
    return model.merge_and_unload()


def load_for_scoring(folder: str, task: str, dtype: str = "float32") -> Any:
    """A saved model, not to be trained. An adapter stays unmerged: its numbers are then those it had in training."""
    if not is_adapter(folder):
        return Start(folder, task, dtype=dtype).load().eval()
    base = Start(adapter_base(Path(folder)), task, dtype=dtype).load()
    return with_adapter(base, folder).eval()


_MEDIA = re.compile(r"image|audio|video|vision", re.IGNORECASE)


def check_vocabulary(model: Any, tokenizer: Any, name: str = "the model") -> None:
    """Raise `ConfigError` where the tokenizer has ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    # By their ids, which may have gaps. Gemma 3 1B has no row for the place of an image: no row of ours has images.
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows)
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    beyond = [token for token in beyond if token not in special or not _MEDIA.search(token)]
    if beyond:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, {name} embeds {rows}: they do not belong together "
            f"(it has nothing for {beyond[0]!r}). Use the model's own tokenizer, or a model of this vocabulary."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: sampler, trainer, reference and reward model must compute the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile each layer by itself: one graph serves all of them, and weights keep their names."""
    layers = layers_of(model)
    if not layers:
        raise ConfigError(f"model.compile: no stack of layers was found in {type(base_of(model)).__name__}")
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
