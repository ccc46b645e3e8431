"""The modules as Lightning users expect them: LightningCLI, hyperparameters, `load_from_checkpoint`, `forward`."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from rlhf_lightning import (
    GroupCentered,
    KLPenalty,
    LoRA,
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    Sampler,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.scorers import ImplicitReward, Scorer
from rlhf_lightning.objectives import BradleyTerry, ClippedSurrogate
from rlhf_lightning.rewards import KeywordReward
from rlhf_lightning.settings import Settings, describe, rebuild
from tests.helpers.cli import stage_config
from tests.helpers.modules import data, make
from tests.helpers.training import trainer

MODULES: dict[str, dict[str, Any]] = {
    "sft": {"lora": LoRA(4, target=["attention"]), "max_empty_steps": 7},
    "preference": {"scorer": ImplicitReward(beta=0.3), "loss": BradleyTerry(label_smoothing=0.1), "lora": LoRA(4)},
    "policy": {
        "objective": ClippedSurrogate(0.1, 0.3),
        "advantage": GroupCentered("std"),
        "kl": KLPenalty(0.1, "reward"),
        "sampler": Sampler(6, temperature=0.9),
        "rewards": [KeywordReward(["a", "e"], min_words=1)],
    },
}
DATA = {"sft": SFTDataModule, "preference": PreferenceDataModule, "policy": PromptDataModule}
CLASSES: dict[str, type] = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}


def fitted(kind: str, base: str, folder: Path, **settings: Any) -> tuple[Any, Path]:
    """A module after one step, and its checkpoint."""
    module = CLASSES[kind](base, **{**MODULES[kind], **settings})
    run = trainer(folder, max_steps=1)
    run.fit(module, data(kind))
    run.save_checkpoint(folder / "step.ckpt")
    return module, folder / "step.ckpt"


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


@pytest.mark.parametrize("kind", CLASSES)
def test_load_from_checkpoint_needs_only_the_path(kind: str, base: str, tmp_path: Path) -> None:
    module, path = fitted(kind, base, tmp_path)
    facts = torch.load(path, weights_only=True)
    assert yaml.safe_load(yaml.safe_dump(facts["hyper_parameters"])) == facts["hyper_parameters"], "plain values"
    loaded = CLASSES[kind].load_from_checkpoint(path)
    assert same_weights(module, loaded)
    assert dict(loaded.hparams) == dict(module.hparams)
    assert describe(loaded.hparams["model"]) == base
    if kind == "preference":
        assert (loaded.scorer.beta, loaded.loss.label_smoothing) == (0.3, 0.1)
    if kind == "policy":
        assert (loaded.objective.clip_high, loaded.kl.coefficient, loaded.sampler.temperature) == (0.3, 0.1, 0.9)
        assert loaded.rewards[0].arguments() if hasattr(loaded.rewards[0], "arguments") else True
    # An argument given beside the path takes the place of the checkpoint's.
    assert CLASSES[kind].load_from_checkpoint(path, max_empty_steps=3).max_empty_steps == 3


def test_load_from_checkpoint_asks_for_arguments_that_are_not_plain(base: str, tmp_path: Path, caplog: Any) -> None:
    class Mine:
        """A class that is not one of our settings."""

    _, path = fitted("sft", base, tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    SFTModule.load_from_checkpoint(path)
    assert "loaded without optimizer" in caplog.text
    module = make("sft", base)
    module.configure_model()
    held, path = fitted("sft", module.model, tmp_path / "b")
    with pytest.raises(ConfigError, match="needs model=…"):
        SFTModule.load_from_checkpoint(path)
    assert same_weights(held, SFTModule.load_from_checkpoint(path, model=base))


class Doubled(ImplicitReward):
    """A user's scorer."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(beta=0.1)
        self.factor = factor


def test_custom_class_is_rebuilt_if_imported(base: str, tmp_path: Path) -> None:
    module, path = fitted("preference", base, tmp_path, scorer=Doubled(3.0), lora=None)
    assert module.hparams["scorer"] == {"class_path": f"{__name__}.Doubled", "init_args": {"factor": 3.0}}
    assert PreferenceModule.load_from_checkpoint(path).scorer.factor == 3.0


@pytest.mark.parametrize("name", ["os.system", "antigravity.S", "subprocess.Popen", "Sampler.bind", 3, ["a"]])
def test_class_named_in_a_file_is_not_imported(name: Any, base: str, tmp_path: Path) -> None:
    _, path = fitted("sft", base, tmp_path)
    facts = torch.load(path, weights_only=True)
    facts["hyper_parameters"]["lora"] = {"class_path": name, "init_args": {"command": "touch evil"}}
    torch.save(facts, path)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="not a known class"):
        SFTModule.load_from_checkpoint(path)
    assert set(sys.modules) == before
    assert not (tmp_path / "evil").exists()


def test_settings_are_described_and_rebuilt() -> None:
    for value in (*MODULES["policy"].values(), *MODULES["preference"].values(), LoRA(2, quantize=None)):
        plain = describe(value)
        assert yaml.safe_load(yaml.safe_dump(plain)) == plain
        assert describe(rebuild(plain)) == plain
    assert issubclass(Scorer, Settings)


def test_forward_gives_logits_and_scores(base: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for kind in ("sft", "policy"):
        module = make(kind, base)
        logits = module(ids, mask)
        torch.testing.assert_close(logits, module.model(input_ids=ids, attention_mask=mask).logits)
        assert module(ids).shape == (2, 4, module.model.config.vocab_size)
    judge = PreferenceModule(base)
    scores = judge(ids, mask)
    wanted = judge.score_tokens([[5, 6, 7, 8], [9, 4]], [[0, 1, 1, 1], [0, 1]])
    torch.testing.assert_close(scores, wanted)
    right = judge(torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), mask.flip(1).sort(1, descending=True)[0])
    torch.testing.assert_close(right, scores)


class Slow(SFTModule):
    """A subclass that overrides Lightning's hooks."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameter_groups(), lr=0.5)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return 2 * super().training_step(batch, batch_idx)


def test_subclass_overrides_hooks(base: str, tmp_path: Path) -> None:
    module = Slow(base)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data("sft"))
    assert module.seen == 2
    assert type(run.optimizers[0]) is torch.optim.SGD
    run.save_checkpoint(tmp_path / "step.ckpt")
    assert same_weights(module, Slow.load_from_checkpoint(tmp_path / "step.ckpt"))


@pytest.mark.parametrize("kind", CLASSES)
def test_modules_run_in_a_custom_lightning_cli(kind: str, base: str, tmp_path: Path) -> None:
    """`LightningCLI(SFTModule, SFTDataModule)` and the other two: fit, validate, test, predict."""
    settings = stage_config(kind, base, tmp_path)
    settings["data"] |= dict.fromkeys(("validation", "test", "predict"), settings["data"]["train"])
    settings["trainer"] |= {"max_steps": 1, "default_root_dir": str(tmp_path), "accelerator": "cpu", "logger": False}
    settings["trainer"] |= {"enable_progress_bar": False, "enable_checkpointing": False}
    if kind == "policy":
        settings["model"]["rewards"] = [{"class_path": "KeywordReward", "init_args": {"keywords": ["a"]}}]
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    for command in ("fit", "validate", "test", "predict"):
        arguments = {"save_config_callback": None, "args": [command, "-c", str(config)]}
        cli = LightningCLI(CLASSES[kind], DATA[kind], **arguments)  # type: ignore[arg-type]
        assert cli.trainer.state.finished
        assert (cli.trainer.global_step == 1) == (command == "fit")


def test_hyperparameters_are_logged(base: str, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path, name="", version=""))
    run.fit(make("sft", base, lora=LoRA(3)), data("sft"))
    found = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert found["lora"]["init_args"]["rank"] == 3
    assert isinstance(run, pl.Trainer)
