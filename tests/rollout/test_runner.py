"""Episodes: turns, time, budgets, failures; none is lost, and each continues from exactly the tokens it sampled."""

import asyncio
import logging
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.base import EpisodeError, Limits, StepResult
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GroupCentered
from rlhf_lightning.rollout.collector import RolloutCollector
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.rollout.statistics import statistics
from rlhf_lightning.types import STOP_REASONS, Completion, Episode
from tests.helpers.environments import PromptEnv
from tests.helpers.paths import CHAT_TEMPLATES
from tests.helpers.rewards import terms
from tests.helpers.rows import prompts, write_rows
from tests.helpers.training import sgd, trainer


def tasks(count: int, group: int = 1) -> list[tuple[Prompt, int]]:
    rows = [Prompt([], [5, 6, 7], {"prompt": f"Count {i}", "i": i}, index=i) for i in range(count)]
    return [(row, sample) for row in rows for sample in range(group)]


def run_episodes(work: list[tuple[Prompt, int]], *settings: Any, **options: Any) -> list[Episode]:
    return EpisodeRunner(*settings, **options).run(work)


class Fake:
    """A sampler without a model, whose tokens depend on the seed only."""

    context, max_tokens, params, stop = None, 8, SamplingParams(8), ()
    session = staticmethod(nullcontext)
    engine = property(lambda self: self)

    def __init__(self, stop_token: int, truncated: float = 0.1) -> None:
        self.stop_token, self.truncated, self.sampled = stop_token, truncated, 0

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        samples = [self._one(seed) for seed in seeds]
        self.sampled += sum(len(sample.ids) for sample in samples)
        return samples

    def _one(self, seed: int) -> Completion:
        chance = random.Random(seed)
        ids = [chance.randrange(100, 200) for _ in range(chance.randrange(self.max_tokens))]
        if chance.random() < self.truncated:
            ids += [101] * (self.max_tokens - len(ids))
            return Completion(ids, [-1.0] * len(ids), "length")
        return Completion([*ids, self.stop_token], [-1.0] * (len(ids) + 1), "stop")


class Several(PromptEnv):
    """An environment with as many turns as the row says, a wait that may be async, and an exception at a given turn."""

    def step(self, message: dict[str, Any]) -> StepResult:
        self.turn += 1
        return StepResult(1.0, self.turn >= self.row.get("turns", 3), [{"role": "user", "content": f"and {self.turn}"}])


# -- ten thousand episodes --------------------------------------------------------------------------------------------


class Failing(Several):
    """Fails with probability 0.1 per step and reset; one random stream decides which attempts fail."""

    chance = random.Random(0)
    raised: list[str] = []  # noqa: RUF012

    def reset(self) -> list[dict[str, Any]]:
        self._maybe("reset")
        return super().reset()

    def step(self, message: dict[str, Any]) -> StepResult:
        self._maybe("step")
        return super().step(message)

    def _maybe(self, where: str) -> None:
        if self.chance.random() < 0.1:
            self.raised.append(where)
            raise RuntimeError("injected")


@pytest.mark.parametrize("policy", ["retry", pytest.param("drop", marks=pytest.mark.slow)])
def test_ten_thousand_episodes_are_each_returned_once(tokenizer: Any, policy: str) -> None:
    Failing.chance, Failing.raised = random.Random(1), []
    chance = random.Random(2)
    rows = [
        Prompt([], [5], {"prompt": "Go" * chance.randrange(1, 9), "turns": chance.randrange(1, 7)}, index=i)
        for i in range(1250)
    ]
    sampler: Any = Fake(tokenizer.eos_token_id)
    limits = Limits(max_turns=4, max_tokens=12, on_error=policy, retries=60)
    collector = RolloutCollector(
        sampler,
        Renderer(tokenizer),
        terms(FunctionReward(lambda completions: [1.0] * len(completions), name="one")),
        GroupCentered(),
        0,
        environment=Failing,
        limits=limits,
    )
    episodes = collector.rollout(rows, 8, (3,))
    assert [(episode.group, episode.sample_index) for episode in episodes] == [
        (i, k) for i in range(1250) for k in range(8)
    ]
    failed = [episode for episode in episodes if episode.failed]
    reasons = Counter(episode.stop_reason for episode in episodes)
    if policy == "drop":
        assert len(failed) == len(Failing.raised) > 1000
        assert all(not episode.training_samples and episode.masked for episode in failed)
    else:
        assert not failed
        assert len(Failing.raised) > 1000
    assert reasons["failed"] == len(failed)
    assert set(reasons) <= set(STOP_REASONS)
    assert min(reasons[name] for name in ("stop", "length", "tokens", "turns")) > 50
    living = [episode for episode in episodes if not episode.failed]
    for episode in living:
        turns = sum(message["role"] == "assistant" for message in episode.responses)
        assert 1 <= turns <= 4
        assert episode.environment_reward == turns
        assert episode.reward == turns + 1
        assert 1 <= episode.response_tokens <= 12
        for training_sample in episode.training_samples:
            assert len(training_sample.ids) == len(training_sample.loss_mask) == len(training_sample.sampling_logprobs)
            assert training_sample.loss_mask[-1] == 1
            assert sum(training_sample.sampling_logprobs) == -training_sample.actions
    kept = sum(episode.response_tokens for episode in living)
    assert kept <= sampler.sampled
    training_samples = collector.training_samples(episodes)
    assert sum(training_sample.actions for training_sample in training_samples) == kept
    assert sum(bool(episode.training_samples) for episode in episodes) == len(living)
    for group in range(0, 1250, 125):
        members = [episode for episode in living if episode.group == group]
        mean = sum(episode.reward for episode in members) / len(members)
        assert [e.advantage for e in members] == pytest.approx([e.reward - mean for e in members])
    sums = statistics(episodes)
    assert sums["failed_episodes"] == (len(failed), 10_000)
    assert sums["reward"] == (sum(episode.reward for episode in living), len(living))
    ended = sum(sums[f"stop_{name}"][0] for name in ("stop", "length", "tokens", "turns", "context"))
    assert ended + len(failed) == 10_000


def test_every_sampled_token_is_kept_without_failures(tokenizer: Any) -> None:
    sampler: Any = Fake(tokenizer.eos_token_id)
    episodes = run_episodes(tasks(500, 4), sampler, Renderer(tokenizer), (0,), Several)
    assert sum(episode.response_tokens for episode in episodes) == sampler.sampled


# -- failures ---------------------------------------------------------------------------------------------------------


class Unlucky(Several):
    """Fails in its second turn as often as the row says."""

    tries: Counter[int] = Counter()  # noqa: RUF012

    def step(self, message: dict[str, Any]) -> StepResult:
        result = super().step(message)
        if self.turn == 2 and self.tries[self.row["i"]] < self.row.get("fails", 0):
            self.tries[self.row["i"]] += 1
            raise ValueError("no luck")
        return result


def played(tokenizer: Any, fails: dict[int, int], limits: Limits, sampler: Any = None) -> list[Episode]:
    Unlucky.tries = Counter()
    work = tasks(4)
    for prompt, _ in work:
        prompt.row["fails"] = fails.get(prompt.index, 0)
    return run_episodes(work, sampler or Fake(tokenizer.eos_token_id, 0.0), Renderer(tokenizer), (0,), Unlucky, limits)


def tokens(episode: Episode) -> list[list[int]]:
    return [training_sample.ids for training_sample in episode.training_samples]


def test_failure_ends_the_run_and_names_the_episode(tokenizer: Any) -> None:
    said = r"prompt 2, sample 0, turn 3: the environment failed: ValueError: no luck \(.*test_runner.py:"
    with pytest.raises(EpisodeError, match=said) as e:
        played(tokenizer, {2: 1}, Limits())
    assert isinstance(e.value.__cause__, ValueError)
    with pytest.raises(EpisodeError, match=r"prompt 2, .* no luck \(.*\) \(tried 3 times\)"):
        played(tokenizer, {2: 3}, Limits(on_error="retry", retries=2))


def test_retry_has_its_own_reproducible_seeds(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(on_error="retry", retries=2)
    clean = played(tokenizer, {}, limits)
    with caplog.at_level(logging.WARNING):
        once, again = (played(tokenizer, {2: 1}, limits) for _ in range(2))
    assert "1 episodes failed and were run again. The first: prompt 2, sample 0, turn 3" in caplog.text
    assert [tokens(a) for a in once] == [tokens(a) for a in again]
    assert [tokens(a) == tokens(b) for a, b in zip(clean, once, strict=True)] == [True, True, False, True]
    assert tokens(played(tokenizer, {2: 2}, limits)[2]) not in (tokens(clean[2]), tokens(once[2]))
    assert once[2].environment_reward == 3.0


def test_dropped_episode_does_not_change_the_others(
    tokenizer: Any, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = Renderer(tokenizer)
    # The tiny model rarely ends a turn by itself.
    sampler = Sampler(max_tokens=20, stop=list("aeiou nt")).build(model.double(), renderer)
    clean = played(tokenizer, {}, Limits(), sampler)
    with caplog.at_level(logging.WARNING):
        dropped = played(tokenizer, {1: 9}, Limits(on_error="drop"), sampler)
    assert "1 of 4 episodes failed and were dropped. The first: prompt 1, sample 0: ValueError: no luck" in caplog.text
    assert len(clean[1].responses) > 1, "it would have come to its second turn"
    for i in (0, 2, 3):
        assert tokens(dropped[i]) == tokens(clean[i])
        assert dropped[i].responses == clean[i].responses
    assert dropped[1].failed
    assert dropped[1].record()["error"] == "ValueError: no luck"
    assert dropped[1].reward == 0.0


def test_environment_with_length_zero_is_stepped(tokenizer: Any) -> None:
    class Empty(Several):
        def __len__(self) -> int:
            return 0

    empty, plain = (
        run_episodes(tasks(2), Fake(tokenizer.eos_token_id, 0.0), Renderer(tokenizer), (0,), kind)
        for kind in (Empty, Several)
    )
    assert [tokens(episode) for episode in empty] == [tokens(episode) for episode in plain]
    assert [episode.environment_reward for episode in empty] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"reset": None}, r"reset\(\) returned None; it must return a list of messages"),
        ({"reset": "Hi"}, r"reset\(\) returned 'Hi'"),
        ({"reset": []}, r"reset\(\) returned \[\]"),
        ({"step": None}, r"step\(\) returned None; it must return a StepResult"),
        ({"step": StepResult(float("nan"))}, r"step\(\) returned reward nan"),
        ({"step": StepResult("1")}, r"step\(\) returned reward '1'"),  # type: ignore[arg-type]
        ({"step": StepResult(metrics={"a": float("inf")})}, r"returned metrics\['a'\] inf"),
        ({"step": StepResult(done=False, next_messages=["Hi"])}, r"next_messages \['Hi'\]"),  # type: ignore[list-item]
    ],
)
def test_invalid_results_of_environments(tokenizer: Any, returned: dict[str, Any], message: str) -> None:
    class Odd(Several):
        def reset(self) -> Any:
            return returned["reset"] if "reset" in returned else super().reset()

        def step(self, message: dict[str, Any]) -> Any:
            return returned.get("step")

    with pytest.raises(EpisodeError, match=f"prompt 0, sample 0, turn .: the environment failed: .*{message}"):
        run_episodes(tasks(1), Fake(tokenizer.eos_token_id, 0.0), Renderer(tokenizer), (0,), Odd)  # type: ignore[arg-type]


def test_template_error_in_a_turn_fails_only_that_episode(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + (
        tokenizer.chat_template
    )

    class Answers(Several):
        def step(self, message: dict[str, Any]) -> StepResult:
            return StepResult(1.0, False, [{"role": "tool", "content": "1"}])

    run: Any = (tasks(2), Fake(tokenizer.eos_token_id, 0.0), Renderer(tokenizer), (0,), Answers)
    with pytest.raises(EpisodeError, match="turn 2: the environment failed: RowError: the chat template rejects"):
        run_episodes(*run)
    assert all(episode.failed for episode in run_episodes(*run, Limits(on_error="drop")))


def boom(row: dict[str, Any]) -> Any:
    if row["wanted"] == 3:
        raise OSError("the sandbox is gone")
    return Several(row)


def test_failure_in_training_names_file_and_line(base: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", prompts(5))
    module = PolicyRLModule(base, environment=boom, sampler=Sampler(max_tokens=4), optimizer=sgd(0.1))
    with pytest.raises(
        EpisodeError, match=rf"{path}:4, sample 0, turn 1: the environment failed: OSError: the sandbox"
    ):
        trainer(tmp_path).fit(module, PromptDataModule(path, group_size=2, prompts_per_round=5))


def test_training_continues_without_dropped_episodes(base: str, tmp_path: Path) -> None:
    module = PolicyRLModule(
        base,
        environment=boom,
        limits=Limits(max_turns=2, on_error="drop"),
        sampler=Sampler(max_tokens=4),
        rewards=[FunctionReward(lambda completions: [float(len(text)) for text in completions], name="length")],
        optimizer=sgd(0.1),
    )
    run = trainer(tmp_path)
    run.fit(module, PromptDataModule(prompts(5), group_size=2, prompts_per_round=5, minibatches=2, seed=1))
    assert run.global_step == 2, "the number of mini-batches does not change"
    assert float(run.callback_metrics["train/failed_episodes"]) == pytest.approx(0.2)
    failed = [episode for episode in module.last_episodes if episode.failed]
    assert [episode.row["wanted"] for episode in failed] == [3, 3]


# -- time -------------------------------------------------------------------------------------------------------------


def test_async_steps_run_concurrently(tokenizer: Any) -> None:
    loops: set[int] = set()

    class Waits(Several):
        async def reset(self) -> Any:  # type: ignore[override]
            loops.add(id(asyncio.get_running_loop()))
            return super().reset()

        async def step(self, message: dict[str, Any]) -> StepResult:  # type: ignore[override]
            loops.add(id(asyncio.get_running_loop()))
            await asyncio.sleep(0.1)
            return super().step(message)

    started = time.perf_counter()
    for limits in (Limits(), Limits(step_timeout=5)):
        episodes = run_episodes(
            tasks(40),
            Fake(tokenizer.eos_token_id, 0.0),
            Renderer(tokenizer),
            (0,),
            Waits,
            limits,  # type: ignore[arg-type]
        )
        assert all(episode.environment_reward == 3.0 for episode in episodes)
    assert time.perf_counter() - started < 3, "one after the other it would be 24 s"
    assert len(loops) == 1, "of all turns and rounds"


def hangs(kind: str) -> type:
    class Hangs(Several):
        def step(self, message: dict[str, Any]) -> Any:
            if self.row["i"] != 1:
                return super().step(message)
            if kind == "sync":
                time.sleep(20)
            return self._blocks() if kind == "blocking" else asyncio.sleep(20)

        async def _blocks(self) -> None:
            time.sleep(1.5)

    return Hangs


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sync", "the call exceeded its time limit of 0.3 s"),
        ("async", "the call exceeded its time limit of 0.3 s"),
        ("blocking", "it does not await"),
    ],
)
def test_hanging_environment_times_out(tokenizer: Any, kind: str, reason: str) -> None:
    run: Any = (tasks(3), Fake(tokenizer.eos_token_id, 0.0), Renderer(tokenizer), (0,), hangs(kind))
    started = time.perf_counter()
    with pytest.raises(EpisodeError, match=f"prompt 1, sample 0, turn 2: .*{reason}"):
        run_episodes(*run, Limits(step_timeout=0.3))
    episodes = run_episodes(*run, Limits(step_timeout=0.3, on_error="drop"))
    assert episodes[1].failed
    if kind != "blocking":  # which also ends all other calls in progress
        assert [episode.failed for episode in episodes] == [False, True, False]
    assert time.perf_counter() - started < 10


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 5, 9, 13])
def test_token_budget_truncates_the_same_tokens(tokenizer: Any, model: Any, budget: int) -> None:
    renderer = Renderer(tokenizer)
    sampler = Sampler(max_tokens=6).build(model.double(), renderer)
    free = run_episodes(tasks(12), sampler, renderer, (0,), Several)
    bound = run_episodes(tasks(12), sampler, renderer, (0,), Several, Limits(max_tokens=budget))
    for a, b in zip(free, bound, strict=True):
        whole, cut = (
            [t for s in e.training_samples for t, m in zip(s.ids, s.loss_mask, strict=True) if m] for e in (a, b)
        )
        assert cut == whole[:budget]
        if len(cut) < len(whole) or len(cut) == budget:
            assert b.stop_reason in ("length", "tokens", a.stop_reason)
        else:
            assert b.stop_reason == a.stop_reason
        if b.stop_reason == "length":
            assert b.training_samples[-1].ids[-1] != tokenizer.eos_token_id
        if b.stop_reason == "tokens":
            assert b.training_samples[-1].ids[-1] == tokenizer.eos_token_id
            assert not b.truncated


def test_turns_and_context(tokenizer: Any) -> None:
    sampler: Any = Fake(tokenizer.eos_token_id, 0.0)
    for turns in (1, 2):
        (episode,) = run_episodes(tasks(1), sampler, Renderer(tokenizer), (0,), Several, Limits(max_turns=turns))
        assert episode.environment_reward == turns
        assert episode.stop_reason == "turns"
    sampler.context = 50
    episodes = run_episodes(tasks(20), sampler, Renderer(tokenizer), (0,), Several)
    assert any(episode.stop_reason == "context" for episode in episodes)
    assert all(
        training_sample.loss_mask[-1] == 1 for episode in episodes for training_sample in episode.training_samples
    ), "nothing after the last"
    sampler.context = 10
    with pytest.raises(EpisodeError, match=r"turn 1: .* no room for a response: the prompt has \d+ tokens"):
        run_episodes(tasks(1), sampler, Renderer(tokenizer), (0,), Several)
    (episode,) = run_episodes([(Prompt([], [5] * 9, {}), 0)], sampler, Renderer(tokenizer), (0,))
    assert (episode.stop_reason, episode.responses, episode.training_samples) == ("context", [], [])


# -- turns and templates ----------------------------------------------------------------------------------------------


class Scripted:
    """Samples given texts letter by letter, so not in the tokens that the tokenizer would produce."""

    context, max_tokens, params, stop = None, 400, SamplingParams(400), ()
    session = staticmethod(nullcontext)
    engine = property(lambda self: self)

    def __init__(self, texts: list[str], renderer: Renderer, stop: str | None = None) -> None:
        self.texts, self.renderer, self.turn = texts, renderer, 0
        self.prompts: list[list[int]] = []
        self.sampled: list[int] = []
        self.ending = stop

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        self.prompts.append(list(prompts[0]))
        tokenizer = self.renderer.tokenizer
        ids = [token for letter in self.texts[self.turn] for token in tokenizer(letter)["input_ids"]]
        self.turn += 1
        end = self.ending or self.renderer.template.turn_end or tokenizer.eos_token
        ids += tokenizer(end, add_special_tokens=False)["input_ids"]
        self.sampled += ids
        return [Completion(ids, [-1.0] * len(ids), "stop")]


class Asks(Several):
    role = "user"

    def step(self, message: dict[str, Any]) -> StepResult:
        self.turn += 1
        return StepResult(0.0, self.turn == 3, [{"role": self.role, "content": f"again {self.turn}"}])


class Tools(Asks):
    role = "tool"


PLAIN = ["First answer.", "é😀 ½", "Third"]
REASONED = [f"<think>\nhm {i}\n</think>\n\nAnswer {i}" for i in range(3)]
OPENED = [f"hm {i}\n</think>\n\nAnswer {i}" for i in range(3)]  # the generation prompt opens the block
ONE, EACH = 1, 3
TEMPLATES = [
    # Kept as written: one row.
    *((name, Asks, PLAIN, ONE) for name in ("own", "cohere", "gemma", "gemma3", "llama3", "llama3_1", "llama3_2")),
    *((name, Asks, PLAIN, ONE) for name in ("qwen2_5", "qwen3", "lfm2", "qwen3_instruct_2507")),
    *((name, Tools, PLAIN, ONE) for name in ("qwen2_5", "qwen3", "llama3_1", "lfm2")),
    *((name, Asks, REASONED, ONE) for name in ("qwen2_5", "llama3", "gemma3", "qwen3_instruct_2507")),
    # Reasoning of turns before the last question is dropped; between tool results it is kept.
    ("qwen3", Asks, REASONED, EACH),
    ("qwen3", Tools, REASONED, ONE),
    ("qwen3_5_think", Asks, OPENED, EACH),
    ("qwen3_5_think", Tools, OPENED, ONE),
    ("qwen3_6", Tools, OPENED, ONE),
    # The generation prompt opens a block that a turn without reasoning does not have.
    ("qwen3_5_think", Asks, PLAIN, EACH),
    ("nemotron_3_nano", Asks, PLAIN, EACH),
    ("deepseekv3", Asks, PLAIN, EACH),
    # History ends a turn by another marker than the last turn.
    ("gptoss", Asks, PLAIN, EACH),
]


@pytest.mark.parametrize("name", ["qwen3", "smollm2-135m-instruct"])
@pytest.mark.parametrize(("template", "environment", "texts", "rows"), TEMPLATES)
def test_episode_is_one_row_unless_the_template_rerenders_turns(
    shared: Path, name: str, template: str, environment: Any, texts: list[str], rows: int
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    if template != "own":
        tokenizer.chat_template = (CHAT_TEMPLATES / f"{template}.jinja").read_text()
    renderer = Renderer(tokenizer)
    sampler: Any = Scripted(texts, renderer)
    (episode,) = run_episodes(tasks(1), sampler, renderer, (0,), environment)
    assert len(episode.training_samples) == rows
    sampled = [t for s in episode.training_samples for t, m in zip(s.ids, s.loss_mask, strict=True) if m]
    assert sampled == sampler.sampled, "every sampled token is trained once, as it was sampled"
    assert [m["content"] for m in episode.responses if m["role"] == "assistant"] == texts
    for turn, ids in enumerate(sampler.prompts):
        # What the policy saw is what it will see at inference.
        before = episode.prompt + episode.responses[: 2 * turn]
        assert tokenizer.decode(ids) == renderer.prompt_text(before)
        if turn == 0 or rows == EACH:
            assert ids == renderer.prompt(before)


def test_whitespace_around_a_response_is_kept_as_sampled(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    sampler: Any = Scripted([" one \n", "\n two", "x"], renderer)
    (episode,) = run_episodes(tasks(1), sampler, renderer, (0,), Asks)
    (training_sample,) = episode.training_samples
    assert "assistant\n one \n<|im_end|>\n<|im_start|>user\nagain 1<|im_end|>" in tokenizer.decode(training_sample.ids)
    assert episode.responses[0]["content"] == "one"


def test_end_token_that_absorbs_whitespace_is_tokenized_as_at_inference(tokenizer: Any) -> None:
    from tokenizers import AddedToken

    # As Phi-3's <|end|>: the line end that the template puts after it is part of it.
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|end|>")
    renderer = Renderer(tokenizer)
    sampler: Any = Scripted(["one", "two", "x"], renderer)
    (episode,) = run_episodes(tasks(1), sampler, renderer, (0,), Asks)
    (training_sample,) = episode.training_samples
    end, line = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer("\n")["input_ids"][0]
    assert training_sample.ids.count(end) == 6
    assert all(b != line for a, b in zip(training_sample.ids, training_sample.ids[1:], strict=False) if a == end)


def test_ending_with_another_stop_token_starts_a_new_row(tokenizer: Any) -> None:
    # The policy ends its turns by a stop token that the template never shows: history would differ from inference.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    renderer = Renderer(tokenizer)
    renderer.stop_token_ids.append(tokenizer.convert_tokens_to_ids("<|other|>"))
    sampler: Any = Scripted(["one", "two", "x"], renderer, "<|other|>")
    (episode,) = run_episodes(tasks(1), sampler, renderer, (0,), Asks)
    assert len(episode.training_samples) == 3
    assert all(
        tokenizer.decode(training_sample.ids).count("<|other|>") == 1 for training_sample in episode.training_samples
    )


# -- stop texts -------------------------------------------------------------------------------------------------------


def test_response_ends_as_soon_as_a_stop_text_is_complete(tokenizer: Any, model: Any) -> None:
    renderer = Renderer(tokenizer)
    settings = Sampler(max_tokens=24, temperature=1.5), Sampler(max_tokens=24, temperature=1.5, stop=["e", "o"])
    free, bound = (one.build(model.double(), renderer) for one in settings)
    prompts = [row.ids for row, _ in tasks(40)]
    stopped = 0
    seeds = list(range(40))
    for whole, cut in zip(free.generate(prompts, seeds), bound.generate(prompts, seeds), strict=True):
        text = tokenizer.decode(cut.ids)
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert not any(stop in tokenizer.decode(cut.ids[:-1]) for stop in ("e", "o"))
        if "e" in text or "o" in text:
            stopped += 1
            assert cut.stop_reason == "stop"
        else:
            assert (cut.ids, cut.stop_reason) == (whole.ids, whole.stop_reason)
    assert stopped > 5
    (episode,) = run_episodes([(Prompt([], [5, 6], {}), 0)], Words("one two thr", tokenizer), renderer, (0,))
    assert episode.response == "one tw", "rewards see the text before the stop"
    assert episode.stopped_by_text
    assert episode.response_tokens == len(tokenizer("one two thr")["input_ids"])


class Words:
    """Samples a text that contains a stop text."""

    context, max_tokens, params, stop = None, 24, SamplingParams(24), ("o thr",)
    session = staticmethod(nullcontext)
    engine = property(lambda self: self)

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.ids = tokenizer(text)["input_ids"]

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        return [Completion(list(self.ids), [-1.0] * len(self.ids), "stop")]


@pytest.mark.parametrize("stop", [[""], "word", [3], ["a", ""]])
def test_invalid_stop_texts_are_rejected(stop: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampler.stop is .*; it must be a list of texts, none of them empty"):
        Sampler(stop=stop)


def test_stop_text_that_the_tokenizer_cannot_produce(tokenizer: Any, model: Any) -> None:
    from tokenizers import normalizers

    for stop in ("\n\n", "END", "é😀", " lead", "<|im_start|>", "</tool_call>"):
        Sampler(stop=[stop]).build(model, Renderer(tokenizer))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        ConfigError, match=r"sampler.stop: the tokenizer never produces 'END' \(it decodes the text's tokens to 'end'\)"
    ):
        Sampler(stop=["END"]).build(model, Renderer(tokenizer))


def test_long_stop_text_is_matched_completely(tokenizer: Any) -> None:
    from rlhf_lightning.generation.token_sampling import is_complete

    stop = "z" * 50
    ids = [tokenizer("z")["input_ids"][0]] * 50
    params = SamplingParams(stop_strings=(stop,))
    assert is_complete(ids, params, tokenizer.decode)
    assert not is_complete(ids[:-1], params, tokenizer.decode)
