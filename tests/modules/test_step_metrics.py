"""Logged metrics of an optimizer step cover all its rows, of every rank and every accumulated micro-batch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from rlhf_lightning import PolicyRLModule, PreferenceDataModule, PreferenceModule, PromptDataModule, SFTModule
from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.modules.metrics import Count
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.objectives.preference import KTO, PlackettLuce
from rlhf_lightning.rollout.advantages import GAE
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.modules import data, make
from tests.helpers.rows import labeled, rankings
from tests.helpers.runs import in_ranks
from tests.helpers.training import sgd, trainer


class Steps(Callback):
    """Writes the metrics after each optimizer step to a file, since the memory of a forked run is lost."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not run.fit_loop._should_accumulate():
            self.seen.append({name: float(value) for name, value in run.logged_metrics.items()})

    def on_fit_end(self, run: Any, module: Any) -> None:
        found = {name: float(value) for name, value in run.callback_metrics.items()}
        if run.is_global_zero:
            Path(run.default_root_dir).mkdir(parents=True, exist_ok=True)
            (Path(run.default_root_dir) / "steps.json").write_text(json.dumps([*self.seen, found]))


Parts = tuple[Callable[[str, dict[str, Any]], Any], Callable[[int, int], Any]]


def policy(**options: Callable[[], Any]) -> Parts:
    """A round is one on-policy step of PPO, then a second, off-policy one; 7 prompts leave an uneven round."""
    return (
        lambda base, more: make("policy", base, **{name: value() for name, value in options.items()}, **more),
        lambda batch, accumulate: data("policy", 7, minibatches=accumulate, update_epochs=2),
    )


def rows_of(make_rows: Callable[[int], list[Any]]) -> Callable[[int, int], Any]:
    return lambda batch, accumulate: PreferenceDataModule(make_rows(19), make_rows(5), batch_size=batch, seed=1)


RUNS: dict[str, Parts] = {
    "sft": (lambda base, more: make("sft", base, **more), lambda batch, accumulate: data("sft", 19, batch)),
    "dpo": (
        lambda base, more: PreferenceModule(base, ImplicitReward(0.1), optimizer=sgd(0.1), **more),
        lambda batch, accumulate: data("preference", 19, batch),
    ),
    "labels": (
        lambda base, more: PreferenceModule(base, ImplicitReward(0.1), KTO(), optimizer=sgd(0.1), **more),
        rows_of(labeled),
    ),
    "rankings": (
        lambda base, more: PreferenceModule(base, ImplicitReward(0.1), PlackettLuce(), optimizer=sgd(0.1), **more),
        rows_of(rankings),
    ),
    "policy": policy(kl=lambda: KLPenalty(0.1), objective=lambda: ClippedSurrogate(0.01, 0.01)),
    "critic": policy(critic=lambda: Critic(learning_rate=0.1), advantage=GAE, objective=ClippedSurrogate),
}
# Ranks, rows of a micro-batch, micro-batches.
LAYOUTS = [(1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4)]


def steps(name: str, layout: tuple[int, int, int], base: str, root: Path, **module: Any) -> list[dict[str, float]]:
    devices, batch, accumulate = layout
    build, source = RUNS[name]
    torch.manual_seed(0)
    run = trainer(
        root,
        devices=devices,
        strategy="ddp_fork" if devices == 2 else "auto",
        accumulate_grad_batches=accumulate,
        precision="64-true" if module.get("dtype") == "float64" else "32-true",
        callbacks=[Steps()],
    )
    run.fit(build(base, module), source(batch, accumulate))
    found: list[dict[str, float]] = json.loads((root / "steps.json").read_text())
    return found


@pytest.mark.parametrize("name", RUNS)
def test_ranks_and_micro_batches_log_the_metrics_of_one_large_batch(name: str, base: str, tmp_path: Path) -> None:
    layouts = [layout for layout in LAYOUTS if name != "labels" or layout[2] == 1]  # KTO's rows must be in one batch
    curves = [steps(name, layout, base, tmp_path / str(i), dtype="float64") for i, layout in enumerate(layouts)]
    assert len(curves[0]) == {"policy": 5, "critic": 5}.get(name, 4)
    for curve in curves[1:]:
        assert len(curve) == len(curves[0])
        for one, other in zip(curves[0], curve, strict=True):
            # Log-probabilities of the sampler are kept in float32.
            exact = {"rel": 1e-5, "abs": 1e-6} if name in ("policy", "critic") else {"rel": 1e-6, "abs": 1e-9}
            assert one == pytest.approx(other, **exact), name
    own = {key for key in curves[0][0] if key.startswith("train/")}
    assert len(own) >= {"sft": 1, "rankings": 3}.get(name, 5)


def test_step_metrics_in_float32(base: str, tmp_path: Path) -> None:
    one, two = (steps("dpo", layout, base, tmp_path / str(layout[0])) for layout in ((1, 8, 1), (2, 1, 4)))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)  # weights after steps of 0.1 differ by rounding themselves
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", ["sft", "dpo", "policy"])
def test_step_metrics_with_sharded_weights(name: str, tensor: int, base: str, tmp_path: Path) -> None:
    """Two ranks with different rows, or two that compute the same rows, which count once."""
    build, source = RUNS[name]
    one = steps(name, (1, 4, 2), base, tmp_path / "one")

    def fit() -> None:
        torch.manual_seed(0)
        strategy = FSDP2(2 // tensor, tensor)
        run = trainer(tmp_path, devices=2, strategy=strategy, accumulate_grad_batches=2, callbacks=[Steps()])
        run.fit(build(base, {}), source(2 * tensor, 2))

    in_ranks(2, fit, tmp_path / "ranks")
    for a, b in zip(one, json.loads((tmp_path / "steps.json").read_text()), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


# -- by hand ----------------------------------------------------------------------------------------------------------


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_sums_means_and_maxima_worked_by_hand() -> None:
    numbers = StepNumbers(("mean", "sum", "nothing", "missing"), ("largest",))
    for total, count, most in ((6.0, 3.0, -2.0), (1.0, 1.0, -5.0)):
        sums = {
            "mean": (number(total), number(count)),
            "sum": (number(total), None),
            "nothing": (number(0.0), number(0.0)),
        }
        numbers.add(number(count), sums, {"largest": number(most)})
    other = {"sum": [3.0, 10.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0], "max": [-1.0]}

    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        theirs = torch.tensor(other[operation], dtype=value.dtype)
        return value + theirs if operation == "sum" else torch.maximum(value, theirs)

    found = numbers.take(reduce)
    assert found == {"mean": 10 / 6, "sum": 17.0, "nothing": None, "trained": 5.0, "largest": -1.0}
    assert numbers.take(reduce) == {}


def test_tokens_are_counted_beyond_the_range_of_float32() -> None:
    count = Count()
    for _ in range(3):
        count.update(torch.tensor(2.0**24))
        count.update(torch.tensor(1.0))
    assert int(count.number) == 3 * 2**24 + 3


def test_sft_metrics_worked_by_hand(base: str, tmp_path: Path) -> None:
    taken = []

    class Watch(Steps):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            taken.append(batch)

    module, watch = make("sft", base, optimizer=sgd(0.0)), Watch()
    trainer(tmp_path, accumulate_grad_batches=3, callbacks=[watch]).fit(module, data("sft", 5, 1))
    for batches, seen in zip((taken[:3], taken[3:]), watch.seen, strict=True):  # the last step is one of two
        nats = tokens = 0.0
        for one in batches:
            ids, loss_mask = one["input_ids"], one["loss_mask"]
            logits = module.model(ids).logits[:, :-1].transpose(1, 2)
            nats += float(
                (torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none") * loss_mask[:, 1:]).sum()
            )
            tokens += float(loss_mask.sum())
        assert seen["train/nll"] == pytest.approx(nats / tokens, rel=1e-5)


def test_preference_metrics_worked_by_hand(base: str, tmp_path: Path) -> None:
    module, source = make("preference", base, optimizer=sgd(0.0)), data("preference", 5, 1)
    watch = Steps()
    trainer(tmp_path, accumulate_grad_batches=5, callbacks=[watch]).fit(module, source)
    rows = source.prepared["train"].rows
    chosen, rejected = (
        module.score_tokens([row.sides[i].ids for row in rows], [row.sides[i].loss_mask for row in rows])
        for i in (0, 1)
    )
    difference = chosen - rejected
    wanted = {
        "train/loss": -torch.nn.functional.logsigmoid(difference).mean(),
        "train/accuracy": (difference > 0).float().mean(),
        "train/margin": difference.mean(),
        "train/chosen_score": chosen.mean(),
        "train/rejected_score": rejected.mean(),
    }
    (seen,) = watch.seen
    assert {name: seen[name] for name in wanted} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-5, abs=1e-6
    )


def test_policy_metrics_worked_by_hand(base: str, tmp_path: Path) -> None:
    """Recorded tokens whose log-probabilities differ by known amounts."""
    model: Any = make("policy", base)
    model.configure_model()
    rows, ratios = [], []
    for length, shift, advantage in ((2, 0.5, 1.0), (4, -0.25, 1.0), (3, -1.0, -1.0)):
        ids = torch.arange(5, 8 + length)[None]
        loss_mask = torch.tensor([[0.0] * 3 + [1.0] * length])
        own = model.token_logprobs(ids, loss_mask).logprobs[0, 3:].tolist()
        rows.append(
            {
                "prompt_tokens": ids[0, :3].tolist(),
                "response_tokens": ids[0, 3:].tolist(),
                "logprobs": [value - shift for value in own],
                "advantage": advantage,
            }
        )
        ratios += [(shift, advantage)] * length
    module = make("policy", base, rewards=[], objective=ClippedSurrogate(), optimizer=sgd(0.0))
    watch = Steps()
    source = PromptDataModule(episodes=rows, prompts_per_round=3, minibatches=3)
    trainer(tmp_path, accumulate_grad_batches=3, callbacks=[watch]).fit(module, source)
    (seen,) = watch.seen
    clipped = [(a > 0 and math.exp(r) > 1.2) or (a < 0 and math.exp(r) < 0.8) for r, a in ratios]
    losses = [max(-math.exp(r) * a, -min(max(math.exp(r), 0.8), 1.2) * a) for r, a in ratios]
    wanted = {
        "train/log_ratio_max": 1.0,
        "train/log_ratio_mean": sum(abs(r) for r, _ in ratios) / 9,
        "train/logprob_gap": sum(abs(r) for r, _ in ratios) / 9,
        "train/clip_fraction": sum(clipped) / 9,
        "train/loss": sum(losses) / 9,
    }
    assert {name: seen[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


# -- what else logs and reads -----------------------------------------------------------------------------------------


class Rows(Logger):
    name, version = "rows", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))


def test_mean_over_no_elements_is_not_logged(base: str, tmp_path: Path) -> None:
    rows = [{**row, "label": int(i != 1)} for i, row in enumerate(labeled(3))]
    module = PreferenceModule(base, ImplicitReward(0.1), KTO(), optimizer=sgd(0.1))
    source, log = PreferenceDataModule(rows, batch_size=1, seed=1), Rows()
    trainer(tmp_path, logger=log, log_every_n_steps=1).fit(module, source)
    found = [("train/desirable_score" in row, "train/undesirable_score" in row) for row in log.rows]
    assert sorted(found) == [(False, True), (True, False), (True, False)]


def test_subclass_may_log_its_own_metric_under_the_same_name(base: str, tmp_path: Path) -> None:
    class Own(SFTModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/nll", -1.0)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("gradient", float(next(self.model.parameters()).grad.norm()))

    watch = Steps()
    trainer(tmp_path, callbacks=[watch]).fit(Own(base, optimizer=sgd(0.1)), data("sft"))
    assert all(seen["train/nll"] == -1.0 and seen["gradient"] > 0 for seen in watch.seen)


def test_dataloader_without_denominators(base: str, tmp_path: Path) -> None:
    ids = torch.arange(3, 27).reshape(4, 6)
    masks = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).float()
    batches = [
        {
            "input_ids": ids[i : i + 1],
            "loss_mask": masks[i : i + 1],
            "old_logprobs": -masks[i : i + 1],
            "advantages": masks[i : i + 1],
        }
        for i in range(4)
    ]
    for kind, name in ((SFTModule, "train/nll"), (PolicyRLModule, "train/loss")):
        watch, module = Steps(), kind(base, optimizer=sgd(0.0))
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer(tmp_path, accumulate_grad_batches=4, callbacks=[watch]).fit(module, loader)
        (seen,) = watch.seen
        logprobs = module.token_logprobs(ids, masks).logprobs
        wanted = -logprobs.sum() / masks.sum()
        if name == "train/loss":  # what is minimized: the mean of the micro-batches' means
            wanted = -((logprobs + masks).exp() * masks).sum(-1).div(masks.sum(-1)).mean()
        assert seen[name] == pytest.approx(float(wanted), rel=1e-5)
    alone = SFTModule(base)
    alone.configure_model()
    alone.training_step(batches[0], 0)  # without a Trainer
