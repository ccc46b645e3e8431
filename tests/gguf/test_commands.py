"""Commands on a GGUF file do what they do on the folder that it was written from."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.rewards import GenerativeReward, RewardTerm
from rlhf_lightning.types import Episode
from tests.helpers.cli import rlhf
from tests.helpers.gguf import write_gguf
from tests.helpers.models import build_model
from tests.helpers.rows import chats, pairs, prompts, write_rows

pytest.importorskip("gguf", reason="the extra gguf is not installed: pip install 'rlhf-lightning[gguf]'")
GOLD = ["--gold", "tests.helpers.modules.vowels"]


@pytest.fixture
def place(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, `tiny.gguf`, and `original/` with the model that it was written from."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    model = build_model(tokenizer, architecture="llama", max_position_embeddings=512)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "llama")
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    for name, rows in {"chats": chats(8), "pairs": pairs(8), "prompts": prompts(4)}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def on_both(place: Path, *command: str) -> list[Any]:
    """What a command writes into `out` about the file, and about the original."""
    found = []
    for model in ("tiny.gguf", "original"):
        rlhf(*(model if part == "MODEL" else part for part in command), "--overwrite", cwd=place)
        text = (place / "out").read_text()
        found.append([json.loads(line) for line in text.splitlines()] if "--output" in command else json.loads(text))
    return found


# -- commands ---------------------------------------------------------------------------------------------------------


def test_evaluate(place: Path) -> None:
    args = ["--max_tokens", "6", "--samples", "2", "--best_of", "3", "--references", "answer", *GOLD]
    write_rows(place / "prompts.jsonl", [{"prompt": f"Count {i}", "answer": "one two"} for i in range(4)])
    ours, theirs = on_both(place, "evaluate", "MODEL", "original", "prompts.jsonl", *args, "--summary", "out")
    assert ours["policy"] == pytest.approx(theirs["policy"], abs=1e-4)
    assert ours["policy"]["perplexity"] > 1
    assert ours["policy"]["kl"] == pytest.approx(0, abs=1e-4)
    assert ours["policy"]["win_rate"] == 0.5


def test_file_as_baseline(place: Path) -> None:
    args = ["original", "tiny.gguf", "prompts.jsonl", "--max_tokens", "6", *GOLD, "--json"]
    out = rlhf("evaluate", *args, cwd=place)
    said = json.loads(out[out.index("{") :])
    assert said["policy"]["win_rate"] == 0.5
    assert said["baseline"]["reward"] == pytest.approx(said["policy"]["reward"])


def test_best_of(place: Path) -> None:
    args = ["prompts.jsonl", "-n", "4", "--max_tokens", "6", *GOLD, "--output", "out"]
    ours, theirs = on_both(place, "best-of", "MODEL", *args)
    assert len(ours) == 4
    assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    assert all(row["reward"] == max(row["rewards"]) and len(row["rewards"]) == 4 for row in ours)


def test_data_check(place: Path) -> None:
    found = []
    for model in ("tiny.gguf", "original"):
        out = rlhf("data", "check", "chats.jsonl", "--kind", "sft", "--model", model, "--json", cwd=place)
        found.append(json.loads(out[out.index("{") :]))
    assert found[0].pop("model") == "tiny.gguf"
    assert found[1].pop("model") == "original"
    assert found[0] == found[1]
    assert found[0]["ok"]


def test_file_as_reward_model(place: Path, tokenizer: Any) -> None:
    episodes = [
        Episode([{"role": "user", "content": "Hi"}], {}, i, responses=[{"role": "assistant", "content": text}])
        for i, text in enumerate(["one", "two", "three four"])
    ]
    options = {"prompt": "{response}", "answer_start": "", "pattern": r"\w", "on_failure": "lowest"}
    scores, details = [], []
    for source in ("tiny.gguf", "original"):
        term = RewardTerm(GenerativeReward(str(place / source), **options), Renderer(tokenizer))
        scores.append(term.score(episodes))
        details.append([term.scorer._question(episode) for episode in episodes])  # type: ignore[attr-defined]
    assert scores[0] == scores[1]
    assert details[0] == details[1]


# -- stages -----------------------------------------------------------------------------------------------------------


def fit(place: Path, root: str, *args: str, steps: int = 2) -> Path:
    """Train a policy from the file; returns its model folder."""
    common = ["--model.model", "tiny.gguf", "--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu"]
    rule = json.dumps([{"class_path": "KeywordReward", "init_args": {"keywords": ["e"], "min_words": 1}}])
    rows = ["--data.train", "prompts.jsonl", "--data.prompts_per_round", "4", "--model.rewards", rule]
    short = ["--model.sampler.max_tokens", "4", "--trainer.default_root_dir", root]
    rlhf("policy", "fit", *common, *rows, *short, *args, cwd=place)
    assert json.loads((place / root / "stage.json").read_text())["steps"] == steps
    return place / root / "model"


@pytest.mark.parametrize("recipe", ["mint", "ppo"])
def test_policy_stages(recipe: str, place: Path) -> None:
    """From the file, with the file as reference of the KL, and with a critic from the file."""
    critic = ["--model.critic.model", "tiny.gguf"] if recipe == "ppo" else ["--data.group_size", "2"]
    folder = fit(place, "run", "--model.recipe", recipe, "--model.kl.reference", "tiny.gguf", *critic)
    metrics = (place / "run" / "metrics.csv").read_text().splitlines()
    first = dict(zip(metrics[0].split(","), metrics[1].split(","), strict=True))
    assert abs(float(first["train/kl"])) < 1e-4, "the policy begins as the reference"
    after = load_file(folder / "model.safetensors")
    before = load_file(Path(model_folder(str(place / "tiny.gguf"))) / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_interrupted_policy_stage_resumes(place: Path) -> None:
    lora = ["--model.lora.rank", "2"]
    whole = load_file(fit(place, "whole", *lora) / "adapter_model.safetensors")
    fit(place, "stopped", *lora, steps=1)
    (place / "stopped" / "stage.json").unlink()
    resumed = load_file(fit(place, "stopped", *lora) / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("forked_stages")
def test_pipeline_from_a_file(place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as start, critic and reference; it is recorded, verified, and another file is refused."""
    from rlhf_lightning.errors import ConfigError
    from rlhf_lightning.pipeline.run import run_pipeline
    from rlhf_lightning.pipeline.verify import verify_run

    monkeypatch.chdir(place)
    common = {"trainer": {"max_steps": 1, "accelerator": "cpu"}}
    rows = {name: {"train": f"{name}.jsonl", "batch_size": 4} for name in ("chats", "pairs")}
    configs = {
        "sft": {**common, "data": rows["chats"], "model": {"lora": {"rank": 2}}},
        "pairs": {**common, "data": rows["pairs"]},
        "rl": {
            **common,
            "data": {"train": "prompts.jsonl", "prompts_per_round": 4},
            "model": {"recipe": "ppo", "sampler": {"max_tokens": 4}, "kl": {"reference": "tiny.gguf"}},
        },
    }
    for name, config in configs.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    plan = {
        "name": "mine",
        "stages": [
            {"kind": "sft", "config": "sft.yaml", "start": "tiny.gguf"},
            {"kind": "preference", "name": "pairs", "config": "pairs.yaml", "start": "sft"},
            {"kind": "policy", "config": "rl.yaml", "start": "sft", "reward": "pairs", "critic": "tiny.gguf"},
        ],
    }
    (place / "plan.yaml").write_text(yaml.safe_dump(plan))
    manifest = run_pipeline("plan.yaml")
    assert [stage["status"] for stage in manifest["stages"].values()] == ["finished"] * 3
    inputs = manifest["stages"]["policy"]["inputs"]
    assert inputs["critic"] == manifest["stages"]["sft"]["inputs"]["start"] != inputs["start"]
    assert math.isfinite(manifest["stages"]["policy"]["metrics"]["train/value_loss"])
    assert {check.status for check in verify_run("runs/mine")} == {"same"}
    write_gguf(place / "tiny.gguf", build_model(tokenizer, seed=5, architecture="llama"), tokenizer, "llama")
    differ = {(check.stage, check.what) for check in verify_run("runs/mine") if check.status == "differs"}
    assert differ == {("sft", "start"), ("policy", "critic")}
    with pytest.raises(ConfigError, match=r"the inputs of stage sft have changed since it ran: start"):
        run_pipeline("plan.yaml")
