"""Rewards: each against values computed by hand, refusals, and statistics that do not depend on ranks and resumes."""

import asyncio
import json
import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rlhf_lightning import PolicyRLModule, PreferenceModule, PromptDataModule
from rlhf_lightning import rewards as package
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.user_calls import TimeLimitError
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.scorers import RewardHead
from rlhf_lightning.rewards import (
    BlockedTerms,
    EnsembleReward,
    ExactAnswer,
    FunctionReward,
    GenerativeReward,
    KeywordReward,
    LengthReward,
    ModelReward,
    OverlongPenalty,
    PairwiseReward,
    ReferenceNorm,
    RegexReward,
    Reward,
    RewardTerm,
    RunningNorm,
    total_rewards,
)
from rlhf_lightning.rewards.model import RewardModelScores
from rlhf_lightning.rewards.normalization import RunningStatistics
from rlhf_lightning.types import Episode, TrainingSample
from tests.helpers.models import build_model
from tests.helpers.rewards import terms
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer


def said(
    text: str, row: dict[str, Any] | None = None, tokens: int = 3, group: int = 0, sample_index: int = 0
) -> Episode:
    """A finished episode with one response."""
    training_sample = TrainingSample([1] + [2] * tokens, [0] + [1] * tokens, [0.0] * (tokens + 1))
    answer = [{"role": "assistant", "content": text}]
    return Episode(
        [], row or {}, group, sample_index, responses=answer, training_samples=[training_sample], stop_reason="stop"
    )


class Fixed(Reward):
    """Returns given scores."""

    def __init__(self, scores: Any, **options: Any) -> None:
        super().__init__(**{"name": "fixed", **options})
        self.scores = scores

    def score(self, episodes: Any) -> Any:
        return self.scores


def total(scores: Any, *episodes: Episode, **options: Any) -> list[float]:
    found = list(episodes) or [said("", group=i) for i in range(len(scores))]
    total_rewards(found, terms(Fixed(scores, **options)))
    return [episode.reward for episode in found]


# -- sums and what is refused -----------------------------------------------------------------------------------------


def test_terms_are_weighted_added_and_stored_separately() -> None:
    episodes = [said("a"), said("b"), said("c")]
    episodes[0].environment_reward = 10.0
    episodes[2].stop_reason = "length"
    parts = terms(
        Fixed([1.0, None, 3.0], weight=2.0, name="x"), Fixed([0.5, 0.25, 9.0], weight=-1.0, name="y", clip=4.0)
    )
    total_rewards(episodes, parts, truncated_reward=-7.0)
    assert [episode.reward for episode in episodes] == [10 + 2 - 0.5, -0.25, -7.0]
    assert [episode.terms for episode in episodes] == [{"x": 1.0, "y": 0.5}, {"x": None, "y": 0.25}, {"x": 3.0, "y": 9}]
    total_rewards(episodes, parts)
    assert episodes[2].reward == 2 * 3 - 4, "clipped, and without a truncated_reward nothing is replaced"


@pytest.mark.parametrize("scores", [torch.tensor([1.0, 2.0]), numpy.array([1, 2]), (numpy.float32(1), 2), iter([1, 2])])
def test_scores_of_other_libraries(scores: Any) -> None:
    assert total(scores, said("a"), said("b")) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, math.nan], "the reward fixed returned nan for data.jsonl:7, sample 3"),
        ([1.0, math.inf], "returned inf for data.jsonl:7, sample 3"),
        (torch.tensor([1.0, math.nan]), r"returned tensor\(nan\) for data.jsonl:7"),
        ([1.0, 10**400], "returned 1000.* for data.jsonl:7"),
        ([1.0, 1e39], r"returned 1e\+39 for data.jsonl:7"),  # infinite in float32
        ([1.0, "0.5"], "returned '0.5' for data.jsonl:7"),
        ([1.0, True], "returned True for data.jsonl:7"),
        ([1.0, numpy.True_], "True_? for data.jsonl:7"),
        ([1.0, torch.tensor(True)], r"tensor\(True\) for data.jsonl:7"),
        ([1.0, [2.0]], r"returned \[2.0\] for data.jsonl:7"),
        ([1.0, torch.ones(2)], "for data.jsonl:7"),
        ([1.0, 1j], "returned 1j for data.jsonl:7"),
        ([1.0], "the reward fixed returned 1 numbers for 2 episodes"),
        ([1.0] * 3, "returned 3 numbers for 2 episodes"),
        (torch.tensor(1.0), "returned 1 numbers for 2 episodes"),
        ("ab", "returned 'ab'; it must return a list"),
        (0.5, "returned 0.5; it must return a list"),
        (None, "returned None; it must return a list"),
        ({"a": 1, "b": 2}, "returned 'a' for prompt 4, sample 0"),
    ],
)
def test_invalid_scores_are_rejected_with_their_row(scores: Any, message: str) -> None:
    second = said("b", sample_index=3)
    second.where = "data.jsonl:7"
    with pytest.raises(ConfigError, match=message):
        total(scores, said("a", group=4), second)


def test_sum_beyond_float32_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"the weighted rewards of prompt 0, sample 0 sum to 2e\+40"):
        total([2e30], weight=1e10)
    with pytest.raises(ConfigError, match=r"the weight of the reward fixed is 1e\+39; it must be a finite number"):
        Fixed([1.0], weight=1e39)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeywordReward(weight=math.nan), "weight of the reward KeywordReward is nan"),
        (lambda: KeywordReward(weight=True), "weight of the reward KeywordReward is True"),
        (lambda: KeywordReward(name=""), "empty name"),
        (lambda: FunctionReward(len, clip=0.0), "clip of the reward len is 0.0; it must be above 0"),
        (lambda: FunctionReward(len, timeout=0), "timeout of the reward len is 0"),
        (lambda: ExactAnswer(pattern="()"), r"pattern '\(\)' is empty; it would match everything"),
        (lambda: RegexReward(""), "needs a pattern"),
        (lambda: ExactAnswer(pattern="(a"), "pattern '\\(a' is not a valid regular expression"),
        (lambda: ExactAnswer(hit=1.0, miss=1.0), "hit and miss are both 1.0"),
        (lambda: ExactAnswer(hit=math.nan), "hit of the reward ExactAnswer is nan"),
        (lambda: RegexReward(), "needs a pattern"),
        (lambda: RegexReward("a", "b"), "set one of them"),
        (lambda: RegexReward("[a"), "is not a valid regular expression"),
        (lambda: BlockedTerms(), "needs terms"),
        (lambda: BlockedTerms([" "]), "needs terms"),
        (lambda: BlockedTerms("bomb"), "must be a list"),  # type: ignore[arg-type]
        (lambda: BlockedTerms(["a"], penalty=1.0), "must be below 0"),
        (lambda: BlockedTerms(file="nowhere.txt"), "nowhere.txt cannot be read"),
        (lambda: LengthReward(), "needs a target, a maximum or a minimum"),
        (lambda: LengthReward(target=3, maximum=4), "exactly one of them"),
        (lambda: LengthReward(maximum=0), "must be at least 1"),
        (lambda: LengthReward(maximum=5, slope=-1.0), "slope of the reward LengthReward is -1.0"),
        (lambda: OverlongPenalty(10, 11), "buffer of the reward OverlongPenalty is 11"),
        (lambda: OverlongPenalty(10, 0), "buffer of the reward OverlongPenalty is 0"),
        (lambda: EnsembleReward(["a"]), "at least two different"),
        (lambda: EnsembleReward(["a", "a"]), "at least two different"),
        (lambda: EnsembleReward(["a", "b"], coefficient=-1.0), "would reward disagreement"),
        (lambda: ModelReward("a", device="nonsense"), "this machine has no device 'nonsense'"),
        (lambda: PairwiseReward(len, outcome="score"), "outcome is 'score'"),
        (lambda: ReferenceNorm([], limit=1), "limit is 1"),
        (lambda: PolicyRLModule("x", rewards=[KeywordReward(), KeywordReward()]), "two rewards have the same name"),
        (lambda: PolicyRLModule("x", truncated_reward=math.nan), "truncated_reward is nan"),
    ],
)
def test_invalid_settings_are_rejected(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_public_reward_can_be_imported() -> None:
    for name in package.__all__:
        assert getattr(package, name)


# -- rules and verifiers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "answer", "response", "wanted"),
    [
        ({}, "42", "42", 1.0),
        ({}, "42", "It is 42", 0.0),
        ({}, "two words", " two \n words ", 1.0),
        ({"ignore_space": False}, "two words", "two  words", 0.0),
        ({}, "Yes", "yes", 0.0),
        ({"ignore_case": True}, "Yes", "yEs", 1.0),
        ({"pattern": r"-?\d+"}, 42, "first 7, then 42.", 1.0),
        ({"pattern": r"-?\d+"}, 42, "first 42, then 7.", 0.0),
        ({"pattern": r"-?\d+"}, 42, "none", 0.0),
        ({"pattern": r"answer: (\w+)"}, "b", "answer: a answer: b", 1.0),
        ({"answer_pattern": r"#### (.*)", "numbers": True}, "because\n#### 1,234", "1234.0", 1.0),
        ({"numbers": True}, 0.5, "1/2", 1.0),
        ({"numbers": True}, "$1,000", "1000", 1.0),
        ({"numbers": True}, "50%", "50", 1.0),
        ({"numbers": True, "pattern": r"\d[\d.,]*"}, "42", "It is 42, then.", 1.0),
        (
            {"numbers": True},
            "1e999999999",
            "1e999999999",
            1.0,
        ),  # compared as text, because computing its value would take forever
        ({"numbers": True}, "1,00", "100", 0.0),
        ({"numbers": True}, "-3", "3", 0.0),
        ({"numbers": True}, "one", "one", 1.0),
        ({}, ["a", "b"], "b", 1.0),
        ({"hit": 2.0, "miss": -1.0}, "a", "b", -1.0),
        ({}, None, "b", None),
        ({}, "", "b", None),
        ({}, [], "b", None),
    ],
)
def test_exact_answer(options: dict[str, Any], answer: Any, response: str, wanted: float | None) -> None:
    assert ExactAnswer(**options).score([said(response, {"answer": answer})]) == [wanted]


def test_rows_that_a_verifier_cannot_use_are_reported_before_training() -> None:
    rows = [Prompt([], [], {"answer": "#### 3"}, where="d.jsonl:1"), Prompt([], [], {"answer": "3"}, where="d.jsonl:2")]
    with pytest.raises(
        DataError, match=r"d.jsonl:2: the reward ExactAnswer: answer_pattern does not match 'answer' '3'"
    ):
        ExactAnswer(answer_pattern="#### (.*)").check(rows)
    with pytest.raises(ConfigError, match=r"no row has the column 'solution'.*the data has answer"):
        ExactAnswer("solution").check(rows)
    with pytest.raises(DataError, match=r"d.jsonl:2: 'answer' '\(' is not a valid regular expression"):
        RegexReward(column="answer").check([rows[0], Prompt([], [], {"answer": "("}, where="d.jsonl:2")])
    with pytest.raises(
        ConfigError, match="argument 'wanted', which is not a column of the data; available are answer, completions"
    ):
        FunctionReward(lambda wanted: wanted, name="f").check(rows)
    ExactAnswer().check(rows)


def test_regular_expressions() -> None:
    episodes = [said("<a>\n1</a> x", {"wanted": "^x"}), said("<a>1</a>", {"wanted": None}), said("X", {"wanted": "^x"})]
    assert RegexReward("<a>.*</a>").score(episodes) == [1.0, 1.0, 0.0]
    assert RegexReward("<a>.*</a>", whole=True, miss=-1.0).score(episodes) == [-1.0, 1.0, -1.0]
    assert RegexReward(column="wanted").score(episodes) == [0.0, None, 0.0]
    assert RegexReward(column="wanted", ignore_case=True).score(episodes) == [0.0, None, 1.0]


def test_blocked_terms_match_whole_words_in_all_turns(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("pipe bomb\n\nc++\n")
    reward = BlockedTerms(["ass"], str(tmp_path / "terms.txt"), penalty=-2.0)
    texts = ["an ASS.", "class assess", "Pipe\n bomb", "pipebomb", "I like C++", "fine", "_ass_", "a\u200bss", "ＡＳＳ"]
    assert reward.score([said(text) for text in texts]) == [-2.0, 0, -2.0, 0, -2.0, 0, -2.0, -2.0, -2.0]
    earlier = said("ass")
    earlier.responses += [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "fine"}]
    theirs = said("fine")
    theirs.responses.insert(0, {"role": "user", "content": "ass"})
    assert reward.score([earlier, theirs]) == [-2.0, 0.0]


def test_length() -> None:
    lengths = [said("", tokens=n) for n in (1, 8, 10, 12, 500)]
    assert LengthReward(target=10, slope=0.1, limit=2.0).score(lengths) == pytest.approx([-0.9, -0.2, 0, -0.2, -2.0])
    assert LengthReward(maximum=10, slope=0.1).score(lengths) == pytest.approx([0, 0, 0, -0.2, -1.0])
    assert LengthReward(minimum=10, slope=0.1).score(lengths) == pytest.approx([-0.9, -0.2, 0, 0, 0])


def test_overlong_punishment_of_dapo() -> None:
    # L_max 100, L_cache 20: 0 up to 80, (80 - n)/20 up to 100, -1 above.
    lengths = [said("", tokens=n) for n in (1, 80, 81, 90, 100, 101)]
    assert OverlongPenalty(100, 20).score(lengths) == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])


# -- functions --------------------------------------------------------------------------------------------------------


def test_functions_may_be_async_and_have_a_time_limit() -> None:
    async def slow(completions: list[str]) -> list[float]:
        await asyncio.sleep(0.01)
        return [float(len(text)) for text in completions]

    def hangs(completions: list[str]) -> list[float]:
        time.sleep(30)
        return []

    async def hangs_too(completions: list[str]) -> list[float]:
        await asyncio.sleep(30)
        return []

    assert FunctionReward(slow).score([said("ab"), said("c")]) == [2.0, 1.0]
    assert FunctionReward(slow, timeout=5).score([said("ab"), said("c")]) == [2.0, 1.0]
    started = time.perf_counter()
    for function in (hangs, hangs_too):
        message = f"the reward {function.__name__}: the call exceeded its time limit of 0.1 s"
        with pytest.raises(TimeLimitError, match=message):
            FunctionReward(function, timeout=0.1).score([said("ab")])
    assert time.perf_counter() - started < 5


def test_error_in_a_reward_function_is_raised_unchanged() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("mine")

    for timeout in (None, 5.0):
        with pytest.raises(KeyError, match="mine"):
            FunctionReward(broken, timeout=timeout).score([said("ab")])


# -- pairs ------------------------------------------------------------------------------------------------------------


def longer(prompt: Any, a: str, b: str) -> float:
    """Prefers the longer response, and also the first position."""
    return min(1.0, max(0.0, 0.5 + (len(a) - len(b)) / 10 + 0.1))


def test_pairs_are_compared_in_both_orders() -> None:
    episodes = [said("aaa", group=1), said("a", group=1), said("aa", group=1), said("alone", group=2)]
    # Margins 2p - 1, both orders averaged, so that the place cancels: 2·(difference of length)/10.
    scores = PairwiseReward(longer).score(episodes)
    assert scores[:3] == pytest.approx([(0.4 + 0.2) / 2, (-0.4 - 0.2) / 2, (-0.2 + 0.2) / 2])
    assert scores[3] is None
    assert episodes[0].details["longer_order_bias"] == pytest.approx(0.2)
    assert episodes[3].details == {}


def test_judges_with_signs_ties_and_invalid_results() -> None:
    calls = []

    async def judge(prompt: Any, a: str, b: str) -> int:
        calls.append((a, b))
        return (a > b) - (a < b)

    assert PairwiseReward(judge, outcome="sign").score([said("b"), said("a"), said("b")]) == [0.5, -1.0, 0.5]
    assert sorted(calls) == [("a", "b"), ("a", "b"), ("b", "a"), ("b", "a")], "equal texts need no judge"
    for value, outcome in (
        (1.5, "probability"),
        (0.5, "sign"),
        (math.nan, "probability"),
        ("1", "sign"),
        (None, "sign"),
    ):
        with pytest.raises(ConfigError, match=r"the reward odd, prompt 0, sample 0 against prompt 0, sample 1"):
            PairwiseReward(lambda p, a, b, v=value: v, outcome, name="odd").score(
                [said("b"), said("a", sample_index=1)]
            )
    with pytest.raises(TimeLimitError, match="the reward slow, prompt 0, sample 0 against"):
        PairwiseReward(lambda p, a, b: time.sleep(20), timeout=0.1, name="slow").score([said("b"), said("a")])


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judges(tmp_path: Path, tokenizer: Any) -> list[str]:
    """Folders of two reward models."""
    folders = []
    for seed in (3, 4):
        judge = PreferenceModule(build_model(tokenizer, seed, task="SEQ_CLS"), scorer=RewardHead(), tokenizer=tokenizer)
        judge.save_pretrained(tmp_path / f"rm{seed}")
        (tmp_path / f"rm{seed}" / "stage.json").write_text(json.dumps(judge.stage_facts()))
        folders.append(str(tmp_path / f"rm{seed}"))
    return folders


def answered(renderer: Renderer, texts: list[str]) -> list[Episode]:
    """Episodes with their true tokens."""
    found = []
    for i, text in enumerate(texts):
        prompt, answer = [{"role": "user", "content": "Count"}], [{"role": "assistant", "content": text}]
        row = renderer.exchange(prompt, answer)
        training_sample = TrainingSample(row.ids, row.loss_mask, [0.0] * len(row.ids))
        found.append(Episode(prompt, {}, i, responses=answer, training_samples=[training_sample], stop_reason="stop"))
    return found


def test_ensemble_subtracts_its_disagreement(judges: list[str], tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    episodes = answered(renderer, ["one", "two three", "four"])
    alone = [RewardTerm(ModelReward(folder), renderer) for folder in judges]
    ensemble = RewardTerm(EnsembleReward(judges, coefficient=0.5), renderer)
    a, b = (part.score(episodes) for part in alone)
    for episode, x, y, score in zip(episodes, a, b, ensemble.score(episodes), strict=True):
        # Two values: mean (x + y)/2, deviation |x - y|/2.
        assert score == pytest.approx((x + y) / 2 - 0.5 * abs(x - y) / 2, abs=1e-5)
        assert episode.details["ensemble_std"] == pytest.approx(abs(x - y) / 2, abs=1e-5)
        assert abs(x - y) > 1e-3


def test_reward_model_with_its_own_device_is_not_a_submodule(judges: list[str], tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    here, apart = (RewardTerm(ModelReward(judges[0], device=device), renderer) for device in (None, "cpu"))
    assert list(here.parameters())
    assert not list(apart.parameters())
    assert isinstance(apart.scorer, RewardModelScores)
    assert apart.scorer.judge.device.type == "cpu"
    episodes = answered(renderer, ["one", "two three"])
    assert here.score(episodes) == apart.score(episodes)


def test_response_ended_by_a_stop_text_is_scored_as_a_message(judges: list[str], tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    reward = RewardTerm(ModelReward(judges[0]), renderer)
    whole, cut, last = answered(renderer, ["one", "one", "two"])
    cut.stopped_by_text = True
    cut.training_samples[0].ids[-1] = tokenizer("#")["input_ids"][0]
    scores = reward.score([whole, cut, last])
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    assert scores[2] == pytest.approx(reward.score([last])[0], abs=1e-5)
    assert abs(scores[2] - scores[0]) > 1e-3  # type: ignore[operator]


def test_demonstrations_set_the_scale(judges: list[str], tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    texts = ["one", "two three", "four five six"]
    rows = [{"prompt": "Count", "completion": text} for text in texts]
    raw = RewardTerm(ModelReward(judges[0]), renderer)
    scores = torch.tensor(raw.score(answered(renderer, texts)), dtype=torch.float64)
    for scale in (False, True):
        reward = RewardTerm(ModelReward(judges[0], normalize=ReferenceNorm(rows, scale)), renderer)
        for _ in range(2):
            episodes = answered(renderer, [*texts, "seven"])
            total_rewards(episodes, [reward])
        found = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
        wanted = (scores - scores.mean()) / (scores.std(correction=0) if scale else 1.0)
        torch.testing.assert_close(found[:3], wanted, rtol=1e-5, atol=1e-5)  # scored in other batches
        assert episodes[3].terms["reward_model"] == pytest.approx(raw.score(episodes[3:])[0], abs=1e-5)
    with pytest.raises(DataError, match=r"list\[1\]: a demonstration must end with an assistant message"):
        ReferenceNorm([rows[0], {"messages": [{"role": "user", "content": "a"}]}]).build(renderer, raw.score)


# -- running statistics -----------------------------------------------------------------------------------------------


def test_running_statistics_worked_by_hand() -> None:
    norm = RunningStatistics()
    options = {"normalize": RunningNorm(), "clip": 1.1, "weight": 2.0}
    episodes = [said("") for _ in range(4)]

    def total(scores: Any, running: str = "off", **more: Any) -> None:
        (term,) = terms(Fixed(scores, **{**options, **more}))
        term.statistics = norm  # those of the scores before
        total_rewards(episodes, [term], running_normalization=running)

    total([1.0, 3.0, None, 5.0], "update")
    # mean 3, variance (4 + 0 + 4)/3
    deviation = math.sqrt(8 / 3)
    assert [e.reward for e in episodes] == pytest.approx([2 * -1.1, 0.0, 0.0, 2 * 1.1])
    assert episodes[0].terms["fixed"] == 1.0, "parts are logged as they were scored"
    total([7.0, 3.0, 3.0, 3.0], "use", clip=None)
    assert episodes[0].reward == pytest.approx(2 * (7 - 3) / deviation)
    total([7.0, 3.0, 3.0, 3.0])
    assert episodes[0].reward == pytest.approx(2 * 1.1), "held out: as they are, but for the clip"
    total([7.0, 9.0, 11.0, 13.0], "update")
    every = torch.tensor([1, 3, 5, 7, 9, 11, 13], dtype=torch.float64)
    assert norm.moments[:2] == (7, pytest.approx(7.0))
    assert norm.deviation == pytest.approx(float(every.std(correction=0)))


def test_equal_scores_are_not_divided_by_zero() -> None:
    norm = RunningStatistics()
    assert norm.normalized([0.1] * 7, "update") == pytest.approx([0.0] * 7, abs=1e-12)
    assert RunningStatistics(center=False).normalized([0.0, 0.0], "update") == [0.0, 0.0]


def test_statistics_keep_float64_precision() -> None:
    holder = nn.ModuleList([RunningStatistics()])
    norm: Any = holder[0]
    norm.merge([0.1, 0.7, 12345.678])
    before = norm.moments
    holder.to(torch.bfloat16)
    assert norm.moments == before
    fresh = nn.ModuleList([RunningStatistics()])
    fresh.load_state_dict(holder.state_dict())
    assert fresh[0].moments == before  # type: ignore[union-attr, operator]


def test_statistics_do_not_depend_on_the_split_over_ranks() -> None:
    values = [math.sin(i) * 10 ** (i % 7) for i in range(50)]
    orders = (values, values[::-1], values[::2] + values[1::2])
    merged = []
    for order in orders:
        norm = RunningStatistics()
        norm.merge(order)
        norm.merge(order[:10] if order is values else [value for value in order if value in values[:10]])
        merged.append(norm.moments)
    assert merged[0] == merged[1] == merged[2]


def vowels(completions: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) * 10.0 for text in completions]


def normed(base: Any, **options: Any) -> PolicyRLModule:
    reward = FunctionReward(vowels, normalize=RunningNorm())
    return PolicyRLModule(base, rewards=[reward], sampler=Sampler(max_tokens=6), **{"optimizer": sgd(0.1), **options})


def source(size: int, **options: Any) -> PromptDataModule:
    return PromptDataModule(
        prompts(size), prompts(3), **{"prompts_per_round": 4, "group_size": 2, "seed": 1, **options}
    )


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("size", [7, 5])  # with five, the second rank has no prompt in the last round
def test_running_statistics_are_those_of_all_ranks(base: str, tmp_path: Path, size: int) -> None:
    states = []
    for devices in (1, 2):
        torch.manual_seed(0)
        folder = tmp_path / str(devices)
        run = trainer(
            folder,
            devices=devices,
            strategy="ddp_fork" if devices == 2 else "auto",
            precision="64-true",
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(folder, save_last=True)],
        )
        run.fit(normed(base, dtype="float64"), source(size))
        states.append(saved(folder / "last.ckpt"))
    (bits,) = [name for name in states[0] if name.endswith("bits")]
    count = states[0][bits].view(torch.float64)[0]
    assert count == size * 2
    assert torch.equal(states[0][bits], states[1][bits])
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-6, atol=1e-7)


def test_running_statistics_resume_in_the_middle_of_a_round(base: str, tmp_path: Path) -> None:
    def fit(name: str, resume: Path | None = None) -> dict[str, Any]:
        folder = tmp_path / name
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run = trainer(folder, enable_checkpointing=True, callbacks=[checkpoints])
        module = normed(base)
        run.fit(module, source(8, minibatches=2), ckpt_path=resume, weights_only=True)
        assert run.global_step == 4
        return module.state_dict()

    whole = fit("whole")
    for step in (1, 2, 3):
        resumed = fit(f"from{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert whole.keys() == resumed.keys()
        for name in whole:
            assert torch.equal(whole[name], resumed[name]), name


# -- truncated responses ----------------------------------------------------------------------------------------------


def short_is_good(episodes: list[Episode]) -> list[float]:
    return [-float(episode.truncated) for episode in episodes]


def test_masked_responses_count_in_their_group_but_are_not_trained(base: str, tmp_path: Path) -> None:
    rows = {}
    for masked in (False, True):
        sampler = Sampler(max_tokens=12, temperature=1.5)
        module = PolicyRLModule(
            base, rewards=[FunctionReward(short_is_good)], sampler=sampler, mask_truncated=masked, optimizer=sgd(0.1)
        )
        trainer(tmp_path / str(masked), max_steps=1).fit(module, source(8, prompts_per_round=8, group_size=8))
        rows[masked] = module.collector.training_samples(module.last_episodes)
        episodes = module.last_episodes
        truncated = [episode for episode in episodes if episode.truncated]
        assert 0 < len(truncated) < len(episodes)
        assert [episode.masked for episode in episodes] == [masked and episode.truncated for episode in episodes]
        for episode in episodes:
            group = [other.reward for other in episodes if other.group == episode.group]
            assert episode.advantage == pytest.approx(episode.reward - sum(group) / len(group))
    assert len(rows[True]) == len(rows[False]) - len(truncated)


def test_logged_metrics(base: str, tmp_path: Path) -> None:
    parts = [
        FunctionReward(vowels),
        ExactAnswer("wanted", name="exact"),
        PairwiseReward(longer),
        LengthReward(target=3),
    ]
    module = PolicyRLModule(base, rewards=parts, sampler=Sampler(max_tokens=6), optimizer=sgd(0.1))
    run = trainer(tmp_path)
    run.fit(module, source(4))
    logged = run.callback_metrics
    for name in ("vowels", "exact", "longer", "longer_order_bias", "LengthReward"):
        assert f"train/reward_{name}" in logged
    fractions = [float(logged[f"train/stop_{name}"]) for name in ("stop", "length", "tokens", "turns", "context")]
    assert sum(fractions) == pytest.approx(1.0)
    assert float(logged["train/stop_length"]) == float(logged["train/truncated"])
    assert float(logged["train/failed_episodes"]) == 0.0


def test_resampled_groups_count_once_in_running_statistics(base: str, tmp_path: Path) -> None:
    reward = FunctionReward(lambda completions: [2.5] * len(completions), name="flat", normalize=RunningNorm())
    module = PolicyRLModule(base, rewards=[reward], sampler=Sampler(max_tokens=3), resample_groups=2)
    trainer(tmp_path).fit(module, source(4))
    assert module.collector.resampled == 8
    (term,) = module.reward_terms
    assert isinstance(term, RewardTerm)
    assert term.statistics is not None
    assert term.statistics.moments[:2] == (8, 2.5)


def blocks(language: str) -> list[str]:
    """The code blocks of docs/rewards.md in a language."""
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_documented_settings_build_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import ArgumentParser

    (tmp_path / "blocked.txt").write_text("bomb\n")
    (tmp_path / "mytools.py").write_text(next(block for block in blocks("python") if "mytools.py" in block))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    built = []
    for block in blocks("yaml"):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(PolicyRLModule, "model")
        given = yaml.safe_load(block)
        given["model"]["model"] = "x"
        built.append(parser.instantiate_classes(parser.parse_object(given)).model)
    first, graded, ended, second = built
    assert [part.skip_special_tokens for part in ended.rewards] == [False]
    assert [type(part) for part in first.rewards] == [ModelReward, ExactAnswer, OverlongPenalty, BlockedTerms]
    assert isinstance(first.rewards[0].normalize, RunningNorm)
    assert [(type(part), part.columns, part.maximum) for part in graded.rewards] == [(GenerativeReward, ["answer"], 10)]
    assert first.rewards[1].score([said("so 1,234.0", {"answer": "x #### 1234"})]) == [1.0]
    assert second.limits.max_turns == 4
    assert list(second.environment({"prompt": "Hi"}).available) == ["add"]


@pytest.mark.parametrize(
    "pattern", [r"(.*)*" * 6 + "x", r"(a+)+!", r"(a|a)*!", r"((a{0,20}){0,20}){0,20}!", r"((a|aa)+)+!"]
)
def test_regular_expression_of_a_row_has_a_time_limit(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.rewards.verifiers.MATCH_SECONDS", 0.2)
    reward = RegexReward(column="answer")
    one = said("a" * 400, {"answer": pattern})
    one.where = "rows.jsonl:3"
    begun = time.process_time()
    found = None
    with suppress(DataError):
        found = reward.score([one])  # some are matched in time
    if found is None:
        with pytest.raises(DataError, match=r"rows\.jsonl:3: the expression .* takes longer than 0\.2 s"):
            reward.score([one])
    assert found in (None, [0.0])
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("flags", [{}, {"ignore_case": True}, {"whole": True}])
def test_expressions_match_like_python(flags: dict[str, bool]) -> None:
    texts = ["", "A b", "a\nB c", "<think>x</think>\n<answer>4</answer>", "12, 3.5", "ſK", "a" * 50, "é ß"]
    patterns = [r"a.*b", r"^\w+$", r"(?P<x>a)(?P=x)?", r"<think>.*?</think>\s*<answer>\d+</answer>", r"\d+(?=\.)", "ß"]
    options = re.DOTALL | (re.IGNORECASE if flags.get("ignore_case") else 0)
    for pattern in patterns:
        found = re.compile(pattern, options)
        wanted = [float(bool(found.fullmatch(t) if flags.get("whole") else found.search(t))) for t in texts]
        assert RegexReward(pattern, **flags).score([said(text) for text in texts]) == wanted, pattern
