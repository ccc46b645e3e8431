"""docs/metrics.md against the metrics that runs log: every logged name is on the page, and vice versa."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.imports import RequirementCache

from rlhf_lightning import (
    Distillation,
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.diagnostics.callback import Diagnostics
from rlhf_lightning.diagnostics.collapse import StopOnCollapse
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.objectives.preference import KTO, BradleyTerry, PlackettLuce
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE
from rlhf_lightning.rollout.curriculum import Curriculum
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.runner import Limits
from tests.helpers.cli import mistake, stage_config, write_yaml
from tests.helpers.environments import PromptEnv
from tests.helpers.modules import length
from tests.helpers.rows import chats, labeled, pairs, prompts, rankings
from tests.helpers.runs import complete
from tests.helpers.training import sgd, trainer

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
SECTIONS = {"sft": "SFT", "preference": "Preference", "policy": "Policy RL"}


def listed(kind: str) -> set[str]:
    """The names in the first column of a section's table."""
    section = PAGE.split(f"\n## {SECTIONS[kind]}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert all(len(line.replace("\\|", "").split("|")) == 4 for line in rows)
    assert all(line.replace("\\|", "").split("|")[2].strip() for line in rows), "each has a meaning"
    return {name for line in rows for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


class Names(Logger):
    """Records the names of logged metrics."""

    name, version = "names", ""

    def __init__(self) -> None:
        super().__init__()
        self.logged: set[str] = set()

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged |= metrics.keys()


def logged(module: Any, data: Any, root: Path, **options: Any) -> set[str]:
    """The names that fit and test log; those of test are listed under `val/`."""
    names = Names()
    run = trainer(root, logger=names, log_every_n_steps=1, **options)
    run.fit(module, data)
    fitted = set(names.logged)
    names.logged.clear()
    run.test(module, data, verbose=False)
    tested = {name.replace("test/", "val/") for name in names.logged} - {"epoch"}
    assert tested <= fitted
    return fitted - {"epoch"}


def both(make: Callable[..., Any], rows: list[Any], **options: Any) -> Any:
    return make(rows, rows, test=rows, batch_size=4, show_example=False, **options)


def sft(base: str, root: Path) -> set[str]:
    module = SFTModule(base, optimizer=sgd(0.1), distillation=Distillation(base))
    return logged(module, both(SFTDataModule, chats(8)), root)


def preference(base: str, root: Path) -> set[str]:
    categories = [{**row, "category": f"c{i % 2}"} for i, row in enumerate(pairs(12))]
    categories += [{"prompt": "a", "chosen": "x", "rejected": "z", "category": "c0"}] * 2
    categories += [{"prompt": "a", "chosen": "one", "rejected": "two three four", "category": "c0"}] * 2
    runs = [(BradleyTerry(), categories), (KTO(), labeled(12)), (PlackettLuce(), rankings(8))]
    found: set[str] = set()
    for number, (loss, rows) in enumerate(runs):
        module = PreferenceModule(base, ImplicitReward(0.1), loss, optimizer=sgd(0.1))
        found |= logged(module, both(PreferenceDataModule, rows), root / str(number))
    return found


class Counting(PromptEnv):
    """An environment of two turns with its own metric; it fails for row 3."""

    def __init__(self, row: dict[str, Any]) -> None:
        if row["wanted"] == 3:
            raise RuntimeError("no room")
        super().__init__(row)

    def step(self, message: dict[str, Any]) -> StepResult:
        self.turn += 1
        return StepResult(0.0, self.turn == 2, [{"role": "user", "content": "and"}], metrics={"asked": 1.0})


def policy(base: str, root: Path) -> set[str]:
    def module(**options: Any) -> PolicyRLModule:
        rewards = [FunctionReward(length, name="length")]
        return PolicyRLModule(
            base, rewards=rewards, sampler=Sampler(max_tokens=8, stop=["a", "e", "o"]), optimizer=sgd(0.1), **options
        )

    def data(group_size: int) -> PromptDataModule:
        rows = prompts(5)
        return PromptDataModule(rows, rows[:2], test=rows[:2], prompts_per_round=5, group_size=group_size)

    groups = module(
        kl=KLPenalty(0.1), resample_groups=1, environment=Counting, limits=Limits(max_turns=2, on_error="drop")
    )
    critic = module(
        critic=Critic(learning_rate=0.1),
        advantage=GAE(),
        objective=ClippedSurrogate(),
        kl=KLPenalty(0.1, "reward"),
        max_staleness=1,
        curriculum=Curriculum(),
    )
    stop = StopOnCollapse(reward_lost=None, entropy_fraction=None, kl_limit=1e-12, patience=1)
    stop.checks[0].severity = lambda curves: 1.0  # type: ignore[method-assign]
    student = PolicyRLModule.distill(
        base, Distillation(base, on_policy_fraction=0.5), sampler=Sampler(max_tokens=8), optimizer=sgd(0.1)
    )
    answered = [{**row, "completion": "one"} for row in prompts(5)]
    distilled = PromptDataModule(answered, answered[:2], test=answered[:2], prompts_per_round=5, group_size=1)
    return (
        logged(groups, data(2), root / "groups", callbacks=[Diagnostics()])
        | logged(critic, data(1), root / "critic", callbacks=[stop])
        | logged(student, distilled, root / "student")
    )


RUNS = {"sft": sft, "preference": preference, "policy": policy}


@pytest.mark.parametrize("kind", RUNS)
def test_page_lists_exactly_the_logged_metrics(kind: str, base: str, tmp_path: Path) -> None:
    found, names = RUNS[kind](base, tmp_path), listed(kind)
    patterns = {name: re.compile(re.escape(name).replace("NAME", r"\w+") + "$") for name in names}
    # A pattern stands for what no other line names.
    exact = {name for name in names if "NAME" not in name}
    unknown = {name for name in found - exact if not any(p.match(name) for n, p in patterns.items() if "NAME" in n)}
    assert unknown == set(), "logged, and not on the page"
    unused = {name for name, pattern in patterns.items() if not any(pattern.match(each) for each in found)}
    assert unused == set(), "on the page, and never logged"


# -- Lightning's own loggers ------------------------------------------------------------------------------------------


def fit(base: str, tmp_path: Path, *args: str) -> list[str]:
    config = write_yaml(tmp_path / "c.yaml", stage_config("sft", base, tmp_path))
    return ["sft", "fit", "-c", config, "--trainer.default_root_dir", str(tmp_path / "run"), *args]


def lightning_logger(name: str, **options: str) -> list[str]:
    given = [f"--trainer.logger.{key}={value}" for key, value in options.items()]
    return [f"--trainer.logger=lightning.pytorch.loggers.{name}", *given]


@pytest.mark.parametrize(("name", "extra"), [("TensorBoardLogger", "tensorboard"), ("WandbLogger", "wandb")])
def test_logger_that_is_not_installed(
    name: str,
    extra: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for where in ("fabric.loggers.tensorboard._TENSORBOARD", "fabric.loggers.tensorboard._TENSORBOARDX"):
        monkeypatch.setattr(f"lightning.{where}_AVAILABLE", RequirementCache("tensorboard>=999"))
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=999"))
    message = mistake(fit(base, tmp_path, *lightning_logger(name, save_dir=str(tmp_path))), capsys)
    assert f'pip install "rlhf-lightning[{extra}]"' in message


def test_metrics_csv_is_written_beside_another_logger(base: str, tmp_path: Path) -> None:
    given = [
        {
            "class_path": "rlhf_lightning.checkpointing.metrics_csv.MetricsCSV",
            "init_args": {"folder": str(tmp_path / "m")},
        },
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}},
    ]
    over = write_yaml(tmp_path / "logger.yaml", {"trainer": {"logger": given}})
    complete(fit(base, tmp_path, "-c", over), tmp_path / "out.txt")
    [other] = (tmp_path / "csv").rglob("metrics.csv")
    assert "train/nll" in other.read_text()
    assert len((tmp_path / "m" / "metrics.csv").read_text().splitlines()) == 5
