"""The curriculum by success rate: how often prompts are drawn, what is saved, and that a resumed run is the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning import Distillation, PolicyRLModule, PromptDataModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.curriculum import Curriculum, PromptSampler, drawn
from rlhf_lightning.types import Episode
from tests.helpers.modules import vowels, weights
from tests.helpers.rows import prompts, write_rows
from tests.helpers.training import sgd, trainer


def draws(sizes: list[float], per_round: int, seed: int) -> list[int]:
    return drawn(torch.tensor(sizes, dtype=torch.float64), per_round, torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1.0, 0.25, 0.01]), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 2**31))
def test_an_epoch_has_full_rounds_of_distinct_prompts(sizes: list[float], per_round: int, seed: int) -> None:
    found = draws(sizes, min(per_round, len(sizes)), seed)
    per_round = min(per_round, len(sizes))
    assert len(found) == len(sizes)
    assert set(found) <= set(range(len(sizes)))
    for k in range(0, len(found), per_round):
        one = found[k : k + per_round]
        assert len(set(one)) == len(one)


def test_frequencies_are_the_weights() -> None:
    """Exact in expectation; in each epoch, the number of draws is the expected one, rounded up or down."""
    sizes, epochs = [0.25] * 20 + [1.0] * 20, 400
    expected = [40 * size / sum(sizes) for size in sizes]
    total: Counter[int] = Counter()
    for seed in range(epochs):
        found = Counter(draws(sizes, 4, seed))
        assert all(abs(found[i] - expected[i]) < 1 for i in range(40))
        assert abs(sum(found[i] for i in range(20)) - 20 * expected[0]) < 1
        total.update(found)
    for i in range(40):
        # Each epoch's number is a Bernoulli variable beside a constant; its deviation is at most 1/2.
        assert abs(total[i] / epochs - expected[i]) < 5 * 0.5 / epochs**0.5


def test_a_prompt_is_drawn_at_most_once_in_a_round() -> None:
    found = Counter(draws([1.0] + [0.01] * 8, 3, 0))
    assert found[0] == 3  # its share would be 8 of 9
    assert sum(found.values()) == 9


def episodes(rates: dict[int, list[float]]) -> list[Episode]:
    return [Episode([], {}, group, reward=reward) for group, rewards in rates.items() for reward in rewards]


def test_rates_take_effect_in_the_next_epoch() -> None:
    sampler = PromptSampler(Curriculum(weight=0.5, success=0.8))
    indices = [10, 11, 12, 13]
    first = sampler.order(0, 1, indices, seed=3)
    assert first == PromptSampler(Curriculum()).order(0, 1, indices, seed=3)
    failed = Episode([], {}, 13, error="no room")
    sums = sampler.observe([*episodes({10: [0.8, 1.0], 11: [0.0, 0.79], 12: [0.0, 0.9]}), failed])
    assert sums == {"prompt_weight": (3.0, 3), "prompts_solved": (1.0, 3), "prompts_failed": (1.0, 3)}
    assert [sampler.weight(index) for index in indices] == [1.0] * 4
    assert sampler.order(0, 1, indices, seed=3) == first  # resumed within the epoch
    sampler.order(1, 1, indices, seed=3)
    assert [sampler.weight(index) for index in indices] == [0.5, 0.5, 1.0, 1.0]
    sampler.observe(episodes({10: [0.0, 1.0]}))
    sampler.order(2, 1, indices, seed=3)
    assert [sampler.weight(index) for index in indices] == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": Curriculum(), "resample_groups": 1}, "resample_groups are both set"),
        ({"curriculum": Curriculum(), "rewards": [], "distillation": "teacher"}, "needs a reward"),
        ({"curriculum": 0.5}, r"Curriculum\(\)"),
    ],
)
def test_refused(options: dict[str, Any], message: str, base: str) -> None:
    given_options = {"rewards": [FunctionReward(vowels)], **options}
    if "distillation" in options:
        given_options["distillation"] = Distillation(base)
    with pytest.raises(ConfigError, match=message):
        PolicyRLModule(base, **given_options)
    for weight in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"curriculum\.weight"):
            Curriculum(weight=weight)


def test_recorded_episodes_are_refused(base: str, tmp_path: Path) -> None:
    rows = [{"prompt_tokens": [5, 6], "response_tokens": [7], "logprobs": [-1.0], "reward": 1.0, "group": "a"}] * 2
    file = write_rows(tmp_path / "episodes.jsonl", rows)
    module = PolicyRLModule(base, rewards=[FunctionReward(vowels)], curriculum=Curriculum())
    with pytest.raises(ConfigError, match="episodes are recorded"):
        trainer(tmp_path, max_epochs=1).fit(module, PromptDataModule(episodes=file, prompts_per_round=1, minibatches=1))


def by_row(completions: list[str], wanted: list[int]) -> list[float]:
    """Both responses of an even row succeed, and one of the two of an odd row."""
    return [float(row % 2 == 0 or i % 2 == 0) for i, row in enumerate(wanted)]


def run(base: str, root: Path, curriculum: Curriculum | None, staleness: int = 0, **options: Any) -> Any:
    """Train three epochs of four rounds with two optimizer steps each."""
    pl.seed_everything(3)
    module = PolicyRLModule(
        base,
        rewards=[FunctionReward(by_row)],
        sampler=Sampler(max_tokens=6),
        optimizer=sgd(0.1),
        curriculum=curriculum,
        max_staleness=staleness,
    )
    rows = [{**row, "wanted": i} for i, row in enumerate(prompts(12))]
    data = PromptDataModule(rows, prompts_per_round=3, group_size=2, minibatches=2)
    path = options.pop("ckpt_path", None)
    trainer(root, max_epochs=3, **options).fit(module, data, ckpt_path=path)
    return module


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_and_its_continuation(staleness: int, base: str, tmp_path: Path) -> None:
    """Solved prompts are sampled less often, and a run resumed within a round or at an epoch's end is bit-equal."""
    seen: list[tuple[int, int]] = []

    class Saves(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch["first"]:
                seen.extend((trainer.current_epoch, episode.group) for episode in module.last_episodes[::2])

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in (8, 13):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = run(base, tmp_path / "whole", Curriculum(weight=0.1), staleness, callbacks=[Saves()])
    first, *later = [[group for epoch, group in seen if epoch == k] for k in range(3)]
    assert sorted(first) == list(range(12))
    for epoch in later:
        assert len(epoch) == 12
        # Expected: 12 * 0.6 / 6.6 = 1.09 of the six even rows.
        assert sum(group % 2 == 0 for group in epoch) in (1, 2)
    for step in (8, 13):
        seen.clear()
        resumed = run(
            base, tmp_path / f"{step}", Curriculum(weight=0.1), staleness, ckpt_path=tmp_path / f"{step}.ckpt"
        )
        assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
        assert resumed.prompt_sampler.state_dict() == whole.prompt_sampler.state_dict()


def test_without_differences_it_changes_nothing(base: str, tmp_path: Path) -> None:
    runs = [run(base, tmp_path / str(i), given) for i, given in enumerate((None, Curriculum(weight=1.0)))]
    assert all(torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())
