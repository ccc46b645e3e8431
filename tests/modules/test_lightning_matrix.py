"""Lightning's own callbacks, loggers, profilers and Trainer flags with each module: each works or is refused.

A case asserts what the feature is for, not only that the run ends. What other files test is not repeated here: resume,
DDP and accumulation (test_invariances.py), loggers of the command (test_metrics_page.py), sharding (test_sharding.py).
"""

import csv
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import profilers
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner

from rlhf_lightning import PolicyRLModule, PreferenceModule, SFTModule
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Engine, Sampler
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rewards.normalization import RunningNorm
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.types import Completion
from tests.helpers.models import build_model
from tests.helpers.modules import data, make, same, vowels, weights
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.training import sgd, trainer

KINDS = ["sft", "preference", "policy"]

pytestmark = pytest.mark.parametrize("kind", KINDS)
CLASSES: dict[str, Any] = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}
HELD_OUT = {"sft": "val/nll", "preference": "val/loss", "policy": "val/reward_sampled"}
STEP = {"sft": "train/nll", "preference": "train/loss", "policy": "train/entropy"}
LORA = {"sft": {}, "preference": {}, "policy": {"kl": KLPenalty(0.1)}}
"""Additional settings with LoRA: for the policy a reference, which is a frozen adapter."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> str:
    """A model folder, which no case writes to."""
    folder = tmp_path_factory.mktemp("base")
    build_model(session_tokenizer).save_pretrained(folder)
    session_tokenizer.save_pretrained(folder)
    return str(folder)


class Counts(Callback):
    """Counts batches, validation runs and steps, and keeps the weights after each step."""

    def __init__(self) -> None:
        self.train, self.val, self.test, self.predict, self.validations = 0, 0, 0, 0, 0
        self.seen: list[Any] = []
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train += 1
        where = sorted(set(batch["where"])) if "where" in batch else batch["input_ids"].tolist()
        self.seen.append(where)
        if run.global_step > len(self.steps):
            self.steps.append(weights(module))

    def on_validation_batch_end(self, *args: Any) -> None:
        self.val += 1

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.validations += 1

    def on_test_batch_end(self, *args: Any) -> None:
        self.test += 1

    def on_predict_batch_end(self, *args: Any) -> None:
        self.predict += 1


def fit(kind: str, base: str, root: Path, *callbacks: Callback, source: Any = None, **options: Any) -> tuple[Any, Any]:
    """A run of a module with callbacks and Trainer options: the module and its trainer."""
    torch.manual_seed(0)  # the reward head's first weights
    settings = options.pop("settings", {})
    module = make(kind, base, **settings)
    run = trainer(root, **{"callbacks": list(callbacks), **options})
    run.fit(module, data(kind) if source is None else source)
    return module, run


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean distance over all weights."""
    return float(sum(((one[name] - other[name]).double() ** 2).sum() for name in one) ** 0.5)


def columns(folder: Path) -> dict[str, list[str]]:
    """The values of `metrics.csv`, without blanks."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


# -- checkpoints, stopping, schedules ---------------------------------------------------------------------------------


def test_model_checkpoint_saves_the_best_and_it_loads(kind: str, base: str, tmp_path: Path) -> None:
    counts = Counts()
    keep = ModelCheckpoint(tmp_path / "c", monitor=HELD_OUT[kind], save_top_k=1, every_n_epochs=1)
    _, run = fit(kind, base, tmp_path, keep, counts, max_epochs=2, enable_checkpointing=True)
    facts = torch.load(keep.best_model_path, weights_only=True)
    assert float(keep.best_model_score) <= float(run.callback_metrics[HELD_OUT[kind]])
    loaded = CLASSES[kind].load_from_checkpoint(keep.best_model_path)
    same(weights(loaded), counts.steps[facts["global_step"] - 1])


def test_early_stopping_stops(kind: str, base: str, tmp_path: Path) -> None:
    stop = EarlyStopping(HELD_OUT[kind], patience=1, min_delta=1e9)
    _, run = fit(kind, base, tmp_path, stop, max_epochs=5)
    assert (run.current_epoch, stop.stopped_epoch) == (2, 1)


def test_timer_stops(kind: str, base: str, tmp_path: Path) -> None:
    timer = Timer(timedelta(microseconds=1), verbose=False)
    _, run = fit(kind, base, tmp_path, timer, max_epochs=5)
    assert run.global_step == 1
    assert timer.time_elapsed("train") > 0


def test_lambda_callback_is_called(kind: str, base: str, tmp_path: Path) -> None:
    losses: list[float] = []
    seen = LambdaCallback(on_train_batch_end=lambda run, module, outputs, batch, index: losses.append(outputs["loss"]))
    fit(kind, base, tmp_path, seen)
    assert len(losses) == 3


# -- averaged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ema", "lora"), [(False, True), (True, False)])
def test_weight_averaging_averages_the_weights(kind: str, ema: bool, lora: bool, base: str, tmp_path: Path) -> None:
    """At the end, in checkpoints, and after resuming; frozen weights are not in checkpoints."""
    counts = Counts()
    settings: dict[str, Any] = {"optimizer": sgd(1.0)} | ({"lora": LoRA(2), **LORA[kind]} if lora else {})

    def average() -> WeightAveraging:
        return EMAWeightAveraging(decay=0.5) if ema else WeightAveraging()

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module, _ = fit(kind, base, tmp_path, average(), counts, keep, enable_checkpointing=True, settings=settings)
    wanted = counts.steps[0]
    for n, step in enumerate(counts.steps[1:], 2):
        share = 0.5 if ema else 1 / n
        wanted = {name: (1 - share) * wanted[name] + share * step[name] for name in wanted}
    assert distance(counts.steps[-1], wanted) > 1e-6
    same(weights(module), wanted, rtol=1e-5, atol=1e-6)
    loaded = CLASSES[kind].load_from_checkpoint(tmp_path / "step=3.ckpt")
    same(weights(loaded), weights(module))
    again = make(kind, base, **settings)
    trainer(tmp_path / "again", callbacks=[average()]).fit(
        again, data(kind), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True
    )
    same(weights(again), weights(module))


def test_run_killed_after_its_last_checkpoint_ends_with_averaged_weights(kind: str, base: str, tmp_path: Path) -> None:
    """Its resume has no step left, and Lightning would call no hook of its end."""
    hooks: list[str] = []
    names = ("on_train_start", "on_train_end")
    seen = LambdaCallback(**{name: lambda *args, name=name: hooks.append(name) for name in names})

    def trained(path: Path | None = None) -> dict[str, torch.Tensor]:
        module = make(kind, base, optimizer=sgd(1.0))
        callbacks = [EMAWeightAveraging(decay=0.5), seen, RunCheckpoints(tmp_path, every=1)]
        run = trainer(tmp_path, max_steps=3, callbacks=callbacks, enable_checkpointing=True)
        run.fit(module, data(kind), ckpt_path=path)
        assert run.global_step == 3
        return weights(module)

    wanted = trained()
    same(trained(tmp_path / "step=3.ckpt"), wanted)
    assert hooks == [*names, *names]


class OwnWeights(Engine):
    """An engine that stores the last weights it received, and samples one token that depends on the seed."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.used: list[dict[str, torch.Tensor]] = []

    def sync(self, named_tensors: Any, version: int) -> None:
        self.held = {name: value.detach().clone() for name, value in named_tensors}

    def generate(self, prompts: Any, params: Any, seeds: Any) -> list[Completion]:
        self.used.append(self.held)
        return [Completion([5 + seed % 20], [-1.0], "length") for seed in seeds]


def test_predictions_of_an_engine_come_from_the_trained_weights(kind: str, base: str, tmp_path: Path) -> None:
    if kind == "preference":
        pytest.skip("a preference model predicts scores")
    engine = OwnWeights()
    module = make(kind, base, sampler=Sampler(max_tokens=2, engine=engine))
    source = data(kind)
    source.sources |= {"predict": prompts(2)}
    run = trainer(tmp_path)
    run.fit(module, source)
    run.predict(module, source)
    trained = weights(module)
    same(engine.used[-1], {name: trained[f"model.{name}"] for name in engine.used[-1]})


def test_validation_uses_the_averaged_weights(kind: str, base: str, tmp_path: Path) -> None:
    """Also with an external engine; training continues from the trained weights."""
    measured: list[dict[str, torch.Tensor]] = []
    look = LambdaCallback(on_validation_batch_start=lambda run, module, *args: measured.append(weights(module)))
    engine, counts = OwnWeights(), Counts()
    settings: dict[str, Any] = {}
    if kind == "policy":
        letters = FunctionReward(lambda completions: [sum(map(ord, text)) % 7 for text in completions])
        settings = {"sampler": Sampler(max_tokens=6, engine=engine), "rewards": [letters]}
    options: dict[str, Any] = {"num_sanity_val_steps": 0, "val_check_interval": 2, "settings": settings}
    fit(kind, base, tmp_path, WeightAveraging(), counts, look, **options)
    first, second = counts.steps[:2]
    average = {name: (first[name] + second[name]) / 2 for name in first}
    assert distance(average, second) > 1e-6
    same(measured[-1], average, rtol=1e-6, atol=1e-7)
    if kind == "policy":
        # Three rounds, and between the last two a validation of two calls: greedy and sampled.
        [_, _, greedy, sampled, third] = [next(iter(held.items())) for held in engine.used]
        for name, found in (greedy, sampled):
            torch.testing.assert_close(found, average[f"model.{name}"], rtol=1e-6, atol=1e-7)
        assert torch.equal(third[1], second[f"model.{third[0]}"])


def test_unsupported_weight_averaging_is_rejected(kind: str, base: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, strategy=ModelParallelStrategy(1, 1), callbacks=[WeightAveraging()])
    with pytest.raises(ConfigError, match=r"averages unsharded weights.*Use ddp"):
        run.fit(make(kind, base), data(kind))
    if kind == "preference":
        with pytest.raises(ConfigError, match=r"Set scorer\.store to false"):
            fit(kind, base, tmp_path, WeightAveraging(), settings={"scorer": ImplicitReward(store=True)})
    if kind == "policy":
        normed = {"rewards": [FunctionReward(vowels, normalize=RunningNorm())]}
        with pytest.raises(ConfigError, match="use_buffers to False"):
            fit(kind, base, tmp_path, EMAWeightAveraging(), settings=normed)
        module, _ = fit(kind, base, tmp_path, EMAWeightAveraging(use_buffers=False), settings=normed)
        assert module.reward_terms[0].statistics.moments[0] == 24


def test_stochastic_weight_averaging_is_rejected(kind: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lightning\.pytorch\.callbacks\.WeightAveraging"):
        fit(kind, base, tmp_path, StochasticWeightAveraging(swa_lrs=0.1))


# -- tuners -----------------------------------------------------------------------------------------------------------


def test_learning_rate_finder(kind: str, base: str, tmp_path: Path) -> None:
    """It tries learning rates, and restores weights, optimizer, schedule and data."""
    if kind == "policy":
        with pytest.raises(ConfigError, match="does not measure progress"):
            fit(kind, base, tmp_path, LearningRateFinder(update_attr=False))
        return
    with pytest.raises(ConfigError, match="Set update_attr to False"):
        fit(kind, base, tmp_path, LearningRateFinder())
    find = LearningRateFinder(1e-4, 1.0, num_training_steps=15, update_attr=False, early_stop_threshold=None)
    settings = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "lr_scheduler": lambda optimizer: Warmup(optimizer, warmup_steps=2),
    }
    plain, _ = fit(kind, base, tmp_path, max_epochs=5, settings=settings)
    tuned, run = fit(kind, base, tmp_path, find, max_epochs=5, settings=settings)
    assert find.optimal_lr is not None
    assert len(find.optimal_lr.results["lr"]) == 15
    assert 1e-4 < find.optimal_lr.suggestion() < 1.0
    assert run.global_step == 15
    same(weights(tuned), weights(plain))


def test_learning_rate_finder_of_the_tuner(kind: str, base: str, tmp_path: Path) -> None:
    if kind == "policy":
        with pytest.raises(ConfigError, match="does not measure progress"):
            Tuner(trainer(tmp_path)).lr_find(make(kind, base), datamodule=data(kind))
        return
    module = make(kind, base)
    found = Tuner(trainer(tmp_path, max_epochs=5)).lr_find(
        module, datamodule=data(kind), num_training=15, update_attr=False, early_stop_threshold=None
    )
    assert found is not None
    assert len(found.results["loss"]) == 15


def test_batch_size_finder(kind: str, base: str, tmp_path: Path) -> None:
    """It stops at the number of rows and sets `data.batch_size`; the following run equals one with that size."""
    if kind == "policy":
        with pytest.raises(ConfigError, match=r"model\.max_tokens_per_batch to bound the memory"):
            fit(kind, base, tmp_path, BatchSizeFinder())
        with pytest.raises(ConfigError, match="which a policy stage does not have"):
            trainer(tmp_path, callbacks=[BatchSizeFinder()]).validate(make(kind, base), data(kind), verbose=False)
        return
    find, source = BatchSizeFinder(init_val=4, steps_per_trial=1, max_trials=4), data(kind, 12, 2)
    tuned, run = fit(kind, base, tmp_path, find, source=source)
    assert (find.optimal_batch_size, source.batch_size, run.global_step) == (16, 16, 1)
    plain, _ = fit(kind, base, tmp_path, source=data(kind, 12, 16))
    same(weights(tuned), weights(plain))
    with pytest.raises(ConfigError, match="Set its batch_arg_name to eval_batch_size"):
        trainer(tmp_path, callbacks=[BatchSizeFinder()]).validate(make(kind, base), data(kind), verbose=False)
    find, source = BatchSizeFinder(batch_arg_name="eval_batch_size", steps_per_trial=1, max_trials=4), data(kind)
    trainer(tmp_path, callbacks=[find]).validate(make(kind, base), source, verbose=False)
    assert source.eval_batch_size == find.optimal_batch_size == 8


def test_batch_size_finder_of_the_tuner(kind: str, base: str, tmp_path: Path) -> None:
    module, source, tuner = make(kind, base), data(kind), Tuner(trainer(tmp_path))
    options: dict[str, Any] = {"datamodule": source, "init_val": 4, "steps_per_trial": 1, "max_trials": 4}
    if kind == "policy":
        with pytest.raises(ConfigError, match="which a policy stage does not have"):
            tuner.scale_batch_size(module, **options)
    else:
        assert tuner.scale_batch_size(module, **options) == source.batch_size == 16


def test_backbone_finetuning_is_rejected(kind: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"freezes module\.backbone, which"):
        fit(kind, base, tmp_path, BackboneFinetuning(1))


def test_gradient_accumulation_scheduler(kind: str, base: str, tmp_path: Path) -> None:
    """An epoch with two micro-batches per step equals an epoch with batches of twice the size."""
    small = data(kind, 12, minibatches=2) if kind == "policy" else data(kind, 12, 3)
    large = data(kind, 12, minibatches=1) if kind == "policy" else data(kind, 12, 6)
    options: dict[str, Any] = {"precision": "64-true", "settings": {"dtype": "float64"}}
    scheduled, run = fit(kind, base, tmp_path, GradientAccumulationScheduler({0: 2}), source=small, **options)
    plain, other = fit(kind, base, tmp_path, source=large, **options)
    assert run.global_step == other.global_step == {"policy": 3}.get(kind, 2)
    same(weights(scheduled), weights(plain), rtol=1e-6, atol=1e-9)
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    _, run = fit(kind, base, tmp_path, changing, source=small, max_epochs=2)
    assert run.global_step == {"policy": 6 + 3}.get(kind, 4 + 2)


def test_accumulation_scheduler_with_a_learning_rate_schedule(kind: str, base: str, tmp_path: Path) -> None:
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    source = data(kind, 12, minibatches=2) if kind == "policy" else data(kind)
    options: dict[str, Any] = {"source": source, "max_epochs": 2}
    with pytest.raises(ConfigError, match=r"Set total_steps of model\.lr_scheduler"):
        fit(kind, base, tmp_path, changing, settings={"lr_scheduler": Warmup}, **options)
    known = {"lr_scheduler": lambda optimizer: Warmup(optimizer, total_steps=9)}
    _, run = fit(kind, base, tmp_path, changing, settings=known, **options)
    assert run.global_step > 0


# -- logging ----------------------------------------------------------------------------------------------------------


def test_csv_logger_and_learning_rate_monitor(kind: str, base: str, tmp_path: Path) -> None:
    """Each step's rate and metrics are rows of the logger."""
    settings = {"lr_scheduler": lambda optimizer: Warmup(optimizer, shape="linear")}
    logger = CSVLogger(tmp_path, name="", version="")
    fit(kind, base, tmp_path, LearningRateMonitor(), logger=logger, log_every_n_steps=1, settings=settings)
    found = columns(tmp_path)
    rates = [float(value) for value in found["lr-SGD"]]
    assert rates == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])
    assert len(found[STEP[kind]]) == 3
    assert len(found[HELD_OUT[kind]]) == 1


def test_device_stats_monitor(kind: str, base: str, tmp_path: Path) -> None:
    pytest.importorskip("psutil", reason="no psutil, which DeviceStatsMonitor needs on a CPU")
    logger = CSVLogger(tmp_path, name="", version="")
    fit(kind, base, tmp_path, DeviceStatsMonitor(cpu_stats=True), logger=logger, log_every_n_steps=1)
    assert len(columns(tmp_path)["DeviceStatsMonitor.on_train_batch_start/cpu_percent"]) == 3


def test_tensorboard_logger(kind: str, base: str, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(kind, base, tmp_path, logger=logger, log_every_n_steps=1)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert len(read.Scalars(STEP[kind])) == 3


@pytest.mark.parametrize("name", ["simple", "advanced", pytest.param("pytorch", marks=pytest.mark.slow)])
def test_profilers(kind: str, name: str, base: str, tmp_path: Path) -> None:
    profiler: Any = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }[name](dirpath=tmp_path / "p", filename="p")
    fit(kind, base, tmp_path, profiler=profiler)
    text = (tmp_path / "p" / "fit-p.txt").read_text()
    wanted = {"simple": "training_step", "advanced": "training_step", "pytorch": "aten::"}[name]
    assert wanted in text


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars(kind: str, bar: Any, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = fit(kind, base, tmp_path, bar(), enable_progress_bar=True)
    assert STEP[kind] in run.progress_bar_metrics
    assert HELD_OUT[kind] in run.progress_bar_metrics
    written = capsys.readouterr()
    assert "Epoch 0" in written.out + written.err


@pytest.mark.parametrize("name", ["ModelSummary", "RichModelSummary"])
def test_model_summary_counts_the_loaded_model(kind: str, name: str, base: str, tmp_path: Path) -> None:
    class Kept(getattr(lightning_callbacks, name)):  # type: ignore[misc]
        """Stores the summary instead of printing it."""

        def summarize(self, rows: Any, total: int, trainable: int, *args: Any, **kwargs: Any) -> None:
            self.found = total, trainable

    summary = Kept(max_depth=2)
    assert isinstance(summary, ModelSummary)
    module, _ = fit(kind, base, tmp_path, summary, enable_model_summary=True, settings={"lora": LoRA(2)})
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in module.parameters()]
    assert summary.found == tuple(map(sum, zip(*sizes, strict=True)))
    assert 0 < summary.found[1] < summary.found[0]


# -- how much of the data ---------------------------------------------------------------------------------------------


def test_fast_dev_run(kind: str, base: str, tmp_path: Path) -> None:
    counts = Counts()
    fit(kind, base, tmp_path / "run", counts, fast_dev_run=2, enable_checkpointing=True, logger=True)
    assert (counts.train, counts.val) == (2, {"policy": 1}.get(kind, 2))
    assert not (tmp_path / "run").exists()


def test_limits_count_batches(kind: str, base: str, tmp_path: Path) -> None:
    rows = {"sft": chats, "preference": pairs, "policy": prompts}[kind](6)
    source = data(kind, eval_batch_size=1)
    source.sources |= {"test": rows, "predict": rows}
    counts = Counts()
    limits = {f"limit_{name}_batches": n for name, n in (("train", 2), ("val", 3), ("test", 4), ("predict", 0.5))}
    module = make(kind, base)
    run = trainer(tmp_path, callbacks=[counts], max_epochs=2, num_sanity_val_steps=0, **limits)
    run.fit(module, source)
    assert (counts.train, counts.val, run.global_step) == (4, 6, 4)
    assert counts.seen[:2] != counts.seen[2:]
    run.test(module, source, verbose=False)
    run.predict(module, source)
    assert (counts.test, counts.predict) == (4, 3)


def test_fractional_limits_on_batches(kind: str, base: str, tmp_path: Path) -> None:
    counts = Counts()
    fit(kind, base, tmp_path, counts, limit_train_batches=0.67, limit_val_batches=0, max_epochs=2)
    assert (counts.train, counts.val) == (4, 0)


def test_overfit_batches_are_the_same_in_every_epoch(kind: str, base: str, tmp_path: Path) -> None:
    counts = Counts()
    source = data(kind, 12, 2) if kind != "policy" else data(kind, 12, prompts_per_round=2)
    fit(kind, base, tmp_path, counts, overfit_batches=2, max_epochs=3, source=source)
    assert counts.seen[0] != counts.seen[1]
    assert counts.seen == counts.seen[:2] * 3


@pytest.mark.parametrize(
    ("flags", "validations"),
    [
        ({"val_check_interval": 1}, 2 * 3),
        ({"val_check_interval": 0.67}, 2),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 3),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"num_sanity_val_steps": -1}, 2 + 1),
    ],
)
def test_validation_intervals(kind: str, flags: dict[str, Any], validations: int, base: str, tmp_path: Path) -> None:
    counts = Counts()
    _, run = fit(kind, base, tmp_path, counts, **{"num_sanity_val_steps": 0, "max_epochs": 2, **flags})
    assert (counts.validations, run.global_step) == (validations, 6)


# -- how it is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(kind: str, algorithm: str, base: str, tmp_path: Path) -> None:
    settings = {"optimizer": sgd(1.0)}
    torch.manual_seed(0)
    start = make(kind, base, **settings)
    start.configure_model()
    options: dict[str, Any] = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "max_steps": 1}
    module, _ = fit(kind, base, tmp_path, settings=settings, **options)
    # `parameters()` has tied weights once.
    moves = [(p - q).detach() for p, q in zip(module.parameters(), start.parameters(), strict=True)]
    found = torch.cat([move.flatten() for move in moves]).norm(2 if algorithm == "norm" else torch.inf)
    assert float(found) == pytest.approx(1e-3, rel=1e-2)


def test_detect_anomaly(kind: str, base: str, tmp_path: Path) -> None:
    class Broken(Callback):
        """Makes the gradient of a weight NaN, as a wrong formula would."""

        def on_train_batch_start(self, run: Any, module: Any, *args: Any) -> None:
            assert torch.is_anomaly_enabled()
            layer = module.model.get_input_embeddings()
            layer.register_forward_hook(lambda part, inputs, output: output + 0 * (output - output.detach()).sqrt())

    with pytest.raises(RuntimeError, match="returned nan values"):
        fit(kind, base, tmp_path, Broken(), detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


def test_deterministic(kind: str, base: str, tmp_path: Path) -> None:
    plain, _ = fit(kind, base, tmp_path)
    asked: list[bool] = []
    look = LambdaCallback(on_train_batch_start=lambda *args: asked.append(torch.are_deterministic_algorithms_enabled()))
    try:
        exact, _ = fit(kind, base, tmp_path, look, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True] * 3
    same(weights(exact), weights(plain))


def test_barebones(kind: str, base: str, tmp_path: Path) -> None:
    """Without logging and validation, the same weights."""
    plain, _ = fit(kind, base, tmp_path)
    torch.manual_seed(0)
    bare = make(kind, base)
    run = pl.Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path / "bare")
    run.fit(bare, data(kind))
    same(weights(bare), weights(plain))
    assert not run.callback_metrics
    assert not (tmp_path / "bare").exists()


def test_without_inference_mode(kind: str, base: str, tmp_path: Path) -> None:
    """Equal metrics without gradients; `fit` works afterwards in both cases."""
    modes: set[tuple[bool, ...]] = set()

    def look(run: Any, *args: Any) -> None:
        if run.state.fn == "validate":
            modes.add((inference, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    found = []
    for inference in (True, False):
        torch.manual_seed(0)
        module = make(kind, base)
        watch = LambdaCallback(on_validation_batch_start=look)
        run = trainer(tmp_path, inference_mode=inference, num_sanity_val_steps=0, callbacks=[watch])
        found.append(run.validate(module, data(kind), verbose=False)[0])
        run.fit(module, data(kind))
        assert run.global_step == 3
    assert found[0] == found[1]
    assert modes == {(True, True, False), (False, False, False)}
