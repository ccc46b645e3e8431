"""DeepSpeed (ZeRO-2, ZeRO-3) on two processes: training, resume and saved models equal those of one process.

`make test-deepspeed` runs them in an environment with DeepSpeed.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.deepspeed_strategy import DeepSpeed
from rlhf_lightning.checkpointing.nonfinite import NonFiniteGuard
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.sharding import is_sharded, zero3_gathered
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.rollout.advantages import GAE
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.modules import data, make, same
from tests.helpers.resume import at, config, result
from tests.helpers.runs import complete, in_ranks
from tests.helpers.sharding import PLAIN, Keep, assert_same_runs, run_command, run_every_command, train
from tests.helpers.training import adamw, trainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.deepspeed]
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; `make test-deepspeed` runs these tests")
FLOAT32 = {"rtol": 1e-5, "atol": 2e-6}
"""DeepSpeed's optimizer holds weights in float32, so runs agree up to the order of its sums."""
REFUSED_BY_ZERO3 = {"dpo-stored", "refresh", "lora"}


def zero(stage: int) -> DeepSpeed:
    strategy = DeepSpeed(stage=stage, reduce_bucket_size=5000, allgather_bucket_size=5000)
    # ZeRO-3 does not shard small weights, that is, none of a tiny model.
    strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


@pytest.mark.parametrize(
    ("stage", "name"),
    [(stage, name) for stage in (2, 3) for name in PLAIN if stage == 2 or name not in REFUSED_BY_ZERO3],
)
def test_training_equals_one_process(stage: int, name: str, base: str, tmp_path: Path) -> None:
    train(name, base, tmp_path / "one", dtype="float32")
    in_ranks(
        2, lambda: train(name, base, tmp_path / "two", 2, 2, strategy=zero(stage), dtype="float32"), tmp_path / "two"
    )
    assert_same_runs(tmp_path, **FLOAT32)
    if "lora" not in name and not name.startswith("preference"):
        stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.isfinite(stock(torch.arange(9)[None]).logits).all()


class Spoil(Callback):
    """Takes the trained tokens from the second step, and makes the third one not finite."""

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch["loss_mask"].zero_()
        if batch_idx == 2:
            batch["denominators"] = dict.fromkeys(batch["denominators"], float("nan"))


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_without_a_usable_gradient_change_nothing(stage: int, base: str, tmp_path: Path) -> None:
    """Momentum and weight decay would change the weights even with gradients of 0."""

    def run(folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        guard = NonFiniteGuard(action="skip")
        module = make("sft", base, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1))
        one = trainer(folder, callbacks=[Spoil(), guard, Keep()], gradient_clip_val=0.5, **options)
        one.fit(module, data("sft", 16, 4 // one.world_size))
        assert (one.global_step, guard.skipped) == (4, 1)
        assert one.callback_metrics["train/empty_steps"] == 1

    run(tmp_path / "one")
    in_ranks(2, lambda: run(tmp_path / "two", devices=2, strategy=zero(stage)), tmp_path / "two")
    same(*(torch.load(tmp_path / name / "weights.pt") for name in ("one", "two")), **FLOAT32)


@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
@pytest.mark.parametrize("stage", [2, 3])
def test_every_command(stage: int, kind: str, base: str, tmp_path: Path) -> None:
    def run() -> None:
        run_every_command(kind, base, trainer(tmp_path, devices=2, strategy=zero(stage)))

    in_ranks(2, run, tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16(stage: int, base: str, tmp_path: Path) -> None:
    def run() -> None:
        one = trainer(tmp_path, devices=2, strategy=zero(stage), precision="bf16-true", callbacks=[ExportModel()])
        run_every_command("policy", base, one, dtype="bfloat16", kl=KLPenalty(0.1))

    in_ranks(2, run, tmp_path / "out")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_zero3_holds_half_of_the_weights_per_rank_except_while_sampling(base: str, tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert is_sharded(module.model)
            weights = list(module.model.parameters())
            assert sum(weight.numel() for weight in weights) == 0
            total = sum(weight.ds_numel for weight in weights)
            assert total / 2 <= sum(weight.ds_tensor.numel() for weight in weights) < 0.52 * total
            with zero3_gathered(module):
                assert not is_sharded(module.model)
                assert sum(weight.numel() for weight in weights) == total
            assert sum(weight.numel() for weight in weights) == 0
            assert sum(weight.untyped_storage().nbytes() for weight in weights) < 4 * total / 100

    def run() -> None:
        one = trainer(tmp_path, devices=2, strategy=zero(3), callbacks=[Watch()])
        one.fit(make("policy", base), data("policy"))
        assert one.global_step == 3

    in_ranks(2, run, tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_of_a_checkpoint_replace_the_present_ones(stage: int, base: str, tmp_path: Path) -> None:
    """As `--export best` loads them."""

    class Back(Callback):
        def now(self, module: Any) -> dict[str, torch.Tensor]:
            with zero3_gathered(module):
                return {name: value.detach().clone() for name, value in module.model.named_parameters()}

        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                run.save_checkpoint(tmp_path / "first.ckpt")
                self.first = self.now(module)

        def on_fit_end(self, run: Any, module: Any) -> None:
            last = self.now(module)
            run.strategy.load_weights(tmp_path / "first.ckpt")
            loaded = self.now(module)
            same(loaded, self.first)
            assert not any(torch.equal(loaded[name], last[name]) for name in last)

    def run() -> None:
        one = trainer(tmp_path, devices=2, strategy=zero(stage), callbacks=[Back()])
        one.fit(make("sft", base), data("sft", 12, 2))
        assert one.global_step == 3

    in_ranks(2, run, tmp_path / "out")


@pytest.mark.parametrize(
    ("stage", "options", "settings", "message"),
    [
        (2, {"precision": "bf16-mixed"}, {}, "use 32-true or bf16-true"),
        (2, {"precision": "bf16-true"}, {"critic": Critic(), "advantage": GAE()}, "value head in bfloat16"),
        (2, {}, {"critic": Critic(warmup_rounds=1), "advantage": GAE()}, "critic.warmup_rounds is not supported"),
        (2, {}, {"max_staleness": 1, "objective": ClippedSurrogate()}, "weights may be sharded"),
        (3, {}, {"kl": KLPenalty(0.1, refresh_every=1)}, "kl.refresh_every is not supported with ZeRO-3"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    stage: int, options: dict[str, Any], settings: dict[str, Any], message: str, base: str, tmp_path: Path
) -> None:
    def run() -> None:
        if "advantage" in settings:
            settings["objective"] = ClippedSurrogate()
        one = trainer(tmp_path, devices=2, strategy=zero(stage), **options)
        with pytest.raises(ConfigError, match=message):
            one.fit(make("policy", base, **settings), data("policy"))

    in_ranks(2, run, tmp_path / "out")


def test_arguments_that_are_not_supported_are_refused() -> None:
    for options in ({"stage": 1}, {"offload_optimizer": True}, {"config": {}}):
        with pytest.raises(ConfigError):
            DeepSpeed(**options)


def test_lightnings_own_strategy_is_refused(base: str, tmp_path: Path) -> None:
    module = make("sft", base)
    module.trainer = trainer(tmp_path, strategy=DeepSpeedStrategy(stage=2))
    with pytest.raises(ConfigError, match="use zero2 or zero3"):
        module.setup("fit")


# -- commands ---------------------------------------------------------------------------------------------------------


def command(kind: str, base: str, folder: Path, root: str, **trainer_options: Any) -> list[str]:
    flags = {"devices": 2, "default_root_dir": folder / root, **trainer_options}
    return [*config(kind, base, folder), *(f"--trainer.{name}={value}" for name, value in flags.items())]


@pytest.mark.parametrize(
    ("strategy", "kind", "place", "number"),
    [("zero2", "policy", "training", 9), ("zero3", "policy", "training", 9)],
)
def test_run_that_was_killed_equals_uninterrupted_run(
    strategy: str, kind: str, place: str, number: int, base: str, tmp_path: Path
) -> None:
    run_command(command(kind, base, tmp_path, "whole", strategy=strategy), tmp_path / "out")
    args = command(kind, base, tmp_path, "killed", strategy=strategy)
    dies = at(kind, place, number, True, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_command(args, tmp_path / "out", dies, code=-signal.SIGKILL)
    saved = sorted((tmp_path / "killed" / "checkpoints").iterdir())
    shard = next(saved[-1].rglob("*optim_states.pt"))
    whole = shard.read_bytes()
    if len(saved) > 1:  # it falls back to the previous one
        shard.write_bytes(whole[:-100])
    run_command(args, tmp_path / "out")
    assert ("is damaged" in (tmp_path / "out" / "rank0.txt").read_text()) is (len(saved) > 1)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_resume_with_weights_that_are_all_sharded(base: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "one.ckpt"

    def run(folder: str, epochs: int, path: Path | None = None, save: bool = False) -> None:
        one = trainer(tmp_path / folder, devices=2, strategy=zero(3), max_epochs=epochs, callbacks=[Keep()])
        (tmp_path / folder).mkdir(exist_ok=True)
        one.fit(make("policy", base, optimizer=adamw(1e-2)), data("policy"), ckpt_path=path)
        if save:
            one.save_checkpoint(checkpoint)

    in_ranks(2, lambda: run("whole", 2), tmp_path / "out")
    in_ranks(2, lambda: run("half", 1, save=True), tmp_path / "out")
    in_ranks(2, lambda: run("resumed", 2, checkpoint), tmp_path / "out")
    whole, half, resumed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "half", "resumed"))
    same(whole, resumed)
    assert not any(torch.equal(whole[name], half[name]) for name in whole)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_checkpoint_that_could_run_code_is_not_opened(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*command("sft", base, tmp_path, "run", strategy="zero2", devices=1), "--trainer.max_epochs"]
    complete([*args, "1"], tmp_path / "one.txt")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "run" / "checkpoints").rglob("*optim_states.pt"):
        torch.save({"payload": Payload()}, path)
    for path in (tmp_path / "run" / "checkpoints").rglob("checksums.json"):
        path.unlink()
    assert "could run code" in complete([*args, "2"], tmp_path / "two.txt", code=2)
    assert not (tmp_path / "ran").exists()


def test_resume_on_another_number_of_devices_is_refused(base: str, tmp_path: Path) -> None:
    args = [*command("sft", base, tmp_path, "run", strategy="zero2"), "--trainer.max_epochs", "1"]
    run_command(args, tmp_path / "out")
    for epochs, (flags, message) in enumerate(
        (
            (["--trainer.devices", "1"], "the shards of 2 ranks with ZeRO-2, but the run has 1 ranks"),
            (["--trainer.devices", "1", "--trainer.strategy", "zero3"], "but the run has 1 ranks with ZeRO-3"),
        ),
        2,
    ):
        text = complete([*args, "--trainer.max_epochs", str(epochs), *flags], tmp_path / "one.txt", code=2)
        assert re.search(message, text), text
