"""Commands of stages and pipelines: every config, resume, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main as entry
from rlhf_lightning.cli.stage import StageCLI
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.pipeline.plan import merged, nested, read_plan
from rlhf_lightning.pipeline.run import run_pipeline
from tests.helpers.cli import KINDS, rlhf, stage_config, write_yaml
from tests.helpers.rows import prompts, write_rows

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "rlhf_lightning" / "quickstart" / "configs").glob("*.yaml")]
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_every_config_is_parsed_and_built(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = KINDS.get(path.stem.rpartition("_")[2])
    if kind is None:
        plan = read_plan(path)
        assert [stage.kind for stage in plan.stages][-2:] == ["preference", "policy"]
        return
    with pytest.raises(SystemExit) as stop:
        StageCLI(kind, ["fit", "-c", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for section, values in yaml.safe_load(path.read_text()).items():
        for key in values if isinstance(values, dict) else ():
            assert key in printed[section], f"{section}.{key} is not known"


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_config_in_front_of_the_command_has_a_section_for_each(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser of a command alone would refuse the sections of the others."""
    sections = {name: {"model": {"model": name}, "keep": 7} for name in ("fit", "validate")}
    with pytest.raises(SystemExit) as stop:
        StageCLI("sft", ["-c", write_yaml(tmp_path / "c.yaml", sections), command, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["model"], printed["keep"]) == (command, 7)


# -- a stage ----------------------------------------------------------------------------------------------------------


def test_stage_is_skipped_refused_restarted_and_predicts(base: str, tmp_path: Path) -> None:
    """A stage runs, is skipped when it runs again, is refused with other settings, starts over, and predicts."""
    config = write_yaml(tmp_path / "sft.yaml", stage_config("sft", base, tmp_path))
    args = ["sft", "fit", "-c", config, "--trainer.default_root_dir", str(tmp_path / "run")]
    out = rlhf(*args)
    assert "12 rows read" in out
    assert "step 3/3" in out
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "model",
        "stage.json",
        "logs",
    }
    assert "12 rows read" in (run / "logs" / "run.log").read_text()
    facts = json.loads((run / "stage.json").read_text())
    assert facts["kind"] == "sft"
    assert facts["steps"] == 3
    assert len(facts["data"]["train"]) == 64

    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert "already finished" in rlhf(*args)
    assert "other settings (model.optimizer.init_args.lr)" in rlhf(
        *args, "--model.optimizer.init_args.lr", "0.5", code=2
    )
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    rlhf(*args, "--model.optimizer.init_args.lr", "0.5", "--fresh")
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns != before

    asked = tmp_path / "policy.jsonl"
    predict = ["sft", "predict", "-c", config, "--model.model", str(run / "model"), "--data.predict", str(asked)]
    predict += ["--model.sampler.max_tokens", "4", "--trainer.default_root_dir", str(run)]
    rlhf(*predict, code=2)
    write_rows(asked, prompts(3))
    rlhf(*predict)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert (run / "metrics.csv").exists()


def test_finished_stage_continues_with_more_steps(base: str, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "sft.yaml", stage_config("sft", base, tmp_path))
    args = ["sft", "fit", "-c", config, "--trainer.default_root_dir", str(tmp_path / "run"), "--checkpoint_every", "1"]
    rlhf(*args)
    assert "step 6/6" in rlhf(*args, "--trainer.max_epochs", "2")
    assert json.loads((tmp_path / "run" / "stage.json").read_text())["steps"] == 6


ENVIRONMENT = """
from rlhf_lightning.environments.base import StepResult


class Twice:
    def __init__(self, row, reward):
        self.row, self.reward, self.turn = row, reward, 0

    def reset(self):
        return [{"role": "user", "content": self.row["prompt"]}]

    def step(self, message):
        self.turn += 1
        return StepResult(self.reward, self.turn == 2, [{"role": "user", "content": "Again"}])
"""


def test_environment_named_in_a_config(base: str, tmp_path: Path) -> None:
    settings = stage_config("policy", base, tmp_path)
    settings["model"] |= {"environment": "my_environment.Twice", "environment_args": {"reward": 0.5}}
    settings["trainer"]["max_steps"] = 1
    (tmp_path / "my_environment.py").write_text(ENVIRONMENT)
    config = write_yaml(tmp_path / "c.yaml", settings)
    rlhf("policy", "fit", "-c", config, "--trainer.default_root_dir", str(tmp_path / "run"), cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in rows} <= {0.5, 1.0}


def test_same_command_resumes_an_interrupted_stage(base: str, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "c.yaml", stage_config("policy", base, tmp_path))
    rule = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
    reward = json.dumps([{**rule, "init_args": {"keywords": ["a", "e"], "min_words": 1}}])
    args = [
        "policy",
        "fit",
        "-c",
        config,
        "--model.rewards",
        reward,
        "--checkpoint_every",
        "1",
        "--trainer.max_epochs",
        "2",
    ]
    rlhf(*args, "--trainer.default_root_dir", str(tmp_path / "whole"))
    # A run that was stopped after 2 of its 6 steps leaves a checkpoint and no stage.json.
    stopped = tmp_path / "stopped"
    rlhf(*args, "--trainer.default_root_dir", str(stopped), "--trainer.max_steps", "2")
    (stopped / "stage.json").unlink()
    out = rlhf(*args, "--trainer.default_root_dir", str(stopped))
    assert "resuming" in out
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "stopped")]
    assert samples[0] == samples[1]
    curves = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "stopped")]
    assert len(curves[0]) == len(curves[1]) == 7


# -- the pipeline -----------------------------------------------------------------------------------------------------


def pipeline_of(base: str, tmp_path: Path, **preference: Any) -> dict[str, Any]:
    for kind in ("sft", "preference", "policy"):
        write_yaml(tmp_path / f"{kind}.yaml", stage_config(kind, base, tmp_path))
    stages = [
        {"kind": "sft", "config": str(tmp_path / "sft.yaml")},
        {"kind": "preference", "config": str(tmp_path / "preference.yaml"), "start": "sft", **preference},
        {
            "kind": "policy",
            "config": str(tmp_path / "policy.yaml"),
            "start": "sft",
            "reward": "preference",
            "overrides": {"model.kl": {"coefficient": 0.1}},
        },
    ]
    return {"name": "test", "seed": 3, "root": str(tmp_path / "run"), "stages": stages}


@pytest.mark.usefixtures("forked_stages")
@pytest.mark.parametrize("lora", [None, pytest.param({"rank": 2, "target": ["all"]}, marks=pytest.mark.slow)])
def test_pipeline_passes_models_to_later_stages(
    base: str, tmp_path: Path, lora: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = pipeline_of(base, tmp_path)
    for stage in plan["stages"] if lora else []:
        stage["overrides"] = {**stage.get("overrides", {}), "model.lora": lora}
    manifest = run_pipeline(plan)
    assert [entry["status"] for entry in manifest["stages"].values()] == ["finished"] * 3
    run = tmp_path / "run"
    facts = {name: json.loads((run / name / "stage.json").read_text()) for name in ("sft", "preference", "policy")}
    assert facts["policy"]["parent"] == {"stage": "sft", "hash": facts["sft"]["model_hash"]}
    assert facts["policy"]["seed"] == 3
    metrics = (run / "policy" / "metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), metrics[1].split(","), strict=True))
    assert float(row["reward_source_prm"]) == 1.0
    assert abs(float(row["train/kl"])) < 1e-4
    assert (run / "logs" / "run.log").read_text().count("model folder") == 3
    if lora:
        assert "continuing the adapter" in (run / "logs" / "run.log").read_text()
        assert (run / "preference" / "merged" / "config.json").exists()

    capfd.readouterr()
    run_pipeline(plan)
    assert capfd.readouterr().out.count("already finished") == 3
    # A moved run still loads: adapters find their base relative to the folder.
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    if lora:
        from rlhf_lightning.models.loading import Start

        Start(str(moved / "preference" / "model"), "SEQ_CLS").load(tmp_path / "scratch")
        return
    plan["root"] = str(moved)
    plan["stages"][1]["overrides"] = {"trainer.max_epochs": 2}
    with pytest.raises(ConfigError, match=r"the inputs of stage preference have changed since it ran: settings"):
        run_pipeline(plan)
    run_pipeline(plan, rerun=["preference"])
    assert "already finished" in capfd.readouterr().out


@pytest.mark.usefixtures("forked_stages")
def test_rule_reward_replaces_a_failed_preference_stage(
    base: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = pipeline_of(base, tmp_path, overrides={"data.train": str(tmp_path / "missing.jsonl")})
    with pytest.raises(UserError, match="stage preference failed"):
        run_pipeline(plan)
    assert "missing.jsonl: no such file" in capfd.readouterr().err
    assert "missing.jsonl: no such file" in (tmp_path / "run" / "logs" / "run.log").read_text()
    rule = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
    plan["stages"][1]["on_failure"] = {"rule_reward": rule}
    run_pipeline(plan)
    out = capfd.readouterr().out
    assert "sft: already finished" in out
    assert "continues as set by on_failure, with the rule reward" in out
    metrics = (tmp_path / "run" / "policy" / "metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), metrics[1].split(","), strict=True))
    assert float(row["reward_source_prm"]) == 0.0
    assert "reward_KeywordReward" in metrics[0]


def test_pipelines_may_omit_or_repeat_kinds_of_stages(base: str, tmp_path: Path) -> None:
    write_yaml(tmp_path / "sft.yaml", stage_config("sft", base, tmp_path))
    stages = [
        {"kind": "sft", "name": "one", "config": "sft.yaml"},
        {
            "kind": "sft",
            "name": "two",
            "config": "sft.yaml",
            "start": "one",
            "overrides": {"trainer": {"max_epochs": 2}},
        },
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"stages": stages}))
    plan = read_plan(path)
    assert plan.name == "plan"
    assert plan.stages[1].settings["trainer"]["max_epochs"] == 2
    assert plan.descendants("one") == {"one", "two"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "stages must be a list"),
        ({"stages": [], "x": 1}, "unknown key 'x'"),
        ({"stages": [{"kind": "dpo"}]}, "kind is 'dpo'"),
        ({"stages": [{"kind": "sft", "start": "x"}]}, "neither an earlier stage"),
        ({"stages": [{"kind": "sft"}, {"kind": "sft"}]}, "is used twice"),
        ({"stages": [{"kind": "sft", "config": "no.yaml"}]}, "no.yaml: no such file"),
        ({"stages": [{"kind": "sft"}, {"kind": "sft", "name": "b", "reward": "sft"}]}, "reward is only for policy"),
        ({"stages": [{"kind": "sft", "on_failure": "go"}]}, "on_failure must be"),
        ({"stages": [{"kind": "sft", "color": 1}]}, "unknown key 'color'"),
    ],
)
def test_invalid_plans_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(plan)


def test_settings_are_merged() -> None:
    assert nested({"a.b": 1, "a.c": {"d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}
    base = {"optimizer": {"class_path": "A", "init_args": {"lr": 1, "eps": 2}}, "x": [1]}
    assert merged(base, nested({"optimizer.init_args.lr": 3}))["optimizer"]["init_args"] == {"lr": 3, "eps": 2}
    assert merged(base, {"optimizer": {"class_path": "B"}})["optimizer"] == {"class_path": "B"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("rlhf-lightning 0.")
