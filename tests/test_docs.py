"""The pages: their commands and examples run, and every name, flag, setting and link in them exists."""

import dataclasses
import importlib
import json
import os
import re
import shutil
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli.main import COMMANDS, main
from rlhf_lightning.cli.stage import CLASSES, StageCLI
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.quickstart.model import make_tokenizer
from tests.helpers.docs import (
    HUB_IDS,
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    defined_names,
    prose,
    quoted,
    run_commands,
    setting_exists,
    tables,
    words,
)
from tests.helpers.models import TEXTS, build_model
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.runs import complete

DOCS = ROOT / "docs"
# What stands on the left of their tables belongs to others.
FOREIGN = ("from-trl.md", "from-tinker.md", "from-config.md", "tinker.md")


def parts_of(language: str, *, slow: bool = False) -> list[Any]:
    """Test parameters: the blocks of a language that are run."""
    found = [block for page in PAGES for block in blocks(page) if block.language == language]
    for block in found:
        assert re.fullmatch(r"|slow|skip .{8,}|file: \S+", block.mark), f"{block}: {block.mark!r} says nothing"
    runs = [block for block in found if block.mark in ("", "slow")]
    marks = {"slow": [pytest.mark.slow], "": []}
    return [pytest.param(block, marks=marks[block.mark], id=str(block)) for block in runs]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that replaces any Hub id."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    tokenizer = make_tokenizer(TEXTS * 5)
    build_model(tokenizer, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ready(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a reader's after the three stages: rows of each kind, configs, examples, runs."""
    folder = tmp_path_factory.mktemp("reader")
    labels = [{"prompt": f"Count {i}", "response": "one two", "label": i % 2} for i in range(8)]
    for place in (folder, folder / "data"):
        place.mkdir(exist_ok=True)
        for name, rows in {"chats": chats(12), "pairs": pairs(12), "prompts": prompts(4), "labels": labels}.items():
            write_rows(place / f"{name}.jsonl", rows)
    write_rows(folder / "held_out.jsonl", chats(3))
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for path in [*(ROOT / "configs").glob("*.yaml")]:
        shutil.copy(path, folder)
    shutil.copy(ROOT / "rlhf_lightning" / "cli" / "project" / "preference.yaml", folder)
    reward = {"class_path": "rlhf_lightning.rewards.LengthReward", "init_args": {"target": 4}}
    model: dict[str, Any] = {"model": tiny, "rewards": [reward], "sampler": {"max_tokens": 4}}
    (folder / "my.yaml").write_text(yaml.safe_dump({"model": model, "data": {"train": "prompts.jsonl"}}))
    flags = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    for kind, name in (("sft", "chats"), ("preference", "pairs"), ("policy", "prompts")):
        start = tiny if kind == "sft" else "runs/sft/model"
        args = ["-c", "my.yaml"] if kind == "policy" else []
        given = ["--model.model", start, "--data.train", f"{name}.jsonl", *flags]
        complete([kind, "fit", *args, *given], folder / f"{kind}.log", before=lambda: os.chdir(folder))
    shutil.copytree(folder / "runs" / "policy", folder / "runs" / "quickstart")
    return folder


@pytest.fixture
def place(ready: Path, tmp_path: Path) -> Path:
    """A copy of that folder for one block."""
    return Path(shutil.copytree(ready, tmp_path / "reader", symlinks=True))


@pytest.fixture
def earlier(request: pytest.FixtureRequest, place: Path, tiny: str, tmp_path: Path) -> list[str]:
    """If a page creates a project, its later blocks run in that project."""
    block: Block = request.getfixturevalue("block")
    before = [one for one in blocks(block.page) if one.language == "bash" and one.line < block.line]
    return [line for one in before if not one.mark for line in commands(one) if line.startswith(("rlhf init", "cd "))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", parts_of("bash"))
def test_commands_run(block: Block, earlier: list[str], place: Path, tiny: str, tmp_path: Path) -> None:
    run_commands([*earlier, *commands(block)], place, tiny, tmp_path / "output")


@pytest.mark.parametrize("block", parts_of("python"))
def test_python_runs(block: Block, place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    code = block.text
    for name in HUB_IDS:
        code = code.replace(name, tiny)
    exec(compile(code, str(block), "exec"), {"__name__": "block"})


def test_blocks_from_files_equal_the_files() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.mark.startswith("file: ")]
    assert found
    for block in found:
        path = ROOT / block.mark.removeprefix("file: ")
        assert f"\n{block.text}\n" in f"\n{path.read_text()}", f"{block} is not what {path.name} says"


@pytest.mark.parametrize("block", parts_of("yaml"))
def test_yaml_is_accepted(
    block: Block, place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    (place / "mytools.py").write_text(_block_with("mytools.py"))
    (place / "page.yaml").write_text(block.text)
    if "stages" in yaml.safe_load(block.text):
        assert read_plan(place / "page.yaml").stages
        return
    said = []
    for kind in CLASSES:
        try:
            StageCLI(kind, ["fit", "-c", "page.yaml", "--model.model", tiny, "--print_config"])
        except SystemExit as stop:
            if stop.code == 0:
                return
        except ConfigError as error:  # keys of another kind of stage
            said.append(str(error))
        said.append(capsys.readouterr().err[-600:])
    raise AssertionError(f"{block}: no stage takes it\n" + "\n".join(said))


def _block_with(text: str) -> str:
    return next(b.text for page in PAGES for b in blocks(page) if b.language == "python" and text in b.text)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def flags() -> set[str]:
    """Every flag that a command's help shows."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        for name in COMMANDS:
            inner = {
                "data": (["check"],),
                "filter": (["apply"], ["evaluate"]),
                "evaluate": ([], ["--task", "gsm8k"]),
            }.get(name, ([],))
            for more in (["fit"], ["predict"]) if name in CLASSES else inner:
                with contextlib.suppress(SystemExit):
                    main([name, *more, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", text.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page: Path, flags: set[str]) -> None:
    lines = [line for block in blocks(page) if block.language in ("bash", "") for line in commands(block)]
    spoken = [line for line in lines if "rlhf " in line and not line.startswith(("make", "pip"))]
    for text in [*spoken, *own_words(page)]:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text):
            known = flag in flags or ("." in flag and setting_exists(flag.removeprefix("--")))
            assert known or text.startswith(("make", "pip")), f"{page.name}: {flag} is no flag ({text})"


def own_words(page: Path) -> list[str]:
    """Texts between backticks that refer to this project; on some pages the left column of tables does not."""
    text = prose(page)
    if page.name in FOREIGN:
        text = re.sub(r"^\|.*? \| ", "", text, flags=re.MULTILINE)
    return quoted(text)


def foreign(word: str, page: Path) -> bool:
    """On the pages for users of other tools: whether the word is on the left side of a table."""
    rows = [row for rows in tables(page).values() for row in rows] if page.name in FOREIGN else []
    return any(word in re.findall(r"\w+", row[0]) for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_exists(page: Path) -> None:
    for word in own_words(page):
        found = re.fullmatch(r"((?:model|data|trainer|kl|sampler|limits|critic|lora)\.[a-z_.]+[a-z_])(?::? .*)?", word)
        if found is None or found[1].endswith((".py", ".yaml", ".jsonl", ".md", ".safetensors")):
            continue
        name = found[1] if found[1].startswith(("model.", "data.", "trainer.")) else f"model.{found[1]}"
        assert setting_exists(name), f"{page.name}: {word}"


def test_unknown_settings_are_detected() -> None:
    for name in ("model.kl.coefficient", "model.optimizer.init_args.lr", "model.scorer.init_args.beta", "data.columns"):
        assert setting_exists(name), name
    for name in ("model.kl.coeficient", "model.optimizer.init_args.rate", "data.chats", "trainer.epochs"):
        assert not setting_exists(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_can_be_imported(page: Path) -> None:
    for path in re.findall(r"\brlhf_lightning(?:\.\w+)+", page.read_text()):
        found: Any = import_module("rlhf_lightning")
        for i, name in enumerate(path.split(".")[1:], 2):
            if not hasattr(found, name):
                import_module(".".join(path.split(".")[:i]))  # raises where there is none
            found = getattr(found, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_exists(page: Path) -> None:
    for path, name in re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", page.read_text()):
        if path == "mytools.py":
            continue
        found = [
            place / path for place in (ROOT, ROOT / "rlhf_lightning", ROOT / "examples") if (place / path).exists()
        ]
        assert found, f"{page.name}: {path}"
        for part in name.split(".") if name else ():
            assert re.search(rf"(def|class) {part}\b", found[0].read_text()), f"{page.name}: {path}: {name}"


LIBRARIES = [
    "builtins",
    "lightning.pytorch",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
    "lightning.pytorch.loggers",
    "lightning.fabric.plugins",
    "transformers",
    "torch",
    "torch.utils.data",
    "torchmetrics",
    "peft",
    "datasets",
    "pathlib",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_class_and_name_exists(page: Path) -> None:
    """A word in backticks is a class or function of ours or of the libraries, or occurs in the sources."""
    classes, known = defined_names(), words()
    for word in own_words(page):
        if name := re.fullmatch(r"([A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*)(\(.*\))?", word):
            ours = name[1] in classes or foreign(name[1], page)
            theirs = any(hasattr(importlib.import_module(library), name[1]) for library in LIBRARIES)
            assert ours or theirs, f"{page.name}: there is no {name[1]}"
        elif re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", word):
            assert word in known or foreign(word, page), f"{page.name}: {word} stands nowhere in the sources"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"], ids=lambda p: p.name
)
def test_every_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


def test_index_and_site_list_every_page() -> None:
    index, site = (DOCS / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index or f"- {name}\n" not in site} == set()


# -- coming from elsewhere --------------------------------------------------------------------------------------------

TRL_CONFIGS = ("SFTConfig", "RewardConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RLOOConfig", "DistillationConfig")


@pytest.mark.parametrize("config", TRL_CONFIGS)
def test_page_lists_exactly_the_options_of_trl(config: str) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra: benchmark)")
    from transformers import TrainingArguments

    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(getattr(trl, config))}
    under = tables(DOCS / "from-trl.md")
    shared = {name for row in under["Options of all configs"] for name in quoted(row[0])}
    own = {name for row in under[config] for name in quoted(row[0])} - {"reward_funcs"}
    if config in ("RLOOConfig", "DistillationConfig"):
        shared |= {name for row in under["GRPOConfig"] for name in quoted(row[0])}
    # A deprecated alias needs no row.
    wanted = fields - general - {"vllm_importance_sampling_cap"}
    assert {name for name in wanted if not any(fnmatch(name, known) for known in own | shared)} == set()
    assert {name for name in own if not any(fnmatch(field, name) for field in fields)} == set()


def test_shared_options_are_options_of_trl() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra: benchmark)")
    fields = {field.name for config in TRL_CONFIGS for field in dataclasses.fields(getattr(trl, config))}
    under = tables(DOCS / "from-trl.md")
    for heading in ("Options of all configs", "Training arguments"):
        for row in under[heading]:
            assert {name for name in quoted(row[0]) if name not in fields} == set(), heading


def test_losses_of_trl_are_mapped_to_existing_classes() -> None:
    """The page's entry for `loss_type` names every value that TRL's help names."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra: benchmark)")
    under = tables(DOCS / "from-trl.md")
    for config, values in {
        "DPOConfig": r"'(\w+)'",
        "GRPOConfig": r"- `\"(\w+)\"`",
        "KTOConfig": r"- `\"(\w+)\"`",
    }.items():
        text = (
            (getattr(trl, config).__doc__ or "")
            .split("loss_type (")[1]
            .split("\n        mask_")[0]
            .split("If multiple")[0]
        )
        text = text.split("\n        beta")[0].split("\n        loss_weights")[0]
        row = next(row for row in under[config] if "`loss_type`" in row[0])
        assert set(re.findall(values, text)) - set(quoted(row[1])) == set(), config


def test_page_lists_the_fields_of_pipeline_files() -> None:
    """`from-config.md` names the file of each field, and each setting is in its file."""
    place = None
    for row in tables(DOCS / "from-config.md")["Coming from an RLHFConfig-style pipeline"]:
        if len(row) < 3 or not row[0].startswith("`"):
            continue
        named = [path for path in quoted(row[2]) if path.startswith("configs/local_")]
        place = ROOT / named[0] if named else place
        if place is None or not named:
            continue
        settings = json.dumps(yaml.safe_load(place.read_text()))
        for name in [word for word in quoted(row[1]) if word.startswith(("model.", "data.", "trainer."))][:1]:
            assert f'"{name.rpartition(".")[2]}"' in settings, f"{place.name}: {name}"
