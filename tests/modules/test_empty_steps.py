"""A step without a trained token changes neither weights nor optimizer state, is counted, and is logged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from rlhf_lightning import PreferenceModule, PromptDataModule, SFTModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.nonfinite import NonFiniteGuard
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.modules.step import drop_gradients
from rlhf_lightning.objectives.advantage import group_centered, leave_one_out
from rlhf_lightning.objectives.policy import ImportanceWeights
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GlobalWhitened, LeaveOneOut
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.modules import data, make, vowels
from tests.helpers.training import trainer

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


class State(Callback):
    """Writes weights, optimizer state and learning rate after each step to a file, with whether they changed."""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.rates: list[float] = []
        self.logged: list[float] = []
        self._before: list[torch.Tensor] = []

    def _now(self, run: Any, module: Any) -> list[torch.Tensor]:
        (optimizer,) = run.optimizers
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return [value.detach().clone() for value in [*module.parameters(), *kept]]

    def on_train_start(self, run: Any, module: Any) -> None:
        self._before = self._now(run, module)

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if run.fit_loop._should_accumulate():
            return
        before, self._before = self._before, self._now(run, module)
        pairs = zip(before, self._before, strict=len(before) == len(self._before))
        self.moved.append(len(before) != len(self._before) or not all(torch.equal(a, b) for a, b in pairs))
        self.rates.append(run.optimizers[0].param_groups[0]["lr"])
        self.logged.append(float(run.callback_metrics.get("train/empty_steps", 0.0)))

    def on_fit_end(self, run: Any, module: Any) -> None:
        path = Path(run.default_root_dir)
        path.mkdir(parents=True, exist_ok=True)
        found = {"moved": self.moved, "rates": self.rates, "logged": self.logged, "step": run.global_step}
        (path / f"state{run.global_rank}.json").write_text(json.dumps(found))


class Batches:
    """Micro-batches of a user's loader; `empty` says on each rank which of them have no trained token."""

    def __init__(self, kind: str, empty: Callable[[int, int], bool], count: int = 4) -> None:
        self.kind, self.empty, self.count = kind, empty, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for k in range(self.count):
            generator = torch.Generator().manual_seed(10 * k + rank)
            weight = 1.0 - self.empty(rank, k)
            loss_mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1]], dtype=torch.float32)
            batch: dict[str, Any] = {"input_ids": torch.randint(3, 20, (2, 6), generator=generator)}
            if self.kind == "preference":
                yield {**batch, "loss_mask": loss_mask, "weights": torch.tensor([weight])}
            else:
                yield {**batch, "loss_mask": loss_mask * weight}


def run_of(root: Path, devices: int, accumulate: int = 1, **options: Any) -> Any:
    options = {"callbacks": [State()], **options}
    strategy = "ddp_fork" if devices == 2 else "auto"
    return trainer(root, devices=devices, strategy=strategy, accumulate_grad_batches=accumulate, **options)


def states(root: Path, devices: int) -> dict[str, Any]:
    """The recorded states, which are the same on all ranks."""
    found = [json.loads((root / f"state{rank}.json").read_text()) for rank in range(devices)]
    assert all(one == found[0] for one in found)
    return found[0]


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_empty_step_changes_no_weights_or_optimizer_state(
    kind: str, devices: int, optimizer: str, base: str, tmp_path: Path
) -> None:
    """Steps of two micro-batches. The second step is empty; in the third, only one rank or micro-batch is."""

    def empty(rank: int, k: int) -> bool:
        return k in (2, 3) or (k in (4, 5) if rank else k == 4)

    make_module = SFTModule if kind == "sft" else PreferenceModule
    module: Any = make_module(base, optimizer=OPTIMIZERS[optimizer], lr_scheduler=schedule)
    run = run_of(tmp_path, devices, 2, gradient_clip_val=1.0)
    run.fit(module, Batches(kind, empty, 6))
    found = states(tmp_path, devices)
    assert found["moved"] == [True, False, True]
    assert found["rates"] == pytest.approx([0.5e-2, 0.25e-2, 0.125e-2])
    assert found["logged"] == [0, 1, 1]
    assert found["step"] == 3


class Rounds:
    """A reward that distinguishes answers in all rounds but the second."""

    __name__ = "rounds"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str]) -> list[float]:
        self.calls += 1
        return [0.1] * len(completions) if self.calls == 2 else vowels(completions)


EMPTY: dict[str, dict[str, Any]] = {
    "groups": {},
    "others": {"advantage": LeaveOneOut()},
    "whitened": {"advantage": GlobalWhitened()},
    "measured": {"kl": KLPenalty(0.0)},
}
TRAINED: dict[str, dict[str, Any]] = {
    "kl": {"kl": KLPenalty(0.1)},
    "kl in reward": {"kl": KLPenalty(0.1, place="reward")},
    "entropy": {"entropy_coefficient": 0.1},
}


@pytest.mark.parametrize("name", [*EMPTY, *TRAINED])
@pytest.mark.parametrize("devices", [1, 2])
def test_round_with_equal_rewards_is_empty(name: str, devices: int, base: str, tmp_path: Path) -> None:
    options = {**EMPTY, **TRAINED}[name]
    module = make("policy", base, rewards=[FunctionReward(Rounds())], optimizer=OPTIMIZERS["adamw"], **options)
    run = run_of(tmp_path, devices, num_sanity_val_steps=0, limit_val_batches=0)
    run.fit(module, data("policy", 12, minibatches=1, group_size=3))
    found = states(tmp_path, devices)
    assert found["moved"] == [True, name in TRAINED, True]
    assert found["step"] == 3


def test_round_with_only_masked_responses_is_empty(base: str, tmp_path: Path) -> None:
    module = make("policy", base, sampler=Sampler(max_tokens=1), mask_truncated=True, optimizer=OPTIMIZERS["momentum"])
    run = run_of(tmp_path, 2, callbacks=[State(), ExportModel()], limit_val_batches=0)
    run.fit(module, data("policy", 8, minibatches=2))
    found = states(tmp_path, 2)
    assert (found["moved"], found["logged"]) == ([False] * 4, [1, 2, 3, 4])
    assert json.loads((tmp_path / "stage.json").read_text())["empty_steps"] == 4


def test_importance_weights_that_mask_all_tokens(base: str, tmp_path: Path) -> None:
    """Episodes whose tokens another policy found far more or far less likely."""
    rows = [
        {"prompt_tokens": [5, 6], "response_tokens": [7, 8, 9], "logprobs": [-90.0] * 3, "advantage": float(k)}
        for k in (1, -1)
    ]
    weights = ImportanceWeights("token", "mask", 0.5, 2.0)
    module = make("policy", base, rewards=[], importance_weights=weights, kl=KLPenalty(0.1))
    module.optimizer_factory = OPTIMIZERS["adamw"]
    run_of(tmp_path, 1).fit(module, PromptDataModule(episodes=rows, prompts_per_round=2))
    assert states(tmp_path, 1)["moved"] == [False]


def test_custom_loss_trains_in_an_otherwise_empty_step(base: str, tmp_path: Path) -> None:
    class Own(SFTModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * next(self.model.parameters()).square().sum()

    module = Own(base, optimizer=OPTIMIZERS["adamw"])
    run_of(tmp_path, 1).fit(module, Batches("sft", lambda rank, k: True))
    found = states(tmp_path, 1)
    assert (found["moved"], found["logged"]) == ([True] * 4, [0] * 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_empty_step_with_a_gradient_scaler(optimizer: str, base: str, tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    module = SFTModule(base, optimizer=OPTIMIZERS[optimizer])
    run = run_of(tmp_path, 1, plugins=[plugin], callbacks=[NonFiniteGuard(), State()])
    run.fit(module, Batches("sft", lambda rank, k: k == 2))
    assert states(tmp_path, 1)["moved"] == [True, True, False, True]


def names() -> list[str]:
    """Optimizers of torch that step without a closure, on dense gradients."""
    found = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type)]
    return sorted(set(found) - {"Optimizer", "LBFGS", "SparseAdam"})


@pytest.mark.parametrize("name", names())
def test_no_torch_optimizer_updates_without_gradients(name: str) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, weight_decay=0.1) if name != "Rprop" else None
    optimizer = optimizer or torch.optim.Rprop([weight], lr=0.1)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    before = [weight.detach().clone(), *(v.clone() for v in optimizer.state[weight].values() if torch.is_tensor(v))]
    weight.grad = torch.zeros_like(weight)
    drop_gradients(trainer(Path(".")), optimizer)
    optimizer.step()
    after = [weight.detach(), *(v for v in optimizer.state[weight].values() if torch.is_tensor(v))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_equal_rewards_have_exactly_zero_advantage() -> None:
    """Not even the rounding error of their mean, which Adam would scale up."""
    rewards, groups = (
        torch.tensor([0.1, 0.1, 0.1, 0.7, 0.1, 0.4], dtype=torch.float64),
        torch.tensor([3, 3, 3, 1, 1, 1]),
    )
    assert float(rewards[:3].sum() / 3) != 0.1
    for advantages in (group_centered(rewards, groups), group_centered(rewards, groups, "std")):
        assert advantages[:3].tolist() == [0.0] * 3
        assert advantages[3:].abs().max() > 0.1
    assert leave_one_out(rewards, groups)[:3].tolist() == [0.0] * 3


# -- many in a row ----------------------------------------------------------------------------------------------------


def test_too_many_consecutive_empty_steps_stop_the_run(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make("policy", base, rewards=[FunctionReward(lambda completions: [1.0] * len(completions), name="one")])
    module.max_empty_steps = 3
    with pytest.raises(
        UserError, match=r"step 3: no token was trained in 3 consecutive optimizer steps .*groups with equal"
    ):
        trainer(tmp_path).fit(module, data("policy", 16, minibatches=1))
    assert caplog.text.count("no token was trained") == 1
    with pytest.raises(ConfigError, match="max_empty_steps is 0"):
        SFTModule(base, max_empty_steps=0)


@pytest.mark.parametrize(("limit", "ends"), [(2, False), (1, True), (None, False)])
def test_only_consecutive_empty_steps_count(limit: int | None, ends: bool, base: str, tmp_path: Path) -> None:
    module = SFTModule(base, optimizer=OPTIMIZERS["adamw"], max_empty_steps=limit)
    run = trainer(tmp_path)
    if ends:
        with pytest.raises(UserError, match=r"step 1: no token .*rlhf data check"):
            run.fit(module, Batches("sft", lambda rank, k: k % 2 == 0))
    else:
        run.fit(module, Batches("sft", lambda rank, k: k % 2 == 0, 6))
        assert run.global_step == 6


def test_count_of_empty_steps_continues_after_resume(base: str, tmp_path: Path) -> None:
    def fit(limit: int, epochs: int, path: Path | None = None) -> None:
        run = trainer(tmp_path, max_epochs=epochs, enable_checkpointing=True)
        run.fit(SFTModule(base, max_empty_steps=limit), Batches("sft", lambda rank, k: True, 2), ckpt_path=path)

    fit(9, 1)
    (path,) = tmp_path.rglob("*.ckpt")
    with pytest.raises(UserError, match="step 4: no token was trained in 4 "):
        fit(4, 2, path)
