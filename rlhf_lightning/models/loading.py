"""Where models and tokenizers come from: a folder, a Hub id, or an object in hand; with or without LoRA."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import hash_folder, write_json
from rlhf_lightning.models.lora import LoRA, base_of, is_quantised
from rlhf_lightning.models.sharding import layers_of

log = logging.getLogger(__name__)
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}


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
            return self._with_lora(self.source)
        folder = check_source(self.source)
        if not is_adapter(folder):
            return self._with_lora(self._pretrained(folder))
        return self._from_adapter(Path(folder), workdir)

    @property
    def _quantised(self) -> bool:
        return self.lora is not None and self.lora.quantize is not None

    def _from_adapter(self, folder: Path, workdir: Path | None) -> nn.Module:
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(folder)
        base_path, task = adapter_base(folder), str(config.task_type)
        if self._quantised and task == self.task:
            quantised = self._pretrained(base_path)
            if self.lora and self.lora.continues(config, quantised):
                log.info("continuing the adapter of %s", folder)
                return PeftModel.from_pretrained(quantised, folder, is_trainable=True)
            del quantised
        # Merged in float32: in a lower precision the sum of base and update would be rounded twice.
        base = Start(base_path, task, dtype="float32", options=self.options)._pretrained(base_path)
        dtype = getattr(torch, self.dtype)
        if self.lora and not self._quantised and task == self.task and self.lora.continues(config, base):
            log.info("continuing the adapter of %s", folder)
            return PeftModel.from_pretrained(base.to(dtype), folder, is_trainable=True)
        merged = merge(PeftModel.from_pretrained(base, folder)).to(dtype)
        if workdir is None and task == self.task and not self._quantised:
            return self._with_lora(merged)
        if workdir is None:
            raise ConfigError(f"{folder} is an adapter; merge it first (rlhf export) to use it as {self.task}")
        log.info("merging the adapter %s into %s", folder, workdir / "merged")
        _write_once(merged, workdir / "merged", hash_folder(folder))
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
        try:
            return auto.from_pretrained(source, dtype=getattr(torch, self.dtype), **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            if "trust_remote_code" in str(error):
                reason = "it brings code; to run that, set model.model_options: {trust_remote_code: true}"
            raise ConfigError(f"the model {source!r} cannot be loaded: {reason}") from error

    def _with_lora(self, model: Any) -> nn.Module:
        if self.lora is None:
            return model
        from peft import get_peft_model

        self.fresh_adapter = True
        return get_peft_model(model, self.lora.config(model, self.task))


def _write_once(model: Any, folder: Path, source: str) -> None:
    """Save a merged model, unless it is there already: from this very adapter (by hash), written by another rank."""
    if _merged_from(folder) == source:
        return
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(scratch)
    write_json(scratch / "merged_from.json", {"adapter": source})
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(scratch, folder)
    except OSError:
        if _merged_from(folder) != source:
            raise
        shutil.rmtree(scratch)


def _merged_from(folder: Path) -> str | None:
    path = folder / "merged_from.json"
    return json.loads(path.read_text())["adapter"] if path.is_file() else None


def check_source(source: Any) -> str:
    """A model source as text, with the mistakes that are common refused; raises `ConfigError`."""
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
        raise ConfigError(f"model {text!r}: the folder has neither config.json nor adapter_config.json")
    return text


def is_adapter(source: str) -> bool:
    """Whether a folder holds a peft adapter."""
    return (Path(source) / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str:
    """The base of an adapter; where a run was moved, the place that `stage.json` gives relative to the folder."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    relative = read_stage(folder).get("base")
    if relative and not Path(base).exists() and (folder / relative).exists():
        base = str((folder / relative).resolve())
    return check_source(base)


def read_stage(folder: Any) -> dict[str, Any]:
    """The `stage.json` of a model folder (beside it or in it), or nothing."""
    for path in (Path(str(folder)) / "stage.json", Path(str(folder)).parent / "stage.json"):
        if path.is_file():
            return json.loads(path.read_text())
    return {}


def merge(model: Any) -> Any:
    """An adapter merged into its base. A tied head that was adapted is untied first, and the config says so."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = head is not None and hasattr(head, "base_layer")
    if adapted and head.base_layer.weight is embedding.weight:
        # Merging into the tied weight would change the input embedding as well.
        head.base_layer.weight = nn.Parameter(embedding.weight.detach().clone())
        base.config.tie_word_embeddings = False
        base.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload()


def load_for_scoring(folder: str, task: str, dtype: str = "float32") -> Any:
    """A saved model, not to be trained. An adapter stays unmerged: its numbers are then those it had in training."""
    if not is_adapter(folder):
        return Start(folder, task, dtype=dtype).load().eval()
    from peft import PeftModel

    base = Start(adapter_base(Path(folder)), task, dtype=dtype).load()
    return PeftModel.from_pretrained(base, folder).eval()


def check_vocabulary(model: Any, tokenizer: Any, name: str = "the model") -> None:
    """Raise `ConfigError` where the tokenizer has ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, {name} embeds {rows}: they do not belong together. "
            "Use the model's own tokenizer, or a model of this vocabulary."
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
