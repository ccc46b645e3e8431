"""The folder of a preference stage: every reader gives the score of training."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.cli import main as entry
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, SequenceLogprob
from rlhf_lightning.rewards import ModelReward, RewardTerm
from rlhf_lightning.rewards.model import RewardModelScores
from rlhf_lightning.settings import arguments, describe
from tests.helpers.models import build_model
from tests.helpers.rows import pairs, write_rows
from tests.helpers.training import sgd, trainer

ROWS = pairs(7)
TEXTS = [row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS]


def train(root: Path, model: Any, scorer: Any, lora: LoRA | None = None, **options: Any) -> PreferenceModule:
    """Run a stage like the command does, with weights far enough from the start."""
    torch.manual_seed(0)
    module = PreferenceModule(model, scorer, lora=lora, optimizer=sgd(0.3), **options)
    data = PreferenceDataModule(ROWS, batch_size=4, show_example=False)
    trainer(root, callbacks=[ExportModel()], max_epochs=2).fit(module, data)
    return module


def folder_of(architecture: str, tokenizer: Any, root: Path) -> str:
    build_model(tokenizer, architecture=architecture).save_pretrained(root / architecture)
    tokenizer.save_pretrained(root / architecture)
    return str(root / architecture)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("stop_as_pad", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["attention"])])
def test_stock_libraries_compute_the_same_score(
    architecture: str, lora: Any, stop_as_pad: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """Alone, batched with padding on the right and on the left, and with LoRA merged."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = folder_of(architecture, tokenizer, tmp_path)
    if stop_as_pad:  # like many tokenizers; stock pooling would skip the token that the score is read at
        config = json.loads((Path(base) / "config.json").read_text())
        (Path(base) / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.eos_token_id}))
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(base)
    module = train(tmp_path / "run", base, RewardHead(), lora)
    folder = tmp_path / "run" / "model"
    wanted = module.score(*TEXTS)
    assert float(wanted.std()) > 0.01
    saved = AutoTokenizer.from_pretrained(folder)
    rows = [module.renderer.exchange(*_messages(p, r)).ids for p, r in zip(*TEXTS, strict=True)]
    if lora:
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.num_labels == 1
        assert model.config.pad_token_id == saved.pad_token_id
    model.eval()
    everyone = [model, model.merge_and_unload()] if lora else [model]
    for one in everyone:
        with torch.no_grad():
            close(torch.cat([one(torch.tensor([ids])).logits[:, 0] for ids in rows]), wanted)
            for side in ("right", "left"):
                saved.padding_side = side
                batch = saved.pad({"input_ids": rows}, return_tensors="pt")
                extra = {}
                if side == "left" and architecture == "gpt2":  # absolute positions: they follow the mask
                    extra = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
                close(one(**batch, **extra).logits[:, 0], wanted)


def _messages(prompt: str, response: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]


SCORERS = {
    "head": lambda: RewardHead(),
    "last_k": lambda: RewardHead(last_k=3),
    "logprob": lambda: SequenceLogprob(),
    "mean": lambda: SequenceLogprob(length_normalized=True, beta=2.0),
    "implicit": lambda: ImplicitReward(0.5),
    "implicit_mean": lambda: ImplicitReward(5.0, length_normalized=True),
}


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["all"])])
@pytest.mark.parametrize("name", SCORERS)
def test_all_readers_of_a_folder_compute_the_same_score(
    name: str, lora: Any, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module, a row with a shared prompt, a fresh load, `rlhf score`, the reward of RL, merged, moved."""
    module = train(tmp_path / "run" / "rm", base, SCORERS[name](), lora)
    folder = tmp_path / "run" / "rm" / "model"
    wanted = module.score(*TEXTS)
    assert float(wanted.std()) > 1e-3
    close(torch.cat([module.score([p], [r]) for p, r in zip(*TEXTS, strict=True)]), wanted)
    shared = module.score(
        [p for p in TEXTS[0] for _ in (0, 1)], [r for row in ROWS for r in (row["chosen"], row["rejected"])]
    )
    close(shared[::2], wanted)
    judge = RewardModel(str(folder))
    close(judge.score(*TEXTS), wanted)
    # A second stage that starts from it computes the same scores.
    reference = {"reference": base} if isinstance(module.scorer, ImplicitReward) else {}
    again = PreferenceModule(str(folder), type(module.scorer)(**{**arguments(module.scorer), **reference}))
    if not lora:
        close(again.score(*TEXTS), wanted)
    file = responses_file(tmp_path)
    with pytest.raises(SystemExit) as stop:
        entry.main(["score", str(folder), file])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    close(torch.tensor([json.loads(line)["score"] for line in printed.out.splitlines()]), wanted)
    assert "rows 7" in printed.err
    scorer = RewardTerm(ModelReward(str(folder)), module.renderer).scorer
    assert isinstance(scorer, RewardModelScores)
    assert scorer.by_tokens
    shutil.move(tmp_path / "run", tmp_path / "moved")
    close(RewardModel(str(tmp_path / "moved" / "rm" / "model")).score(*TEXTS), wanted)


def responses_file(root: Path) -> str:
    return write_rows(root / "rows.jsonl", [{"prompt": p, "response": r} for p, r in zip(*TEXTS, strict=True)])


def test_moved_run_finds_its_reference(base: str, tmp_path: Path) -> None:
    """A reference inside the run is found beside the model, even if the old path now has another model."""
    shutil.copytree(base, tmp_path / "run" / "sft" / "model")
    start = str(tmp_path / "run" / "sft" / "model")
    module = train(tmp_path / "run" / "dpo", start, ImplicitReward(0.5))
    wanted = module.score(*TEXTS)
    facts = json.loads((tmp_path / "run" / "dpo" / "model" / "stage.json").read_text())
    assert facts["reference"] == "../../sft/model"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "copy" / "dpo" / "model", start)  # another model now
    close(RewardModel(str(tmp_path / "copy" / "dpo" / "model")).score(*TEXTS), wanted)
    shutil.rmtree(tmp_path / "run")
    close(RewardModel(str(tmp_path / "copy" / "dpo" / "model")).score(*TEXTS), wanted)


def test_reference_outside_the_run_keeps_its_path(base: str, tmp_path: Path) -> None:
    module = train(tmp_path / "runs" / "one" / "dpo", base, ImplicitReward(0.5))
    folder = tmp_path / "runs" / "one" / "dpo" / "model"
    assert json.loads((folder / "stage.json").read_text())["reference"] is None
    shutil.move(tmp_path / "runs" / "one", tmp_path / "elsewhere")
    close(RewardModel(str(tmp_path / "elsewhere" / "dpo" / "model")).score(*TEXTS), module.score(*TEXTS))


def test_model_as_its_own_reference_is_rejected(base: str, tmp_path: Path) -> None:
    train(tmp_path / "dpo", base, ImplicitReward(0.5))
    folder = tmp_path / "dpo" / "model"
    facts = json.loads((folder / "stage.json").read_text())
    facts["scorer"]["init_args"]["reference"], facts["reference"] = str(folder), None
    (folder / "stage.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="names itself as its reference"):
        RewardModel(str(folder))


def test_warns_if_a_policy_is_compared_with_itself(base: str, tmp_path: Path, caplog: Any) -> None:
    train(tmp_path / "dpo", base, ImplicitReward(0.5))
    folder = str(tmp_path / "dpo" / "model")
    caplog.set_level("WARNING", "rlhf_lightning")
    for reference, warns in ((base, False), (None, True)):
        module = PreferenceModule(folder, ImplicitReward(0.5, reference))
        data = PreferenceDataModule(validation=ROWS, batch_size=4, show_example=False)
        found = trainer(tmp_path / "dpo").validate(module, data, verbose=False)[0]
        assert ("is compared with itself" in caplog.text) == warns
        assert (abs(found["val/margin"]) < 1e-6) == warns


def test_model_without_a_head_is_not_a_reward_model(base: str, tmp_path: Path) -> None:
    """Scoring it would give random numbers."""
    for folder in (base, _sft_adapter(base, tmp_path)):
        with pytest.raises(ConfigError, match="is not a preference model"):
            RewardModel(folder)


def _sft_adapter(base: str, root: Path) -> str:
    from rlhf_lightning import SFTModule

    SFTModule(base, lora=LoRA(rank=2)).save_pretrained(root / "adapter")
    return str(root / "adapter")


def test_score_shift_is_applied_only_on_request(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = train(tmp_path / "rm", base, RewardHead())
    folder = str(tmp_path / "rm" / "model")
    with pytest.raises(ConfigError, match="has no reward_shift"):
        RewardModel(folder, shifted=True)
    file = responses_file(tmp_path)
    for args in (["--set_shift"], ["--set_shift"], ["--set_shift", "--shifted"]):  # a second time changes nothing
        with pytest.raises(SystemExit) as stop:
            entry.main(["score", folder, file, *args])
        assert stop.value.code == 0
    wanted = module.score(*TEXTS)
    close(RewardModel(folder).score(*TEXTS), wanted)
    close(RewardModel(folder, shifted=True).score(*TEXTS), wanted - wanted.mean())
    capsys.readouterr()


def test_dpo_policy_is_an_ordinary_causal_model(base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = train(tmp_path / "dpo", base, ImplicitReward(0.5))
    folder = tmp_path / "dpo" / "model"
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(3, 20)[None]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert (folder / "generation_config.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, module.model(ids).logits)


@pytest.mark.parametrize("options", [{"format": "raw"}, {"template_kwargs": {"calm": True}}])
def test_rendering_settings_are_saved(options: dict[str, Any], base: str, tmp_path: Path) -> None:
    """A model trained on plain text, or with template settings, is scored on the same rendering."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% if calm %}Calmly.\n{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    module = PreferenceModule(base, RewardHead(), optimizer=sgd(0.3))
    data = PreferenceDataModule(ROWS, batch_size=4, show_example=False, **options)
    trainer(tmp_path / "run", callbacks=[ExportModel()]).fit(module, data)
    pairs = data.prepared["train"].rows
    wanted = module.score_tokens([p.chosen.ids for p in pairs], [p.chosen.loss_mask for p in pairs])
    close(module.score(*TEXTS), wanted)
    judge = RewardModel(str(tmp_path / "run" / "model"))
    close(judge.score(*TEXTS), wanted)
    assert judge.same_tokens(module.renderer)


class Scaled(ImplicitReward):
    """A user's scorer: another argument, and none for the reference."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(beta=0.25 * factor)
        self.factor = factor


class Twice(ModelReward):
    """A user's reward."""


def test_custom_scorer_subclass_is_saved_loaded_and_frozen(base: str, tmp_path: Path) -> None:
    module = train(tmp_path / "run", base, Scaled(3.0))
    folder = str(tmp_path / "run" / "model")
    judge = RewardModel(folder)
    assert judge.scorer.factor == 3.0  # type: ignore[attr-defined]
    close(judge.score(*TEXTS), module.score(*TEXTS))
    with pytest.raises(AttributeError, match="settings are frozen after construction"):
        judge.scorer.beta = 1.0
    reward = Twice(folder)
    assert reward.scored_by_model
    assert describe(reward)["init_args"] == {"model": folder}
    assert pickle.loads(pickle.dumps(reward)).model == folder
    (model,) = RewardTerm(reward, module.renderer).models
    assert isinstance(model, RewardModel)
