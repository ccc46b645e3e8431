"""Distillation in PolicyRLModule and SFTModule: losses, mixing, the teacher's state, invariances, refusals."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rlhf_lightning import Distillation, LoRA, PolicyRLModule, PromptDataModule, Sampler, SFTDataModule, SFTModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.objectives.distillation import divergence
from rlhf_lightning.quickstart.model import make_tokenizer
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.cli import rlhf, stage_config, write_yaml
from tests.helpers.models import TEXTS, build_model
from tests.helpers.modules import few_vowels, same, weights
from tests.helpers.rows import chats, prompts
from tests.helpers.runs import in_ranks
from tests.helpers.sharding import Keep
from tests.helpers.training import adamw, sgd, trainer


@pytest.fixture
def teacher(tmp_path: Path, tokenizer: Any) -> str:
    """The folder of a wider model with the student's tokenizer and a padded embedding."""
    folder = tmp_path / "teacher"
    size = {"hidden_size": 48, "vocab_size": len(tokenizer) + 5}
    build_model(tokenizer, seed=1, **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def answered(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Count {i}", "completion": " ".join(["one", "two", "three"][: 1 + i % 3])} for i in range(count)
    ]


def policy(base: str, distillation: Distillation, **options: Any) -> PolicyRLModule:
    options = {"sampler": Sampler(max_tokens=6), "optimizer": sgd(0.1), **options}
    return PolicyRLModule.distill(base, distillation, **options)


def source(rows: list[dict[str, Any]] | None = None, **options: Any) -> PromptDataModule:
    options = {"prompts_per_round": 4, "group_size": 1, "seed": 1, **options}
    return PromptDataModule(rows or prompts(8), prompts(3), show_example=False, **options)


def sft(base: str, distillation: Distillation | None, **options: Any) -> SFTModule:
    return SFTModule(base, distillation=distillation, **{"optimizer": sgd(0.1), **options})


class Batches(Callback):
    """Records batches, logged values and the modes of the teacher's modules."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.modes: set[bool] = set()

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.logged.append({name: float(value) for name, value in run.logged_metrics.items()})
        if module.teacher is not None:
            self.modes |= {part.training for part in module.teacher.model.modules()}


@pytest.mark.parametrize("kind", ["policy", "sft"])
@pytest.mark.parametrize(("beta", "top_k"), [(1.0, None), (0.5, 3)])
def test_loss_is_the_divergence_of_the_two_models(
    kind: str, beta: float, top_k: int | None, base: str, teacher: str, tmp_path: Path
) -> None:
    """The logged loss of a step, from the logits of the two folders as transformers gives them."""
    from transformers import AutoModelForCausalLM

    settings = Distillation(teacher, beta=beta, top_k=top_k, coefficient=0.5, temperature=1.3)
    seen = Batches()
    module, data = (
        (policy(base, settings), source())
        if kind == "policy"
        else (sft(base, settings, nll_coefficient=0.25), SFTDataModule(chats(4), batch_size=4, show_example=False))
    )
    trainer(tmp_path, max_steps=1, callbacks=[seen]).fit(module, data)
    student, other = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, teacher))
    ids, mask = seen.batches[0]["input_ids"], seen.batches[0]["loss_mask"][:, 1:]
    with torch.no_grad():
        logits = student(ids).logits[:, :-1]
        per_token = divergence(logits, other(ids).logits[:, :-1], beta, temperature=1.3, top_k=top_k)
        nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    mean = float((per_token * mask).sum() / mask.sum())
    assert seen.logged[0]["train/divergence"] == pytest.approx(mean, rel=1e-4)
    if kind == "policy":
        assert seen.logged[0]["train/loss"] == pytest.approx(0.5 * mean, rel=1e-4)
        assert not {"train/reward", "train/zero_variance_groups"} & seen.logged[0].keys()
    else:
        assert seen.logged[0]["train/nll"] == pytest.approx(float((nll * mask).sum() / mask.sum()), rel=1e-4)


def test_sft_mixes_divergence_and_likelihood(base: str, teacher: str, tmp_path: Path) -> None:
    """Gradient descent adds up: the step of 0.5 D + 0.25 NLL is half that of D plus a quarter of that of the NLL."""

    def change(settings: Distillation | None, **options: Any) -> dict[str, torch.Tensor]:
        module = sft(base, settings, dtype="float64", **options)
        module.configure_model()
        before = weights(module)
        data = SFTDataModule(chats(4), batch_size=4, show_example=False)
        trainer(tmp_path, max_steps=1, precision="64-true").fit(module, data)
        return {name: value - before[name] for name, value in weights(module).items()}

    alone = change(Distillation(teacher, beta=0.0)), change(None)
    both = change(Distillation(teacher, beta=0.0, coefficient=0.5), nll_coefficient=0.25)
    added = {name: 0.5 * alone[0][name] + 0.25 * alone[1][name] for name in both}
    same(both, added, rtol=1e-6, atol=1e-8)
    assert any(not torch.allclose(alone[0][name], alone[1][name]) for name in both)


@pytest.mark.parametrize("kind", ["policy", "sft", "mixed", "rewarded"])
def test_accumulated_micro_batches_equal_one_large_batch(kind: str, base: str, teacher: str, tmp_path: Path) -> None:
    results = []
    for pieces in (1, 2):
        settings = Distillation(teacher, beta=0.5, on_policy_fraction=0.5 if kind == "mixed" else 1.0)
        rows, options = answered(8) if kind == "mixed" else prompts(8), {"dtype": "float64"}
        if kind == "sft":
            module, data = sft(base, settings, **options), SFTDataModule(chats(4), batch_size=4 // pieces)
        elif kind == "rewarded":
            module = policy(base, settings, rewards=[FunctionReward(few_vowels)], **options)
            data = source(rows, group_size=2, minibatches=pieces)
        else:
            module, data = policy(base, settings, **options), source(rows, minibatches=pieces)
        run = trainer(tmp_path, accumulate_grad_batches=pieces, precision="64-true", max_epochs=1)
        run.fit(module, data)
        results.append(weights(module))
    same(results[0], results[1], rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize("kind", ["policy", "mixed", "sft", "distill_pg"])
def test_interrupted_run_equals_an_uninterrupted_run_exactly(
    kind: str, base: str, teacher: str, tmp_path: Path
) -> None:
    def fit(folder: str, resume: Path | None = None) -> Any:
        options = {"optimizer": adamw(1e-2), "lora": LoRA(rank=2)}
        torch.manual_seed(0)  # the adapter's first weights
        if kind == "sft":
            module: Any = sft(base, Distillation(teacher), **options)
            data: Any = SFTDataModule(chats(16), batch_size=4, show_example=False, seed=1)
        elif kind == "distill_pg":
            module = PolicyRLModule.distill_pg(base, teacher, sampler=Sampler(max_tokens=6), **options)
            data = source(minibatches=2, update_epochs=1)
        else:
            fraction = 0.5 if kind == "mixed" else 1.0
            module = policy(base, Distillation(teacher, on_policy_fraction=fraction), **options)
            data = source(answered(8), minibatches=2)
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run = trainer(tmp_path / folder, max_epochs=1, callbacks=[saved], enable_checkpointing=True)
        run.fit(module, data, ckpt_path=resume, weights_only=True)
        assert run.global_step == 4
        return module

    whole = weights(fit("whole"))
    same(whole, weights(fit("resumed", tmp_path / "whole" / "step=1.ckpt")))
    stored = torch.load(tmp_path / "whole" / "step=1.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in stored if "teacher" in name or "reference" in name]


def test_teacher_is_frozen_in_eval_mode_and_saved_nowhere(base: str, teacher: str, tmp_path: Path) -> None:
    seen = Batches()
    module = policy(base, Distillation(teacher, dtype="bfloat16"))
    run = trainer(tmp_path, callbacks=[seen, ExportModel()], max_epochs=1)
    module.configure_model()
    assert module.teacher is not None
    before = [p.clone() for p in module.teacher.model.parameters()]
    run.fit(module, source())
    after = list(module.teacher.model.parameters())
    assert seen.modes == {False}
    assert {p.dtype for p in after} == {torch.bfloat16}
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in after)
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in after}
    assert not [name for name in module.state_dict() if "teacher" in name]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in load_file(f"{base}/model.safetensors").items()
    }


def test_teacher_in_an_adapter_folder_on_a_device_of_its_own(base: str, tmp_path: Path) -> None:
    """A student starts from the base of its teacher's adapter, so that their divergence is the adapter's effect."""
    torch.manual_seed(0)
    data = SFTDataModule(chats(4), batch_size=4, show_example=False)
    adapter = SFTModule(base, lora=LoRA(rank=2), optimizer=sgd(5.0))
    trainer(tmp_path / "adapter", max_steps=2, callbacks=[ExportModel()]).fit(adapter, data)
    folder = str(tmp_path / "adapter" / "model")
    assert (Path(folder) / "adapter_config.json").exists()
    found = []
    for options in ({}, {"device": "cpu"}, {"offload": True}):
        seen = Batches()
        run = trainer(tmp_path / "run", max_steps=1, callbacks=[seen])
        run.fit(policy(base, Distillation(folder, **options)), source())
        found.append(seen.logged[0]["train/divergence"])
    assert found[0] > 1e-4
    assert found[1:] == found[:1] * 2


def test_policy_gradient_form_estimates_the_gradient_of_the_reverse_kl(base: str, teacher: str, tmp_path: Path) -> None:
    """Many samples of one token: the mean of the sampled gradients approaches that of the whole vocabulary."""

    def step(module: PolicyRLModule) -> torch.Tensor:
        module.configure_model()
        before = torch.cat([p.detach().flatten().clone() for p in module.model.parameters()])
        data = PromptDataModule([{"prompt": "Count 1"}], group_size=2048, show_example=False, seed=3)
        trainer(tmp_path, max_steps=1).fit(module, data)
        return torch.cat([p.detach().flatten() for p in module.model.parameters()]) - before

    one = {"sampler": Sampler(max_tokens=1, slots=2048), "optimizer": sgd(1e-3)}
    whole = step(PolicyRLModule.distill(base, teacher, **one))
    sampled = step(PolicyRLModule.distill_pg(base, teacher, **one))
    assert float(torch.nn.functional.cosine_similarity(whole, sampled, dim=0)) > 0.9
    assert float(sampled.norm() / whole.norm()) == pytest.approx(1, abs=0.2)


def test_data_answers_are_mixed_in_by_prompt(base: str, teacher: str, tmp_path: Path) -> None:
    """The fraction of sampled answers, the tokens of the others, and ratios of 1 on both."""
    seen, rows = Batches(), answered(200)
    module = policy(base, Distillation(teacher, on_policy_fraction=0.3), optimizer=sgd(0.0))
    trainer(tmp_path, callbacks=[seen], max_epochs=1).fit(module, source(rows, prompts_per_round=50))
    fractions = [logged["train/on_policy"] for logged in seen.logged]
    assert sum(fractions) / len(fractions) == pytest.approx(0.3, abs=0.1)
    assert len(set(fractions)) > 1
    assert all(logged["train/log_ratio_max"] < 1e-4 for logged in seen.logged)
    assert all(logged["train/logprob_gap"] < 1e-4 for logged in seen.logged)
    texts = [
        module.tokenizer.decode(ids[flags.bool()])
        for batch in seen.batches
        for ids, flags in zip(batch["input_ids"], batch["loss_mask"], strict=True)
    ]
    assert len(texts) == 200
    wanted = {"one<|im_end|>", "one two<|im_end|>", "one two three<|im_end|>"}
    answered_by_data = sum(text.removesuffix("\n") in wanted for text in texts)
    assert answered_by_data == round(sum(50 * (1 - fraction) for fraction in fractions))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_ends_of_the_fraction(fraction: float, base: str, teacher: str, tmp_path: Path) -> None:
    seen = Batches()
    module = policy(base, Distillation(teacher, on_policy_fraction=fraction))
    trainer(tmp_path, callbacks=[seen], max_epochs=1).fit(module, source(answered(8)))
    assert len(module.last_episodes) == 4 * fraction
    assert [logged.get("train/on_policy", 1.0) for logged in seen.logged] == [fraction] * 2
    assert all(bool(batch["loss_mask"].any(1).all()) for batch in seen.batches)


def test_distillation_approaches_the_teacher(base: str, teacher: str, tmp_path: Path) -> None:
    module = PolicyRLModule.distill(base, teacher, sampler=Sampler(max_tokens=6), optimizer=adamw(3e-3))
    data, run = source(prompts(16), prompts_per_round=16), trainer(tmp_path, max_epochs=12)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    after = run.validate(module, data, verbose=False)[0]
    assert after["val/divergence"] < 0.7 * before["val/divergence"]
    assert not [name for name in after if "reward" in name]


def test_two_ranks_equal_one_with_mixed_answers(base: str, teacher: str, tmp_path: Path) -> None:
    """Which prompts keep the answers of the data does not depend on the rank that has them."""
    results = []
    for devices in (1, 2):
        module = policy(base, Distillation(teacher, on_policy_fraction=0.5), dtype="float64")
        root = tmp_path / str(devices)
        root.mkdir()
        strategy = "ddp_fork" if devices == 2 else "auto"
        run = trainer(root, devices=devices, strategy=strategy, precision="64-true", callbacks=[Keep()])
        run.fit(module, source(answered(7)))
        results.append(torch.load(root / "weights.pt"))
    same(results[0], results[1], rtol=1e-6, atol=1e-8)


def test_bfloat16_changes_the_divergence_by_rounding_only(base: str, teacher: str, tmp_path: Path) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        seen = Batches()
        run = trainer(tmp_path, precision=precision, max_steps=1, callbacks=[seen])
        run.fit(sft(base, Distillation(teacher)), SFTDataModule(chats(4), batch_size=4, show_example=False))
        found.append(seen.logged[0]["train/divergence"])
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.03)


@pytest.mark.parametrize("kind", ["policy", pytest.param("sft", marks=pytest.mark.slow)])
def test_sharded_student_and_teacher_equal_one_process(kind: str, base: str, teacher: str, tmp_path: Path) -> None:
    """FSDP2 on two ranks, with micro-batches and logits in chunks."""

    def train(root: Path, world: int) -> None:
        root.mkdir(exist_ok=True)
        options = {"dtype": "float64", "max_tokens_per_batch": 40}
        if kind == "sft":
            module: Any = sft(base, Distillation(teacher), **options)
            data: Any = SFTDataModule(chats(8), batch_size=4 // world // world, show_example=False)
        else:
            module, data = policy(base, Distillation(teacher), **options), source(minibatches=world)
        strategy: Any = FSDP2() if world > 1 else "auto"
        run = trainer(root, devices=world, strategy=strategy, accumulate_grad_batches=world, callbacks=[Keep()])
        run.fit(module, data)
        assert run.global_step == 2

    train(tmp_path / "one", 1)
    in_ranks(2, lambda: train(tmp_path / "two", 2), tmp_path / "two ranks")
    one, two = (torch.load(tmp_path / name / "weights.pt") for name in ("one", "two"))
    same(one, two, rtol=1e-6, atol=1e-8)


def other_vocabulary(tmp_path: Path) -> str:
    words = make_tokenizer([text[::-1] for text in TEXTS] * 5)
    build_model(words, seed=2, vocab_size=400).save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_teacher_with_another_vocabulary_is_refused(base: str, tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path)
    for module in (policy(base, Distillation(other)), sft(base, Distillation(other))):
        with pytest.raises(ConfigError, match=r"another vocabulary than the student: \d+ of the student's"):
            module.configure_model()


def test_tokens_of_one_side_are_allowed_and_logged(
    base: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.add_tokens(["<extra>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "Assistant") + " "
    folder = str(tmp_path / "more")
    build_model(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        sft(base, Distillation(folder)).configure_model()
    assert "1 tokens are only in the vocabulary of the student or of the teacher" in caplog.text
    assert "'<extra>'" in caplog.text
    assert "chat template of the teacher" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"top_k": 0}, "top_k"),
        ({"coefficient": 0.0}, "coefficient is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"on_policy_fraction": 2.0}, "on_policy_fraction is 2.0"),
        ({"dtype": "float31"}, "dtype is 'float31'"),
        ({"device": "cpu", "offload": True}, "set only one"),
        ({"teacher": ""}, "teacher is ''"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distillation(**{"teacher": "t", **options})


def test_settings_that_do_not_fit_together_are_refused(base: str, teacher: str, tmp_path: Path) -> None:
    mixed = Distillation("t", on_policy_fraction=0.5)
    for options in ({"rewards": [FunctionReward(few_vowels)]}, {"kl": KLPenalty(0.1)}):
        with pytest.raises(ConfigError, match="need sampled answers"):
            policy("m", mixed, **options)
    with pytest.raises(ConfigError, match="resample_groups has no effect without rewards"):
        policy("m", Distillation("t"), resample_groups=1)
    with pytest.raises(ConfigError, match="SFT trains only on the answers of the data"):
        sft("m", mixed)
    with pytest.raises(ConfigError, match="nll_coefficient has no effect"):
        sft("m", None, nll_coefficient=1.0)
    with pytest.raises(ConfigError, match="in Python pass an object"):
        SFTModule("m", distillation=teacher)  # type: ignore[arg-type]
    module = policy(base, Distillation(teacher, on_policy_fraction=0.5))
    with pytest.raises(ConfigError, match=r"Set data\.group_size to 1"):
        trainer(tmp_path).fit(module, source(answered(8), group_size=2))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*answered(3), {"prompt": "Hi"}]))
    data = PromptDataModule(str(rows), group_size=1, prompts_per_round=4, show_example=False)
    with pytest.raises(DataError, match=r"rows.jsonl:4: the row has no answer"):
        trainer(tmp_path).fit(module, data)
    with pytest.raises(ConfigError, match=r"there is no reward.*model\.distillation"):
        trainer(tmp_path).fit(PolicyRLModule(base, recipe="distill"), source())


def test_on_the_command_line(base: str, teacher: str, tmp_path: Path) -> None:
    settings = stage_config("policy", base, tmp_path)
    settings["model"] = {"model": base, "recipe": "distill", "sampler": {"max_tokens": 4}}
    settings["model"]["distillation"] = {"teacher": teacher, "beta": 0.5, "top_k": 8}
    config = write_yaml(tmp_path / "distill.yaml", settings)
    rlhf("policy", "fit", "-c", config, "--trainer.default_root_dir", "run", cwd=tmp_path)
    columns, values = (line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[:2])
    assert float(dict(zip(columns, values, strict=True))["train/divergence"]) > 0
    facts = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert facts["teacher"] == teacher
    said = rlhf("policy", "fit", "-c", config, "--model.distillation.beta", "2", cwd=tmp_path, code=2)
    assert "distillation.beta is 2.0; it must be in [0, 1]" in said
