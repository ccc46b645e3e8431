"""Diagnostics of policy runs: statistics, warnings, the stop on collapse, the best checkpoint, samples."""

import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import correlation
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import PolicyRLModule
from rlhf_lightning.callbacks import table
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.callbacks.heldout import HeldOutAnswers
from rlhf_lightning.callbacks.samples import SamplesLog
from rlhf_lightning.checkpointing.best import BestUnderKL
from rlhf_lightning.diagnostics import (
    Check,
    Clipping,
    EntropyCollapse,
    GrowingKL,
    HighKL,
    LengthCollapse,
    LengthHacking,
    LogprobGap,
    NegativeKL,
    NoSignal,
    NotFinite,
    OverOptimized,
    RepeatedText,
    RewardCollapse,
    Truncation,
    UselessCritic,
    WildRatios,
)
from rlhf_lightning.diagnostics.callback import DEFAULT, Diagnostics
from rlhf_lightning.diagnostics.collapse import StopOnCollapse
from rlhf_lightning.diagnostics.curves import Curve, Curves, together, trend
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants, logprob_bound
from rlhf_lightning.diagnostics.ratios import SMALLEST_GAP
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.report import write_report
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.statistics import means, repeated_ngrams, statistics
from rlhf_lightning.types import Episode, TrainingSample
from tests.helpers.cli import rlhf, stage_config, write_yaml
from tests.helpers.models import build_model
from tests.helpers.modules import data, make, vowels
from tests.helpers.training import trainer

# -- statistics of a round --------------------------------------------------------------------------------------------


def episode(tokens: list[int], reward: float = 0.0, group: int = 0) -> Episode:
    one = Episode(
        [],
        {},
        group,
        training_samples=[TrainingSample([0, *tokens], [0] + [1] * len(tokens), [0.0] * (len(tokens) + 1))],
    )
    one.reward = reward
    return one


def test_correlation_of_length_and_reward_is_exact_over_uneven_ranks() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 40) for _ in range(23)]
    rewards = [1000.0 + length / 20 + draw.gauss(0, 1) for length in lengths]
    episodes = [episode([5] * length, reward) for length, reward in zip(lengths, rewards, strict=True)]
    wanted = correlation([float(length) for length in lengths], rewards)
    for cuts in ([0, 23], [0, 1, 23], [0, 0, 9, 20, 23]):
        parts = [statistics(episodes[a:b]) for a, b in itertools.pairwise(cuts)]
        found = means(parts)
        assert found["length_reward_correlation"] == pytest.approx(wanted, rel=1e-6)
        assert found["response_tokens"] == pytest.approx(sum(lengths) / 23)
        assert not any(name.startswith("~") for name in found)


@pytest.mark.parametrize("episodes", [[episode([1] * n, 0.1) for n in (1, 2, 3)], [episode([1], r) for r in (1.1, 2)]])
def test_constant_values_have_no_correlation(episodes: list[Episode]) -> None:
    assert "length_reward_correlation" not in means([statistics(episodes)])


def test_repeated_ngrams_worked_by_hand() -> None:
    assert repeated_ngrams(episode([1, 2, 3, 4, 5])) == (0, 2)
    assert repeated_ngrams(episode([7] * 6)) == (2, 3)
    assert repeated_ngrams(episode([1, 2, 3])) == (0, 0)
    # 1 2 3 4 is sampled in two turns; no n-gram spans the environment's 9.
    turns = Episode(
        [], {}, 0, training_samples=[TrainingSample([0, 1, 2, 3, 4, 9, 1, 2, 3, 4], [0, 1, 1, 1, 1, 0, 1, 1, 1, 1], [])]
    )
    assert repeated_ngrams(turns) == (1, 2)
    turns.training_samples.append(TrainingSample([1, 2, 3, 4], [1] * 4, []))
    assert repeated_ngrams(turns) == (2, 3)
    found = means([statistics([episode([7] * 6)]), statistics([episode([1, 2, 3, 4, 5]), episode([1])])])
    assert found["repeated_ngrams"] == 2 / 5
    assert "repeated_ngrams" not in means([statistics([episode([1])])])


def test_statistics_and_gold_reward_are_logged(base: str, tmp_path: Path) -> None:
    gold = FunctionReward(lambda completions: [-1.0] * len(completions), weight=0.0, name="gold")
    module = make("policy", base, rewards=[FunctionReward(vowels), gold])
    run = trainer(tmp_path)
    run.fit(module, data("policy", 8))
    assert run.callback_metrics["train/reward_gold"] == -1.0
    assert all(one.reward == one.terms["vowels"] for one in module.last_episodes)
    assert {"train/repeated_ngrams", "train/length_reward_correlation"} <= set(run.callback_metrics)


# -- curves -----------------------------------------------------------------------------------------------------------


def test_curve_keeps_start_last_rounds_and_peak() -> None:
    curve = Curve.of([*range(100), None, math.nan])
    assert curve.first == list(range(10))
    assert curve.last(4) == [98, 99]
    assert curve.level(4) is None
    assert len(curve.recent) == 40
    assert curve.peak == 97
    assert curve.start(4) == 1.5
    assert Curve.of([1.0]).level(2) is None


def test_trend_is_the_t_statistic_of_the_slope() -> None:
    values = [1.0, 3.0, 2.0, 5.0, 4.0, 6.0]
    # Slope 15.5 / 17.5, residual sum of squares 17.5 - 15.5² / 17.5 over 4, divided by 17.5.
    assert trend(values) == pytest.approx(15.5 / 17.5 / math.sqrt((17.5 - 15.5**2 / 17.5) / 4 / 17.5))
    assert trend(values[::-1]) == pytest.approx(-trend(values))
    assert trend([1.0, 2.0, 3.0]) == math.inf
    assert trend([0.1 + 0.2] * 3 + [0.3] * 3) == 0.0


def test_together_keeps_rounds_with_both_values() -> None:
    one, other = Curve.of([1, None, 3, 4]), Curve.of([9, 5, 6, math.nan, 7])
    assert together(one, other, 4) == ([1, 4], [5, 7])


# -- checks on recorded curves ----------------------------------------------------------------------------------------


def noisy(shape: Callable[[int], float], rounds: int, deviation: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [shape(i) + draw.gauss(0, deviation) for i in range(rounds)]


def up(i: int) -> float:
    return i / 40


FAILURES: list[tuple[Check, dict[str, Any]]] = [
    (NotFinite(), {"loss": [0.1, math.nan]}),
    (NotFinite(), {"loss": [0.1, 0.2], "reward": [0.0, math.inf]}),
    (HighKL(), {"kl": [10, 20, 40, 55, 60, 70, 80]}),
    (
        GrowingKL(),
        {"kl": [1, 1, 2, 2, 3, 4, 5, 7, 10, 14], "reward": [0.5, 0.6, 0.5, 0.5, 0.4, 0.5, 0.6, 0.5, 0.5, 0.4]},
    ),
    (NegativeKL(), {"kl": [0.1, -0.2, -0.1, -0.3, -0.2, -0.4]}),
    (
        OverOptimized(),
        {"reward": noisy(up, 20, 0.05), "reward_gold": noisy(lambda i: -up(i), 20, 0.05, 1), "kl": [1] * 20},
    ),
    (RewardCollapse(), {"reward": noisy(lambda i: 0.2 + min(i, 30) / 50 if i < 50 else 0.25, 60, 0.02)}),
    (RewardCollapse(), {"reward": noisy(lambda i: 0.5 if i < 30 else -0.5, 40, 0.02)}),
    (LengthHacking(), {"length_reward_correlation": [0.7] * 15, "response_tokens": [100 + 10 * i for i in range(15)]}),
    (
        LengthCollapse(),
        {"reward": noisy(lambda i: 0.3 + i / 60, 30, 0.05), "response_tokens": [max(14, 36 - i) for i in range(30)]},
    ),
    (NoSignal(), {"zero_variance_groups": [0.1, 0.9, 0.9, 0.8, 0.95, 0.1, 0.9]}),
    (EntropyCollapse(), {"entropy": noisy(lambda i: max(0.1, 2 - i / 10), 30, 0.02)}),
    (RepeatedText(), {"repeated_ngrams": [0.02] * 5 + [0.3] * 3}),
    (Truncation(), {"truncated": [0.0, 0.1, 0.4, 0.5, 0.6, 0.4]}),
    (LogprobGap(), {"logprob_gap": [0.001, 0.03, 0.03, 0.04, 0.03]}),
    (WildRatios(), {"log_ratio_max": [1, 2, 7, 8, 9, 7]}),
    (Clipping(), {"clip_fraction": [0.1, 0.5, 0.4, 0.5, 0.6]}),
    (UselessCritic(), {"explained_variance": [0.1] + [-0.2, -1.0] * 5}),
]

HEALTHY: list[tuple[Check, dict[str, Any]]] = [
    (NotFinite(), {"loss": [math.nan, 0.1], "reward": [0.0, 1.0]}),
    (HighKL(), {"kl": [10, 90, 12, 11, 95, 12, 14]}),  # single rounds
    (GrowingKL(), {"kl": [0.01 * 2**i for i in range(8)], "reward": [0.5] * 8}),  # far below a nat
    (GrowingKL(), {"kl": [i * 1.5 for i in range(10)], "reward": noisy(up, 10, 0.02)}),  # bought with KL
    (GrowingKL(), {"kl": noisy(lambda i: 20, 10, 4), "reward": noisy(lambda i: 0.5, 10, 0.1)}),
    (NegativeKL(), {"kl": [0.0, -0.2, 0.01, -0.3, -0.2, -0.4]}),
    (NegativeKL(), {"kl": [-1e-5] * 10}),  # rounding
    (OverOptimized(), {"reward": noisy(up, 20, 0.05), "reward_gold": noisy(up, 20, 0.05, 1)}),
    (OverOptimized(), {"reward": noisy(lambda i: 0, 20, 1), "reward_gold": noisy(lambda i: -up(i), 20, 0.05, 1)}),
    (OverOptimized(), {"reward": noisy(up, 20, 0.05)}),  # nothing to compare with
    (RewardCollapse(), {"reward": noisy(lambda i: min(0.8, 0.2 + i / 50), 60, 0.02)}),
    (RewardCollapse(), {"reward": noisy(lambda i: 0.3, 1000, 0.1)}),
    (RewardCollapse(), {"reward": [0.0] * 20}),
    (LengthHacking(), {"length_reward_correlation": [0.7] * 15, "response_tokens": noisy(lambda i: 100, 15, 10)}),
    (LengthHacking(), {"length_reward_correlation": [0.1] * 15, "response_tokens": [100 + 10 * i for i in range(15)]}),
    (
        LengthCollapse(),  # the reward does not rise
        {"reward": noisy(lambda i: 0.3, 30, 0.05), "response_tokens": [max(14, 36 - i) for i in range(30)]},
    ),
    (
        LengthCollapse(),  # a third shorter
        {"reward": noisy(lambda i: 0.3 + i / 60, 30, 0.05), "response_tokens": [max(24, 36 - i) for i in range(30)]},
    ),
    (LengthCollapse(), {"reward": noisy(up, 9, 0.02), "response_tokens": [40, 30, 20, 10, 5, 5, 5, 5, 5]}),  # too early
    (NoSignal(), {"zero_variance_groups": [0.5, 0.9, 0.6, 0.5, 0.95, 0.1, 0.4]}),
    (EntropyCollapse(), {"entropy": noisy(lambda i: max(1.0, 2 - i / 10), 30, 0.05)}),
    (EntropyCollapse(), {"entropy": [0.01] * 20}),  # it began like this
    (RepeatedText(), {"repeated_ngrams": [0.3] * 15}),
    (Truncation(), {"truncated": [0.0, 1.0, 0.0, 0.1, 1.0, 0.0]}),
    (LogprobGap(), {"logprob_gap": [1e-3] * 8}),
    (WildRatios(), {"log_ratio_max": [1, 20, 2, 1, 30, 1]}),
    (Clipping(), {"clip_fraction": [0.15] * 9}),
    (UselessCritic(), {"explained_variance": [-1.0] * 9 + [0.3]}),
]


@pytest.mark.parametrize(("check", "values"), FAILURES)
def test_check_detects_its_failure(check: Check, values: dict[str, list[float]]) -> None:
    message = check(Curves.of(**values))
    assert message is not None
    assert message.startswith(check.name)
    assert check.meaning in message
    assert "Usual remedy" in message


@pytest.mark.parametrize(("check", "values"), HEALTHY)
def test_check_does_not_warn_about_a_healthy_curve(check: Check, values: dict[str, list[float]]) -> None:
    curves = {name: list(numbers) for name, numbers in values.items()}
    for rounds in range(1, 1 + max(len(numbers) for numbers in curves.values())):
        if check.name == "not_finite" and rounds == 1:
            continue
        assert check(Curves.of(**{name: numbers[:rounds] for name, numbers in curves.items()})) is None


def test_checks_do_not_warn_without_values() -> None:
    for make_check in DEFAULT:
        check = make_check()
        assert check(Curves()) is None
        # A single clamped token is enough.
        value = 0.0 if check.name == "clamped_ratios" else 0.5
        assert check(Curves.of(**{key: [value] for key in check.watched})) is None


def saturating(start: float, end: float, rate: float) -> Callable[[int], float]:
    """A curve that approaches its last level."""
    return lambda i: end + (start - end) * math.exp(-i / rate)


def healthy_run(seed: int, rounds: int = 300) -> dict[str, list[float]]:
    """A run that learns, with the noise of small rounds."""
    shapes: dict[str, tuple[Callable[[int], float], float]] = {
        "reward": (saturating(0.2, 0.8, 60), 0.05),
        "reward_gold": (saturating(0.1, 0.6, 60), 0.05),
        "kl": (lambda i: 0.3 * math.sqrt(i) + i / 30, 0.2),
        "entropy": (saturating(1.5, 0.6, 80), 0.05),
        "loss": (lambda i: 0.0, 0.1),
        "response_tokens": (saturating(100, 130, 100), 8.0),
        "length_reward_correlation": (lambda i: 0.2, 0.15),
        "zero_variance_groups": (saturating(0.1, 0.5, 100), 0.08),
        "repeated_ngrams": (lambda i: 0.03, 0.01),
        "truncated": (lambda i: 0.05, 0.03),
        "logprob_gap": (lambda i: 0.002, 0.0005),
        "log_ratio_max": (lambda i: 1.0, 0.3),
        "clip_fraction": (lambda i: 0.1, 0.03),
        "explained_variance": (saturating(-0.2, 0.7, 5), 0.1),
    }
    return {
        name: noisy(shape, rounds, deviation, 100 * seed + k)
        for k, (name, (shape, deviation)) in enumerate(shapes.items())
    }


def stand_in(samples_rollouts: bool) -> Any:
    """What the checks ask of a module, in float32."""
    facts = {"samples_rollouts": samples_rollouts, "max_staleness": 0, "rewarded": True}
    model = torch.nn.Linear(1, 1)
    return SimpleNamespace(
        **facts, model=model, parameters=model.parameters, trainer=SimpleNamespace(precision="32-true")
    )


class Rounds:
    """Feeds recorded curves to a callback as a Trainer would."""

    def __init__(self, folder: Path) -> None:
        self.default_root_dir, self.is_global_zero, self.global_step = str(folder), True, 0
        self.fast_dev_run = False

    def play(self, callback: Diagnostics, values: dict[str, list[float]], first: int = 0) -> list[tuple[int, str]]:
        module = stand_in(samples_rollouts=True)
        self.global_step = first
        callback.on_train_start(self, module)  # type: ignore[arg-type]
        for i in range(first, len(next(iter(values.values())))):
            self.global_step = i
            callback.curves.record({name: numbers[i] for name, numbers in values.items()}, callback.watched)
            callback.round_ended(self, module)  # type: ignore[arg-type]
        path = Path(self.default_root_dir) / "warnings.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(row["step"], row["name"]) for row in rows]


@pytest.mark.parametrize("seed", range(10))
def test_no_warning_for_a_noisy_run_that_learns(seed: int, tmp_path: Path) -> None:
    assert Rounds(tmp_path).play(Diagnostics(), healthy_run(seed)) == []


def test_warns_in_time_about_over_optimization(tmp_path: Path) -> None:
    values = healthy_run(0)
    values["reward_gold"] = noisy(lambda i: 0.1 + i / 150 if i < 100 else 0.77 - (i - 100) / 150, 300, 0.03)
    values["reward"] = noisy(lambda i: 0.2 + i / 300, 300, 0.03)
    raised = Rounds(tmp_path).play(Diagnostics(), values)
    assert {name for _, name in raised} == {"over_optimized"}
    assert 105 <= raised[0][0] <= 125


def learned(
    rate: float, rewards: tuple[float, float], lengths: tuple[float, float], seed: int
) -> dict[str, list[float]]:
    """40 rounds of a run whose reward and length approach their last level, each with the noise of 64 episodes."""
    return {
        "reward": noisy(saturating(*rewards, rate), 40, 0.08, seed),
        "response_tokens": noisy(saturating(*lengths, rate), 40, 2.0, seed + 1000),
    }


@pytest.mark.parametrize("rate", [5, 8, 12])
def test_answers_that_lose_two_thirds_of_their_length_for_a_reward_are_warned_of(rate: float, tmp_path: Path) -> None:
    """A reward of the format alone, 0.30 to 0.78, while answers shrink from 36 tokens to 13, slowly or fast."""
    spoke = []
    for seed in range(20):
        raised = Rounds(tmp_path / str(seed)).play(Diagnostics(), learned(rate, (0.3, 0.78), (36, 13), seed))
        assert {name for _, name in raised} <= {"length_collapse"}
        spoke += [step for step, _ in raised[:1]]
    assert len(spoke) >= 19
    assert min(spoke) >= 9
    assert max(spoke) < 40


@pytest.mark.parametrize(
    ("rewards", "lengths"),
    [((0.5, 0.5), (36, 13)), ((0.5, 0.3), (36, 13)), ((0.3, 0.78), (36, 24)), ((0.3, 0.78), (36, 50))],
    ids=["flat reward", "falling reward", "a third shorter", "longer"],
)
def test_other_runs_are_not_warned_of_a_length_that_collapses(
    rewards: tuple[float, float], lengths: tuple[float, float], tmp_path: Path
) -> None:
    for seed in range(20):
        values = learned(8, rewards, lengths, seed)
        raised = Rounds(tmp_path / str(seed)).play(Diagnostics(), values)
        assert "length_collapse" not in {name for _, name in raised}


def test_the_report_shows_that_length_collapses(tmp_path: Path) -> None:
    Rounds(tmp_path).play(Diagnostics(), learned(8, (0.3, 0.78), (36, 13), 0))
    (tmp_path / "metrics.csv").write_text("epoch,step,train/reward\n0,0,0.3\n")
    page = write_report(tmp_path).read_text()
    assert "Warnings (1)" in page
    assert page.index("length_collapse") < page.index(LengthCollapse.meaning)


TRUNCATED = [0.0] * 6 + [0.5] * 10 + [0.28] * 10 + [0.5] * 10 + [0.1] * 10 + [0.5] * 10


def test_warns_once_until_the_failure_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger(Diagnostics.__module__), "warning", lambda text, *args: said.append(text % args)
    )
    # 0.28 is below the limit of 0.3, but not far enough to be over.
    raised = Rounds(tmp_path).play(Diagnostics(), {"truncated": TRUNCATED})
    assert raised == [(8, "truncation"), (48, "truncation")]
    assert [text[:29] for text in said] == ["step 8: truncation (truncated", "step 48: truncation (truncate"]
    (row, _) = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert row["numbers"] == {"truncated": 0.5, "limit": 0.3}
    assert "larger sampler.max_tokens" in row["message"]


@pytest.mark.parametrize("stop", [3, 9, 20, 47, 50])
def test_resumed_run_warns_like_an_uninterrupted_run(stop: int, tmp_path: Path) -> None:
    values = {"truncated": TRUNCATED, "kl": [i * 2.0 for i in range(len(TRUNCATED))], "reward": [0.5] * len(TRUNCATED)}
    whole = Rounds(tmp_path / "whole").play(Diagnostics(), values)
    assert len(whole) == 4
    first = Diagnostics()
    run = Rounds(tmp_path / "cut")
    run.play(first, {name: numbers[:stop] for name, numbers in values.items()})
    state = json.loads(json.dumps(first.state_dict()))
    # It went on for a while after the checkpoint, and was then killed.
    Rounds(tmp_path / "cut").play(first, {name: numbers[: stop + 4] for name, numbers in values.items()}, stop)
    second = Diagnostics()
    second.load_state_dict(state)
    assert run.play(second, values, stop) == whole
    files = [(tmp_path / name / "warnings.jsonl").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_checks_can_be_replaced_disabled_and_added(tmp_path: Path) -> None:
    values = {"truncated": [0.2] * 8, "kl": [60.0] * 8}
    assert {name for _, name in Rounds(tmp_path / "a").play(Diagnostics(), values)} == {"high_kl"}
    stricter = Diagnostics(checks=[Truncation(limit=0.1)], disabled=["high_kl"])
    assert {name for _, name in Rounds(tmp_path / "b").play(stricter, values)} == {"truncation"}
    assert len(stricter.checks) == len(DEFAULT) - 1
    with pytest.raises(ConfigError, match="'kl_high', which is not a check; the checks are not_finite, high_kl"):
        Diagnostics(disabled=["kl_high"])
    for wrong in (lambda: HighKL(limit=0), lambda: GrowingKL(rounds=100), lambda: NoSignal(rounds=0)):
        with pytest.raises(ConfigError):
            wrong()


def test_checks_of_on_policy_samples_skip_recorded_episodes(tmp_path: Path) -> None:
    callback, run = Diagnostics(), Rounds(tmp_path)
    module = stand_in(samples_rollouts=False)
    callback.on_train_start(run, module)  # type: ignore[arg-type]
    for _ in range(6):
        callback.curves.record({"logprob_gap": 0.5, "kl": -3.0}, callback.watched)
        callback.round_ended(run, module)  # type: ignore[arg-type]
    assert not (tmp_path / "warnings.jsonl").exists()


def test_nan_is_written_as_valid_json(tmp_path: Path) -> None:
    Rounds(tmp_path).play(Diagnostics(), {"loss": [0.1, math.nan], "reward": [0.0, 0.0]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (row,) = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()
    ]
    assert row["numbers"] == {"loss": "nan"}


def test_the_docs_list_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert {make_check().name for make_check in DEFAULT} <= listed


# -- under the Trainer ------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


class Watch(Diagnostics):
    """Records the rounds that it saw."""

    def on_train_start(self, run: Any, module: Any) -> None:
        super().on_train_start(run, module)
        self.seen: list[dict[str, Any]] = []

    def round_ended(self, run: Any, module: Any) -> None:
        super().round_ended(run, module)
        self.seen.append({name: curve.recent[-1] for name, curve in self.curves.items()})


def strict_checks() -> list[Check]:
    """Checks so strict that random models trigger them."""
    return [Truncation(limit=0.01, rounds=1), HighKL(limit=1e-4, rounds=2), EntropyCollapse(fraction=0.9999, rounds=1)]


def fit(
    base: str,
    folder: Path,
    callbacks: Iterable[pl.Callback],
    resume: Path | None = None,
    rate: float = 1e-2,
    **flags: Any,
) -> tuple[Any, pl.Trainer]:
    module = make("policy", base, kl=KLPenalty(0.1), optimizer=lambda p: torch.optim.AdamW(p, lr=rate))
    options = {"minibatches": 2, "update_epochs": 2, **flags.pop("data", {})}
    run = trainer(folder, **{"max_epochs": 2, "enable_checkpointing": True, "callbacks": list(callbacks), **flags})
    run.fit(module, data("policy", 12, **options), ckpt_path=resume, weights_only=True)
    return module, run


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_resumed_anywhere_writes_the_same_files(accumulate: int, base: str, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        samples = [SamplesLog(every=2, table_every=0), HeldOutAnswers(2)]
        return [*samples, Diagnostics(strict_checks()), checkpoints(tmp_path / "ckpt")]

    _, run = fit(base, tmp_path / "run", callbacks(), accumulate_grad_batches=accumulate)
    names = ("samples.jsonl", "heldout.jsonl", "warnings.jsonl")
    wanted = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    rows = [json.loads(line) for line in wanted["samples.jsonl"].splitlines()]
    assert [row["round"] for row in rows] == [0] * 8 + [2] * 8 + [4] * 8
    answers = [json.loads(line) for line in wanted["heldout.jsonl"].splitlines()]
    assert [(row["step"], row["group"]) for row in answers] == [
        (step, i) for step in (0, run.global_step) for i in (0, 1)
    ]
    assert len(wanted["warnings.jsonl"].splitlines()) >= 3
    # Of a round of two steps: in its middle and at its end, whether it is logged or not, in both epochs.
    for stop in range(1, run.global_step) if accumulate == 1 else (1, 2, 3, 6, 7, run.global_step - 1):
        # The files hold the whole run: what came after the checkpoint is cut off, and written again.
        fit(
            base,
            tmp_path / "run",
            callbacks(),
            tmp_path / "ckpt" / f"step={stop}.ckpt",
            accumulate_grad_batches=accumulate,
        )
        assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == wanted


class SaveAt(pl.Callback):
    """Saves a checkpoint after a mini-batch, in the middle of an optimizer step."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.current_epoch == 0 and batch_idx == self.batch:
            run.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_samples_of_a_round_interrupted_before_its_first_step(batch: int, base: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"accumulate_grad_batches": 2, "rate": 0.0}  # a lost part of a gradient changes nothing
    names = ("samples.jsonl", "heldout.jsonl")
    fit(base, tmp_path, [SamplesLog(), HeldOutAnswers(), SaveAt(batch, tmp_path / "x.ckpt")], **flags)
    wanted = [(tmp_path / name).read_bytes() for name in names]
    fit(base, tmp_path, [SamplesLog(), HeldOutAnswers()], tmp_path / "x.ckpt", **flags)
    assert [(tmp_path / name).read_bytes() for name in names] == wanted


def test_new_run_starts_new_files(base: str, tmp_path: Path) -> None:
    callbacks = [SamplesLog(), HeldOutAnswers()]

    def lines() -> list[int]:
        return [len((tmp_path / name).read_text().splitlines()) for name in ("samples.jsonl", "heldout.jsonl")]

    for _ in range(2):
        fit(base, tmp_path, callbacks, max_epochs=1)
        assert lines() == [24, 6]
    fit(base, tmp_path, callbacks, fast_dev_run=True)  # a fast_dev_run changes no files
    assert lines() == [24, 6]


def test_two_ranks_warn_like_one(base: str, tmp_path: Path) -> None:
    files: dict[int, Any] = {}
    for devices in (1, 2):
        strategy = "ddp_fork" if devices == 2 else "auto"
        folder = tmp_path / str(devices)
        flags: dict[str, Any] = {"devices": devices, "strategy": strategy, "precision": "64-true"}
        module = make("policy", base, dtype="float64", kl=KLPenalty(0.1))
        watch = [SamplesLog(), HeldOutAnswers(), Numbers(), Diagnostics(strict_checks())]
        run = trainer(folder, callbacks=watch, **flags)
        run.fit(module, data("policy", 7, prompts_per_round=4, update_epochs=2))  # rounds of 4 and 3 prompts
        files[devices] = [
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("samples.jsonl", "rounds.jsonl", "warnings.jsonl", "heldout.jsonl")
        ]
    samples = [files[devices][0] for devices in (1, 2)]
    assert [(row["round"], row["sample"]) for row in samples[0]] == [(0, k % 2) for k in range(8)] + [
        (1, k % 2) for k in range(6)
    ]
    assert [row["group"] for row in samples[0][:8]] == sorted(row["group"] for row in samples[0][:8])
    for name in ("step", "round", "group", "sample", "prompt", "response", "terms", "stop_reason", "response_tokens"):
        assert [row[name] for row in samples[0]] == [row[name] for row in samples[1]], name
    for name in ("reward", "advantage", "kl"):
        assert [row[name] for row in samples[0]] == pytest.approx([row[name] for row in samples[1]], rel=1e-6, abs=1e-7)
    # The means over a round's tokens are those of all ranks.
    for one, other in zip(files[1][1], files[2][1], strict=True):
        assert one.keys() == other.keys() >= {"entropy", "reward", "kl", "logprob_gap", "repeated_ngrams"}
        assert [name for name in one if one[name] is None] == [name for name in other if other[name] is None]
        for name in {name for name in one if one[name] is not None} - {"loss"}:  # a rank's loss is its share
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    assert [row["name"] for row in files[1][2]] == [row["name"] for row in files[2][2]] != []
    assert [(row["step"], row["group"]) for row in files[1][3]] == [(step, i) for step in (0, 4) for i in range(3)]
    assert files[1][3] == files[2][3]


class Numbers(Watch):
    """Writes the rounds to a file, since the memory of a forked rank is lost."""

    @property
    def state_key(self) -> str:
        return "numbers"

    def on_train_start(self, run: Any, module: Any) -> None:
        super().on_train_start(run, module)
        self._file = type(self._file)("unused.jsonl")
        self._file.start(run)

    def on_train_end(self, run: Any, module: Any) -> None:
        if run.is_global_zero:
            text = "".join(json.dumps(row) + "\n" for row in self.seen)
            (Path(run.default_root_dir) / "rounds.jsonl").write_text(text)


def test_round_metrics_are_means_over_tokens(base: str, tmp_path: Path) -> None:
    logged: list[tuple[float, float, float]] = []

    class Log(pl.Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found = run.callback_metrics
            numbers = (
                float(batch["loss_mask"].sum()),
                float(found["train/entropy"]),
                float(found["train/log_ratio_max"]),
            )
            logged.append(numbers)

    watch = Watch()
    fit(base, tmp_path, [Log(), watch], max_epochs=1)
    assert len(watch.seen) == 3
    for k, seen in enumerate(watch.seen):
        rows = logged[4 * k : 4 * k + 4]
        mean = sum(n * e for n, e, _ in rows) / sum(n for n, _, _ in rows)
        assert seen["entropy"] == pytest.approx(mean, rel=1e-5)
        assert seen["log_ratio_max"] == max(r for _, _, r in rows) > 0


def test_critic_advantages_and_explained_variance_are_logged(base: str, tmp_path: Path) -> None:
    watch = Watch()
    module = make("policy", base, critic=Critic(), advantage=GAE(), kl=KLPenalty(0.1, place="reward"))
    trainer(tmp_path, callbacks=[watch, SamplesLog()]).fit(module, data("policy", 8, minibatches=2))
    assert all(round["explained_variance"] <= 1 for round in watch.seen)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    last = {(one.group, one.sample_index): one for one in module.last_episodes}
    for row in rows[-8:]:
        (training_sample,) = last[row["group"], row["sample"]].training_samples
        sampled = [a for a, flag in zip(training_sample.advantages, training_sample.loss_mask, strict=True) if flag]
        assert row["advantage"] == pytest.approx(sum(sampled) / len(sampled))
    assert any(row["advantage"] for row in rows)


def test_logprob_gap_check_skips_stale_rollouts(base: str, tmp_path: Path) -> None:
    for max_staleness, names in ((0, ["logprob_gap"]), (1, [])):
        watch = Watch([LogprobGap(limit=1e-12, rounds=2)], disabled=["truncation"])
        folder = tmp_path / str(max_staleness)
        module = make("policy", base, max_staleness=max_staleness)
        trainer(folder, callbacks=[watch, FirstStepInvariants(strict=True)]).fit(module, data("policy"))
        path = folder / "warnings.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        assert [json.loads(row)["name"] for row in rows] == names


def test_the_limit_of_the_logprob_gap_follows_the_precision(base: str, tmp_path: Path) -> None:
    limits = {}
    for precision in ("32-true", "bf16-mixed"):
        module = make("policy", base)
        trainer(tmp_path / precision, precision=precision).fit(module, data("policy"))
        bound = logprob_bound(module)
        fitted = LogprobGap(rounds=3).fitted(module)
        assert isinstance(fitted, LogprobGap)
        assert fitted.rounds == 3
        limits[precision] = (fitted.limit, bound)
        assert LogprobGap(limit=0.5).fitted(module).severity(Curves.of(logprob_gap=[0.25] * 5)) == 0.5
    assert limits["32-true"] == (SMALLEST_GAP, None)
    limit, bound = limits["bf16-mixed"]
    assert bound is not None
    assert limit == max(SMALLEST_GAP, bound)


class Falling:
    """A reward that is random around 1, and around 0 from some round on."""

    __name__ = "falling"

    def __init__(self, calls: int) -> None:
        self.calls, self.left = calls, calls

    def __call__(self, completions: list[str]) -> list[float]:
        self.left -= 1
        return [float(self.left >= 0) + value / 10 for value in vowels(completions)]


@pytest.mark.parametrize("devices", [1, 2])
def test_stop_on_collapse(devices: int, base: str, tmp_path: Path) -> None:
    module = make("policy", base, rewards=[FunctionReward(Falling(15))])
    flags: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    run = trainer(tmp_path, max_epochs=30, limit_val_batches=0, callbacks=[StopOnCollapse(), ExportModel()], **flags)
    run.fit(module, data("policy", 4, prompts_per_round=2))
    facts = json.loads((tmp_path / "stage.json").read_text())
    # From round 16 on it is low: 3 rounds until the median of 5 is, and 3 in a row.
    assert facts["steps"] == facts["stopped"]["step"] == 20
    assert facts["metrics"]["stopped_on_collapse"] == 1.0
    assert "reward_collapse" in facts["stopped"]["reason"]
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_stop_on_collapse_by_kl_and_by_entropy(base: str, tmp_path: Path) -> None:
    stop = StopOnCollapse(reward_lost=None, entropy_fraction=None, kl_limit=1e-3, patience=2)
    _, run = fit(base, tmp_path / "kl", [stop], max_epochs=10, rate=1e-2, data={"minibatches": 1, "update_epochs": 1})
    assert stop.stopped is not None
    assert "high_kl" in stop.stopped["reason"]
    assert run.global_step < 30
    stop = StopOnCollapse(kl_limit=None, entropy_fraction=0.999999, patience=1, reward_lost=None)
    fit(base, tmp_path / "entropy", [stop], max_epochs=10, data={"minibatches": 1, "update_epochs": 1})
    assert stop.stopped is not None
    assert "entropy_collapse" in stop.stopped["reason"]


def test_healthy_run_is_not_stopped(base: str, tmp_path: Path) -> None:
    stop = StopOnCollapse()
    _, run = fit(base, tmp_path, [stop, ExportModel()], max_epochs=8, data={"minibatches": 1, "update_epochs": 1})
    assert run.global_step == 24
    assert stop.stopped is None
    facts = json.loads((tmp_path / "stage.json").read_text())
    assert "stopped" not in facts
    assert "stopped_on_collapse" not in facts["metrics"]


def test_non_finite_metrics_raise_and_export_nothing(base: str, tmp_path: Path) -> None:
    class Broken(PolicyRLModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            out = super().training_step(batch, batch_idx)
            if self.global_step == 2:
                self.log("train/loss", float("nan"), on_step=True, on_epoch=False)
            return out

    module = Broken(base, rewards=[FunctionReward(vowels)], sampler=Sampler(max_tokens=4))
    run = trainer(tmp_path, callbacks=[StopOnCollapse(), ExportModel()])
    with pytest.raises(UserError, match="not_finite"):
        run.fit(module, data("policy", 12))
    assert not (tmp_path / "stage.json").exists()


def test_resumed_run_stops_like_an_uninterrupted_run(base: str, tmp_path: Path) -> None:
    def go(folder: str, resume: Path | None = None) -> StopOnCollapse:
        stop = StopOnCollapse(reward_lost=None, entropy_fraction=None, kl_limit=1e-3, patience=3)
        options = {"minibatches": 1, "update_epochs": 1}
        fit(base, tmp_path / folder, [stop, checkpoints(tmp_path / folder)], resume, max_epochs=10, data=options)
        return stop

    whole = go("whole").stopped
    assert whole is not None
    for step in range(1, whole["step"]):
        assert go(f"resumed{step}", tmp_path / "whole" / f"step={step}.ckpt").stopped == whole


class Scripted(PolicyRLModule):
    """A module that logs given validation metrics."""

    script: tuple[tuple[float, float], ...] = ()

    def evaluate(self, batch: dict[str, Any], name: str) -> None:
        reward, kl = self.script[min(self.global_step, len(self.script)) - 1]
        self.log("val/reward_sampled", reward, batch_size=1)
        self.log("val/kl", kl, batch_size=1)


def scripted(base: str, script: tuple[tuple[float, float], ...], **options: Any) -> Scripted:
    module = Scripted(
        base,
        rewards=[FunctionReward(vowels)],
        sampler=Sampler(max_tokens=4),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        **{"kl": KLPenalty(0.0), **options},
    )
    module.script = script
    return module


SCRIPT = ((0.1, 1.0), (0.5, 8.0), (0.4, 9.0), (0.9, 30.0), (0.6, 11.0), (0.55, 2.0))


@pytest.mark.parametrize(("limit", "best"), [(10.0, 6), (100.0, 4), (20.0, 5), (8.0, 2), (1.5, 1)])
def test_best_checkpoint_under_a_kl_limit(limit: float, best: int, base: str, tmp_path: Path) -> None:
    script = SCRIPT if limit != 8.0 else SCRIPT[:5]
    saver = BestUnderKL(kl_limit=limit)
    flags: dict[str, Any] = {"enable_checkpointing": True, "val_check_interval": 1, "num_sanity_val_steps": 0}
    run = trainer(
        tmp_path,
        max_epochs=2,
        max_steps=len(script),
        callbacks=[saver, checkpoints(tmp_path / "all"), ExportModel("best")],
        **flags,
    )
    run.fit(scripted(base, script), data("policy", 12))
    assert saver.best_model_path == str(tmp_path / "checkpoints" / f"best-step={best}.ckpt")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"best-step={best}.ckpt"]
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "model" / "model.safetensors")
    wanted = torch.load(tmp_path / "all" / f"step={best}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, wanted[f"model.{name}"]) for name, value in exported.items())


def test_best_checkpoint_over_two_ranks(base: str, tmp_path: Path) -> None:
    module = make("policy", base, kl=KLPenalty(0.1), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    flags: dict[str, Any] = {
        "devices": 2,
        "strategy": "ddp_fork",
        "enable_checkpointing": True,
        "val_check_interval": 1,
    }
    run = trainer(tmp_path, callbacks=[BestUnderKL(kl_limit=0.1), ExportModel("best")], **flags)
    run.fit(module, data("policy", 12))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    metrics = json.loads((tmp_path / "stage.json").read_text())["metrics"]
    assert abs(metrics["val/kl"]) < 0.1


def test_no_checkpoint_under_the_kl_limit(base: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"enable_checkpointing": True, "val_check_interval": 1}
    run = trainer(tmp_path, callbacks=[BestUnderKL(kl_limit=0.5), ExportModel("best")], **flags)
    with pytest.raises(UserError, match=r"no checkpoint was saved for val/reward_sampled with val/kl at most 0.5"):
        run.fit(scripted(base, SCRIPT), data("policy", 12))
    with pytest.raises(ConfigError, match=r"set model\.kl"):
        trainer(tmp_path, callbacks=[BestUnderKL()], **flags).fit(scripted(base, SCRIPT, kl=None), data("policy", 4))
    run = trainer(tmp_path, callbacks=[BestUnderKL(kl="val/other")], **flags)
    with pytest.raises(ConfigError, match="'val/other', which is not logged; logged metrics: val/kl"):
        run.fit(scripted(base, SCRIPT), data("policy", 4))


# -- the first step ---------------------------------------------------------------------------------------------------


def test_invariants_detect_a_reference_that_differs_from_the_start(base: str, tmp_path: Path) -> None:
    module = make("policy", base, kl=KLPenalty(0.1))
    module.configure_model()
    with torch.no_grad():
        next(module.reference.copy.parameters()).mul_(1.5)
    with pytest.raises(UserError, match="the policy differs from its reference before any update"):
        trainer(tmp_path, callbacks=[FirstStepInvariants(strict=True)]).fit(module, data("policy"))


def test_separate_reference_may_differ_from_the_start(base: str, tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_model(tokenizer, seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    watch = Watch()
    module = make("policy", base, kl=KLPenalty(0.1, reference=str(other)))
    trainer(tmp_path, callbacks=[FirstStepInvariants(strict=True), watch]).fit(module, data("policy"))
    assert watch.seen[0]["kl"] > 0.1


def test_invariants_detect_clipping_before_the_first_update(base: str, tmp_path: Path) -> None:
    class Clipped(PolicyRLModule):
        fraction = 0.0

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            # Later mini-batches of a round may well be clipped.
            clipped = self.fraction if batch["first"] else 0.5
            return {**super().training_step(batch, batch_idx), "clip_fraction": torch.tensor(clipped)}

    def go(fraction: float, **flags: Any) -> None:
        module = Clipped(base, rewards=[FunctionReward(vowels)], sampler=Sampler(max_tokens=4))
        module.fraction = fraction
        run = trainer(tmp_path, callbacks=[FirstStepInvariants(strict=True)], **flags)
        run.fit(module, data("policy", 8, update_epochs=2))

    go(0.0)
    with pytest.raises(UserError, match=r"1\.00% of the tokens of newly sampled episodes are clipped"):
        go(0.01)
    go(0.005, precision="bf16-mixed")


# -- the table --------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "step": 4,
        "round": 2,
        "prompt": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": f"Question {i}?"}],
        "response": text,
        "terms": {"judge": reward / 2, "length": None if i else 0.5},
        "reward": reward,
        "advantage": reward - 1,
        "kl": None if i == 2 else 1.25,
        "stop_reason": "stop",
    }
    for i, (reward, text) in enumerate([(1.0, "fine\n\nyes"), (2.0, "\x1b[2Jgone " + "word " * 50), (0.0, "no [b]way")])
]


def test_table_as_plain_lines() -> None:
    lines = table.plain("round 2", table.choose(ROWS)).splitlines()
    assert lines[:3] == [
        "round 2",
        "  best   reward 2  advantage 1  KL 1.25  stop",
        "    prompt    Question 1?",
    ]
    assert lines[3].startswith("    response  [2Jgone word word")
    assert lines[3].endswith("…")
    assert lines[4] == "  median reward 1 (judge 0.5, length 0.5)  advantage 0  KL 1.25  stop"
    assert lines[6] == "    response  fine yes"
    assert lines[7] == "  worst  reward 0  advantage -1  KL –  stop"
    assert len(lines) == 10
    assert "\x1b" not in "".join(lines)


def test_table_in_a_terminal() -> None:
    text = table.rich("round 2", table.choose(ROWS), width=90)
    assert "\x1b[2J" not in text
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(len(line) <= 90 for line in shown.splitlines())
    assert table.rich("round 2", table.choose(ROWS), width=60) == table.plain("round 2", table.choose(ROWS))
    assert all(word in shown for word in ("round 2", "best", "median", "worst", "Question 2?", "no [b]way", "1.25"))


@pytest.mark.parametrize(("count", "names"), [(1, ["best"]), (2, ["best", "worst"]), (3, ["best", "median", "worst"])])
def test_table_has_no_more_rows_than_episodes(count: int, names: list[str]) -> None:
    chosen = table.choose(ROWS[:count])
    assert list(chosen) == names
    assert len({id(row) for row in chosen.values()}) == count


def test_table_is_printed_every_n_rounds(base: str, tmp_path: Path, capsys: Any) -> None:
    fit(base, tmp_path, [SamplesLog(every=100, table_every=2)])
    out = capsys.readouterr().out
    assert re.findall(r"^round (\d+) \(step (\d+)\): 8 episodes$", out, flags=re.MULTILINE) == [
        ("0", "0"),
        ("2", "8"),
        ("4", "16"),
    ]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8
    with pytest.raises(ConfigError, match=r"SamplesLog\.every is 0"):
        SamplesLog(every=0)


# -- the command ------------------------------------------------------------------------------------------------------


def named(module: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"rlhf_lightning.{module}.{name}", "init_args": arguments}


def policy_config(base: str, tmp_path: Path, **options: Any) -> list[str]:
    settings = stage_config("policy", base, tmp_path)
    rule = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
    words: dict[str, Any] = {"keywords": ["a", "e"], "min_words": 1}
    rewards = [{**rule, "init_args": words}, {**rule, "init_args": {**words, "weight": 0.0, "name": "gold"}}]
    settings["model"] |= {"rewards": rewards, "kl": {"coefficient": 0.0}}
    settings["trainer"] |= options
    config = write_yaml(tmp_path / "c.yaml", settings)
    return ["policy", "fit", "-c", config, "--trainer.default_root_dir", str(tmp_path / "run")]


def test_callbacks_in_yaml_replace_the_defaults(base: str, tmp_path: Path) -> None:
    checks = [named("diagnostics", "Truncation", limit=0.01, rounds=1)]
    callbacks = [
        named("callbacks.samples", "SamplesLog", every=2, table_every=0),
        named("diagnostics.callback", "Diagnostics", checks=checks, disabled=["no_signal"]),
        named(
            "diagnostics.collapse", "StopOnCollapse", reward_lost=None, entropy_fraction=1.5, kl_limit=None, patience=1
        ),
    ]
    args = policy_config(base, tmp_path, callbacks=callbacks, max_epochs=9)
    for out in (rlhf(*args), rlhf(*args, "--fresh")):
        assert "truncation (truncated 1, limit 0.01)" in out
        assert not re.search(r"^round \d+ \(step \d+\): \d+ episodes$", out, flags=re.MULTILINE)  # no table
        assert "step 5: stopping training, entropy_collapse" in out
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0] * 8 + [2] * 8 + [4] * 8
    assert len((run / "warnings.jsonl").read_text().splitlines()) == 1
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/reward_gold", "train/repeated_ngrams", "train/kl", "stopped_on_collapse"} <= set(header)
    assert json.loads((run / "stage.json").read_text())["stopped"]["step"] == 5


@pytest.mark.slow
def test_last_weights_can_be_exported_without_a_best_checkpoint(base: str, tmp_path: Path) -> None:
    args = policy_config(base, tmp_path, callbacks=[named("checkpointing.best", "BestUnderKL")])
    out = rlhf(*args, "--export", "best", code=2)
    assert "no checkpoint was saved for val/reward_sampled with val/kl at most 20" in out
    assert re.search(r"^round 0 \(step 0\): 8 episodes$", out, flags=re.MULTILINE)  # the default table
    assert not (tmp_path / "run" / "stage.json").exists()
    rlhf(*args, "--export", "last")
    assert json.loads((tmp_path / "run" / "stage.json").read_text())["steps"] == 3
    assert "other settings (export)" in rlhf(*args, "--export", "best", code=2)
