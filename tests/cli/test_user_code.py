"""From the current folder, only modules that the user named can be imported, and modules that these import."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_lightning.cli.user_code import UserFolder, allow_user_code

ENTRY = "from rlhf_lightning.cli.main import main"
MODULES = ("mine_named", "mine_beside", "mine_other", "mine_package", "mine_namespace", "megatron", "mine_compiled")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.meta_path", [one for one in sys.meta_path if not isinstance(one, UserFolder)])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


def found(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return False
    return True


def test_named_modules_and_their_imports_are_found(folder: Path) -> None:
    (folder / "mine_named.py").write_text("def late():\n    import mine_beside\n    return mine_beside\n")
    (folder / "mine_beside.py").write_text("import mine_package.inner\n")
    (folder / "mine_other.py").write_text("")
    (folder / "mine_package").mkdir()
    (folder / "mine_package" / "inner.py").write_text("VALUE = 3\n")
    allow_user_code(["policy", "fit", "--model.rewards.function=mine_named.late"])
    assert not found("mine_other")
    assert not found("mine_beside")
    assert found("mine_named")
    assert sys.modules["mine_named"].late().__name__ == "mine_beside"
    assert sys.modules["mine_package.inner"].VALUE == 3
    assert not found("mine_other")


def test_names_are_read_from_configs_and_files_named_there(folder: Path) -> None:
    for name in MODULES[:4]:
        (folder / f"{name}.py").write_text("")
    (folder / "configs").mkdir()
    (folder / "configs" / "a.yaml").write_text("model: {environment: mine_named.Env}\ndata: b.yaml\n")
    (folder / "configs" / "b.yaml").write_text("train: rows.jsonl\ncallbacks: [{class_path: mine_package.C}]\n")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "mine_other.f"}))
    allow_user_code(["policy", "fit", "-c", "configs/a.yaml", "--data.train", "rows.jsonl"])
    assert [found(name) for name in ("mine_named", "mine_package", "mine_other")] == [True, True, False]


def test_model_folder_is_not_imported_as_a_package(folder: Path) -> None:
    """For example with a downloaded adapter whose config makes peft import `megatron`."""
    (folder / "megatron").mkdir()
    (folder / "megatron" / "__init__.py").write_text("raise SystemExit('code of the model has run')")
    allow_user_code(["sft", "fit", "--model.model", "megatron"])
    assert not found("megatron")


# With `-m`, Python itself adds the current folder; `-P` is the `rlhf` script, where only the command could.
@pytest.mark.parametrize(
    "start",
    [["-m", "rlhf_lightning"], pytest.param(["-P", "-c", f"{ENTRY}; main()"], marks=pytest.mark.slow)],
    ids=["-m", "script"],
)
def test_command_does_not_import_from_the_current_folder(start: list[str], tmp_path: Path) -> None:
    """Modules in the folder have the names of libraries that may or may not be installed."""
    code = "import pathlib\npathlib.Path('ran').write_text(__name__)\n"
    for name in ("bitsandbytes", "flash_attn", "kernels", "megatron", "tensorflow", "jax", "apex", "deepspeed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    for name in ("math", "json", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text(code)
    command = [sys.executable, *start, "sft", "fit", "--model.model", "nowhere/at/all", "--data.train", "rows.jsonl"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 2, out.stderr
    assert not (tmp_path / "ran").exists()
