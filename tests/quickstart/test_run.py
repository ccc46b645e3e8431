"""The quickstart: its data, its rubric, and a small run that still learns."""

import json
import re
from pathlib import Path

import pytest

from rlhf_lightning.quickstart import phrases
from rlhf_lightning.quickstart.data import LABEL_NOISE, Sizes, subjects, write_data
from rlhf_lightning.quickstart.rubric import WEIGHTS, rubric, rubric_parts
from rlhf_lightning.quickstart.run import QuickstartSettings, quickstart

BEST = (
    "Let us take care of the rusty gate. First, put a drop of oil on every joint. "
    "Do it soon, because waiting makes the repair cost more. Be careful not to force anything."
)


def test_rubric() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert rubric(BEST, "rusty gate", "metal") == pytest.approx(1)
    assert rubric("", "rusty gate", "metal") == 0
    assert rubric_parts(BEST, "rusty door", "metal")["names"] == 0
    assert rubric_parts(BEST.replace("rusty", "crusty"), "rusty gate", "metal")["names"] == 0
    assert rubric_parts(BEST, "rusty gate", "wood")["step"] == 0
    assert rubric_parts(BEST.replace(" because ", " as "), "rusty gate", "metal")["reason"] == 0
    assert rubric_parts(BEST.replace("careful", "quick"), "rusty gate", "metal")["caution"] == 0
    for worse in (BEST[:-1], f"{BEST} {phrases.FILLERS[3]}", BEST + " Very good." * 30):
        assert rubric_parts(worse, "rusty gate", "metal")["concise"] == 0


def test_quickstart_data(tmp_path: Path) -> None:
    files = write_data(tmp_path / "a", 5, Sizes(300, 1000, 200, 40))
    again = write_data(tmp_path / "b", 5, Sizes(300, 1000, 200, 40))
    rows = {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in files.items()}
    assert all(Path(files[name]).read_text() == Path(again[name]).read_text() for name in files)
    train, held = subjects(5)
    assert not set(train) & set(held)
    for name, items in rows.items():
        text = json.dumps(items)
        other = held if name.endswith("_train") else train
        assert not any(re.search(rf"\b{subject}\b", text) for subject, _ in other), name
    materials = dict(train) | dict(held)

    def better(row: dict[str, str]) -> bool:
        subject = next(subject for subject in materials if re.search(rf"\b{subject}\b", row["prompt"]))
        scores = [rubric(row[side], subject, materials[subject]) for side in ("chosen", "rejected")]
        assert abs(scores[0] - scores[1]) > 0.09
        return scores[0] > scores[1]

    assert all(better(row) for row in rows["preference_validation"])
    flipped = sum(not better(row) for row in rows["preference_train"]) / 1000
    assert abs(flipped - LABEL_NOISE) < 0.03  # three standard errors


@pytest.mark.usefixtures("forked_stages")
def test_small_quickstart_learns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A third of the data, fewer rounds and a weaker requirement: every stage improves on the previous one."""
    settings = QuickstartSettings(
        tmp_path / "run",
        seed=1,
        toy=True,
        sizes=Sizes(1200, 600, 400, 60),
        overrides={
            "sft": {"trainer.max_epochs": 2},
            "preference": {"trainer.max_epochs": 1},
            "policy": {"trainer.max_steps": 9, "model.optimizer.init_args.lr": 4e-4},
        },
    )
    summary = quickstart(settings)
    assert summary["sft"]["val_nll"] < summary["sft"]["val_nll_start"] / 4
    assert summary["preference"]["pair_accuracy"] > 0.6
    assert summary["policy"]["gold_reward"] > summary["sft"]["gold_reward"] > summary["base"]["gold_reward"]
    assert summary["policy"]["reward_model_score"] > summary["sft"]["reward_model_score"]
    assert summary["base"]["kl"] is None
    assert summary["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    assert summary["policy"]["kl"] > 0
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(stored) >= {"base", "sft", "policy", "preference", "seconds", "peak_memory_gb", "seed"}
    keys = {"gold_reward", "reward_model_score", "kl", "response_tokens", "truncated_fraction"}
    assert all(keys <= set(stored[name]) for name in ("base", "sft", "policy"))
    capfd.readouterr()
    assert quickstart(settings)["policy"] == summary["policy"]
    assert capfd.readouterr().out.count("already finished") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("forked_stages")
def test_own_model_and_files(base: str, tmp_path: Path) -> None:
    from tests.helpers.rows import chats, pairs, prompts, write_rows

    small = {"trainer.max_steps": 2, "trainer.max_epochs": 1}
    settings = QuickstartSettings(
        tmp_path / "run",
        model=base,
        sft=write_rows(tmp_path / "sft.jsonl", chats(30)),
        preferences=write_rows(tmp_path / "pairs.jsonl", pairs(30)),
        prompts=write_rows(tmp_path / "prompts.jsonl", prompts(30)),
        overrides={"sft": small, "preference": small, "policy": {**small, "model.sampler.max_tokens": 6}},
    )
    summary = quickstart(settings)
    assert summary["policy"]["gold_reward"] is None
    assert summary["policy"]["response_tokens"] <= 6
    assert (tmp_path / "run" / "policy" / "model" / "adapter_config.json").exists()
