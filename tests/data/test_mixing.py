"""Weighted mixing of several sources: proportions, ends of epochs, counts and refusals."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PolicyRLModule, PromptDataModule, SFTDataModule, SFTModule
from rlhf_lightning.data.batching import MixedOrder, RowLoader
from rlhf_lightning.data.mixing import Mixture, WeightedSource, epoch_sources
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import KeywordReward
from tests.helpers.cli import rlhf_in_process, stage_config, write_yaml
from tests.helpers.rows import chats, prompts, write_rows
from tests.helpers.training import trainer

ENDS = {
    # Weights 3:1 with 30 and 100 rows. The epoch ends when the first source has no rows left, when both have given all
    # of theirs (the first starts over until a 101st row of the second would follow), or when each row was given once.
    "first_exhausted": [30, 10],
    "all_exhausted": [303, 100],
    "all_exhausted_without_replacement": [30, 100],
}


def mixture(stopping: str = "first_exhausted", a: Any = "a.jsonl", b: Any = "b.jsonl") -> Mixture:
    found = Mixture.of({"a": {"source": a, "weight": 3}, "b": {"source": b}}, stopping)
    assert found is not None
    return found


@pytest.mark.parametrize("stopping", ENDS)
def test_every_stretch_of_an_epoch_has_the_proportions(stopping: str) -> None:
    order = epoch_sources([30, 100], mixture(stopping))
    assert [order.count(0), order.count(1)] == ENDS[stopping]
    mixed = order[:40] if stopping == "all_exhausted_without_replacement" else order
    for end in range(1, len(mixed)):
        assert abs(mixed[:end].count(0) - 0.75 * end) <= 1


@pytest.mark.parametrize("stopping", ENDS)
def test_order_is_determined_by_the_seed_and_every_pass_has_each_row_once(stopping: str) -> None:
    source_of = [0] * 30 + [1] * 100
    order = MixedOrder(mixture(stopping), source_of, seed=1)
    first, second = order.epoch(0, True), order.epoch(1, True)
    assert first == MixedOrder(mixture(stopping), source_of, seed=1).epoch(0, True)
    assert first != second
    assert first != MixedOrder(mixture(stopping), source_of, seed=2).epoch(0, True)
    for epoch in (first, second):
        a = [row for row in epoch if row < 30]
        assert all(sorted(a[k : k + 30]) == list(range(30)) for k in range(0, len(a) - 29, 30))
        assert max(Counter(row for row in epoch if row >= 30).values()) == 1


def test_loader_reports_how_often_each_source_was_used(base: str, tmp_path: Path) -> None:
    sources = {"a": {"source": chats(9), "weight": 2}, "b": {"source": write_rows(tmp_path / "b.jsonl", chats(4))}}
    data = SFTDataModule(sources, batch_size=3, validation_split=2, show_example=False)
    engine = trainer(tmp_path, max_epochs=None, max_steps=5)
    engine.fit(SFTModule(base), data)
    loader = data.train_loader
    assert isinstance(loader, RowLoader)
    assert loader.order is not None
    per_epoch = [loader.order.sources.count(source) for source in (0, 1)]
    batches = len(loader)
    epochs, rest = divmod(5, batches)
    begun = loader.order.sources[: 3 * rest]
    expected = [epochs * count + begun.count(source) for source, count in enumerate(per_epoch)]
    counts: Any = data.row_counts()["train"]
    assert [one["drawn"] for one in counts["sources"].values()] == expected
    assert sum(one["examples"] for one in counts["sources"].values()) == 11
    assert counts["sources"]["b"]["source"] == str(tmp_path / "b.jsonl")


def test_policy_rounds_have_the_proportions(base: str, tmp_path: Path) -> None:
    others = [{"prompt": f"Spell {i}", "answer": str(i)} for i in range(8)]
    data = PromptDataModule(
        {"a": {"source": prompts(4), "weight": 1}, "b": {"source": others, "weight": 2}},
        prompts_per_round=3,
        group_size=2,
        show_example=False,
    )
    module = PolicyRLModule(base, rewards=[KeywordReward(["a"], min_words=1)], sampler=Sampler(max_tokens=2))
    engine = trainer(tmp_path)
    engine.fit(module, data)
    assert engine.global_step == 4
    for positions in (module.rollouts.order.epoch(0, True)[k : k + 3] for k in range(0, 12, 3)):
        assert sum(position < 4 for position in positions) == 1
    counts: Any = data.row_counts()["train"]
    assert {name: one["drawn"] for name, one in counts["sources"].items()} == {"a": 4, "b": 8}


def test_command_trains_on_a_mixture_and_records_it(base: str, tmp_path: Path) -> None:
    settings = stage_config("sft", base, tmp_path)
    other = write_rows(tmp_path / "other.jsonl", chats(5))
    settings["data"]["train"] = {
        "chat": {"source": settings["data"]["train"], "weight": 2},
        "other": {"source": [other]},
    }
    settings["data"]["stopping_strategy"] = "all_exhausted_without_replacement"
    args = ["sft", "fit", "-c", write_yaml(tmp_path / "sft.yaml", settings)]
    rlhf_in_process(*args, "--trainer.default_root_dir", str(tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "stage.json").read_text())
    sources = facts["rows"]["train"]["sources"]
    assert {name: (one["weight"], one["examples"], one["drawn"]) for name, one in sources.items()} == {
        "chat": (2, 12, 12),
        "other": (1.0, 5, 5),
    }
    assert len(facts["data"]["train"]) == 64
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| chat | " in card
    assert "| 2 | 12 | 12 |" in card
    record = json.loads((tmp_path / "run" / "sources.json").read_text())
    assert len(record["train"]["files"]) == 2


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"a": {"source": "a.jsonl", "weight": 0}}, "the weight of a is 0"),
        ({"a": {"source": "a.jsonl", "weight": "much"}}, "the weight of a is 'much'"),
        ([WeightedSource("a", "a.jsonl"), WeightedSource("a", "b.jsonl")], "two sources have the name 'a'"),
    ],
)
def test_mistakes_in_mixtures_are_refused(train: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTDataModule(train)


def test_other_uses_of_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.validation has weights"):
        SFTDataModule("a.jsonl", {"a": {"source": "a.jsonl"}})
    with pytest.raises(ConfigError, match=r"data\.episodes has weights"):
        PromptDataModule(episodes={"a": {"source": "a.jsonl"}})
    with pytest.raises(ConfigError, match="must not occur twice in a round"):
        PromptDataModule({"a": {"source": "a.jsonl"}}, stopping_strategy="all_exhausted")
    with pytest.raises(ConfigError, match="stopping_strategy is 'never'"):
        SFTDataModule("a.jsonl", stopping_strategy="never")


def test_rows_and_columns_are_not_taken_for_mixtures() -> None:
    columns = {"train": {"source": ["x"], "weight": [1], "prompt": ["Hi"]}}
    for source in (
        columns,
        {"source": ["a"], "weight": [1]},
        [{"source": "wiki", "weight": 1, "prompt": "Hi"}],
        [],
        {},
    ):
        assert Mixture.of(source) is None
