"""A run that is asked to stop drops its current round or optimizer step, and repeats it on resume."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
    sys_exit,
)
from rlhf_lightning.callbacks.samples import SamplesLog
from rlhf_lightning.checkpointing import relay
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.checkpointing.io import newest_whole
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.generation.local_engine import LocalEngine
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import Reward
from rlhf_lightning.rewards.normalization import RunningNorm
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.runs import in_ranks
from tests.helpers.training import adamw, trainer

MODULES = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}
Work = list[str]
"""What a run does, in its order: the places of work, `signal`, and `checkpoint` for one that is complete."""


@pytest.fixture(autouse=True)
def handlers_as_they_were() -> Iterator[None]:
    """Restore the signal handlers that a run ended by a signal leaves installed."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    sys_exit._state["asked"] = False
    for number, handler in before.items():
        signal.signal(number, handler)


class Vowels(Reward):
    """Counts the vowels of a response; each call counts as work."""

    def score(self, episodes: Any) -> Any:
        return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in map(self.text, episodes)]


def parts(kind: str, base: str, **options: Any) -> tuple[Any, Any]:
    """A module with everything that changes in a round, and its data: four steps per epoch of two micro-batches."""
    adam = adamw(0.01)
    quiet: dict[str, Any] = {"show_example": False, "seed": 3}
    if kind == "sft":
        return SFTModule(base, optimizer=adam), SFTDataModule(chats(15), chats(4), batch_size=2, **quiet)
    if kind == "preference":
        return PreferenceModule(base, optimizer=adam), PreferenceDataModule(pairs(15), pairs(4), batch_size=2, **quiet)
    policy = PolicyRLModule(
        base,
        optimizer=adam,
        rewards=[Vowels(normalize=RunningNorm())],
        kl=KLPenalty(0.05, target=0.1, horizon=4, refresh_every=2),
        sampler=Sampler(max_tokens=6, slots=2),
        resample_groups=1,
        **options,
    )
    rounds = {"prompts_per_round": 2, "group_size": 2, "minibatches": 4}
    return policy, PromptDataModule(prompts(4), prompts(4), eval_batch_size=2, **rounds, **quiet)


PLACES: dict[str, Callable[[str], tuple[type, str]]] = {
    "training": lambda kind: (MODULES[kind], "training_step"),
    "validation": lambda kind: (MODULES[kind], "validation_step"),
    "sampling": lambda kind: (LocalEngine, "step"),
    "reward": lambda kind: (Vowels, "score"),
}


def watch(monkeypatch: pytest.MonkeyPatch, kind: str, work: Work, act: Callable[[str, int], None]) -> None:
    """Record the work, and call `act` in each piece of it with its place and number; not for pieces of a validation."""
    validating: list[bool] = []

    def count(place: str, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not validating:
                work.append(place)
                act(place, work.count(place))
            validation = place == "validation"
            validating.extend([True] * validation)
            try:
                return original(*args, **kwargs)
            finally:
                if validation:
                    validating.clear()

        monkeypatch.setattr(owner, name, counted)

    for place, where in PLACES.items():
        count(place, *where(kind))
    save = pl.Trainer.save_checkpoint

    def saved(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        work.append("checkpoint")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", saved)


def run(kind: str, base: str, root: Path, resume: bool = False, every: int = 0, **options: Any) -> dict[str, Any]:
    """Weights and files of a run; from the newest checkpoint with `resume`."""
    pl.seed_everything(3, verbose=False)
    own = {name: options.pop(name) for name in ("max_staleness",) if name in options}
    module, data = parts(kind, base, **own)
    found = newest_whole(root / "checkpoints")[0] if resume else None
    logger = MetricsCSV(root, resume=found is not None)
    callbacks = [*([SamplesLog(table_every=0)] if kind == "policy" else []), RunCheckpoints(every=every)]
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    one = trainer(root, enable_checkpointing=True, callbacks=callbacks, logger=logger, **{**settings, **options})
    one.fit(module, data, ckpt_path=found and str(found))
    files = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    return {**{name: value.clone() for name, value in module.state_dict().items()}, **files}


def equal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    assert one.keys() == other.keys()
    same = {name: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for name, a, b in both(one, other)}
    return [name for name, is_same in same.items() if not is_same]


def both(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, one[name], other[name]) for name in one]


def default_handlers() -> None:
    for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL if one != signal.SIGINT else signal.default_int_handler)


def interrupted(
    kind: str, base: str, root: Path, place: str, number: int, by: int = signal.SIGTERM, **options: Any
) -> Work:
    """Run until it stops, signaled in the `number`th piece of work of a place; returns the work done."""
    work: Work = []

    def act(found: str, count: int) -> None:
        if (found, count) == (place, number) and "signal" not in work:
            work.append("signal")
            os.kill(os.getpid(), by)

    default_handlers()  # `nohup` ignores SIGHUP
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, kind, work, act)
        with pytest.raises(SystemExit):
            run(kind, base, root, resume=True, **options)
    sys_exit._state["asked"] = False
    default_handlers()
    return work


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Callable[..., Any]:
    """The start model, the result of an uninterrupted run, and its work; computed once."""
    from tests.helpers.models import build_model

    made: dict[Any, Any] = {}

    def make(kind: str, **options: Any) -> Any:
        key = (kind, str(options))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            build_model(session_tokenizer).save_pretrained(folder / "base")
            session_tokenizer.save_pretrained(folder / "base")
            work: Work = []
            with pytest.MonkeyPatch.context() as patch:
                watch(patch, kind, work, lambda place, number: None)
                made[key] = str(folder / "base"), run(kind, str(folder / "base"), folder / "whole", **options), work
        return made[key]

    return make


def check(kind: str, base: str, expected: Any, root: Path, place: str, number: int, by: int, **options: Any) -> None:
    """Interrupt a run in the `number`th piece of work of a place, check the work done after, resume, and compare."""
    work = interrupted(kind, base, root, place, number, by, **options)
    before, after = work[: work.index("signal")], work[work.index("signal") + 1 :]
    steps = before.count("training") // 2  # that of the micro-batch under way too, where it completes one
    saved = newest_whole(root / "checkpoints")[0]
    assert (saved and saved.name) == (f"step={steps}.ckpt" if steps else None), f"{place} {number}"
    # That of the last step, and nothing else: it may have been there before.
    assert after in ([], ["checkpoint"]), f"{place} {number}: {after}"
    assert equal(expected, run(kind, base, root, resume=True, **options)) == [], f"{place} {number}"


@pytest.mark.parametrize(
    ("kind", "place", "number", "by"),
    [
        ("sft", "training", 7, signal.SIGTERM),  # the first micro-batch of a step
        ("sft", "training", 9, signal.SIGINT),  # of an epoch
        ("preference", "training", 5, signal.SIGHUP),
        ("policy", "training", 5, signal.SIGTERM),  # of a round
        ("policy", "training", 11, signal.SIGTERM),  # within one
        ("policy", "sampling", 3, signal.SIGTERM),  # before the first step
        pytest.param("policy", "reward", 5, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_interrupted_work_is_repeated_on_resume(
    kind: str, place: str, number: int, by: int, whole: Any, tmp_path: Path
) -> None:
    base, expected, _ = whole(kind)
    check(kind, base, expected, tmp_path / "run", place, number, by)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("sampling", 30),  # in the thread, or in the main thread, which samples groups again
        ("reward", 3),  # of a round that the thread has sampled
        ("training", 5),  # of a round, so that it is trained again
        ("training", 8),  # within one
    ],
)
def test_run_that_samples_ahead_is_resumed_exactly(place: str, number: int, whole: Any, tmp_path: Path) -> None:
    ahead = {"max_staleness": 1}
    base, expected, _ = whole("policy", **ahead)
    interrupted("policy", base, tmp_path / "run", place, number, **ahead)
    assert equal(expected, run("policy", base, tmp_path / "run", resume=True, **ahead)) == []


@pytest.mark.parametrize(
    ("kind", "place", "number"),
    [
        ("policy", "validation", 1),
        ("preference", "training", 4),  # before one
        ("sft", "validation", 3),  # at the end of an epoch
    ],
)
def test_interrupted_validation_is_repeated_on_resume(
    kind: str, place: str, number: int, whole: Any, tmp_path: Path
) -> None:
    base, expected, _ = whole(kind, **VALIDATED)
    work = interrupted(kind, base, tmp_path, place, number, signal.SIGTERM, **VALIDATED)
    assert work[work.index("signal") :] == ["signal", "checkpoint"]
    # In the validation that is done again, of which the checkpoint is there.
    work = interrupted(kind, base, tmp_path, "validation", 1, signal.SIGTERM, **VALIDATED)
    assert work == ["validation", "signal"]
    assert equal(expected, run(kind, base, tmp_path, resume=True, **VALIDATED)) == []


@pytest.mark.parametrize(
    ("kind", "signalled", "after"),
    [
        ("sft", 1, "training"),  # between micro-batches
        ("policy", 0, "waiting"),  # the fast rank, as it waits for the other
        pytest.param("policy", 1, "sampling", marks=pytest.mark.slow),
    ],
)
def test_signal_to_one_of_two_ranks(kind: str, signalled: int, after: str, base: str, tmp_path: Path) -> None:
    """The other one stops too, and all ranks stop at one step."""
    two = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 4, "limit_val_batches": 0}
    slow = 0.1

    def act(work: Work, stopping: bool) -> Callable[[str, int], None]:
        rank = int(os.environ["RANK"])

        def signal_me() -> None:
            (tmp_path / "signalled").touch()
            os.kill(os.getpid(), signal.SIGTERM)

        def acts(place: str, number: int) -> None:
            if (tmp_path / "signalled").exists():
                work.append("late")
            if not stopping:
                return
            if place == "training" and kind == "sft":
                time.sleep(slow)
                if rank == signalled and number == 6:
                    signal_me()
            if place == "sampling" and work.count("training") >= 4:
                time.sleep(slow * rank)  # the second rank is far slower
                if after == "sampling" and rank == signalled and work[-2:] == ["sampling"] * 2:
                    signal_me()
            if place == "reward" and after == "waiting" and rank == signalled and work.count("training") >= 4:
                threading.Timer(2 * slow, signal_me).start()

        return acts

    def fit(root: Path, stopping: bool, resume: bool = False) -> Callable[[], None]:
        def ranks() -> None:
            relay.EVERY = slow / 10
            work: Work = []
            with pytest.MonkeyPatch.context() as patch:
                watch(patch, kind, work, act(work, stopping))
                try:
                    run(kind, base, root, resume, **two)
                except SystemExit:
                    assert stopping
                else:
                    assert not stopping
            if stopping:
                assert work.count("late") <= 2, work
                assert work[-1] == "checkpoint", work

        return ranks

    in_ranks(2, fit(tmp_path / "whole", False), tmp_path / "out")
    in_ranks(2, fit(tmp_path / "run", True), tmp_path / "out")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=1.ckpt"]
    (tmp_path / "signalled").unlink()
    in_ranks(2, fit(tmp_path / "run", False, resume=True), tmp_path / "out")
    for name in ("metrics.csv", *(["samples.jsonl"] if kind == "policy" else [])):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


VALIDATED = {"val_check_interval": 4, "every": 3, "limit_val_batches": 2}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("options", [{}, VALIDATED, {"max_epochs": None, "max_steps": 6}])
@pytest.mark.parametrize("kind", list(MODULES))
def test_signal_at_any_point(kind: str, options: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    base, expected, work = whole(kind, **options)
    for place in sorted({*PLACES} & set(work)):
        # The engine's first two steps are its check of the model.
        numbers = range(3, work.count(place) + 1, 5) if place == "sampling" else range(1, work.count(place) + 1)
        for number in numbers:
            check(kind, base, expected, tmp_path / f"{place}{number}", place, number, signal.SIGTERM, **options)
