"""The model of a preference stage as a reward: by its margin, in text, or replaced by a rule."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.pipeline.run import stage_settings

RULE = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
MODEL = "rlhf_lightning.rewards.ModelReward"
JUDGE = "rlhf_lightning.rewards.GenerativeReward"
FOLDER = "runs/mine/pairs/model"


def rewards(own: Any, failed: bool = False, scorer: Any = None) -> list[Any]:
    """The rewards of a policy stage with its own and the model of a preference stage."""
    pairs = {"kind": "preference", "name": "pairs", "on_failure": {"rule_reward": RULE}}
    pairs["overrides"] = {"model.scorer": scorer} if scorer else {}
    rl = {"kind": "policy", "name": "rl", "reward": "pairs", "overrides": {"model.rewards": own}}
    plan = read_plan({"name": "mine", "stages": [pairs, rl]})
    found = stage_settings(plan, plan.stages[1], {"pairs": plan.stages[0]} if failed else {})
    return found["model"]["rewards"]  # type: ignore[index, call-overload, return-value]


@pytest.mark.parametrize("own", [None, [], [RULE], [{"class_path": MODEL, "init_args": {"model": "other"}}]])
def test_model_reward_is_added(own: Any) -> None:
    assert rewards(own) == [*(own or []), {"class_path": MODEL, "init_args": {"model": FOLDER}}]
    assert rewards(own, failed=True) == [*(own or []), RULE]


def test_rewards_without_a_model_take_it() -> None:
    judge = {"class_path": JUDGE, "init_args": {"maximum": 10.0}}
    margin = {"class_path": "ModelReward", "init_args": {"weight": 0.0}}
    own = [judge, RULE, margin]
    found = rewards(own)
    assert found == [
        {"class_path": JUDGE, "init_args": {"model": FOLDER, "maximum": 10.0}},
        RULE,
        {"class_path": "ModelReward", "init_args": {"model": FOLDER, "weight": 0.0}},
    ]
    assert rewards([{"class_path": JUDGE}]) == [{"class_path": JUDGE, "init_args": {"model": FOLDER}}]
    assert rewards([judge, margin], failed=True) == [RULE]
    assert own == [judge, RULE, margin], "the plan is left as it was"


def test_only_a_model_reward_takes_the_scorer() -> None:
    found = rewards([{"class_path": JUDGE}, {"class_path": MODEL}], scorer="mine.Scorer")
    assert [part["init_args"].get("scorer") for part in found] == [None, "mine.Scorer"]


def test_shipped_pipelines(tmp_path: Path) -> None:
    configs = Path(__file__).parents[2] / "configs"
    for name, classes in (("mint_verified", [MODEL, RULE["class_path"]]), ("mint_generative", [JUDGE])):
        plan = read_plan(configs / f"{name}.yaml")
        settings: Any = stage_settings(plan, plan.stages[-1])
        found = settings["model"]["rewards"]
        assert [part["class_path"] for part in found] == classes
        assert found[0]["init_args"]["model"] == f"runs/{name}/reward_model/model"
