"""Folders that others made: what their files may ask of the libraries, and how it is told where they ask for more."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import SFTModule
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import read_stage
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.untrusted import check_folder, check_pattern
from tests.conftest import SHARED

# Of Qwen2.5, Llama 3, DeepSeek V3, GPT-4o's family, BLOOM, StarCoder, Mistral; of peft's and unsloth's adapters.
SHIPPED = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n/]*|\s*[\r\n]+",
    r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp|ffn|dense).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
    r"^(?!.*visual).*(?:q_proj|k_proj)$",
]
HOSTILE = [
    r"(([a-z0-9_.]+)+)+!",
    r"(a|a)*b",
    r"(a?)*b",
    r"(.*)*" * 6,
    r".*.*.*.*.*.*x",
    r"(\w+\s?)*$",
    r"(?:(?=(a+))a)*b",
    r"((a{0,20}){0,20}){0,20}!",
    r"[[a]](\p{L}+)+!",
    "(",
]


@pytest.mark.parametrize("pattern", SHIPPED)
def test_what_real_folders_hold_is_taken(pattern: str) -> None:
    check_pattern(pattern, "tokenizer.json")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_expression_that_backtracks_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"can take for ever|cannot be read"):
        check_pattern(pattern, "tokenizer.json")


@pytest.mark.parametrize("name", ["minimind", "smollm2-135m-instruct", "qwen3"])
def test_real_tokenizers_are_taken(name: str, shared: Path) -> None:
    check_folder(SHARED / "tokenizers" / name)


def changed(folder: str | Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(folder) / file
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


Change = tuple[str, Callable[[dict[str, Any]], Any], str]
MODELS: list[Change] = [
    ("config.json", lambda c: c.update(num_hidden_layers=1_000_000), "num_hidden_layers is 1000000"),
    ("config.json", lambda c: c.update(hidden_size=10**15), "hidden_size is 1000000000000000"),
    ("config.json", lambda c: c.update(vocab_size=10**12), "vocab_size is"),
    ("config.json", lambda c: c.update(attn_implementation="owner/kernel"), "attn_implementation: …"),
    ("config.json", lambda c: c.update(_attn_implementation="owner/kernel:f"), "would be fetched from a hub"),
    ("config.json", lambda c: c.update(text_config={"attn_implementation": "owner/kernel"}), "fetched from a hub"),
    ("config.json", lambda c: c.update(num_key_value_heads=0), "cannot be loaded"),
    ("config.json", lambda c: c.update(num_attention_heads=-4), "cannot be loaded"),
    ("config.json", lambda c: c.update(num_hidden_layers=-1), "cannot be loaded|lacks"),
    ("config.json", lambda c: c.update(hidden_size=0), "cannot be loaded"),
    ("config.json", lambda c: c.update(model_type="../../evil"), "cannot be loaded"),
    ("config.json", lambda c: c.update(model_type=[]), "cannot be loaded"),
]


@pytest.mark.parametrize(("file", "change", "words"), MODELS)
def test_a_model_that_asks_for_more_is_refused(
    file: str, change: Callable[[dict[str, Any]], Any], words: str, base: str
) -> None:
    changed(base, file, change)
    with pytest.raises(ConfigError, match=words) as error:
        Start(base).load()
    assert len(str(error.value)) < 700


TOKENIZERS: list[Change] = [
    ("tokenizer.json", lambda c: c.update(normalizer=replaced(r"(a+)+$")), "can take for ever"),
    ("tokenizer.json", lambda c: c.update(pre_tokenizer=split(r"(\p{L}+)+!")), "can take for ever"),
    ("tokenizer.json", lambda c: c.update(decoder=replaced(r"(.|\n)*x")), "can take for ever"),
    ("tokenizer.json", lambda c: c.update(pre_tokenizer=split("(")), "cannot be read"),
    ("tokenizer.json", lambda c: c.update(decoder={"type": "Strip", "content": "", "start": -1}), "no tokenizer can"),
    ("tokenizer.json", lambda c: c["model"].update(merges=[["no such", "tokens"]]), "no tokenizer can be loaded"),
    ("tokenizer_config.json", lambda c: c.update(tokenizer_class=5), "no tokenizer can be loaded"),
]


def replaced(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(("file", "change", "words"), TOKENIZERS)
def test_a_tokenizer_that_asks_for_more_is_refused(
    file: str, change: Callable[[dict[str, Any]], Any], words: str, base: str
) -> None:
    changed(base, file, change)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(base)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "", "[]", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_that_are_no_json_of_theirs(file: str, text: str, base: str) -> None:
    (Path(base) / file).write_text(text)
    # transformers leaves out a generation config that it cannot read, with a warning.
    with suppress(ConfigError) if file == "generation_config.json" else pytest.raises(ConfigError):
        load_tokenizer(base)
        Start(base).load()


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> Path:
    module = SFTModule(base, lora=LoRA(rank=2))
    module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(megatron_config={"a": 1}, megatron_core="megatron.evil"), "megatron_config"),
        (lambda c: c.update(megatron_core="evil"), "megatron_config"),
        (lambda c: c.update(target_modules=r"(([a-z0-9_.]+)+)+!"), "target_modules .* can take for ever"),
        (lambda c: c.update(exclude_modules=r"(a|a)*b"), "exclude_modules"),
        (lambda c: c.update(rank_pattern={r"(([a-z0-9_.]+)+)+!": 4}), "rank_pattern"),
        (lambda c: c.update(alpha_pattern={r"(.*)*(.*)*": 4}), "alpha_pattern"),
        (lambda c: c.update(layers_to_transform=[0], layers_pattern=r"(a+)+"), "layers_pattern"),
        (lambda c: c.update(peft_type="EVIL"), "cannot be loaded"),
        (lambda c: c.update(r=-1), "cannot be loaded"),
        (lambda c: c.update(r="x"), "cannot be loaded"),
        (lambda c: c.update(base_model_name_or_path=7), "names no base"),
    ],
)
def test_an_adapter_that_asks_for_more_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, adapter: Path
) -> None:
    changed(adapter, "adapter_config.json", change)
    with pytest.raises(ConfigError, match=words):
        Start(str(adapter)).load()


def test_an_index_without_its_shards(base: str) -> None:
    (Path(base) / "model.safetensors").unlink()
    for index in ({}, {"weight_map": {}}, {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}):
        (Path(base) / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match="cannot be loaded"):
            Start(base).load()


def test_weights_that_are_a_pickle_under_another_name(base: str, tmp_path: Path) -> None:
    import pickle

    (Path(base) / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Start(base).load()
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("found", "words"), [(2, "update rlhf-lightning"), (0, "train it anew"), ("x", "train it anew")]
)
def test_another_version_of_a_record(found: Any, words: str, adapter: Path) -> None:
    assert json.loads((adapter / "stage.json").read_text())["format"] == 1
    changed(adapter, "stage.json", lambda stage: stage.update(format=found))
    with pytest.raises(ConfigError, match=rf"stage\.json has format {found!r}, and this version reads 1: .*{words}"):
        read_stage(adapter)


def test_a_checkpoint_of_another_version(base: str) -> None:
    module = SFTModule(base)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"format": 1}
    with pytest.raises(ConfigError, match="the checkpoint has format 7, and this version reads 1: update"):
        module.on_load_checkpoint({"format": 7})
