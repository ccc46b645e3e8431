"""Special tokens in rewards: left out by default, read on request, and patterns that could never match."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import (
    BlockedTerms,
    ExactAnswer,
    FunctionReward,
    KeywordReward,
    LengthReward,
    PairwiseReward,
    RegexReward,
    Reward,
    RewardTerm,
)
from rlhf_lightning.rewards.required_literals import required_literal
from rlhf_lightning.rollout.episode_state import EpisodeState
from rlhf_lightning.types import Completion, Episode
from tests.helpers.rows import prompts
from tests.helpers.training import trainer

TOKENS = ["<|im_end|>", "<|call|>", "<s>"]


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    return Renderer(tokenizer)


def sampled(renderer: Renderer, *texts: str, row: Any = None) -> Episode:
    """An episode whose turns were sampled as given."""
    running = EpisodeState(Prompt([{"role": "user", "content": "Hi"}], [1, 2], row or {}), 0)
    for text in texts:
        running.add_prompt([3], continues=bool(running.episode.training_samples))
        ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        running.add_response(Completion(ids, [-1.0] * len(ids), "stop"), renderer, ())
    return running.episode


def scored(reward: Reward, renderer: Renderer, *episodes: Episode) -> list[float | None]:
    return RewardTerm(reward, renderer).score(episodes)


def test_text_rewards_read_special_tokens_on_request(renderer: Renderer) -> None:
    read: list[Any] = []

    def seen(completions: list[str]) -> list[float]:
        read.append(completions)
        return [0.0] * len(completions)

    def judge(prompt: Any, a: str, b: str) -> float:
        return float("<|call|>" in a and "<|call|>" not in b)

    first, last = "one <|call|>two<|im_end|>", " four<|im_end|>"
    episode = sampled(renderer, first, last)
    assert [m["content"] for m in episode.responses] == ["one two", "four"]
    for skip, text in ((True, "four"), (False, last)):
        scored(FunctionReward(seen, skip_special_tokens=skip), renderer, episode)
        assert read.pop() == [text]
    one = sampled(renderer, first, row={"answer": "two<|im_end|>"})
    other = sampled(renderer, "one two<|im_end|>")
    assert scored(RegexReward(r"</?\|call\|>|two<\|im_end\|>$", skip_special_tokens=False), renderer, one) == [1.0]
    assert scored(RegexReward(r"one <\|call\|>", skip_special_tokens=False), renderer, one, other) == [1.0, 0.0]
    assert scored(RegexReward(r"one two"), renderer, one, other) == [1.0, 1.0]
    exact = ExactAnswer(pattern=r"<\|call\|>(.*)", skip_special_tokens=False)
    assert scored(exact, renderer, one) == [1.0]
    keyword = KeywordReward(["<|CALL|>"], min_words=1, skip_special_tokens=False)
    assert scored(keyword, renderer, one, other) == [0.5, -0.1]
    # All turns of an episode, not the last alone.
    blocked = BlockedTerms(["<|call|>two"], skip_special_tokens=False)
    assert scored(blocked, renderer, episode, other) == [-1.0, 0.0]
    pairs = PairwiseReward(judge, skip_special_tokens=False)
    assert scored(pairs, renderer, one, other) == [1.0, -1.0]
    assert scored(PairwiseReward(judge), renderer, one, other) == [0.0, 0.0], "equal without special tokens"


def test_turns_are_decoded_from_the_sampled_tokens(renderer: Renderer) -> None:
    texts = ["one<|im_end|>", "two <|call|>", "three"]
    decode = renderer.tokenizer.decode
    assert [decode(ids) for ids in sampled(renderer, *texts).sampled_turns()] == texts
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        RegexReward("a", skip_special_tokens=False).score([sampled(renderer, "a")])


@pytest.mark.parametrize(
    ("pattern", "token"),
    [
        (r"</answer><\|im_end\|>$", "<|im_end|>"),
        (r"^<answer>.*</answer>\s*(<\|im_end\|>)\Z", "<|im_end|>"),
        (r"<\|call\|>|x<\|im_end\|>", "<|call|>"),
        (r"(?:<\|(?:call|im_end)\|>)+", "<|call|>"),
        (r"(?=.*<\|call\|>)one", "<|call|>"),
        (r"<[|]call[|]>", "<|call|>"),
        (r"<s(?#a comment)>", "<s>"),
        (r"(?>a<s>)", "<s>"),
        (r"</answer>$", None),
        (r"</answer>(<\|im_end\|>)?$", None),
        (r"<\|im_end\|>|$", None),
        (r"(?!<\|im_end\|>)a", None),
        (r"<\|im_.nd\|>", None),
        ("(?:a|b)(?:c|d)" * 9 + "<s>", "<s>"),
        ("(?:aa|bb)(?:cc|dd)" * 9 + "<s>", None),  # too many alternatives to examine
        (r"<\|im_end\|>{0}x", None),
    ],
)
def test_required_literal(pattern: str, token: str | None) -> None:
    assert required_literal(re.compile(pattern), TOKENS) == token


def test_required_literal_respects_case() -> None:
    assert required_literal(re.compile("<S>"), TOKENS) is None
    assert required_literal(re.compile("<S>", re.IGNORECASE), TOKENS) == "<s>"


PIECES = st.sampled_from([r"<s>", "a", "b", r"\s*", ".", "[ab]", "^", "$", r"\b", "(?=a)", "(?!<s>)", "<", "s>"])
PATTERNS = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda ab: f"(?:{ab[0]}|{ab[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "??"])).map(lambda ab: f"(?:{ab[0]}){ab[1]}"),
        inner.map(lambda a: f"({a})"),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pattern=PATTERNS, text=st.text(alphabet="ab <s>", max_size=8))
def test_pattern_that_matches_without_a_token_does_not_require_it(pattern: str, text: str) -> None:
    if "<s>" not in text and re.search(pattern, text):
        assert required_literal(re.compile(pattern), ["<s>"]) is None


@pytest.mark.parametrize(
    ("reward", "setting"),
    [
        (lambda **kw: RegexReward(r"x<\|call\|>$", **kw), "the pattern"),
        (lambda **kw: ExactAnswer(pattern=r"(\d+)<\|im_end\|>", **kw), "its pattern"),
        (lambda **kw: KeywordReward(["fine", "<|CALL|>"], **kw), "of its keywords"),
        (lambda **kw: BlockedTerms(["a <|call|>"], **kw), "of its terms"),
    ],
)
def test_patterns_that_can_never_match_are_rejected(renderer: Renderer, reward: Any, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}.*Set skip_special_tokens: false"):
        RewardTerm(reward(), renderer)
    RewardTerm(reward(skip_special_tokens=False), renderer)


def test_patterns_of_a_column_are_rejected_with_their_row(renderer: Renderer) -> None:
    reward = RewardTerm(RegexReward(column="want"), renderer)
    rows = [Prompt([], [1], {"want": want}, where=f"rows.jsonl:{i}") for i, want in enumerate(["a", r"b<\|im_end\|>"])]
    reward.check(rows[:1])
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*<\|im_end\|>.*Set skip_special_tokens: false"):
        reward.check(rows)


def test_stop_text_is_removed_from_responses(base: str, tmp_path: Any) -> None:
    def fit(**options: Any) -> None:
        reward = RegexReward("<a>.*</a>", **options)
        rewards = [reward, LengthReward(target=3, weight=0.1)]
        module = PolicyRLModule(base, rewards=rewards, sampler=Sampler(max_tokens=4, stop=["</a>"]))
        trainer(tmp_path, max_steps=1).fit(module, PromptDataModule(prompts(4), prompts_per_round=2, group_size=2))

    with pytest.raises(ConfigError, match=r"'</a>'.*Set skip_special_tokens: false"):
        fit()
    fit(skip_special_tokens=False)
