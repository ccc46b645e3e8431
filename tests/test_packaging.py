"""The wheel: its contents, its metadata, and that it works without the repository."""

import email
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from rlhf_lightning import __version__
from rlhf_lightning.cli.refusals import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_defined_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", __version__)
    files = [path for path in (ROOT / "rlhf_lightning").rglob("*.py") if f'"{__version__}"' in path.read_text()]
    assert files == [ROOT / "rlhf_lightning" / "__init__.py"]


def test_documented_extras_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"dev", "benchmark", "cuda", "vllm", "tensorboard", "wandb", "docs"} <= extras.keys()
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    # What a page or a message tells to install is an extra.
    assert {*re.findall(r"rlhf-lightning\[([\w-]+)\]", pages), *EXTRAS} <= extras.keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that setuptools leaves no build folder in the repository."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "rlhf_lightning", source / "rlhf_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    out = subprocess.run([*build, str(folder), str(source)], capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr
    [found] = folder.glob("*.whl")
    return found


def test_wheel_contains_only_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "rlhf_lightning"
    wanted = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    # The folder of the configs is a link in the repository, and a folder in the wheel.
    wanted |= {f"rlhf_lightning/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"rlhf_lightning/py.typed", "rlhf_lightning/report/style.css", "rlhf_lightning/configs/gsm8k.yaml"} <= names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    facts = email.message_from_string(archive.read(name).decode())
    assert (facts["Name"], facts["Version"], facts["Requires-Python"]) == ("rlhf-lightning", __version__, ">=3.11")
    assert facts["License-Expression"] == "Apache-2.0"
    assert "# rlhf-lightning" in str(facts.get_payload())
    assert set(facts.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


@pytest.mark.slow
def test_installed_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """In a virtual environment with this one's libraries and without the repository."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=100)
    pip = [sys.executable, "-m", "pip", "--python", str(venv), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=100)
    [site] = venv.glob("lib/python*/site-packages")
    # An editable install of the project among them is a .pth file, which a .pth file does not read.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(*args: str) -> str:
        out = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=200, env={"HOME": "/tmp"})
        assert out.returncode == 0, out.stderr
        return out.stdout

    python, rlhf = str(venv / "bin" / "python"), str(venv / "bin" / "rlhf")
    where = run(python, "-c", "import rlhf_lightning; print(rlhf_lightning.__file__)").strip()
    assert Path(where).is_relative_to(venv)
    assert (
        run(rlhf, "--version") == run(python, "-m", "rlhf_lightning", "--version") == f"rlhf-lightning {__version__}\n"
    )
    assert "rlhf quickstart" in run(rlhf, "--help")
    assert "train_on: all_assistant" in run(rlhf, "sft", "fit", "--model.model", "x", "--print_config")
    # What is made of package data, and used: a project's example rows, checked with the quickstart's tokenizer.
    run(rlhf, "init", "mine", "--model", "Qwen/Qwen3-0.6B")
    code = (
        "from rlhf_lightning.quickstart.model import make_tokenizer; from rlhf_lightning.quickstart.run import CONFIGS;"
        "assert len(list(CONFIGS.glob('*.yaml'))) == 3; make_tokenizer(['one two'] * 9).save_pretrained('tokenizer')"
    )
    run(python, "-c", code)
    out = run(rlhf, "data", "check", "mine/data/chats.jsonl", "--kind", "sft", "--model", "tokenizer")
    assert "bad rows: 0" in out
