"""Loads models and adapters from a folder, a Hub id, or an object, with or without LoRA."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from rlhf_lightning.data.tokenizers import conflicting_tokens, load_tokenizer
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import adapted_base, check_model, hash_folder, read_object, read_stage, real_path, write_json
from rlhf_lightning.gguf.folder import cache_root, model_folder
from rlhf_lightning.models.base_weights import (
    adapter_shapes,
    check_adapted,
    check_kind,
    fit_rows,
    keeps_base,
    stored_embeddings,
    untie,
)
from rlhf_lightning.models.lora import HEADS, LoRA, base_of, is_quantized
from rlhf_lightning.types import JSON, Tokenizer
from rlhf_lightning.untrusted import check_files, load_failure, refuse_chain

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

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
    UnpicklingError,
    EOFError,
)

UNREACHED = re.compile(
    "couldn't connect to 'https|is not a local folder and is not a valid model identifier|offline mode"
)
"""Messages of the libraries for a name that is neither a local folder nor a repository on the Hub."""


@dataclass
class Start:
    """The model that a stage starts from, and how to load it.

    Args:
        source: Folder, Hub id or `PreTrainedModel`.
        task: `CAUSAL_LM` or `SEQ_CLS`.
        lora: Train adapters instead of all weights.
        dtype: Data type of the weights; float32 by default, even if the checkpoint has another, because bfloat16
            weights train badly.
        options: Further arguments of `from_pretrained` (`attn_implementation`, `trust_remote_code`, …).

    Example:
        ```python
        model = Start("HuggingFaceTB/SmolLM2-135M", lora=LoRA(rank=16)).load()
        ```
    """

    source: "str | Path | PreTrainedModel | PeftModel"
    task: str = "CAUSAL_LM"
    lora: LoRA | None = None
    dtype: str = "float32"
    options: dict[str, JSON] = field(default_factory=dict)
    fresh_adapter: bool = field(default=False, init=False)
    """True if `load` created a new adapter, which does not change the model yet."""
    base_kept: bool = field(default=True, init=False)
    """Set by `load`: True if the weights below the adapter equal those of the base that it names."""

    def load(self, workdir: Path | None = None) -> nn.Module:
        """Load the model, ready to train.

        An adapter with equal rank, alpha and targets is trained further. Any other adapter is merged first.

        Args:
            workdir: Folder for a merged model, which a new adapter then has as its base.

        Returns:
            The model, or a `PeftModel` around it.

        Raises:
            ConfigError: If the source does not exist or cannot be loaded.
        """
        if isinstance(self.source, nn.Module):
            if self._quantized and not is_quantized(self.source):
                raise ConfigError("lora.quantize cannot quantize a model object; load it in 4 bits, or pass its folder")
            check_adapted(self.source, self.lora)
            heads = getattr(base_of(self.source), "get_output_embeddings", None)
            if self.task == "CAUSAL_LM" and heads is not None and heads() is None:
                raise ConfigError(f"{type(base_of(self.source)).__name__} has no language-model head; use a causal LM")
            model = self._with_lora(self.source)
            self.base_kept = keeps_base(model)
            return model
        folder = check_source(self.source, self.options)
        if not is_adapter(folder):
            return self._with_lora(self._pretrained(folder, whole=True))
        return self._from_adapter(Path(folder), workdir)

    @property
    def _quantized(self) -> bool:
        return self.lora is not None and self.lora.quantize is not None

    def _from_adapter(self, folder: Path, workdir: Path | None) -> nn.Module:
        config = adapter_config(folder)
        base_path, task = adapter_base(folder), adapter_task(config, folder)
        if self._quantized and task == self.task:
            quantized = self._pretrained(base_path)
            if self.lora and self.lora.continues(config, quantized) and not stored_embeddings(config, folder):
                log.info("continuing the adapter of %s", folder)
                return with_adapter(quantized, folder, is_trainable=True)
            del quantized
        # Merged in float32: in a lower precision, the sum of base and update would be rounded twice.
        base = Start(base_path, task, dtype="float32", options=self.options)._pretrained(base_path)
        dtype = getattr(torch, self.dtype)
        if self.lora and not self._quantized and task == self.task and self.lora.continues(config, base):
            log.info("continuing the adapter of %s", folder)
            self.base_kept = not stored_embeddings(config, folder)
            return with_adapter(base.to(dtype), folder, is_trainable=True)
        merged = merge(with_adapter(base, folder)).to(dtype)
        if workdir is None and task == self.task and not self._quantized:
            self.base_kept = False  # no folder contains the merged weights
            return self._with_lora(merged)
        if workdir is None:
            raise ConfigError(f"{folder} is an adapter; merge it first (rlhf export) to use it as {self.task}")
        log.info("merging the adapter %s into %s", folder, workdir / "merged")
        _write_once(merged, workdir / "merged", folder)
        return self._with_lora(self._pretrained(str(workdir / "merged")))

    def _pretrained(self, source: str, whole: bool = False) -> "PreTrainedModel":
        """Load a model folder or Hub id; `whole` is False for the base of an adapter that may bring the score head."""
        import transformers

        auto = getattr(transformers, AUTO_CLASSES[self.task])
        # An adapter records the path of its base; a relative path would be valid only in this working directory.
        source = str(Path(source).resolve()) if Path(source).is_dir() else source
        # Set explicitly; otherwise transformers asks at the terminal.
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
                f"the model {source!r} is an encoder ({model.config.model_type}), whose tokens attend to later tokens, "
                "so it cannot generate text. Use a causal model; if this is one, set model.model_options: {is_decoder: "
                "true}"
            )
        # A score head may be new. transformers only warns about other missing weights, and initializes them at random.
        if missing := [n for n in info["missing_keys"] if self.task != "SEQ_CLS" or n.split(".")[0] not in HEADS]:
            raise ConfigError(
                f"the model {source!r} is missing {len(missing)} weights (for example {sorted(missing)[0]}): its "
                "files are incomplete, or config.json belongs to another model"
            )
        self._check_head(source, model.config.architectures or [], info["unexpected_keys"], info["missing_keys"], whole)
        # A classifier leaves out the language-model head; files of earlier transformers have a buffer of frequencies.
        unused = [name for name in sorted(info["unexpected_keys"]) if not name.endswith(".inv_freq")]
        if self.task == "SEQ_CLS":
            unused = [name for name in unused if any(part.isdigit() for part in name.split("."))]
        if unused:
            log.warning(
                "the files of the model %r have %d weights that %s does not use (for example %s); they are left out. "
                "If they belong to the model, correct its config.json",
                source, len(unused), type(model).__name__, unused[0],
            )  # fmt: skip
        return model

    def _check_head(
        self, source: str, architectures: list[str], unused: Iterable[str], missing: Iterable[str], whole: bool
    ) -> None:
        """Raise `ConfigError` if files and config disagree about a score head, or the task would drop it.

        Args:
            source: The model's folder or Hub id.
            architectures: Those of its config.
            unused: Weights in its files that the model does not have.
            missing: Weights of the model that its files do not have.
            whole: The files must have the head, because no adapter brings it.
        """
        heads = [name for name in sorted(unused) if name.split(".")[0] in HEADS]
        lacking = [name for name in sorted(missing) if name.split(".")[0] in HEADS]
        if not any(name.endswith("Classification") for name in architectures):
            if heads:
                raise ConfigError(
                    f"the model {source!r} has a score head ({heads[0]}), but architectures in its config.json is "
                    f"{architectures}; restore the file"
                )
        elif self.task != "SEQ_CLS":
            if heads:
                raise ConfigError(
                    f"the model {source!r} is a reward model ({heads[0]}), whose score head would be dropped; use the "
                    "language model that it was trained from"
                )
        elif lacking and whole:
            others = f"; weights that are not used: {', '.join(sorted(unused)[:3])}" if unused else ""
            raise ConfigError(
                f"the reward model {source!r} has no weights named {lacking[0]}, which is its score head{others}. A "
                "new head would give random scores: restore the files, or rename the weight of the head in them"
            )
        elif heads:
            raise ConfigError(
                f"transformers does not load {heads[0]} of the reward model {source!r}, so its scores would differ "
                f"from those of its author. Remove {heads[0]} from its files to use it without"
            )

    def _with_lora(self, model: nn.Module) -> nn.Module:
        if self.lora is None:
            return model
        self.fresh_adapter = True
        return self.lora.add_to(model, self.task)


def _sees_ahead(config: "PretrainedConfig") -> bool:
    """True if the architecture is bidirectional and not configured as a decoder."""
    from transformers.models.auto import modeling_auto as auto

    kinds = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    return config.model_type in kinds and not getattr(config, "is_decoder", False)


def _write_once(model: "PreTrainedModel", folder: Path, adapter: Path) -> None:
    """Save a merged model, unless another rank or run has already written it from the same adapter (by hash).

    The tokenizer, chat template, generation config and rendering settings next to the adapter are copied.
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
    """Context manager that converts errors to a `ConfigError` that says what cannot be loaded, and what to do.

    The libraries may raise almost any exception for a damaged folder.
    """
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        reason = load_failure(error)
        if "ignore_mismatched_sizes" in reason:  # transformers lists the shapes only in its log
            reason = "the shapes of its weights differ from config.json, or it is a classifier with several labels"
        remedy = "Restore its files, or use another model"
        if found := re.search(r"configuration class <class '[\w.]*\.(\w+)Config'> .*AutoModelFor(\w+)", reason):
            kinds = {"CausalLM": "causal language model", "SequenceClassification": "sequence classifier"}
            reason, remedy = (
                f"transformers has no {kinds.get(found[2], found[2])} for the architecture {found[1]}",
                "Use another",
            )
        elif UNREACHED.search(str(error)):
            reason = f"no such folder (seen from {Path.cwd()}), and the Hub has no such repository or cannot be reached"
            remedy = "Use a folder that exists"
        elif isinstance(error, ImportError):
            remedy = "Install it, or use a model that does not need it"
        elif "unexpected keyword argument" in reason:
            remedy = "See model.model_options"
        raise ConfigError(f"{what} cannot be loaded: {reason.rstrip('. ')}. {remedy}.") from error


def adapter_config(folder: Path | str) -> "PeftConfig":
    """peft's config of an adapter folder.

    Raises:
        ConfigError: If it cannot be read, or the adapter has no weights in layers.
    """
    from peft import PeftConfig

    if Path(folder).is_dir():
        read_object(Path(folder) / "adapter_config.json")
    with loading(f"the adapter {str(folder)!r}"):
        config = PeftConfig.from_pretrained(folder)
    check_kind(config, f"the adapter {str(folder)!r}")
    return config


def adapter_task(config: "PeftConfig", folder: Path | str) -> str:
    """Key of `AUTO_CLASSES` for an adapter. Many are saved without a task; only those of classifiers have a head.

    Raises:
        ConfigError: If it is an adapter for another task.
    """
    if config.task_type is None:
        with loading(f"the adapter {str(folder)!r}"):
            heads = {part for name in adapter_shapes(folder) for part in name.split(".") if part in HEADS}
        return "SEQ_CLS" if heads else "CAUSAL_LM"
    task = str(getattr(config.task_type, "value", config.task_type))
    if task not in AUTO_CLASSES:
        raise ConfigError(
            f"the adapter {str(folder)!r} is for the task {task}; only {' and '.join(AUTO_CLASSES)} are supported"
        )
    return task


def with_adapter(base: "PreTrainedModel", folder: Path | str, is_trainable: bool = False) -> "PeftModel":
    """Load an adapter onto a base.

    Args:
        base: The base model; it is resized if the adapter's vocabulary is larger.
        folder: The adapter's folder.
        is_trainable: Train the adapter.

    Raises:
        ConfigError: If the adapter does not fit, lacks weights, or has some that its config does not use.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with loading(f"the adapter {str(folder)!r}"):
        fit_rows(base, adapter_config(folder), folder)
        model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
        if not (stored := adapter_shapes(folder).keys()):
            return model
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(wanted - stored):
        raise ConfigError(
            f"the adapter {str(folder)!r} is missing {len(missing)} weights (for example {missing[0]}); restore its "
            "files"
        )
    if unused := sorted(name for name in stored - wanted if ".lora_A." in name or ".lora_B." in name):
        raise ConfigError(
            f"the adapter {str(folder)!r} has {len(unused)} weights that its adapter_config.json does not use (for "
            f"example {unused[0]}); restore its files"
        )
    return model


def _merged_from(folder: Path) -> str | None:
    """Hash of the adapter in a merged folder; None if there is no such folder."""
    path = folder / "merged_from.json"
    found = read_object(path).get("adapter") if path.is_file() else None
    return found if isinstance(found, str) else None


def check_source(source: str | Path, options: Mapping[str, JSON] | None = None) -> str:
    """Return a model source as text, after checking for common mistakes and for unsafe folders.

    Args:
        source: Folder, Hub id or GGUF file. A GGUF file is converted to a folder.
        options: Arguments of `from_pretrained`; see `untrusted.check_files`.

    Raises:
        ConfigError: If the folder does not exist, is not a model, or is refused by `untrusted.check_files`.
    """
    text = os.path.expanduser(model_folder(str(source), options))
    if text.endswith(".ckpt"):
        raise ConfigError(
            f"model {text!r}: this is a Lightning checkpoint, which can only resume its own stage (--ckpt_path). Start "
            "from the stage's model folder, for example runs/NAME/sft/model"
        )
    if not os.path.exists(text) and Path(text).is_relative_to(cache_root()):
        raise ConfigError(
            f"model {text!r}: the folder of a converted GGUF file is no longer in the cache. Any command with the file "
            "writes it again, for example rlhf chat FILE.gguf"
        )
    check_model(f"model {text!r}", text)
    check_files(text, options)
    return text


def is_adapter(source: str) -> bool:
    """True if a folder contains a peft adapter."""
    return (Path(source) / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str:
    """The base of an adapter: the path in its config or, if the run was moved, the relative path in `stage.json`.

    Raises:
        ConfigError: If the adapter names no base, or the base does not exist.
    """
    base = adapted_base(folder)
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{folder}: adapter_config.json names no base model (base_model_name_or_path is {base!r})")
    relative = read_stage(folder).get("base")
    if isinstance(relative, str) and relative and not Path(base).exists() and (folder / relative).exists():
        base = str(real_path(folder / relative))
    if not Path(base).exists() and Path(base).name == "base" and (folder / "base" / "config.json").is_file():
        base = str(real_path(folder / "base"))  # the base is inside the adapter's folder, which was moved
    refuse_chain(Path(base), folder)
    try:
        return check_source(base)
    except ConfigError as error:
        raise ConfigError(f"the base of the adapter {folder} cannot be used: {error}") from None


def merge(model: "PeftModel") -> "PreTrainedModel":
    """Merge an adapter into its base; if one of two tied weights is adapted, untie them first, also in the config."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = [part for part in (head, embedding) if hasattr(part, "base_layer")]
    if adapted and head is not None and head.weight is embedding.weight:
        untie(base)  # merging into one of the tied weights would also change the other
    return model.merge_and_unload()


def load_for_scoring(folder: str, task: str, dtype: str = "float32") -> "PreTrainedModel | PeftModel":
    """Load a saved model in eval mode. An adapter is not merged, so that scores equal those in training.

    Args:
        folder: Model or adapter folder, or Hub id.
        task: `CAUSAL_LM` or `SEQ_CLS`.
        dtype: Data type of the weights.
    """
    if not is_adapter(folder):
        return Start(folder, task, dtype=dtype).load().eval()
    source = adapter_base(Path(folder))
    base = Start(source, task, dtype=dtype)._pretrained(source)
    return with_adapter(base, folder).eval()


_MEDIA = re.compile(r"image|audio|video|vision", re.IGNORECASE)


def check_vocabulary(model: "PreTrainedModel", tokenizer: Tokenizer, name: str = "the model") -> None:
    """Check that the model has an embedding for every id of the tokenizer.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        name: Name of the model, for the message.

    Raises:
        ConfigError: If the tokenizer has an id without an embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    # By id, because ids may have gaps.
    if beyond := sorted(token for token, number in text_tokens(tokenizer).items() if number >= rows):
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but {name} has {rows} embeddings, so they do not match "
            f"(there is no embedding for {beyond[0]!r}). Use the model's own tokenizer, or a model with this "
            "vocabulary."
        )


def check_same_tokens(source: str, tokenizer: Tokenizer, name: str) -> None:
    """Check that token ids mean the same to another model as to the policy.

    A folder without a tokenizer cannot be compared.

    Args:
        source: Folder or Hub id of the other model.
        tokenizer: The policy's tokenizer.
        name: Name of the other model, for the message.

    Raises:
        ConfigError: If a token has another id there.
    """
    try:
        other = load_tokenizer(source)
    except ConfigError as error:
        log.info("the vocabulary of %s cannot be compared with the policy's: %s", name, error)
        return
    if wrong := conflicting_tokens(tokenizer, other):
        raise ConfigError(
            f"{name} {source!r} has another vocabulary than the policy: {len(wrong)} of the policy's tokens have "
            f"another id or meaning there (for example {wrong[0]!r}). It would read other texts; use a model with "
            "the policy's tokenizer"
        )


def text_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Token ids by token, without those of images, audio and video, which rows never contain.

    Gemma 3 1B has no embedding for its image token.

    Args:
        tokenizer: The tokenizer.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if token not in special or not _MEDIA.search(token)
    }


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, because sampler, trainer, reference and reward model must compute the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
