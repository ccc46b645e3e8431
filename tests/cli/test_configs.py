"""Each recipe in `configs/` is built and run at a small size, with a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli.stage import StageCLI
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.errors import DataError
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.yaml_files import read_mapping
from tests.helpers.cli import KINDS, rlhf
from tests.helpers.models import build_model
from tests.helpers.modules import reward_model
from tests.helpers.rows import chats, labeled, pairs, prompts, write_rows
from tests.helpers.runs import complete

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if "stages" not in read_mapping(path))
PIPELINES = sorted(path for path in CONFIGS.glob("*.yaml") if "stages" in read_mapping(path))
# One config for each stage, objective and kind of rows; the others run in `make test-slow`.
SAMPLE = {"sft", "reward_model", "dpo", "kto", "grpo", "ppo", "gsm8k", "distill", "mint_rl"}
FULL = sorted((CONFIGS / "full").glob("*.yaml"))
# Only sizes are reduced; losses, rewards and KL of a recipe are unchanged.
SMALL = {"max_tokens": 6, "prompts_per_round": 4, "group_size": 2, "max_steps": 2, "max_epochs": 1, "batch_size": 4}


def test_standard_pipelines_are_included() -> None:
    names = {path.name for path in [*RECIPES, *PIPELINES]}
    assert {"mint.yaml", "mint_simple.yaml", "local.yaml", "pipeline.yaml", "qwen3_full.yaml"} <= names
    assert {"sft.yaml", "reward_model.yaml", "dpo.yaml", "kto.yaml", "policy.yaml"} <= names
    assert {"ppo.yaml", "grpo.yaml", "gsm8k.yaml"} <= names
    assert {path.name for path in FULL} == {"sft.yaml", "reward_model.yaml", "dpo.yaml", "policy.yaml"}


def kind_of(path: Path) -> str:
    return KINDS[path.stem.rpartition("_")[2]]


@pytest.fixture(scope="module")
def judge(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return reward_model(base, tmp_path_factory.mktemp("judge"), 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> str:
    folder = tmp_path_factory.mktemp("base")
    build_model(session_tokenizer, max_position_embeddings=4096).save_pretrained(folder)
    session_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    questions = [{"question": row["prompt"], "answer": f"It is {i}.\n#### {i}"} for i, row in enumerate(prompts(8))]
    rows = {"chats": chats(24), "pairs": pairs(24), "prompts": prompts(8), "labels": labeled(24), "gsm8k": questions}
    return {name: write_rows(tmp_path / f"{name}.jsonl", made) for name, made in rows.items()}


def small(value: Any, base: str, judge: str, data: dict[str, str], key: str = "") -> Any:
    """A config with local files instead of Hub ids and earlier runs, and with small sizes."""
    if isinstance(value, dict):
        return {name: small(inner, base, judge, data, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [small(inner, base, judge, data, key) for inner in value]
    if key in ("model", "teacher") and isinstance(value, str):
        return judge if value == "runs/preference/model" else base
    if key in ("train", "validation"):
        return data["gsm8k" if value.startswith("openai/gsm8k") else Path(value).stem]
    return min(value, SMALL[key]) if key in SMALL else value


def run_small(kind: str, files: list[Path], base: str, judge: str, data: dict[str, str], tmp_path: Path) -> Path:
    """Run a recipe with its overlays, each file reduced in size separately; returns the folder of the run."""
    root = tmp_path / "run"
    args = [kind, "fit"]
    for number, file in enumerate(files):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(small(read_mapping(file), base, judge, data)))
        args += ["-c", str(path)]
    if kind == "policy" and not {"rewards", "distillation"} & read_mapping(files[0])["model"].keys():
        # A pipeline passes this to a stage with `reward`.
        reward = {"class_path": "rlhf_lightning.rewards.ModelReward", "init_args": {"model": judge}}
        args += ["--model.rewards", json.dumps([reward])]
    complete([*args, "--trainer.default_root_dir", str(root)], tmp_path / "out.txt")
    assert json.loads((root / "stage.json").read_text())["steps"] > 0
    return root


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem in SAMPLE else pytest.mark.slow) for p in RECIPES],
)
def test_every_recipe_runs(path: Path, base: str, judge: str, data: dict[str, str], tmp_path: Path) -> None:
    root = run_small(kind_of(path), [path, CONFIGS / "overlays" / "cpu.yaml"], base, judge, data, tmp_path)
    adapted = "lora" in read_mapping(path)["model"]
    assert (root / "model" / "adapter_config.json").exists() == adapted
    if path.stem == "gsm8k":
        header = (root / "metrics.csv").read_text().splitlines()[0]
        assert "train/reward_ExactAnswer" in header
        assert "val/reward_greedy" in header


@pytest.mark.parametrize("over", FULL, ids=lambda path: path.stem)
def test_every_recipe_trains_all_weights(
    over: Path, base: str, judge: str, data: dict[str, str], tmp_path: Path
) -> None:
    recipe = CONFIGS / over.name
    root = run_small(kind_of(over), [recipe, over, CONFIGS / "overlays" / "cpu.yaml"], base, judge, data, tmp_path)
    assert not (root / "model" / "adapter_config.json").exists()
    config = read_mapping(root / "config.yaml")
    assert (
        config["model"]["optimizer"]["init_args"]["lr"] == read_mapping(over)["model"]["optimizer"]["init_args"]["lr"]
    )
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert config["model"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("overlay", sorted((CONFIGS / "overlays").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["sft", "reward_model", "policy"])
def test_overlays_are_merged_over_recipes(overlay: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        StageCLI(
            KINDS[recipe.rpartition("_")[2]],
            ["fit", "-c", str(CONFIGS / f"{recipe}.yaml"), "-c", str(overlay), "--print_config"],
        )
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    over, under = read_mapping(overlay)["trainer"], read_mapping(CONFIGS / f"{recipe}.yaml")["trainer"]
    assert {key: printed[key] for key in {**under, **over}} == {**under, **over}


def test_engine_overlay_is_merged_over_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = CONFIGS / "engine" / "vllm_server.yaml"
    with pytest.raises(SystemExit) as stop:
        StageCLI(KINDS["policy"], ["fit", "-c", str(CONFIGS / "policy.yaml"), "-c", str(overlay), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["sampler"]["init_args"]
    under = read_mapping(CONFIGS / "policy.yaml")["model"]["sampler"]
    assert {key: printed[key] for key in under} == under
    assert printed["engine"]["init_args"]["url"] == ["http://127.0.0.1:8000"]


def test_pipeline_takes_lists_and_overlays_of_configs() -> None:
    plan = read_plan(CONFIGS / "qwen3_full.yaml", overlays=[CONFIGS / "overlays" / "cpu.yaml"])
    assert [stage.settings["model"]["lora"] for stage in plan.stages] == [None] * 3
    assert [stage.settings["model"]["optimizer"]["init_args"]["lr"] for stage in plan.stages] == [1e-5, 1e-5, 1e-6]
    assert [stage.settings["trainer"]["precision"] for stage in plan.stages] == ["auto"] * 3
    assert {stage.settings["trainer"]["accelerator"] for stage in plan.stages} == {"cpu"}
    assert plan.stages[0].settings["model"]["model"] == "Qwen/Qwen3-0.6B"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("forked_stages")
@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_runs(path: Path, base: str, judge: str, data: dict[str, str], tmp_path: Path) -> None:
    for file in [*CONFIGS.glob("*.yaml"), *FULL]:
        settings = read_mapping(file)
        copy = tmp_path / file.relative_to(CONFIGS)
        copy.parent.mkdir(exist_ok=True)
        # A pipeline names stages and files, but no model.
        copy.write_text(yaml.safe_dump(settings if "stages" in settings else small(settings, base, judge, data)))
    plan = read_plan(tmp_path / path.name, tmp_path / "run", [CONFIGS / "overlays" / "cpu.yaml"])
    manifest = run_pipeline(plan)
    assert [stage["status"] for stage in manifest["stages"].values()] == ["finished"] * len(plan.stages)
    metrics = (tmp_path / "run" / plan.stages[-1].name / "metrics.csv").read_text().splitlines()
    assert dict(zip(metrics[0].split(","), metrics[1].split(","), strict=True))["reward_source_prm"] == "1.0"


def keys(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Every key of a YAML file with its line number, from 0."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key.value, key.start_mark.line
            yield from keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys(item)


def test_every_key_has_a_comment() -> None:
    """The comment is on the line of the key or on the line before, in at least one of the files."""
    found: dict[str, bool] = {}
    for path in [*RECIPES, *PIPELINES, *FULL, *CONFIGS.glob("overlays/*.yaml"), *CONFIGS.glob("engine/*.yaml")]:
        lines = path.read_text().splitlines()
        for key, line in keys(yaml.compose(path.read_text())):
            told = "#" in lines[line] or lines[line - 1].lstrip().startswith("#")
            found[key] = found.get(key, False) or told
    assert [key for key, told in found.items() if not told] == []


# -- the data of gsm8k.yaml -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k:main/train", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main/", ("openai/gsm8k", "main", "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]")),
        ("owner/name", ("owner/name", None, "train")),
    ],
)
def test_configuration_of_a_hub_dataset(source: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        assert (name, configuration, split) == asked
        return [{"question": "q"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [row.data for row in read_rows(source)] == [{"question": "q"}]


def test_missing_configuration_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match=r"'socratic'\]\); write a configuration .* owner/name:configuration/split"):
        read_rows("openai/gsm8k")


def test_gsm8k_verifier_on_real_rows(shared: Path) -> None:
    """It accepts every solution of the dataset, and no solution for another row's answer."""
    from rlhf_lightning.rewards import ExactAnswer
    from rlhf_lightning.types import Episode

    [given] = read_mapping(CONFIGS / "gsm8k.yaml")["model"]["rewards"]
    reward = ExactAnswer(**given["init_args"])
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k_test_400.jsonl").read_text().splitlines()]
    solutions = [row["messages"][-1]["content"] for row in rows]
    answers = [row["answer"] for row in rows]

    def scores(texts: list[str], wanted: list[str]) -> list[float | None]:
        said = [[{"role": "assistant", "content": text}] for text in texts]
        made = [Episode([], {"answer": a}, i, responses=r) for i, (r, a) in enumerate(zip(said, wanted, strict=True))]
        return list(reward.score(made))

    assert scores(solutions, solutions) == [1.0] * len(rows)
    worded = [f"So they need ${answer} in all. That is \\boxed{{{answer}}}." for answer in answers]
    assert scores(worded, solutions) == [1.0] * len(rows)
    turned = scores(solutions, solutions[1:] + solutions[:1])
    same = [float(a == b) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert turned == same


# -- the configs in the package ---------------------------------------------------------------------------------------


def test_configs_are_listed_with_a_description() -> None:
    said = rlhf("configs")
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        [line] = [line for line in said.splitlines() if line.split()[0] == name]
        assert len(line.split()) > 2


def test_config_is_found_by_name_from_any_folder(tmp_path: Path) -> None:
    for given in (["-c", "rlhf:gsm8k"], ["--config=rlhf:gsm8k.yaml", "-c", "rlhf:overlays/cpu"]):
        shown = yaml.safe_load(rlhf("policy", "fit", *given, "--print_config", cwd=tmp_path))
        assert shown["model"]["rewards"][0]["class_path"] == "rlhf_lightning.rewards.ExactAnswer"
        assert (shown["trainer"]["accelerator"] == "cpu") == (len(given) == 3)
    assert "did you mean gsm8k" in rlhf("policy", "fit", "-c", "rlhf:gms8k", cwd=tmp_path, code=2)
    # The plan of the pipeline is read; the error is that its data is missing.
    assert "no such file" in rlhf("pipeline", "rlhf:mint", cwd=tmp_path, code=2)


def test_config_is_copied_with_its_stages_without_replacing_files(tmp_path: Path) -> None:
    rlhf("configs", "copy", "mint", str(tmp_path / "here"))
    names = {"mint.yaml", "mint_sft.yaml", "mint_reward_model.yaml", "mint_rl.yaml"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (ROOT / "configs" / name).read_bytes()
    (tmp_path / "here" / "mint.yaml").unlink()
    assert "exists already" in rlhf("configs", "copy", "mint", str(tmp_path / "here"), code=2)
    assert not (tmp_path / "here" / "mint.yaml").exists()
    assert "did you mean mint?" in rlhf("configs", "copy", "mnt", str(tmp_path), code=2)
    assert "rlhf configs copy mint ." in rlhf("configs", "copy", "mint", code=2)
