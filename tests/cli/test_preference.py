"""`rlhf score`, `rlhf evaluate`, `rlhf best-of`, the preference watch, and DPO in a pipeline."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.cli import main as entry
from rlhf_lightning.diagnostics.preference import PreferenceWatch
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives.intervals import best_of_kl, mean_interval, wilson, win_rate
from rlhf_lightning.objectives.preference import BradleyTerry
from rlhf_lightning.pipeline.run import run_pipeline
from tests.helpers.cli import mistake, stage_config, write_yaml
from tests.helpers.modules import reward_model, vowels
from tests.helpers.rows import chats, labeled, pairs, prompts, rankings, write_rows
from tests.helpers.training import sgd, trainer

GOLD = "tests.helpers.modules.vowels"


def rlhf(*args: str) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(list(args))
    assert stop.value.code == 0


@pytest.fixture
def judge(base: str, tmp_path: Path) -> str:
    """A small reward model."""
    return reward_model(base, tmp_path / "rm", 8)


def test_score_accepts_every_kind_of_row(judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "scored.jsonl"

    def scored(rows: list[Any]) -> list[dict[str, Any]]:
        rlhf("score", judge, write_rows(tmp_path / "rows.jsonl", rows), "--output", str(out), "--overwrite")
        return [json.loads(line) for line in out.read_text().splitlines()]

    found = scored([{**row, "category": "odd" if i % 2 else "even"} for i, row in enumerate(pairs(9))])
    right = [row["chosen_score"] > row["rejected_score"] for row in found]
    summary = capsys.readouterr().err
    assert f"accuracy {sum(right) / 9:.4g} " in summary
    assert f"accuracy_category_odd {sum(right[1::2]) / 4:.4g}" in summary
    assert "accuracy_longer_wins" in summary
    assert "ece" in summary
    assert found[3]["prompt"] == "Count 3"
    singles = scored([{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(9)])
    for one, other in zip(singles, found, strict=True):
        assert one["score"] == pytest.approx(other["chosen_score"], abs=1e-5)
    talks = scored([{"messages": [*row["messages"], {"role": "user", "content": "Thanks"}]} for row in chats(4)])
    assert all(math.isfinite(row["score"]) for row in talks)
    found = scored(rankings(3))
    assert [len(row["response_scores"]) for row in found] == [2, 3, 4]
    assert found[0]["scores"] == rankings(3)[0]["scores"]  # the data's own
    assert len(scored(labeled(3))) == 3


def test_score_names_the_bad_row(judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [pairs(1)[0], {"prompt": "a", "response": ""}, {"prompt": "a"}])
    assert "rows.jsonl:2: no token is trained" in mistake(["score", judge, file], capsys)
    rlhf("score", judge, file, "--on_bad_row", "skip")
    assert "rows 1  skipped 2" in capsys.readouterr().err
    assert "no such folder" in mistake(["score", "./nowhere", file], capsys)
    assert "no such file" in mistake(["score", judge, "nowhere.jsonl"], capsys)


def test_evaluate_compares_two_policies(
    base: str, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy against itself has win rate 1/2 and KL 0; another one is compared by a gold function."""
    file = write_rows(tmp_path / "prompts.jsonl", prompts(6))
    common = ["--max_tokens", "6", "--device", "cpu", "--summary", str(tmp_path / "s.json")]
    rlhf("evaluate", base, base, file, "--reward", judge, *common)
    same = json.loads((tmp_path / "s.json").read_text())
    assert same["prompts"] == 6
    assert same["policy"]["win_rate"] == 0.5  # the same draws
    assert same["policy"]["kl"] == pytest.approx(0, abs=1e-4)
    assert same["policy"]["reward"] == same["baseline"]["reward"]
    assert "win rate" in capsys.readouterr().out

    module = PreferenceModule(base, ImplicitReward(0.1), optimizer=sgd(1.0))
    trainer(tmp_path / "dpo", callbacks=[ExportModel()]).fit(
        module, PreferenceDataModule(pairs(8), batch_size=4, show_example=False)
    )
    policy = str(tmp_path / "dpo" / "model")
    rows_file = tmp_path / "rows.jsonl"
    rlhf(
        "evaluate",
        policy,
        base,
        file,
        "--gold",
        GOLD,
        "--samples",
        "3",
        "--best_of",
        "5",
        "--overwrite",
        "--output",
        str(rows_file),
        *common,
    )
    found = json.loads((tmp_path / "s.json").read_text())
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rewards = [[one["reward"] for one in row["policy"]] for row in rows]
    assert rewards == [vowels([one["response"] for one in row["policy"]]) for row in rows]
    assert found["policy"]["reward"] == pytest.approx(sum(map(sum, rewards)) / 18)
    wins = [win_rate(ours, [one["reward"] for one in row["baseline"]]) for ours, row in zip(rewards, rows, strict=True)]
    assert found["policy"]["win_rate"] == pytest.approx(sum(wins) / 6)
    assert found["policy"]["win_rate_low"] < found["policy"]["win_rate"] < found["policy"]["win_rate_high"]
    assert math.isfinite(found["policy"]["kl"])
    assert found["best_of_5"]["reward"] > found["baseline"]["reward"]
    assert found["best_of_5"]["kl"] == pytest.approx(math.log(5) - 0.8)


@pytest.mark.parametrize("by", ["model", "implicit", "gold"])
def test_best_of_keeps_the_best_response(by: str, base: str, judge: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prompts.txt", ["Count", "Add"])
    scorer = judge
    if by == "implicit":
        module = PreferenceModule(base, ImplicitReward(0.1), optimizer=sgd(0.5))
        data = PreferenceDataModule(pairs(8), batch_size=4, show_example=False)
        trainer(tmp_path / "dpo", callbacks=[ExportModel()]).fit(module, data)
        scorer = str(tmp_path / "dpo" / "model")
    rewards = ["--gold", GOLD] if by == "gold" else ["--reward", scorer]
    out, summary = tmp_path / "best.jsonl", tmp_path / "summary.json"
    rlhf(
        "best-of", base, file, *rewards, "-n", "6", "--max_tokens", "5", "--output", str(out), "--summary", str(summary)
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert len(row["rewards"]) == 6
        assert row["reward"] == max(row["rewards"])
        if by == "gold":
            assert vowels([row["response"]]) == [row["reward"]]
    found = json.loads(summary.read_text())
    everything = [reward for row in rows for reward in row["rewards"]]
    assert found["single"]["reward"] == pytest.approx(sum(everything) / 12)
    assert found["best_of_6"]["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["evaluate", "BASE", "BASE", "FILE", "--gold", "nowhere.function"],
            "--gold 'nowhere.function' cannot be imported",
        ),
        (["evaluate", "BASE", "BASE", "FILE", "--gold", GOLD, "--samples", "0"], "--samples is 0"),
        (
            ["evaluate", "BASE", "BASE", "FILE", "--gold", GOLD, "--max_tokens", "999"],
            "exceed the model's context of 256 tokens",
        ),
        (["evaluate", "BASE", "./nowhere", "FILE", "--gold", GOLD], "no such folder"),
        (["evaluate", "BASE", "BASE", "missing.jsonl", "--gold", GOLD], "no such file"),
        (["best-of", "BASE", "FILE", "--gold", GOLD, "-n", "0"], "-n is 0"),
        (["best-of", "BASE", "FILE", "--gold", GOLD, "--temperature", "0"], "--temperature is 0"),
        (["best-of", "BASE", "FILE"], "no reward: give a reward model"),
    ],
)
def test_unsuitable_arguments_are_refused(
    args: list[str], message: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", prompts(2))
    assert message in mistake([{"BASE": base, "FILE": file}.get(arg, arg) for arg in args], capsys)


def test_intervals_of_a_worked_example() -> None:
    low, high = wilson(0.6, 50)
    assert low == pytest.approx(0.4618, abs=1e-4)
    assert high == pytest.approx(0.7239, abs=1e-4)
    assert wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(1.959964 / math.sqrt(3))
    assert mean_interval([1.0])[1] == math.inf
    assert win_rate([1.0, 2.0], [1.0, 0.0]) == (0.5 + 1 + 1 + 1) / 4
    assert best_of_kl(1) == 0


# -- the watch --------------------------------------------------------------------------------------------------------


def test_watch_warns_when_chosen_responses_become_less_likely(base: str, tmp_path: Path, caplog: Any) -> None:
    """Both responses become less likely, the rejected one faster, so the loss falls. There is one warning."""

    class Down(BradleyTerry):
        def __call__(self, chosen: torch.Tensor, rejected: torch.Tensor, **_: Any) -> torch.Tensor:
            return 0.1 * chosen + 0.2 * rejected

    def run(loss: Any, root: str) -> str:
        caplog.clear()
        module = PreferenceModule(base, ImplicitReward(0.1), loss, optimizer=sgd(0.02))
        data = PreferenceDataModule(pairs(4), batch_size=4, show_example=False)
        trainer(tmp_path / root, callbacks=[PreferenceWatch(window=2, falls=3)], max_epochs=16).fit(module, data)
        return caplog.text

    caplog.set_level(logging.WARNING, "rlhf_lightning")
    text = run(Down(), "down")
    assert text.count("chosen responses have become less likely over 6 steps") == 1
    assert "chosen responses" not in run(SFTOnly(), "up")


class SFTOnly(BradleyTerry):
    def __call__(self, chosen: torch.Tensor, rejected: torch.Tensor, **_: Any) -> torch.Tensor:
        return -chosen


def test_watch_warns_when_train_and_validation_diverge(base: str, tmp_path: Path, caplog: Any) -> None:
    """The labels are random, so the model can only memorize them."""
    caplog.set_level(logging.WARNING, "rlhf_lightning")

    def noise(seed: int, count: int) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        words = [chr(97 + i) * 3 for i in range(20)]

        def text() -> str:
            return " ".join(words[i] for i in torch.randint(20, (4,), generator=generator).tolist())

        return [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)]

    torch.manual_seed(0)
    module = PreferenceModule(base, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = PreferenceDataModule(noise(1, 16), noise(2, 64), batch_size=8, show_example=False)
    trainer(tmp_path, callbacks=[PreferenceWatch()], max_epochs=12).fit(module, data)
    assert caplog.text.count("the model overfits") == 1
    assert "model.freeze_backbone: true" in caplog.text
    report = json.loads((tmp_path / "preference_report.json").read_text())
    assert sum(part["pairs"] for part in report["reliability"]) == 64
    assert report["numbers"]["accuracy"] < 0.8

    caplog.clear()
    module = PreferenceModule(base, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = PreferenceDataModule(pairs(24), pairs(24), batch_size=8, show_example=False)
    trainer(tmp_path, callbacks=[PreferenceWatch()], max_epochs=12).fit(module, data)
    assert "overfits" not in caplog.text


# -- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("forked_stages")
def test_dpo_in_a_pipeline(base: str, tmp_path: Path) -> None:
    """SFT, DPO, and RL from the DPO policy with the DPO model as reward, each from the previous folder."""
    configs = {kind: stage_config(kind, base, tmp_path) for kind in ("sft", "preference", "policy")}
    configs["preference"]["model"]["scorer"] = {
        "class_path": "rlhf_lightning.models.scorers.ImplicitReward",
        "init_args": {"beta": 0.1, "store": True},
    }
    configs["policy"]["trainer"]["max_steps"] = 2
    for kind, config in configs.items():
        write_yaml(tmp_path / f"{kind}.yaml", config)
    plan = {
        "name": "run",
        "stages": [
            {"kind": "sft", "config": str(tmp_path / "sft.yaml")},
            {"kind": "preference", "name": "dpo", "config": str(tmp_path / "preference.yaml"), "start": "sft"},
            {"kind": "policy", "config": str(tmp_path / "policy.yaml"), "start": "dpo", "reward": "dpo"},
        ],
    }
    root = tmp_path / "runs" / "run"
    manifest = run_pipeline(plan, root)
    assert [stage["status"] for stage in manifest["stages"].values()] == ["finished"] * 3
    facts = json.loads((root / "dpo" / "model" / "stage.json").read_text())
    assert facts["reference"] == "../../sft/model"
    assert json.loads((root / "dpo" / "model" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    logged = (root / "policy" / "metrics.csv").read_text().splitlines()
    assert "train/reward_reward_model" in logged[0]
    assert (tmp_path / "preference.jsonl.reference").is_dir()
