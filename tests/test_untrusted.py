"""Model folders from untrusted sources: files that would make a library import, download or hang are refused."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from rlhf_lightning import SFTModule
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import read_stage
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.untrusted import check_folder, check_pattern
from tests.helpers.paths import SHARED

# From Qwen2.5, Llama 3, DeepSeek V3, GPT-4o's family, BLOOM, StarCoder, Mistral, and adapters of peft and unsloth.
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
def test_patterns_of_real_models_are_accepted(pattern: str) -> None:
    check_pattern(pattern, "tokenizer.json")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_backtracking_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"can take forever|cannot be read"):
        check_pattern(pattern, "tokenizer.json")


@pytest.mark.parametrize("name", ["minimind", "smollm2-135m-instruct", "qwen3"])
def test_real_tokenizers_are_accepted(name: str, shared: Path) -> None:
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
    ("config.json", lambda c: c.update(_attn_implementation="owner/kernel:f"), "would download code from a hub"),
    ("config.json", lambda c: c.update(text_config={"attn_implementation": "owner/kernel"}), "code from a hub"),
    (
        "config.json",
        lambda c: c.update(use_pretrained_backbone=True, backbone="owner/x"),
        "would download another model",
    ),
    ("config.json", lambda c: c.update(num_local_experts=10**6), "num_local_experts"),
    (
        "config.json",
        lambda c: c.update(quantization_config={"quant_method": "x", "modules_to_not_convert": [r"((a+)+)+!"]}),
        "modules_to_not_convert .* can take forever",
    ),
    ("config.json", lambda c: c.update(configuration_files=["../config.4.0.0.json"]), "not a file in its folder"),
    ("config.json", lambda c: c.update(num_key_value_heads=0), "cannot be loaded"),
    ("config.json", lambda c: c.update(num_attention_heads=-4), "cannot be loaded"),
    ("config.json", lambda c: c.update(num_hidden_layers=-1), "cannot be loaded|lacks"),
    ("config.json", lambda c: c.update(hidden_size=0), "cannot be loaded"),
    ("config.json", lambda c: c.update(model_type="../../evil"), "cannot be loaded"),
    ("config.json", lambda c: c.update(model_type=[]), "cannot be loaded"),
]


@pytest.mark.parametrize(("file", "change", "words"), MODELS)
def test_unsafe_model_config_is_refused(
    file: str, change: Callable[[dict[str, Any]], Any], words: str, base: str
) -> None:
    changed(base, file, change)
    with pytest.raises(ConfigError, match=words) as error:
        Start(base).load()
    assert len(str(error.value)) < 700


TOKENIZERS: list[Change] = [
    ("tokenizer.json", lambda c: c.update(normalizer=replaced(r"(a+)+$")), "can take forever"),
    ("tokenizer.json", lambda c: c.update(pre_tokenizer=split(r"(\p{L}+)+!")), "can take forever"),
    ("tokenizer.json", lambda c: c.update(decoder=replaced(r"(.|\n)*x")), "can take forever"),
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
def test_unsafe_tokenizer_is_refused(file: str, change: Callable[[dict[str, Any]], Any], words: str, base: str) -> None:
    changed(base, file, change)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(base)


def test_alternative_files_listed_in_a_config_are_checked(base: str) -> None:
    folder = Path(base)
    for listing, key, file, spoilt in (
        ("tokenizer_config.json", "fast_tokenizer_files", "tokenizer.json", "tokenizer.4.0.0.json"),
        ("config.json", "configuration_files", "config.json", "config.4.0.0.json"),
    ):
        shutil.copy(folder / file, folder / spoilt)
        changed(base, listing, lambda c, name=key, other=spoilt: c.update({name: [other]}))
    changed(base, "tokenizer.4.0.0.json", lambda c: c.update(normalizer=replaced(r"(a+)+$")))
    with pytest.raises(ConfigError, match=r"tokenizer\.4\.0\.0\.json: the regular expression .* can take forever"):
        load_tokenizer(base)
    (folder / "tokenizer.4.0.0.json").unlink()
    changed(base, "config.4.0.0.json", lambda c: c.update(_attn_implementation="owner/kernel"))
    with pytest.raises(ConfigError, match=r"config\.4\.0\.0\.json: _attn_implementation"):
        Start(base).load()


def test_links_to_other_kinds_of_files_are_refused(base: str, tmp_path: Path) -> None:
    folder, other = Path(base), tmp_path / "other"
    shutil.copytree(base, other)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(other / name)
    Start(base).load()  # files that several folders share
    assert load_tokenizer(base)
    (tmp_path / "secret").write_text("{{ messages }} a secret")
    for target, words in (
        (tmp_path / "secret", "another kind of file"),
        (tmp_path / "nothing", "broken link"),
        (folder / "chat_template.jinja", "broken link"),
        (Path("/dev/zero"), "a device"),
    ):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.jinja").symlink_to(target)
        for load in (load_tokenizer, lambda name: Start(name).load()):
            with pytest.raises(ConfigError, match=words):
                load(base)
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(ConfigError, match="a named pipe"):
        load_tokenizer(base)


def test_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "second")
    for target in (str(adapter), str(tmp_path / "second")):
        changed(
            tmp_path / "second", "adapter_config.json", lambda c, name=target: c.update(base_model_name_or_path=name)
        )
        with pytest.raises(ConfigError, match="another adapter as its base"):
            Start(str(tmp_path / "second")).load()


def test_no_file_of_a_folder_is_imported_or_unpickled(adapter: Path, base: str) -> None:
    mark = adapter.parent / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\ndef generate(**kwargs): pass\n"
    bomb = pickle.dumps(Bomb(str(mark)))
    for folder in (Path(base), adapter):
        (folder / "custom_generate").mkdir()
        for name in ("evil.py", "custom_generate/generate.py", "handler.py", "setup.py"):
            (folder / name).write_text(code)
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "hparams.pkl"):
            (folder / name).write_bytes(bomb)
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]))
        for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
            evil = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
            (folder / name).write_text(json.dumps(evil))
        (folder / "generation_config.json").write_text(json.dumps({"custom_generate": base, "eos_token_id": 1}))
    remote = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    changed(base, "config.json", lambda c: c.update(auto_map=remote, custom_pipelines={"x": {"impl": "evil.Evil"}}))
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    changed(adapter, "adapter_config.json", lambda c: c.update(auto_mapping=mapping, auto_map=remote))
    changed(base, "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}))
    for load in (load_tokenizer, lambda name: Start(name).load(), task_of):
        with suppress(ConfigError):
            load(base)
        with suppress(ConfigError):
            load(str(adapter))
    assert not mark.exists()


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "", "[]", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_invalid_json_files_are_refused(file: str, text: str, base: str) -> None:
    (Path(base) / file).write_text(text)
    # transformers warns about an unreadable generation config, and ignores it.
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
        (lambda c: c.update(target_modules=r"(([a-z0-9_.]+)+)+!"), "target_modules .* can take forever"),
        (lambda c: c.update(exclude_modules=r"(a|a)*b"), "exclude_modules"),
        (lambda c: c.update(rank_pattern={r"(([a-z0-9_.]+)+)+!": 4}), "rank_pattern"),
        (lambda c: c.update(alpha_pattern={r"(.*)*(.*)*": 4}), "alpha_pattern"),
        (lambda c: c.update(layers_to_transform=[0], layers_pattern=r"(a+)+"), "layers_pattern"),
        (lambda c: c.update(layer_replication=[[0, 2]] * 10**5), "layer_replication"),
        (lambda c: c.update(init_lora_weights="pissa_niter_1000000"), "init_lora_weights"),
        (lambda c: c.update(r=10**12), "rank is larger"),
        (lambda c: c.update(peft_type="EVIL"), "cannot be loaded"),
        (lambda c: c.update(r=-1), "cannot be loaded"),
        (lambda c: c.update(r="x"), "cannot be loaded"),
        (lambda c: c.update(base_model_name_or_path=7), "names no base"),
    ],
)
def test_unsafe_adapter_config_is_refused(change: Callable[[dict[str, Any]], Any], words: str, adapter: Path) -> None:
    changed(adapter, "adapter_config.json", change)
    with pytest.raises(ConfigError, match=words):
        Start(str(adapter)).load()


def test_index_without_shards_is_refused(base: str) -> None:
    (Path(base) / "model.safetensors").unlink()
    for index in ({}, {"weight_map": {}}, {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}):
        (Path(base) / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match=r"cannot be loaded|not a file in its folder"):
            Start(base).load()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_pointer_of_git_lfs_is_refused(file: str, base: str) -> None:
    (Path(base) / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    with pytest.raises(ConfigError, match=f"{file}: this is a pointer of Git LFS"):
        Start(base).load()


@pytest.mark.parametrize("content", [pickle.dumps({"a": Path("x")}), b"nonsense", b""])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapter_file_that_is_not_of_weights_is_refused(content: bytes, task: str | None, adapter: Path) -> None:
    changed(adapter, "adapter_config.json", lambda config: config.update(task_type=task))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ConfigError, match="file is damaged, or contains other objects than weights"):
        Start(str(adapter)).load()


def test_model_file_that_is_not_of_weights_is_refused(base: str) -> None:
    (Path(base) / "model.safetensors").unlink()
    (Path(base) / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Path("x")}) + bytes(10**6))
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        Start(base).load()
    assert "weights_only" not in str(caught.value)


def test_pickle_named_safetensors_is_refused(base: str, tmp_path: Path) -> None:
    (Path(base) / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Start(base).load()
    shutil.rmtree(base)


@pytest.mark.parametrize(("found", "words"), [(2, "update rlhf-lightning"), (0, "train again"), ("x", "train again")])
def test_record_of_another_format_is_refused(found: Any, words: str, adapter: Path) -> None:
    assert json.loads((adapter / "stage.json").read_text())["format"] == 1
    changed(adapter, "stage.json", lambda stage: stage.update(format=found))
    with pytest.raises(
        ConfigError, match=rf"stage\.json has format {found!r}, but this version reads format 1: .*{words}"
    ):
        read_stage(adapter)


def test_checkpoint_of_another_format_is_refused(base: str) -> None:
    module = SFTModule(base)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"format": 1, "unsaved_arguments": []}
    with pytest.raises(ConfigError, match="the checkpoint has format 7, but this version reads format 1: update"):
        module.on_load_checkpoint({"format": 7})


# -- the Hub ----------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, folder: Path, commit: str = COMMIT, ref: str = "main") -> None:
    """Put a folder into the cache as `huggingface_hub` does: blobs, and snapshots with links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for path in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the Hub, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_safe_repository_loads(base: str, hub: Path) -> None:
    cached(hub, "owner/good", Path(base))
    cached(hub, "alone", Path(base))
    for name in ("owner/good", "alone"):
        assert load_tokenizer(name).chat_template
        assert Start(name).load().config.name_or_path == name
    with pytest.raises(ConfigError, match="cannot be reached"):
        Start("owner/absent").load()


@pytest.mark.parametrize(("file", "change", "words"), [*MODELS[:10], *TOKENIZERS[:4]])
def test_unsafe_repository_is_refused(
    file: str, change: Callable[[dict[str, Any]], Any], words: str, base: str, hub: Path
) -> None:
    changed(base, file, change)
    cached(hub, "owner/evil", Path(base))
    with pytest.raises(ConfigError, match=words):
        load_tokenizer("owner/evil") if file == "tokenizer.json" else Start("owner/evil").load()


def test_chosen_revision_and_subfolder_are_checked(base: str, hub: Path) -> None:
    cached(hub, "owner/mixed", Path(base))
    changed(base, "config.json", lambda c: c.update(_attn_implementation="owner/kernel"))
    cached(hub, "owner/mixed", Path(base), "f" * 40, "evil")
    Start("owner/mixed").load()
    for revision in ("evil", "f" * 40):
        with pytest.raises(ConfigError, match="download code from a hub"):
            Start("owner/mixed", options={"revision": revision}).load()
    changed(base, "config.json", lambda c: c.pop("_attn_implementation"))
    inner = Path(base) / "inner"
    inner.mkdir()
    shutil.copy(Path(base) / "config.json", inner)
    changed(inner, "config.json", lambda c: c.update(_attn_implementation="owner/kernel"))
    with pytest.raises(ConfigError, match="download code from a hub"):
        Start(base, options={"subfolder": "inner"}).load()


def test_adapter_on_the_hub_and_its_base_are_checked(adapter: Path, base: str, hub: Path) -> None:
    changed(adapter, "adapter_config.json", lambda c: c.update(target_modules=r"(([a-z0-9_.]+)+)+!"))
    cached(hub, "owner/adapter", adapter)
    with pytest.raises(ConfigError, match=r"target_modules .* can take forever"):
        Start("owner/adapter").load()
    changed(adapter, "adapter_config.json", lambda c: c.update(target_modules=["q_proj"]))
    changed(base, "config.json", lambda c: c.update(num_hidden_layers=1_000_000))
    cached(hub, "owner/second", adapter)
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        Start("owner/second").load()
    changed(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path="owner/third"))
    cached(hub, "owner/third", adapter)
    with pytest.raises(ConfigError, match="another adapter as its base"):
        Start("owner/third").load()


@pytest.mark.parametrize("name", ["model-2.safetensors", "extra.bin"])
def test_damaged_weight_file_does_not_lift_the_bound_of_the_others(name: str, base: str) -> None:
    (Path(base) / name).write_bytes(b"PK\x05\x06" + bytes([255]) * 18)
    changed(base, "config.json", lambda c: c.update(vocab_size=2**31))
    with pytest.raises(ConfigError, match="vocab_size is 2147483648, and the weight files next to it have only"):
        check_folder(Path(base))


class Server(ThreadingHTTPServer):
    """A hub with one repository. Records its requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.asked = folder, list[str]()
        Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        files = {path.name: path.read_bytes() for path in self.server.folder.iterdir() if path.is_file()}
        place, _, name = self.path.partition("?")[0].rpartition("/")
        if "/tree/" in self.path:
            rows = [{"type": "file", "path": name, "size": len(text), "oid": name} for name, text in files.items()]
            body: bytes | None = json.dumps(rows).encode()
        elif "/api/models/" in self.path:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "owner/evil", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            body = files.get(name) if "/resolve/" in place else None
        self.send_response(404 if body is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("evil", [False, True])
def test_command_checks_a_model_on_a_local_hub(evil: bool, base: str, tmp_path: Path) -> None:
    if evil:
        changed(base, "config.json", lambda c: c.update(num_hidden_layers=1_000_000))
    server = Server(Path(base))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_lightning", "generate", "owner/evil", "--prompt", "a", "--max_tokens", "2"],
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
            | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == (2 if evil else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert any("config.json" in path for path in server.asked)
    if evil:
        assert "num_hidden_layers is 1000000" in done.stderr
