"""Mistakes in a user's script with the three modules and a plain Trainer: reported before anything is trained."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.objectives.preference import BradleyTerry
from rlhf_lightning.rewards import KeywordReward
from rlhf_lightning.rollout.advantages import GAE
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.models import build_model
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.training import sgd, trainer

ARGUMENTS: list[tuple[str, Callable[[], Any], list[str]]] = [
    ("no model", lambda: SFTModule(None), ["model.model is None", "folder, a Hub id"]),
    ("a class for a model", lambda: SFTModule(torch.nn.Linear), ["model.model is the class Linear"]),
    ("another module", lambda: SFTModule(torch.nn.Linear(1, 1)), ["is a Linear, which is not a transformers model"]),
    ("lora as a dict", lambda: SFTModule("m", lora={"rank": 8}), ["model.lora is {'rank': 8}", "LoRA(rank=16)"]),
    ("lora as a number", lambda: SFTModule("m", lora=8), ["model.lora is 8", "LoRA(rank=16)"]),
    ("peft's lora", lambda: SFTModule("m", lora=LoraConfig()), ["peft's LoraConfig", "LoRA(rank, alpha)"]),
    ("a rank in quotes", lambda: LoRA("8"), ["lora.rank is '8'; it must be a whole number"]),
    ("no target", lambda: LoRA(target=None), ["lora.target is None; it must list any of attention, mlp"]),
    ("alpha 0", lambda: LoRA(alpha=0), ["lora.alpha is 0", "above 0"]),
    ("much dropout", lambda: LoRA(dropout=1.5), ["lora.dropout is 1.5", "below 1"]),
    ("an optimizer's name", lambda: SFTModule("m", optimizer="adamw"), ["model.optimizer is 'adamw'", "lambda"]),
    ("a schedule's name", lambda: SFTModule("m", lr_scheduler="cosine"), ["model.lr_scheduler is 'cosine'", "Warmup("]),
    ("options as text", lambda: SFTModule("m", model_options="x"), ["model.model_options is 'x'"]),
    ("dtype twice", lambda: SFTModule("m", model_options={"torch_dtype": "auto"}), ["model.dtype: auto"]),
    (
        "trust as text",
        lambda: SFTModule("m", model_options={"trust_remote_code": "false"}),
        ["trust_remote_code is 'false'; it must be true or false, without quotes"],
    ),
    ("device_map", lambda: SFTModule("m", model_options={"device_map": "auto"}), ["the Trainer places the model"]),
    (
        "labels",
        lambda: SFTModule("m", model_options={"num_labels": 2}),
        ["num_labels is fixed, because a preference model has one"],
    ),
    (
        "a length of rows",
        lambda: PromptDataModule([], max_length=9),
        ["data.max_length has no meaning", "max_prompt_toke"],
    ),
    ("a batch of prompts", lambda: PromptDataModule([], batch_size=9), ["data.batch_size", "data.prompts_per_round"]),
    ("a budget in quotes", lambda: SFTModule("m", max_tokens_per_batch="9"), ["'9'; it must be a whole number"]),
    ("a sampler's dict", lambda: SFTModule("m", sampler={"max_tokens": 9}), ["model.sampler is", "Sampler(max_tokens"]),
    ("a loss's name", lambda: PreferenceModule("m", loss="dpo"), ["model.loss is 'dpo'", "BradleyTerry()"]),
    ("a loss's class", lambda: PreferenceModule("m", loss=BradleyTerry), ["the class BradleyTerry; pass an instance"]),
    ("a scorer's name", lambda: PreferenceModule("m", scorer="x"), ["model.scorer is 'x'", "ImplicitReward(beta"]),
    (
        "an objective's class",
        lambda: PolicyRLModule("m", objective=ClippedSurrogate),
        ["the class ClippedSurrogate; pass an instance", "ClippedSurrogate(…)"],
    ),
    ("a coefficient", lambda: PolicyRLModule("m", kl=0.1), ["model.kl is 0.1", "KLPenalty(0.1)"]),
    ("critic: true", lambda: PolicyRLModule("m", critic=True), ["model.critic is True", "Critic()"]),
    ("one reward", lambda: PolicyRLModule("m", rewards=KeywordReward(["a"])), ["must be a list", "[KeywordReward(…)]"]),
    ("a function", lambda: PolicyRLModule("m", rewards=[len]), ["must be a Reward: FunctionReward(my_function)"]),
    (
        "a reward's name",
        lambda: PolicyRLModule("m", rewards=["KeywordReward"]),
        ["contains 'KeywordReward'; each must"],
    ),
    (
        "an engine's name",
        lambda: Sampler(engine="vllm"),
        ["sampler.engine is 'vllm'", "generation.vllm_engine.VLLMEngine"],
    ),
    ("no slots", lambda: Sampler(slots=0), ["sampler.slots is 0; it must be at least 1"]),
    (
        "a size in quotes",
        lambda: SFTDataModule([], batch_size="8"),
        ["data.batch_size is '8'; it must be a whole"],
    ),
    ("eval size 0", lambda: SFTDataModule([], eval_batch_size=0), ["data.eval_batch_size is 0; it must be at least 1"]),
    ("length -1", lambda: SFTDataModule([], max_length=-1), ["data.max_length is -1; it must be at least 1"]),
    ("columns as a list", lambda: SFTDataModule([], columns=["a"]), ["data.columns is ['a']", "mapping"]),
    ("options of a template", lambda: SFTDataModule([], template_kwargs="x"), ["data.template_kwargs is 'x'"]),
    ("loaders first", lambda: SFTDataModule([]).train_dataloader(), ["data.train are not read", "setup()"]),
    ("no such checkpoint", lambda: SFTModule.load_from_checkpoint("no.ckpt"), ["no.ckpt: no such file (seen from"]),
]


@pytest.mark.parametrize(("call", "parts"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS])
def test_invalid_arguments_are_rejected(call: Callable[[], Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        call()
    assert all(part in str(refused.value) for part in parts), refused.value


def sft(base: str, **options: Any) -> SFTModule:
    return SFTModule(base, **options)


def policy(base: str) -> PolicyRLModule:
    return PolicyRLModule(base, rewards=[KeywordReward(["a"])], sampler=Sampler(max_tokens=3))


def test_data_module_of_another_stage_is_rejected(base: str, tmp_path: Path) -> None:
    modules = {"SFT": sft(base), "Preference": PreferenceModule(base), "Prompt": policy(base)}
    data: dict[str, Callable[[], Any]] = {
        "SFT": lambda: SFTDataModule(chats(4), show_example=False),
        "Preference": lambda: PreferenceDataModule(pairs(4), show_example=False),
        "Prompt": lambda: PromptDataModule(prompts(4), show_example=False),
    }
    for wanted, module in modules.items():
        for given in data.keys() - {wanted}:
            with pytest.raises(ConfigError, match=f"^{given}DataModule is for another stage.* {wanted}Data"):
                trainer(tmp_path).fit(module, data[given]())
        assert module.model is None  # said before anything is loaded
        with pytest.raises(ConfigError, match=f"trainer.fit has no data: .*{wanted}DataModule"):
            trainer(tmp_path).fit(module)
        with pytest.raises(ConfigError, match=f"trainer.test has no data: .*{wanted}DataModule"):
            trainer(tmp_path).test(module, verbose=False)
        with pytest.raises(ConfigError, match=f"trainer.predict has no data: .*{wanted}DataModule"):
            trainer(tmp_path).predict(module)


def test_checkpoint_without_settings_asks_for_the_arguments(base: str, tmp_path: Path) -> None:
    """`load_from_checkpoint(path)` says what to pass; with that, the weights are the saved ones."""
    module = sft(base, optimizer=sgd(0.1))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, SFTDataModule(chats(4), show_example=False))
    run.save_checkpoint(tmp_path / "one.ckpt")
    facts = torch.load(tmp_path / "one.ckpt", weights_only=True)
    torch.save({name: value for name, value in facts.items() if name != "hyper_parameters"}, tmp_path / "bare.ckpt")
    with pytest.raises(
        ConfigError, match=r"SFTModule.load_from_checkpoint needs model=… and the other arguments"
    ) as refused:
        SFTModule.load_from_checkpoint(tmp_path / "bare.ckpt")
    assert "SFTModule('runs/NAME/model')" in str(refused.value)
    for again in (
        SFTModule.load_from_checkpoint(tmp_path / "one.ckpt"),
        SFTModule.load_from_checkpoint(tmp_path / "bare.ckpt", model=base),
    ):
        assert all(torch.equal(again.state_dict()[name], value) for name, value in module.state_dict().items())
    with pytest.raises(ConfigError, match=r"is a model folder, not a checkpoint; start from it with SFTModule\('"):
        SFTModule.load_from_checkpoint(base)
    with pytest.raises(ConfigError, match="does not match this stage and its settings"):
        PreferenceModule.load_from_checkpoint(tmp_path / "one.ckpt", model=base)


def test_missing_attributes_name_the_alternative(base: str) -> None:
    module = sft(base)
    for name, part in [("generate", "trainer.predict"), ("push_to_hub", "rlhf export"), ("score", "PreferenceModule")]:
        with pytest.raises(AttributeError, match=f"no attribute '{name}'.*{part}"):
            getattr(module, name)
    with pytest.raises(AttributeError, match=r"configure_model\(\)"):
        module.training_step({"input_ids": torch.ones(1, 2), "loss_mask": torch.ones(1, 2)}, 0)
    assert not hasattr(module, "nothing_like_it")


def test_score_needs_lists(base: str) -> None:
    module = PreferenceModule(base)
    with pytest.raises(ConfigError, match=r"prompts is a single text; it must be a list of texts: \['hi'\]"):
        module.score("hi", "there")
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        module.score(["hi"], ["there"], batch_size=0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"optimizer": lambda parameters: None}, ["model.optimizer returned None"]),
        (
            {"lr_scheduler": ReduceLROnPlateau},
            ["needs the name of its metric", "lightning.pytorch.cli.ReduceLROnPlateau"],
        ),
        ({"lr_scheduler": lambda o: Warmup(o, warmup_steps=-1)}, ["warmup_steps is -1"]),
        ({"tokenizer": 3}, ["tokenizer is 3; it must be a folder, a Hub id"]),
    ],
)
def test_mistakes_reported_when_training_begins(base: str, tmp_path: Path, options: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        trainer(tmp_path).fit(sft(base, **options), SFTDataModule(chats(4), show_example=False))
    assert all(part in str(refused.value) for part in parts), refused.value


def test_reduce_on_plateau_uses_its_metric(base: str, tmp_path: Path) -> None:
    """LightningCLI's ReduceLROnPlateau names its metric, and is stepped with it after each epoch."""
    from lightning.pytorch.cli import ReduceLROnPlateau as Plateau

    plateau = partial(Plateau, monitor="val/nll", patience=0, threshold=9)
    module = sft(base, optimizer=sgd(0.1), lr_scheduler=plateau)
    rows = SFTDataModule(chats(4), validation=chats(2), batch_size=4, show_example=False)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(module, rows)
    # By a threshold that nothing reaches, each of the three epochs lowers the rate tenfold.
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0001)


def test_warns_if_validation_never_runs(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fit(**options: Any) -> list[str]:
        caplog.clear()
        rows = SFTDataModule(chats(4), validation=chats(2), batch_size=1, show_example=False)
        with caplog.at_level(logging.WARNING, "rlhf_lightning"):
            trainer(tmp_path, **options).fit(sft(base, optimizer=sgd(0.1)), rows)
        return [record.getMessage() for record in caplog.records if "never used" in record.getMessage()]

    assert len(fit(max_steps=1)) == 1
    assert not fit(max_steps=1, val_check_interval=1)
    assert not fit(max_steps=1, limit_val_batches=0)


def test_warns_if_warmup_is_longer_than_the_run(caplog: pytest.LogCaptureFixture) -> None:
    schedule = Warmup(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), warmup_steps=10)
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        schedule.set_total_steps(11)
        assert not caplog.records
        schedule.set_total_steps(10)
    assert (
        "warmup_steps is 10, but the run has only 10 steps, so the full learning rate is never reached" in caplog.text
    )


def test_models_that_cannot_generate_are_rejected(tokenizer: Any, tmp_path: Path) -> None:
    """An encoder, a model of another kind, and a classifier object are refused."""
    import transformers

    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=16))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for name, model in (("bert", bert), ("t5", t5)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"is an encoder \(bert\), whose tokens attend to later tokens"):
        SFTModule(str(tmp_path / "bert")).configure_model()
    SFTModule(str(tmp_path / "bert"), model_options={"is_decoder": True}).configure_model()
    with pytest.raises(ConfigError, match=r"transformers has no causal language model for the architecture T5"):
        SFTModule(str(tmp_path / "t5")).configure_model()
    classifier = build_model(tokenizer, task="SEQ_CLS")
    with pytest.raises(ConfigError, match="has no language-model head; use a causal LM"):
        SFTModule(classifier, tokenizer=tokenizer).configure_model()


def test_model_checkpoint_with_an_unknown_metric(base: str, tmp_path: Path) -> None:
    """Lightning's own message is unchanged: a ModelCheckpoint with a metric that is not logged."""
    keep = ModelCheckpoint(tmp_path / "best", monitor="val/los")
    run = trainer(tmp_path, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(Exception, match=r"could not find the monitored key"):
        run.fit(sft(base), SFTDataModule(chats(4), validation=chats(2), show_example=False))


def test_rows_longer_than_the_context_are_refused_before_training(tokenizer: Any, tmp_path: Path) -> None:
    short = {"tokenizer": tokenizer, "architecture": "llama", "max_position_embeddings": 16}
    runs = (
        (SFTModule(build_model(**short), tokenizer=tokenizer), SFTDataModule(chats(8))),
        (PreferenceModule(build_model(**short, task="SEQ_CLS"), tokenizer=tokenizer), PreferenceDataModule(pairs(8))),
    )
    for module, data in runs:
        with pytest.raises(ConfigError, match=r"longest row of data.train has \d+ tokens, .* 16 positions"):
            trainer(tmp_path).fit(module, data)


@pytest.mark.parametrize("what", ["vocabulary", "chat template"])
def test_tokenizer_of_the_data_that_differs_from_the_saved_one_is_refused(
    what: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    other = copy.deepcopy(tokenizer)
    if what == "vocabulary":
        other.add_tokens(["brand-new"])
    else:
        other.chat_template = other.chat_template.replace("<|im_end|>", "<|im_end|>!")
    module = SFTModule(model, tokenizer=tokenizer)
    trainer(tmp_path, max_steps=1).fit(module, SFTDataModule(chats(8), tokenizer=copy.deepcopy(tokenizer)))
    with pytest.raises(ConfigError, match=f"data.tokenizer has another {what} than the model's tokenizer"):
        trainer(tmp_path, max_steps=1).fit(module, SFTDataModule(chats(8), tokenizer=other))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_reward_model_as_a_policy_is_refused(lora: LoRA | None, base: str, tmp_path: Path) -> None:
    reward = PreferenceModule(base, lora=lora)
    reward.configure_model()
    reward.save_pretrained(tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"is a reward model \(score.weight\), whose score head would be dropped"):
        trainer(tmp_path / "run").fit(SFTModule(tmp_path / "reward"), SFTDataModule(chats(8)))


def test_other_models_of_a_stage_must_have_the_same_token_ids(base: str, tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    saved = json.loads((other / "tokenizer.json").read_text())
    ids = saved["model"]["vocab"]
    first, second = (token for token, number in ids.items() if number in (20, 21))
    ids[first], ids[second] = ids[second], ids[first]
    (other / "tokenizer.json").write_text(json.dumps(saved))
    rewards = [KeywordReward(["one"])]
    for module in (
        PreferenceModule(base, scorer=ImplicitReward(reference=str(other))),
        PolicyRLModule(base, rewards=rewards, kl=KLPenalty(0.1, reference=str(other))),
        PolicyRLModule(base, rewards=rewards, critic=Critic(model=str(other)), advantage=GAE()),
    ):
        with pytest.raises(ConfigError, match="has another vocabulary than the policy: 2 of the policy's tokens"):
            module.configure_model()
