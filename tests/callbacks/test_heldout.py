"""Answers to held-out prompts before and after training."""

import json
from pathlib import Path

import pytest

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.callbacks.heldout import HeldOutAnswers
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import FunctionReward
from tests.helpers.modules import length, vowels
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer


def module(base: str) -> PolicyRLModule:
    rewards = [FunctionReward(vowels), FunctionReward(length, weight=0.5)]
    return PolicyRLModule(base, rewards=rewards, sampler=Sampler(6), optimizer=sgd(1.0))


def test_the_same_prompts_at_the_start_and_at_the_end(base: str, tmp_path: Path) -> None:
    data = PromptDataModule(prompts(4), prompts(9)[4:], prompts_per_round=2, group_size=4, show_example=False)
    trained = module(base)
    trainer(tmp_path, callbacks=[HeldOutAnswers(3)]).fit(trained, data)
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert [(row["step"], row["group"]) for row in rows] == [(step, i) for step in (0, 2) for i in range(3)]
    wanted = [row.messages for row in data.prepared["validation"].rows[:3]]
    assert [row["prompt"] for row in rows] == [*wanted, *wanted]
    for row in rows:
        (one,), (other,) = vowels([row["response"]]), length([row["response"]])
        assert row["terms"] == {"vowels": one, "length": other}
        assert row["reward"] == pytest.approx(one + 0.5 * other)
    start = module(base)
    start.configure_model()
    held_out = data.prepared["validation"].rows[:3]
    assert [row["response"] for row in rows[:3]] == [one.response for one in start.answer_greedily(held_out)]
    assert [row["response"] for row in rows[3:]] == [one.response for one in trained.answer_greedily(held_out)]
    assert [row["response"] for row in rows[:3]] != [row["response"] for row in rows[3:]]


def test_nothing_is_written_without_held_out_prompts(base: str, tmp_path: Path) -> None:
    for held_out, count in ((None, 8), (prompts(2), 0)):
        data = PromptDataModule(prompts(2), held_out, prompts_per_round=2, group_size=2, show_example=False)
        trainer(tmp_path, callbacks=[HeldOutAnswers(count)]).fit(module(base), data)
        assert not (tmp_path / "heldout.jsonl").exists()
    with pytest.raises(ConfigError, match=r"HeldOutAnswers\.prompts is -1; it must be at least 0"):
        HeldOutAnswers(-1)
