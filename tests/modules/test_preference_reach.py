"""Targets of preference learning: overfitting real pairs, the simpler MinT recipe, RL with every scorer."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.quickstart.data import Sizes
from rlhf_lightning.quickstart.run import CONFIGS, QuickstartSettings, quickstart
from tests.helpers.models import build_model
from tests.helpers.rows import prompts, write_rows
from tests.helpers.training import trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_overfits_real_pairs_and_scores_consistently(shared: Path, tmp_path: Path) -> None:
    """64 pairs to accuracy 1.0 in under 2 minutes; all ways of scoring a text agree."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm2-135m-instruct")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 1024}
    build_model(tokenizer, **sizes).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [json.loads(line) for line in (shared / "data" / "preference_en.jsonl").read_text().splitlines()[:64]]
    torch.manual_seed(0)
    module = PreferenceModule(
        str(tmp_path / "base"),
        lora=LoRA(rank=16, target=["attention", "mlp"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    data = PreferenceDataModule(rows, rows, batch_size=16, max_length=1024, overlong="truncate", show_example=False)
    run = trainer(tmp_path / "rm", max_epochs=10, callbacks=[ExportModel()], check_val_every_n_epoch=10)
    started = time.process_time()  # of one thread: what others do on the machine does not count
    run.fit(module, data)
    assert time.process_time() - started < 120
    assert float(run.callback_metrics["val/accuracy"]) == 1.0
    assert float(run.callback_metrics["val/accuracy_longer_wins"]) < 0.8  # it is not length that it learnt

    examples = data.prepared["train"].rows[:12]
    sides = [side for pair in examples for side in (pair.chosen, pair.rejected)]
    batch = data.collate(examples, [1.0] * len(examples))
    with torch.no_grad():
        together = torch.stack(
            module.model_scorer(batch).chunk(2), -1
        ).flatten()  # both sides of a pair share its prompt
    alone = torch.cat([module.score_tokens([side.ids], [side.loss_mask]) for side in sides])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    judge = RewardModel(str(tmp_path / "rm" / "model"))
    found = judge.score_tokens([side.ids for side in sides], [side.loss_mask for side in sides])
    torch.testing.assert_close(found, together, rtol=1e-5, atol=1e-5)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model")
    for model in (stock.eval(), stock.merge_and_unload().eval()):
        with torch.no_grad():
            found = torch.cat([model(torch.tensor([side.ids])).logits[:, 0] for side in sides])
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)


HANDFUL = [
    ("How do I keep my bike dry?", "Cover it with a sheet and oil the chain.", "It is a bike."),
    ("What should I eat before a run?", "A banana an hour before, and some water.", "Food."),
    ("How do I back up my files?", "Copy them to a second disk every week and test a restore.", "You can not."),
    ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because it likes to be."),
    ("How do I sleep better?", "Go to bed at the same time, and keep the room dark.", "Sleep is boring, stay up."),
]


@pytest.mark.usefixtures("forked_stages")
def test_the_simpler_mint_recipe(base: str, tmp_path: Path) -> None:
    """Its file with a small model: DPO loss from 0.69 to below 0.15, all pairs in order, then RL with real rollouts."""
    pairs = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in HANDFUL]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    source = read_plan(ROOT / "configs" / "mint_simple.yaml").source
    common = {"trainer.precision": "32-true", "trainer.accelerator": "cpu"}
    changes = {
        "dpo": {
            "model.model": base,
            "data.train": file,
            "data.validation": file,
            "trainer.max_epochs": 20,
            "model.optimizer.init_args.lr": 3e-3,
        },
        "rl": {
            "data.train": write_rows(tmp_path / "prompts.jsonl", prompts(8)),
            "model.sampler.max_tokens": 8,
            "data.group_size": 2,
            "trainer.max_steps": 2,
        },
    }
    stages = [
        {**stage, "config": str(ROOT / "configs" / stage["config"]), "overrides": {**common, **changes[stage["name"]]}}
        for stage in source["stages"]
    ]
    manifest = run_pipeline({**source, "stages": stages}, tmp_path / "run")
    with open(tmp_path / "run" / "dpo" / "metrics.csv") as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row.get("train/loss")]
    assert losses[0] == pytest.approx(0.693, abs=1e-3)
    metrics = manifest["stages"]["dpo"]["metrics"]
    assert metrics["val/loss"] < 0.15
    assert metrics["val/accuracy"] == 1.0
    judge = RewardModel(str(tmp_path / "run" / "dpo" / "model"))
    chosen, rejected = (judge.score([row[0] for row in HANDFUL], [row[side] for row in HANDFUL]) for side in (1, 2))
    assert (chosen > rejected).all()
    samples = [json.loads(line) for line in (tmp_path / "run" / "rl" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 8 * 2
    assert all("reward_model" in sample["terms"] for sample in samples)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("forked_stages")
@pytest.mark.parametrize("scorer", ["SequenceLogprob", "ImplicitReward"])
def test_every_scorer_is_a_reward_in_the_quickstart(scorer: str, tmp_path: Path) -> None:
    """One line of YAML differs from the shipped quickstart, whose scorer is `RewardHead`."""
    line = "class_path: rlhf_lightning.models.scorers.RewardHead"
    assert line in (CONFIGS / "preference.yaml").read_text()
    settings = QuickstartSettings(
        tmp_path / "run",
        toy=True,
        overrides={
            "sft": {"trainer.max_epochs": 3},
            "preference": {"model.scorer.class_path": line.split()[1].replace("RewardHead", scorer)},
            "policy": {"trainer.max_steps": 24, "model.optimizer.init_args.lr": 4e-4},
        },
        sizes=Sizes(1200, 600, 400, 100),
    )
    summary = quickstart(settings)
    assert summary["preference"]["pair_accuracy"] > 0.6
    assert summary["policy"]["reward_model_score"] > summary["sft"]["reward_model_score"]
