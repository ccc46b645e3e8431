"""Exports a trained model for other libraries, with its adapter merged and in the requested dtype."""

from pathlib import Path

from rlhf_lightning.data.rendering_settings import RenderingSettings
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, UserError, check_dtype, first_line
from rlhf_lightning.files import hash_folder, write_json
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import (
    Start,
    adapter_base,
    check_source,
    check_vocabulary,
    is_adapter,
    loading,
    merge,
    read_stage,
)
from rlhf_lightning.models.model_card import CARD, edited_card, write_card
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.saving import save_model
from rlhf_lightning.models.scorers import recorded_scorer, scorer_of
from rlhf_lightning.types import JSON


def export_model(source: str, folder: Path, dtype: str | None = None) -> dict[str, JSON]:
    """Write a model with its adapter merged: safetensors, config, tokenizer, generation config and `stage.json`.

    Args:
        source: Folder or Hub id of a model, a reward model, or an adapter of one.
        folder: Folder to write; it must be empty or not exist.
        dtype: Data type of the weights; by default that of the model, or of the adapter's base. Adapters are merged in
            float32.

    Returns:
        The content of `stage.json`.

    Raises:
        ConfigError: If the source cannot be loaded, or the folder is not empty.
    """
    import torch

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: the folder is not empty; choose one that is empty or does not exist")
    source = check_source(source)
    dtype = dtype or stored_dtype(source)
    check_dtype(dtype)
    template = None
    if task_of(source) == "SEQ_CLS":
        judge = RewardModel(source)
        tokenizer, renderer = judge.tokenizer, judge.renderer
        model = merge(judge.model) if is_adapter(source) else judge.model
        template = renderer.template if renderer.format == "chat" else None
    else:
        tokenizer = load_tokenizer(source)
        renderer = RenderingSettings.of(source).renderer(tokenizer, end_token_ids(source, tokenizer))
        model = Start(source).load()
        check_vocabulary(model, tokenizer, f"the model {source}")
    stop = (*renderer.stop_strings, *renderer.stop)
    save_model(
        model.to(getattr(torch, dtype)), tokenizer, folder, renderer.stop_token_ids, stop=stop, template=template
    )
    facts = {**_facts(source), "exported_from": str(Path(source).resolve()) if Path(source).exists() else source}
    facts |= {"dtype": dtype, "base": None}
    if (edited := edited_card(Path(source))) is not None:
        (folder / CARD).write_text(edited, encoding="utf-8", errors="surrogateescape")
    write_card(folder, facts)
    facts["model_hash"] = hash_folder(folder)
    write_json(folder / "stage.json", facts)
    return facts


def stored_dtype(source: str) -> str:
    """Data type in which a model is stored; for an adapter that of its base."""
    from transformers import AutoConfig

    with loading(f"the model {source!r}"):
        source = adapter_base(Path(source)) if is_adapter(source) else source
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _facts(source: str) -> dict[str, JSON]:
    """The source's `stage.json`, with paths relative to it made absolute."""
    facts = read_stage(source)
    if facts.get("reference"):
        reference = getattr(scorer_of(source), "reference", None)
        if named := recorded_scorer(source):
            facts["scorer"] = {"name": named["name"], "init_args": {**named["init_args"], "reference": reference}}
        facts["reference"] = None
    return facts


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload a folder to the Hugging Face Hub.

    Args:
        folder: The folder.
        repository: Id of the repository; it is created if it does not exist.
        public: Make a new repository public.

    Returns:
        The address of the repository.

    Raises:
        UserError: If the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{folder} was written, but cannot be uploaded to {repository}: {first_line(error)}") from error
    return str(address)
