"""A run must not run code from a model folder, use the network, open files named in data, or write secrets."""

import json
import os
import pickle
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.io import AtomicCheckpointIO
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.models.heads import has_head
from rlhf_lightning.models.loading import Start, load_for_scoring
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import RewardHead, scorer_of
from tests.helpers.cli import three_stages
from tests.helpers.models import TEXTS
from tests.helpers.rows import chats, write_rows
from tests.helpers.training import trainer

WATCH = """
import os, sys

LOG = os.environ["WATCHED"]
CANARY = os.environ["CANARY"]


def told(line):
    with os.fdopen(os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as stream:
        stream.write(line + "\\n")


def hook(event, args):
    if event == "open" and CANARY in str(args[0]):
        told(f"opened {args[0]}")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(args[1], tuple):
        if args[1][0] not in ("127.0.0.1", "::1", "localhost"):
            told(f"{event} {args[1]}")
            raise OSError("no network here")
    if event == "socket.getaddrinfo" and args[0] not in (None, "localhost", "127.0.0.1", "::1", b"localhost"):
        told(f"{event} {args[0]}")
        raise OSError("no network here")


sys.addaudithook(hook)
"""
SECRETS = {
    "HF_TOKEN": "hf_QxZ7notARealTokenButLong42",
    "WANDB_API_KEY": "f00dfeedQxZ7notARealKeyButLong43",
    "OPENAI_API_KEY": "sk-QxZ7notARealKeyEither44",
    "AWS_SECRET_ACCESS_KEY": "QxZ7notARealzecret45",
}


@pytest.mark.parametrize("stages", [1, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_stages_use_no_network_open_no_named_files_and_write_no_secrets(stages: int, base: str, tmp_path: Path) -> None:
    """The Hub is enabled, but no setting is a Hub id. Paths in the rows lead to a watched file."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    canary = tmp_path / "canary.txt"
    canary.write_text("a file that only data names")
    plan = three_stages(base, tmp_path)
    settings = yaml.safe_load(Path(plan).read_text())
    Path(plan).write_text(yaml.safe_dump({**settings, "stages": settings["stages"][:stages]}))
    named = {"file": str(canary), "icon": f"file://{canary}", "path": str(canary), "chat_template": str(canary)}
    for kind in ("sft", "preference", "policy"):
        rows = [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        rows[0] |= named
        if "prompt" in rows[0]:
            rows[0]["prompt"] = str(canary)
        else:
            rows[0]["messages"][0]["content"] = str(canary)
        write_rows(tmp_path / f"{kind}.jsonl", rows)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_OFFLINE")}
    paths = [str(tmp_path / "watch"), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    environment |= {
        **SECRETS,
        "PYTHONPATH": os.pathsep.join(paths),
        "WATCHED": str(tmp_path / "watched.txt"),
        "CANARY": str(canary),
        "HF_HOME": str(tmp_path / "hub"),
    }
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", plan]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    assert not (tmp_path / "watched.txt").exists(), (tmp_path / "watched.txt").read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "run" in path.relative_to(tmp_path).parts]
    assert len(written) > 10 * stages
    for secret in SECRETS.values():
        assert secret not in out.stdout + out.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


def test_audit_hook_reports_opened_files_and_connections(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    code = "import socket, os; open(os.environ['CANARY']).close()\nsocket.create_connection(('192.0.2.1', 80), 1)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "WATCHED": str(tmp_path / "log"), "CANARY": __file__}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert (tmp_path / "log").read_text().startswith(f"opened {__file__}\nsocket.")


# -- untrusted code ---------------------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "code has run")


@pytest.mark.parametrize("what", ["model", "adapter", "checkpoint"])
def test_pickles_run_no_code(what: str, base: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = tmp_path / "hostile"
    if what == "checkpoint":
        path = tmp_path / "step=1.ckpt"
        torch.save({"state_dict": {}, "payload": Payload(mark)}, path)
        with pytest.raises(UserError, match="contains more than tensors and plain values"):
            AtomicCheckpointIO().load_checkpoint(path)
    else:
        if what == "model":
            shutil.copytree(base, folder)
            name = "pytorch_model.bin"
        else:
            module, data = SFTModule(base, lora=LoRA(rank=2)), SFTDataModule(chats(4), batch_size=4)
            trainer(tmp_path / "run", callbacks=[ExportModel()]).fit(module, data)
            shutil.copytree(tmp_path / "run" / "model", folder)
            name = "adapter_model.bin"
        for path in folder.glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": Payload(mark)}, folder / name)
        with pytest.raises((ConfigError, pickle.UnpicklingError)):
            load_for_scoring(str(folder), "CAUSAL_LM")
    assert not mark.exists()
    with open(tmp_path / "plain", "wb") as stream:
        pickle.dump(Payload(mark), stream)
    pickle.loads((tmp_path / "plain").read_bytes())
    assert mark.exists()  # the payload does run when it is unpickled


@pytest.fixture
def custom(base: str, tmp_path: Path) -> Path:
    """A model with custom code, which creates a file when it runs."""
    folder = tmp_path / "custom"
    shutil.copytree(base, folder)
    mark = tmp_path / "ran"
    (folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).write_text('x')\n"
        "from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM\n"
        "class MyConfig(Qwen3Config):\n    model_type = 'mine'\n"
        "class MyModel(Qwen3ForCausalLM):\n    config_class = MyConfig\n"
        "class MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_custom_model_code_runs_only_with_trust_remote_code(
    custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a prompt of transformers must not be enough
    with pytest.raises(ConfigError, match=r"model_options: \{trust_remote_code: true\}"):
        Start(str(custom)).load()
    with pytest.raises(ConfigError, match="trust_remote_code"):
        has_head(str(custom))
    settings = json.loads((custom / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "mine.MyTokenizer"]}
    settings["tokenizer_class"] = "MyTokenizer"
    (custom / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_tokenizer(str(custom))
    assert not mark.exists()
    module = SFTModule(str(custom), model_options={"trust_remote_code": True})
    module.configure_model()
    assert type(module.model).__name__ == "MyModel"
    assert mark.exists()


@pytest.mark.parametrize("path", ["payload.S", "model.payload.S", "os.system", "pathlib.Path", "antigravity.S", ""])
@pytest.mark.parametrize("compiled", [False, True])
def test_model_folder_cannot_import_a_scorer_class(
    path: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the folder, its parent, nor installed libraries: no name is looked up."""
    folder = tmp_path / "model"
    folder.mkdir()
    mark = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('x')\nfrom rlhf_lightning.models.scorers import *\n"
    for place in (folder, tmp_path):
        (place / "payload.py").write_text(f"{code}class S(RewardHead): pass\n")
        if compiled:
            py_compile.compile(str(place / "payload.py"), str(place / "payload.pyc"))
            (place / "payload.py").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (folder / "stage.json").write_text(json.dumps({"scorer": {"name": path, "init_args": {}}}))
    with pytest.raises(ConfigError, match=r"A folder may not cause an import"):
        scorer_of(folder)
    assert not mark.exists()
    assert not {"payload", "model", "antigravity"} & (set(sys.modules) - before)


def test_imported_scorer_class_is_found_by_name(tmp_path: Path) -> None:
    class Mine(RewardHead):
        """A user's scorer."""

    settings = Mine().settings()
    assert settings["name"].endswith("Mine")
    (tmp_path / "stage.json").write_text(json.dumps({"scorer": settings}))
    assert type(scorer_of(tmp_path)) is Mine
    own = RewardHead(last_k=2).settings()
    assert own["name"] == "RewardHead"
    (tmp_path / "stage.json").write_text(json.dumps({"scorer": own}))
    assert type(scorer_of(tmp_path)) is RewardHead
    for bad in ({"name": "RewardHead", "init_args": {"nothing": 1}}, {"name": 3}, [], "RewardHead"):
        (tmp_path / "stage.json").write_text(json.dumps({"scorer": bad}))
        with pytest.raises(ConfigError, match=r"stage\.json of"):
            scorer_of(tmp_path)


def test_chat_templates_are_sandboxed(tokenizer: Any) -> None:
    from jinja2.exceptions import SecurityError

    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[0]}], tokenize=False)


def test_exports_contain_only_safetensors(base: str, tmp_path: Path) -> None:
    for name, lora in (("full", None), ("lora", LoRA(rank=2))):
        module = SFTModule(base, lora=lora)
        trainer(tmp_path / name, callbacks=[ExportModel()]).fit(module, SFTDataModule(chats(4), batch_size=4))
        names = {path.suffix for path in (tmp_path / name / "model").rglob("*") if path.is_file()}
        assert ".safetensors" in names
        assert not names & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def test_reference_named_in_a_folder_is_not_downloaded(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as hub

    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "get_hf_file_metadata", asked)
    settings = {"name": "ImplicitReward", "init_args": {"reference": "owner/name"}}
    (tmp_path / "stage.json").write_text(json.dumps({"scorer": settings}))
    with pytest.raises(ConfigError, match=r"A folder may not cause a download.*hf download owner/name"):
        scorer_of(tmp_path)
    place = tmp_path / "cache" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    shutil.copytree(base, place / "snapshots" / ("a" * 40))
    assert scorer_of(tmp_path).reference == str(place / "snapshots" / ("a" * 40))  # type: ignore[attr-defined]
