"""Sampling while training: which weights sample a round, what an interruption keeps, and how the thread ends."""

import gc
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import PolicyRLModule, PromptDataModule, sys_exit
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.checkpointing.io import newest_whole
from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.environments.base import EpisodeError, StepResult
from rlhf_lightning.errors import ConfigError, SyncError
from rlhf_lightning.generation.canary import Canary
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.token_sampling import SamplingParams, uniforms
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.modules.policy_checks import check_producer
from rlhf_lightning.objectives.policy import ImportanceWeights, PolicyObjective, Reinforce
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.policy_copy import PolicyCopy
from rlhf_lightning.rollout.producer import _Thread
from rlhf_lightning.types import Completion
from tests.helpers.environments import PromptEnv
from tests.helpers.models import build_model
from tests.helpers.modules import length, make, same, weights
from tests.helpers.rows import prompts
from tests.helpers.training import sgd, trainer

SECONDS = 20.0
"""Limit for waiting on the other thread, after which a test fails."""


@pytest.fixture(autouse=True)
def thread_has_ended() -> Iterator[None]:
    yield
    sys_exit._state["asked"] = False
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


class ExternalEngine:
    """An engine with weights of its own: remembers what it was asked, and samples random tokens."""

    def __init__(self) -> None:
        self.version, self.weight = -1, 0.0
        self.calls: list[tuple[str, int, float]] = []
        """Thread, version of the weights, and a weight, for each call of `generate`."""
        self.prompts: list[list[int]] = []
        self.busy = threading.Lock()

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert self.busy.acquire(blocking=False), "two threads use the engine"
        self.version, self.weight = version, float(dict(named_tensors)["model.embed_tokens.weight"].sum())
        self.busy.release()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        assert self.busy.acquire(blocking=False), "two threads use the engine"
        self.calls.append((threading.current_thread().name, self.version, self.weight))
        self.prompts += [list(prompt) for prompt in prompts]
        self.wait(self.version)
        self.busy.release()
        # Of two lengths, so that the rewards of a group of two differ.
        lengths = [1 + 3 * (i % 2) for i in range(len(seeds))]
        return [Completion([60 + seed % 40] * n, [-1.0] * n) for seed, n in zip(seeds, lengths, strict=True)]

    def wait(self, version: int) -> None:
        """Overridden to wait for something."""


class Trained(Callback):
    """Records prompts, versions and metrics of each step, and can act after one."""

    def __init__(self, act: Any = None) -> None:
        self.prompts: Counter[str] = Counter()
        self.rounds: list[int] = []
        self.ages: list[tuple[float, float]] = []
        self.weights: dict[int, float] = {}
        self.act = act

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.rounds.append(batch["round"])
        self.weights.setdefault(batch["round"], float(module.model.get_input_embeddings().weight.detach().sum()))
        self.prompts.update(set(batch["where"]))

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "train/staleness" in run.logged_metrics:
            self.ages.append(tuple(float(run.logged_metrics[f"train/staleness{end}"]) for end in ("", "_max")))
        if self.act:
            self.act(batch["round"])


def policy(base: str, max_staleness: int = 1, engine: Any = None, **options: Any) -> PolicyRLModule:
    options = {"optimizer": sgd(0.5), "sampler": Sampler(max_tokens=6, engine=engine), **options}
    options.setdefault("rewards", [FunctionReward(length)])
    return make("policy", base, max_staleness=max_staleness, **options)


def rows(count: int = 6, **options: Any) -> PromptDataModule:
    """Rounds of one prompt, in the order of the data."""
    options = {"prompts_per_round": 1, "group_size": 2, "seed": 1, "show_example": False, **options}
    return PromptDataModule(prompts(count), prompts(2), **options)


def training(root: Path, **options: Any) -> Any:
    """A Trainer without validation, which would sample too."""
    return trainer(root, **{"limit_val_batches": 0, **options})


def test_nothing_is_sampled_ahead_by_default(base: str, tmp_path: Path) -> None:
    names: set[str] = set()
    watch = Trained(lambda index: names.update(thread.name for thread in threading.enumerate()))
    module = make("policy", base)
    training(tmp_path, callbacks=[watch]).fit(module, rows(2))
    assert "rollouts" not in names
    assert module.producer is None
    assert not watch.ages


def test_a_round_is_sampled_while_the_one_before_it_is_trained(base: str, tmp_path: Path) -> None:
    trained = threading.Event()

    class Waits(ExternalEngine):
        def wait(self, version: int) -> None:
            if len(self.calls) == 2:  # the second round
                assert trained.wait(SECONDS), "the first round is not trained while the second one is sampled"

    engine = Waits()
    watch = Trained(lambda index: trained.set())
    training(tmp_path, callbacks=[watch]).fit(policy(base, 1, engine), rows(4))
    assert [call[0] for call in engine.calls] == ["rollouts"] * 4
    assert [call[1] for call in engine.calls] == [0, 0, 1, 2]
    # The engine had the weights from the start of the round that the version names.
    for _, version, weight in engine.calls:
        assert weight == watch.weights[version]
    assert len(set(watch.weights.values())) == 4
    assert watch.ages == [(0, 0), (1, 1), (1, 1), (1, 1)]


def test_weights_do_not_depend_on_when_the_thread_wakes_up(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = _Thread._next

    def late(thread: Any) -> Any:
        threading.Event().wait(0.2)  # longer than a step
        return following(thread)

    monkeypatch.setattr(_Thread, "_next", late)
    engine, watch = ExternalEngine(), Trained()
    training(tmp_path, callbacks=[watch]).fit(policy(base, 1, engine), rows(4))
    assert [age for age, _ in watch.ages] == [0, 1, 1, 1]
    for _, version, weight in engine.calls:
        assert weight == watch.weights[version]


@pytest.mark.parametrize("most", [2, 3])
def test_no_round_is_older_than_the_maximum(most: int, base: str, tmp_path: Path) -> None:
    """A fast engine runs ahead as far as it may, and waits there."""
    engine = ExternalEngine()
    sampled: list[int] = []
    ahead = threading.Event()

    def act(index: int) -> None:
        # Each step lasts until the thread can go no further.
        wanted = min(6, index + most + 1)
        while len(engine.calls) < wanted:
            ahead.wait(0.01)
        ahead.wait(0.05)
        sampled.append(len(engine.calls))

    watch = Trained(act)
    training(tmp_path, callbacks=[watch]).fit(policy(base, most, engine), rows(6))
    assert sampled == [min(6, index + most + 1) for index in range(6)]
    assert [age for age, _ in watch.ages] == [min(index, most) for index in range(6)]
    assert sorted(watch.prompts.values()) == [1] * 6


def test_slow_sampling_uses_the_newest_weights(base: str, tmp_path: Path) -> None:
    """If the trainer waits for each round, the next one is sampled with the weights that it then has."""

    class Slow(ExternalEngine):
        def wait(self, version: int) -> None:
            # Until the main thread waits for this round.
            while module.producer._thread.at_rest != len(self.calls) - 1:
                threading.Event().wait(0.005)

    engine = Slow()
    watch = Trained()
    module: Any = policy(base, 3, engine)
    training(tmp_path, callbacks=[watch]).fit(module, rows(5))
    assert [age for age, _ in watch.ages] == [0, 1, 1, 1, 1]
    for _, version, weight in engine.calls:
        assert weight == watch.weights[version]


def test_first_round_of_the_built_in_engine_equals_that_without_a_thread(base: str, tmp_path: Path) -> None:
    """With autocast, too, and with the copy of an adapter."""
    for precision in ("bf16-mixed", "bf16-true", "32-true"):
        found = []
        for max_staleness in (0, 1):
            torch.manual_seed(0)
            module = policy(base, max_staleness, lora=LoRA(rank=2))
            episodes: list[Any] = []
            watch = Trained(lambda index, module=module, episodes=episodes: episodes.append(module.last_episodes))
            training(tmp_path, callbacks=[watch], max_steps=1, precision=precision).fit(module, rows(2))
            found.append([(one.ids, one.sampling_logprobs) for e in episodes[0] for one in e.training_samples])
        assert found[0] == found[1]


def test_random_numbers_of_the_sampler_do_not_depend_on_the_default_type() -> None:
    expected = uniforms([1, 2], 50)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(uniforms([1, 2], 50), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(expected.unique()) == 100


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("same_count", [True, False])
def test_each_prompt_is_trained_once_through_an_interruption(
    most: int, same_count: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that were sampled before it are not sampled again; the one that was being sampled is."""
    stop, start = threading.Event(), _Thread.start

    class Blocks(ExternalEngine):
        def wait(self, version: int) -> None:
            if len(self.calls) == 4 and not stop.is_set():
                stop.wait(SECONDS)  # the fourth round is under way when the run is interrupted

    def act(index: int) -> None:
        if index == 2 - min(most, 2) + (most == 1):
            # Ahead as far as it goes: with 1 the third round is trained, with 3 the first.
            while len(engine.calls) < 4:
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    class Interrupted(Trained):
        def on_exception(self, *_: Any) -> None:  # the checkpoint is written
            stop.set()

    engine = Blocks()
    first, second = Interrupted(act), Trained()
    run = training(tmp_path, callbacks=[first, RunCheckpoints(every=0)], enable_checkpointing=True)
    with pytest.raises(SystemExit):
        run.fit(policy(base, most, engine), rows(8))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    path = newest_whole(tmp_path / "checkpoints")[0]
    assert path is not None
    if not same_count:  # as if from two ranks: what was sampled ahead is dropped
        state = torch.load(path, weights_only=True)
        ahead = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["ahead"]
        ahead["rounds"].append([])
        torch.save(state, path)
    before = len(engine.prompts)
    resumed = ExternalEngine()
    # The thread starts after the main thread has asked for the round, and could have newer weights.
    monkeypatch.setattr(_Thread, "start", lambda thread: threading.Timer(0.3, start, [thread]).start())
    run = training(tmp_path, callbacks=[second, RunCheckpoints(every=0)], enable_checkpointing=True)
    run.fit(policy(base, most, resumed), rows(8), ckpt_path=str(path))
    assert sorted((first.prompts + second.prompts).values()) == [1] * 8
    assert second.rounds[0] == first.rounds[-1] + 1
    again = [prompt for prompt in resumed.prompts if prompt in engine.prompts]
    kept = len({tuple(prompt) for prompt in again})
    assert before == 8  # four rounds of two
    if same_count:  # with the weights that it was being sampled with
        assert resumed.calls[0][1:] == engine.calls[3][1:]
    assert kept == (1 if same_count else 4 - len(first.rounds))


def test_checkpoint_without_rounds_ahead_resumes(base: str, tmp_path: Path) -> None:
    """A checkpoint of a run with another `max_staleness` can be continued, in both directions."""
    for before, after in ((0, 1), (1, 0)):
        folder = tmp_path / str(before)
        first, second = Trained(), Trained()
        callbacks = [first, RunCheckpoints(every=2)]
        options = {"enable_checkpointing": True, "max_epochs": 1}
        training(folder, callbacks=callbacks, **{**options, "max_steps": 2}).fit(policy(base, before), rows(5))
        path = str(newest_whole(folder / "checkpoints")[0])
        run = training(folder, callbacks=[second, RunCheckpoints(every=2)], **options)
        run.fit(policy(base, after), rows(5), ckpt_path=path)
        assert sorted((first.prompts + second.prompts).values()) == [1] * 5


def test_weights_are_kept_for_an_unfinished_round_of_another_rank(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [False]
    gathered = lambda value: [value, others[0]] if isinstance(value, bool) else [value]  # noqa: E731
    monkeypatch.setattr("rlhf_lightning.rollout.producer.gather", gathered)
    engine, states = ExternalEngine(), list[Any]()

    def act(index: int) -> None:
        while len(engine.calls) < index + 2:
            threading.Event().wait(0.01)
        for others[0] in (False, True):
            states.append(module.producer.state_dict(index + 1))
        raise LookupError("enough")

    module: Any = policy(base, 1, engine)
    with pytest.raises(LookupError, match="enough"):
        training(tmp_path, callbacks=[Trained(act)]).fit(module, rows(4))
    assert [(state["version"], state["weights"] is None) for state in states] == [(None, True), (0, False)]


def test_run_with_a_smaller_maximum_samples_older_rounds_again(base: str, tmp_path: Path) -> None:
    trained = threading.Event()

    class Blocks(ExternalEngine):
        def wait(self, version: int) -> None:
            if len(self.calls) == 4:
                assert trained.wait(SECONDS)  # so that it is under way when the first checkpoint is written

    def act(index: int) -> None:
        while index == 0 and len(engine.calls) < 4:
            threading.Event().wait(0.01)
        if index:
            trained.set()

    engine = Blocks()
    first, second = Trained(act), Trained()
    callbacks = [first, RunCheckpoints(every=1, keep=9)]
    # The second round is ready, so that its step does not wait for the fourth.
    training(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(policy(base, 3, engine), rows(6))
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    ahead = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["ahead"]
    assert [(one["index"], one["version"]) for one in ahead["rounds"][0]] == [(1, 0), (2, 0)]
    assert ahead["weights"] is not None
    run = training(tmp_path, callbacks=[second, RunCheckpoints(every=0)], enable_checkpointing=True)
    run.fit(policy(base, 1, ExternalEngine()), rows(6), ckpt_path=str(path))
    assert second.rounds == [1, 2, 3, 4, 5]
    assert [age for age, _ in second.ages] == [1] * 5


# -- failures ---------------------------------------------------------------------------------------------------------


class Breaks(PromptEnv):
    """Fails for the prompts of one round."""

    def step(self, message: Any) -> StepResult:
        if self.row["prompt"] == BROKEN[0]:
            raise ZeroDivisionError("the tool broke")
        return StepResult(float(len(message["content"])), done=True)


BROKEN = [""]


def test_failure_of_a_later_round_is_raised_when_the_round_is_due(base: str, tmp_path: Path) -> None:
    watch = Trained()
    generator = torch.Generator().manual_seed(mix_seeds(1, 0))
    BROKEN[0] = prompts(6)[torch.randperm(6, generator=generator).tolist()[3]]["prompt"]
    module = policy(base, 2, rewards=[], environment=Breaks)
    with pytest.raises(EpisodeError, match="ZeroDivisionError: the tool broke") as found:
        training(tmp_path, callbacks=[watch]).fit(module, rows(6))
    assert watch.rounds == [0, 1, 2]
    assert "run_groups" in {frame.name for frame in traceback.extract_tb(found.value.__traceback__)}
    assert found.value.__cause__ is not None
    assert "step" in {frame.name for frame in traceback.extract_tb(found.value.__cause__.__traceback__)}


def test_thread_ends_if_training_fails(base: str, tmp_path: Path) -> None:
    def act(index: int) -> None:
        raise LookupError("in training")

    with pytest.raises(LookupError, match="in training"):
        training(tmp_path, callbacks=[Trained(act)]).fit(policy(base, 2), rows(6))


def test_thread_ends_if_the_epoch_is_cut_short(base: str, tmp_path: Path) -> None:
    watch = Trained()
    training(tmp_path, callbacks=[watch], max_epochs=2, limit_train_batches=2).fit(policy(base, 2), rows(6))
    assert len(watch.rounds) == 4
    assert [age for age, _ in watch.ages][::2] == [0, 0]  # the first round of an epoch has the current weights


# -- beside the thread ------------------------------------------------------------------------------------------------


def test_validation_waits_for_one_round_of_an_external_engine(base: str, tmp_path: Path) -> None:
    validates = threading.Event()

    class Waits(ExternalEngine):
        def wait(self, version: int) -> None:
            if len(self.calls) == 3:
                assert validates.wait(SECONDS)

    class Validated(Trained):
        def on_validation_start(self, run: Any, module: Any) -> None:
            validates.set()

        def on_validation_epoch_end(self, run: Any, module: Any) -> None:
            weight = float(module.model.get_input_embeddings().weight.detach().sum())
            assert engine.calls[-1][0] == "MainThread"
            assert engine.calls[-1][2] == weight, "validation samples with the current weights"
            sampled.append([name for name, _, _ in engine.calls].count("rollouts"))

    engine, sampled = Waits(), list[int]()
    watch = Validated()
    run = trainer(tmp_path, callbacks=[watch], val_check_interval=2, num_sanity_val_steps=0)
    run.fit(policy(base, 2, engine), rows(6))
    assert sampled[0] == 3, "the round after the one under way waits for the end of the validation"
    assert len(sampled) == 3
    for name, version, weight in engine.calls:
        if name == "rollouts":
            assert weight == watch.weights[version]


def test_groups_are_sampled_again_with_the_current_weights(base: str, tmp_path: Path) -> None:
    class Equal(ExternalEngine):
        def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
            return [Completion([70], [-1.0]) for _ in super().generate(prompts, params, seeds)]

    engine = Equal()
    watch = Trained()
    module = policy(base, 1, engine, resample_groups=1, kl=KLPenalty(0.5))
    training(tmp_path, callbacks=[watch]).fit(module, rows(4))
    assert [version for name, version, _ in engine.calls if name == "MainThread"] == [0, 1, 2, 3]
    for _, version, weight in engine.calls:
        assert weight == watch.weights[version]
    assert watch.ages == [(0, 0)] * 4


def test_engine_is_compared_with_the_weights_that_it_received(base: str, tmp_path: Path) -> None:
    """Not with those of the policy, which changes meanwhile."""

    class Scores(ExternalEngine):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(base)
            self.scored: list[str] = []

        def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
            received = {name: tensor.clone() for name, tensor in named_tensors}
            self.model.load_state_dict(received, strict=False)  # a tied head is sent with the embeddings
            super().sync(received.items(), version)

        @torch.no_grad()
        def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
            self.scored.append(threading.current_thread().name)
            ids = torch.tensor(rows)
            logprobs = self.model(ids).logits[:, :-1].log_softmax(-1)
            return logprobs.gather(-1, ids[:, 1:, None])[..., 0].tolist()

    engine = Scores()
    module = policy(base, 1, engine, lora=LoRA(rank=2), optimizer=sgd(20.0))
    training(tmp_path).fit(module, rows(4))
    assert engine.scored == ["rollouts"] * 4
    with pytest.raises(SyncError):
        Canary(engine, module.model).check(4)


def test_validation_does_not_change_what_is_trained(base: str, tmp_path: Path) -> None:
    """With the built-in engine both sample at the same time, from different models."""
    results = []
    for options in ({"limit_val_batches": 0}, {"val_check_interval": 1, "num_sanity_val_steps": 0}):
        module = policy(base, 1)
        trainer(tmp_path, **options).fit(module, rows(4))
        results.append({name: value for name, value in weights(module).items() if not name.startswith("heldout")})
    same(*results)


# -- settings and memory ----------------------------------------------------------------------------------------------


def test_losses_that_do_not_correct_are_refused(base: str) -> None:
    class Plain(PolicyObjective):
        valid_off_policy = False

        def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
            return -advantages * logprobs * loss_mask

    for objective in (Reinforce(), Plain()):
        with pytest.raises(ConfigError, match=f"{type(objective).__name__} has neither a clip nor"):
            policy(base, 1, objective=objective)
    assert policy(base, 1, objective=Reinforce(), importance_weights=ImportanceWeights()).max_staleness == 1
    assert policy(base, 0, objective=Reinforce()).importance_weights is None
    assert isinstance(policy(base, 1).importance_weights, ImportanceWeights)


def test_sharded_policies_and_cuda_graphs_are_refused(session_tokenizer: Any) -> None:
    model = build_model(session_tokenizer)

    class ShardsToo(DDPStrategy):
        """As that of DeepSpeed."""

    one = SingleDeviceStrategy()
    check_producer(one, model, Sampler())
    check_producer(DDPStrategy(), model, Sampler())
    with pytest.raises(ConfigError, match="ShardsToo"):
        check_producer(ShardsToo(), model, Sampler())
    with pytest.raises(ConfigError, match="cuda_graphs: false"):
        check_producer(one, model, Sampler(cuda_graphs=True))
    model.run_inside = lambda function: function()
    with pytest.raises(ConfigError, match="max_staleness: 0"):
        check_producer(one, model, Sampler())


def test_copy_shares_frozen_weights(base: str) -> None:
    module = policy(base, 0, lora=LoRA(rank=2))
    module.configure_model()
    model = module.model
    copied = PolicyCopy(model)
    theirs = dict(model.named_parameters())
    for name, weight in copied.model.named_parameters():
        assert (weight is theirs[name]) == ("lora_" not in name)
        assert weight.requires_grad == ("lora_" in name)
    before = copied.loaded()
    with torch.no_grad():
        for weight in theirs.values():
            if weight.requires_grad:
                weight.add_(1.0)
    same(copied.loaded(), before)
    copied.load()
    same(copied.loaded(), copied.current())
    copied.load(before)
    same(copied.loaded(), before)
    for weight in theirs.values():
        weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="are trained now"):
        copied.load()


def test_producer_state_is_plain(base: str, tmp_path: Path) -> None:
    """A checkpoint with rounds ahead loads with `weights_only=True`, and holds only those that are not trained."""
    engine = ExternalEngine()

    def act(index: int) -> None:
        while len(engine.calls) < min(5, index + 3):
            threading.Event().wait(0.01)

    options = {"enable_checkpointing": True, "callbacks": [Trained(act), RunCheckpoints(every=1, keep=9)]}
    training(tmp_path, **options).fit(policy(base, 2, engine), rows(5))
    for step in range(1, 5):
        state = torch.load(tmp_path / "checkpoints" / f"step={step}.ckpt", weights_only=True)
        ahead = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["ahead"]
        found = [one["index"] for one in ahead["rounds"][0]]
        assert found == list(range(step, step + len(found)))
        assert ahead["weights"] is None or step + len(found) < 5
    assert ahead["version"] is None
