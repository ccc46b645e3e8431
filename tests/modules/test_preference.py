"""Preference learning as a whole: every loss over batches and ranks, kinds of data, stored references, metrics."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from rlhf_lightning import PreferenceDataModule, PreferenceModule
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, Scorer, SequenceLogprob
from rlhf_lightning.objectives import preference
from rlhf_lightning.objectives.preference import PreferenceLoss
from tests.helpers.rows import WORDS, labeled, pairs, rankings, write_rows
from tests.helpers.training import sgd, trainer

BETA = 0.5


def implicit() -> ImplicitReward:
    return ImplicitReward(BETA)


def mean_logprob() -> SequenceLogprob:
    return SequenceLogprob(length_normalized=True)


EVERY_LOSS: dict[str, tuple[Any, Any]] = {
    "bradley_terry": (RewardHead, preference.BradleyTerry),
    "centered": (RewardHead, lambda: preference.BradleyTerry(0.1, 0.05)),
    "last_k": (lambda: RewardHead(last_k=3), preference.BradleyTerry),
    "dpo": (implicit, preference.BradleyTerry),
    "length_desensitized": (lambda: ImplicitReward(BETA, tail_weight=0.4), preference.BradleyTerry),
    "length_normalized": (lambda: ImplicitReward(2.0, length_normalized=True), preference.BradleyTerry),
    "robust": (implicit, preference.Robust),
    "hinge": (implicit, preference.Hinge),
    "ipo": (implicit, preference.IPO),
    "simpo": (lambda: SequenceLogprob(True, 2.0), preference.SimPO),
    "orpo": (mean_logprob, preference.ORPO),
    "exo": (implicit, preference.EXO),
    "nca": (implicit, preference.NCA),
    "sppo": (implicit, preference.SPPO),
    "apo_zero": (implicit, preference.APOZero),
    "apo_down": (implicit, preference.APODown),
    "discopop": (implicit, preference.DiscoPOP),
    "aot": (implicit, preference.AOT),
    "aot_unpaired": (SequenceLogprob, preference.AOTUnpaired),
    "bco": (implicit, preference.BCO),
    "davidson": (RewardHead, preference.Davidson),
    "rao_kupper": (implicit, preference.RaoKupper),
    "sum_with_sft": (
        implicit,
        lambda: preference.WeightedSum(
            [preference.BradleyTerry(), preference.SFT(), preference.KLToStart()], [1, 0.2, 1]
        ),
    ),
    "coupled_sum": (implicit, lambda: preference.WeightedSum([preference.BCO(), preference.Centering()], [1, 0.1])),
    "kto": (implicit, lambda: preference.KTO(1.0, 0.8)),
    "apo_unpaired": (implicit, preference.APOUnpaired),
    "bco_unpaired": (implicit, preference.BCOUnpaired),
    "plackett_luce": (SequenceLogprob, preference.PlackettLuce),
}
COUPLED = {"aot", "aot_unpaired", "bco", "coupled_sum", "kto", "bco_unpaired"}
# One loss for each way of scoring, gathering and weighting rows; the others differ only in the formula.
SAMPLE = COUPLED | {"bradley_terry", "dpo", "davidson", "sum_with_sft", "plackett_luce", "length_normalized", "orpo"}


def sampled(names: Collection[str], slow: Collection[str] = ()) -> list[Any]:
    """The names; those outside the sample or in `slow` are marked slow."""
    quick = SAMPLE.difference(slow)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


def rows_of(loss: PreferenceLoss, count: int) -> list[dict[str, Any]]:
    if loss.kind == "pairs":
        found = [{**row, "margin": 0.1 * (i % 3)} for i, row in enumerate(pairs(count))]
        if "ties" in loss.keywords():
            found = [{**row, "tie": i % 4 == 0} for i, row in enumerate(found)]
        return found
    return labeled(count) if loss.kind == "labels" else rankings(count)


def fit(name: str, base: str, root: Path, batch: int, size: int = 13, **options: Any) -> tuple[Any, Any]:
    """Train two epochs in float64; returns the module and its trainer."""
    scorer, loss = (make() for make in EVERY_LOSS[name])
    torch.manual_seed(0)  # the reward head's first weights
    rate = 1e-3 if name in ("ipo", "sppo") else 0.05  # squares of scores over beta: steep
    module = PreferenceModule(base, scorer, loss, optimizer=sgd(rate), dtype="float64")
    data = PreferenceDataModule(rows_of(loss, size), rows_of(loss, 5), batch_size=batch, seed=1, show_example=False)
    run = trainer(root, precision="64-true", max_epochs=2, **options)
    run.fit(module, data)
    return module, run


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.model.named_parameters() if value.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sampled(EVERY_LOSS.keys() - COUPLED))
def test_accumulated_batches_equal_one_large_batch(name: str, base: str, tmp_path: Path) -> None:
    """Over several steps, the last one with fewer rows."""
    results = []
    for batch, accumulate in ((8, 1), (1, 8), (4, 2)):
        module, run = fit(name, base, tmp_path, batch, accumulate_grad_batches=accumulate)
        assert run.global_step == 4
        results.append((weights(module), float(run.callback_metrics["val/loss"])))
    for other, loss in results[1:]:
        same(results[0][0], other)
        assert loss == pytest.approx(results[0][1], rel=1e-5)


@pytest.mark.parametrize("name", sampled(EVERY_LOSS.keys()))
def test_two_ranks_equal_one(name: str, base: str, tmp_path: Path) -> None:
    """The last step has one row, so that one rank has none."""
    results = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        strategy = "ddp_fork" if devices == 2 else "auto"
        fit(name, base, root, 4 // devices, devices=devices, strategy=strategy, callbacks=[ExportModel()])
        from safetensors.torch import load_file

        found = load_file(root / "model" / "model.safetensors")
        facts = json.loads((root / "stage.json").read_text())
        results.append((found, {k: v for k, v in facts["metrics"].items() if k.startswith("val/")}))
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], value, rtol=1e-6, atol=1e-7)
    assert results[0][1].keys() == results[1][1].keys()
    for key, value in results[0][1].items():
        assert results[1][1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    start = load_file(Path(base) / "model.safetensors")
    assert any(not torch.equal(start[k].double(), results[0][0][k].double()) for k in start if k in results[0][0])


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_batch_coupled_losses_reject_accumulation(name: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compares the rows of a whole optimizer step.*accumulate_grad_batches to 1"):
        fit(name, base, tmp_path, 2, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="compares the rows of a whole optimizer step"):
        fit(name, base, tmp_path, 2, callbacks=[GradientAccumulationScheduler({1: 2})])


@pytest.mark.usefixtures("every_comparison")
@pytest.mark.parametrize("name", ["bco", "kto", "plackett_luce"])
def test_interrupted_run_equals_an_uninterrupted_run_exactly(name: str, base: str, tmp_path: Path) -> None:
    def once(folder: str, resume: Path | None = None) -> Any:
        scorer, loss = (make() for make in EVERY_LOSS[name])
        module = PreferenceModule(base, scorer, loss, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        data = PreferenceDataModule(rows_of(loss, 9), batch_size=4, seed=1, show_example=False)
        saver = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run = trainer(tmp_path / folder, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
        run.fit(module, data, ckpt_path=resume, weights_only=True)
        return module

    whole = once("whole")
    for stop in (1, 2, 4):
        resumed = once(f"resumed{stop}", tmp_path / "whole" / f"step={stop}.ckpt")
        for key, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[key])
        if name == "bco":
            assert resumed.loss.means.totals == whole.loss.means.totals


# -- what goes together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "loss", "message"),
    [
        (RewardHead(), preference.SFT(), "needs 'chosen_logps', which this scorer does not provide"),
        (RewardHead(), preference.IPO(), "needs 'beta'"),
        (SequenceLogprob(), preference.NCA(), "Use ImplicitReward"),
        (RewardHead(), preference.KTO(), "Use ImplicitReward"),
        (SequenceLogprob(), preference.ORPO(), "length_normalized: true and beta: 1"),
        (SequenceLogprob(True, 2.0), preference.ORPO(), "length_normalized: true and beta: 1"),
        (ImplicitReward(tail_weight=0.5), preference.PlackettLuce(), "scorer.tail_weight"),
        (RewardHead(), preference.WeightedSum([preference.BradleyTerry(), preference.SFT()]), "'chosen_logps'"),
    ],
)
def test_incompatible_scorers_and_losses_are_rejected(scorer: Scorer, loss: Any, message: str, base: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreferenceModule(base, scorer, loss)


@pytest.mark.parametrize("make", [lambda: RewardHead(0), lambda: ImplicitReward(0), lambda: SequenceLogprob(beta=-1)])
def test_invalid_scorer_options_are_rejected(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_run_must_not_overwrite_its_reference(base: str, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "run" / "model")
    for options in (
        {"model": str(tmp_path / "run" / "model")},
        {"model": base, "reference": tmp_path / "run" / "model"},
    ):
        reference = options.pop("reference", None)
        module = PreferenceModule(options["model"], ImplicitReward(reference=reference and str(reference)))
        with pytest.raises(ConfigError, match="is the reference, but this run would write"):
            trainer(tmp_path / "run").fit(module, PreferenceDataModule(pairs(4), show_example=False))


# -- rows -------------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "Count"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ("pairs", {"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: no token is trained"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": " \n"}, "rejected: no token is trained"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "no 'rejected'"),
        (
            "pairs",
            {"chosen": USER + answer("x"), "rejected": [{"role": "user", "content": "Add"}, *answer("y")]},
            "do not begin with the same messages",
        ),
        (
            "pairs",
            {
                "chosen": USER + answer("x") + [{"role": "user", "content": "And?"}, *answer("y")],
                "rejected": USER + answer("z") + [{"role": "user", "content": "Or?"}, *answer("y")],
            },
            "answer different prompts",
        ),
        (
            "pairs",
            {"prompt": "a", "chosen": USER + answer("x"), "rejected": USER + answer("y")},
            "chosen begins with a user message that is not in the prompt",
        ),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' is 'much'"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "'margin' is nan"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "tie": "no"}, "'tie' is 'no'"),
        (
            "pairs",
            {"prompt": "a", "response": "b", "label": 1},
            "the row has the columns of labels, but pairs are needed",
        ),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "one " * 400}, "tokens exceed data.max_length 128"),
        ("labels", {"prompt": "a", "response": "b", "label": 2}, "'label' is 2; it must be 1"),
        ("labels", {"prompt": "a", "response": "b", "label": "good"}, "'label' is 'good'"),
        ("labels", {"prompt": "a", "response": "b", "label": 0.5}, "'label' is 0.5"),
        ("labels", {"prompt": "a", "response": "", "label": 1}, "no token is trained"),
        ("labels", {"prompt": "a", "label": 1}, "no 'completion'"),
        ("labels", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ("rankings", {"prompt": "a", "responses": ["b"]}, "at least two"),
        ("rankings", {"prompt": "a", "responses": ["b", "b"]}, "two of the responses are equal"),
        ("rankings", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "'scores' must be a list of 2 numbers"),
        ("rankings", {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}, "all responses have the same rank"),
        ("rankings", {"prompt": "a", "responses": ["b", ""]}, "response 1: no token is trained"),
    ],
)
def test_invalid_preference_rows_are_rejected(
    kind: str, row: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    """An error with file and line, or counted skips, depending on the setting."""
    good = {"pairs": pairs, "labels": labeled, "rankings": rankings}[kind](2)
    file = write_rows(tmp_path / "rows.jsonl", [*good, row])
    options: dict[str, Any] = {"kind": kind, "tokenizer": tokenizer, "max_length": 128, "show_example": False}
    data = PreferenceDataModule(file, **options)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: ") as error:
        data.setup("fit")
    assert message in str(error.value)
    lenient = PreferenceDataModule(file, on_bad_row="skip", **options)
    lenient.setup("fit")
    assert len(lenient.prepared["train"].rows) == 2
    (skipped,) = lenient.prepared["train"].reading.skipped
    assert "rows.jsonl:3" in skipped


def test_rows_over_the_budget_are_counted(tokenizer: Any) -> None:
    long = {"prompt": "one two three four five six " * 20, "chosen": "one two", "rejected": "three"}
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 64, "show_example": False}
    cut = PreferenceDataModule([*pairs(2), long], overlong="truncate", **options)
    cut.setup("fit")
    assert cut.prepared["train"].truncated == 1
    pair = cut.prepared["train"].rows[2]
    assert pair.tokens == 64
    whole = cut.renderer.exchange(
        [{"role": "user", "content": long["prompt"]}], [{"role": "assistant", "content": "one two"}]
    )
    removed = len(whole.ids) - len(pair.chosen.ids)
    assert pair.chosen.ids == whole.ids[removed:]  # the prompt is truncated on the left, and the response is complete
    assert pair.chosen.trained == whole.trained
    skipped = PreferenceDataModule([*pairs(2), long], overlong="skip", **options)
    skipped.setup("fit")
    assert len(skipped.prepared["train"].reading.skipped) == 1
    with pytest.raises(DataError, match="a response alone is longer than"):
        PreferenceDataModule([{**long, "chosen": long["prompt"]}], overlong="truncate", **options).setup("fit")


def test_ties_need_a_loss_that_supports_them(base: str, tmp_path: Path) -> None:
    rows = [{**row, "tie": i == 1} for i, row in enumerate(pairs(4))]
    module = PreferenceModule(base, loss=preference.Hinge())
    with pytest.raises(DataError, match=r"list\[1\]: the pair is a tie, but Hinge cannot learn from ties"):
        trainer(tmp_path).fit(module, PreferenceDataModule(rows, show_example=False))


def test_mismatched_responses_need_several_prompts(base: str, tmp_path: Path) -> None:
    rows = [{**row, "prompt": "the same"} for row in labeled(4)]
    module = PreferenceModule(base, implicit(), preference.KTO())
    with pytest.raises(DataError, match="all rows have the same prompt"):
        trainer(tmp_path).fit(module, PreferenceDataModule(rows, show_example=False))


def test_kind_of_rows_must_match_the_loss(base: str, tmp_path: Path) -> None:
    module = PreferenceModule(base, implicit(), preference.KTO())
    with pytest.raises(ConfigError, match=r"data\.kind is rankings, but the loss KTO needs labels"):
        trainer(tmp_path).fit(module, PreferenceDataModule(pairs(4), kind="rankings", show_example=False))
    with pytest.raises(ConfigError, match=r"data\.kind is 'lists'"):
        PreferenceDataModule(pairs(4), kind="lists")


def test_mismatched_response_belongs_to_another_prompt(base: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Count {i // 2}", "response": WORDS[i], "label": i % 2} for i in range(6)]
    module = PreferenceModule(base, implicit(), preference.KTO(), optimizer=sgd(0.0))
    data = PreferenceDataModule(rows, batch_size=2, show_example=False)
    trainer(tmp_path).fit(module, data)
    decode = data.renderer.tokenizer.decode
    shown = [decode(row.sides[1].ids) for row in data.prepared["train"].rows]
    partner = [2, 2, 4, 4, 0, 0]  # the next row of another prompt, around the end
    for i, text in enumerate(shown):
        assert f"Count {i // 2}" in text
        assert WORDS[partner[i]] in text
        assert WORDS[i] not in text.replace(f"Count {i // 2}", "")


@pytest.mark.parametrize(("weight", "warns"), [(1.0, True), (0.5, False)])
def test_warns_about_unbalanced_labels(weight: float, warns: bool, base: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("WARNING", "rlhf_lightning")
    rows = labeled(9)  # 6 desirable, 3 undesirable
    module = PreferenceModule(base, implicit(), preference.KTO(desirable_weight=weight), optimizer=sgd(0.0))
    trainer(tmp_path).fit(module, PreferenceDataModule(rows, batch_size=9, show_example=False))
    assert ("6 desirable and 3 undesirable rows have weights of 2.00 to 1" in caplog.text) == warns
    assert ("desirable_weight to 0.50, or undesirable_weight to 2.00" in caplog.text) == warns


def test_pair_is_converted_to_labels_or_a_ranking(tokenizer: Any) -> None:
    for kind, count in (("labels", 6), ("rankings", 3)):
        data = PreferenceDataModule(pairs(3), kind=kind, tokenizer=tokenizer, show_example=False)
        data.setup("fit")
        assert len(data.prepared["train"].rows) == count
    labels = PreferenceDataModule(pairs(3), kind="labels", tokenizer=tokenizer, show_example=False)
    labels.setup("fit")
    assert [row.label for row in labels.prepared["train"].rows] == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["kto", "plackett_luce", "davidson"])
def test_other_kinds_validate_test_and_predict(name: str, base: str, tmp_path: Path) -> None:
    module, run = fit(name, base, tmp_path, 4)
    data = PreferenceDataModule(predict=rows_of(module.loss, 5), test=rows_of(module.loss, 5), batch_size=2)
    wanted = {"labels": "test/auc", "rankings": "test/top1", "pairs": "test/ece"}[module.loss.kind]
    assert wanted in run.test(module, data, verbose=False)[0]
    found = [row for batch in run.predict(module, data) for row in batch]
    assert len(found) == 5
    if name == "plackett_luce":
        assert [len(row["scores"]) for row in found] == [2, 3, 4, 2, 3]


@pytest.mark.parametrize(
    "name", sampled({"kto", "plackett_luce", "simpo", "orpo", "aot", "bco_unpaired", "last_k"}, {"aot", "bco_unpaired"})
)
def test_every_kind_of_loss_learns(name: str, base: str, tmp_path: Path) -> None:
    scorer, loss = (make() for make in EVERY_LOSS[name])
    torch.manual_seed(0)
    module = PreferenceModule(base, scorer, loss, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    rows = rows_of(loss, 16)
    data = PreferenceDataModule(rows, rows, batch_size=8, show_example=False)
    run = trainer(tmp_path, max_epochs=40)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    after = run.validate(module, data, verbose=False)[0]
    assert after["val/loss"] < before["val/loss"]
    key = "val/auc" if loss.kind == "labels" else "val/accuracy"
    assert after[key] > 0.9


# -- stored references ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_stored_reference_logprobs_equal_computed_ones(
    lora: LoRA | None, base: str, tmp_path: Path, caplog: Any
) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", pairs(9))

    def once(root: str, store: bool, epochs: int = 2, file: str = file, model: str = base) -> Any:
        """Train at a rate at which a difference in the last bit stays small; at 0.1 the adapter diverges."""
        torch.manual_seed(0)
        scorer = ImplicitReward(BETA, store=store)
        module = PreferenceModule(model, scorer, lora=lora, optimizer=sgd(0.01), dtype="float64")
        data = PreferenceDataModule(file, pairs(3), batch_size=4, seed=1, show_example=False)
        run = trainer(tmp_path / root, max_epochs=epochs, precision="64-true")
        run.fit(module, data)
        return module, run

    caplog.set_level("INFO", "rlhf_lightning")
    plain, run = once("plain", store=False)
    stored, again = once("stored", store=True)
    folder = tmp_path / "pairs.jsonl.reference"
    (first,) = folder.iterdir()
    stamp = first.stat().st_mtime_ns
    assert "train: log-probabilities of the reference were saved to" in caplog.text
    for row in again.datamodule.prepared["train"].rows:  # computed together, and kept as float32
        for side, values in zip(row.sides, row.reference, strict=True):
            alone = pad_tokens([side.ids], [side.loss_mask], pad_id=0)
            wanted = plain.model_scorer.reference_logprobs(alone)[0]
            torch.testing.assert_close(torch.tensor(values).double(), wanted, rtol=1e-6, atol=1e-6)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(stored)[key], value, rtol=1e-6, atol=1e-7)
    for key in ("val/loss", "val/accuracy", "val/kl"):
        assert float(run.callback_metrics[key]) == pytest.approx(float(again.callback_metrics[key]), rel=1e-6)
    assert (stored.reference is None) == (
        lora is None
    )  # a copied reference is released; a disabled adapter needs no memory

    caplog.clear()
    reused, _ = once("reused", store=True)
    assert "train: log-probabilities of the reference were loaded" in caplog.text
    assert first.stat().st_mtime_ns == stamp
    for key, value in weights(stored).items():
        assert torch.equal(weights(reused)[key], value)

    other = write_rows(tmp_path / "pairs.jsonl", pairs(8))  # other rows in the same file
    once("rows", store=True, epochs=1, file=other)
    assert len(list(folder.iterdir())) == 2
    moved = tmp_path / "moved"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(moved)
    AutoTokenizer.from_pretrained(base).save_pretrained(moved)
    once("model", store=True, epochs=1, model=str(moved))
    assert len(list(folder.iterdir())) == 3


def test_stored_reference_logprobs_over_two_ranks(base: str, tmp_path: Path) -> None:
    results = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        root.mkdir()
        file = write_rows(root / "pairs.jsonl", pairs(5))
        module = PreferenceModule(base, ImplicitReward(BETA, store=True), optimizer=sgd(0.1), dtype="float64")
        data = PreferenceDataModule(file, batch_size=4 // devices, seed=1, show_example=False)
        strategy = "ddp_fork" if devices == 2 else "auto"
        options = {"devices": devices, "strategy": strategy, "precision": "64-true", "callbacks": [ExportModel()]}
        trainer(root, **options).fit(module, data)
        from safetensors.torch import load_file

        (stored,) = (root / "pairs.jsonl.reference").iterdir()
        results.append({**load_file(root / "model" / "model.safetensors"), **load_file(stored)})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-6)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_exact_over_uneven_batches(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = PreferenceModule(base)
    rows = [{**row, "category": ["easy", "hard"][i % 2]} for i, row in enumerate(pairs(11))]
    data = PreferenceDataModule(validation=rows, batch_size=4, show_example=False)
    found = trainer(tmp_path).validate(module, data, verbose=False)[0]
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (module.score(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    right = (chosen > rejected).float()
    assert found["val/accuracy"] == pytest.approx(float(right.mean()))
    for number, name in enumerate(("easy", "hard")):
        assert found[f"val/accuracy_category_{name}"] == pytest.approx(float(right[number::2].mean()))
    sizes = [(r.chosen.trained, r.rejected.trained) for r in data.prepared["validation"].rows]
    longer = torch.tensor([float(c > r) for c, r in sizes])
    assert found["val/accuracy_longer_wins"] == pytest.approx(float(longer.mean()))
    assert found["val/accuracy_chosen_longer"] == pytest.approx(float(right[longer > 0].mean()))
    probability = (chosen - rejected).sigmoid()
    assert found["val/brier"] == pytest.approx(float((1 - probability).square().mean()), rel=1e-4)
    assert found["val/loss"] == pytest.approx(float(-probability.log().mean()), rel=1e-4)
    quarters = [found[f"val/accuracy_margin_q{q}"] for q in (1, 2, 3, 4)]
    assert all(0 <= value <= 1 for value in quarters)
    curve = module.last_report["reliability"]
    assert sum(bin["pairs"] for bin in curve) == 11


def test_equal_scores_are_wrong_and_labeled_ties_are_left_out() -> None:
    from rlhf_lightning.modules.preference_metrics import pair_report

    rows = {
        "chosen": torch.tensor([1.0, 1.0, 0.0, 2.0]),
        "rejected": torch.tensor([0.0, 1.0, 1.0, 0.0]),
        "ties": torch.tensor([0.0, 0.0, 0.0, 1.0]),
        "chosen_lengths": torch.tensor([3.0, 2.0, 1.0, 9.0]),
        "rejected_lengths": torch.tensor([1.0, 2.0, 2.0, 1.0]),
    }
    numbers, _ = pair_report(rows, [])
    assert numbers["accuracy"] == pytest.approx(1 / 3)
    assert numbers["accuracy_longer_wins"] == pytest.approx(1 / 3)


def test_dpo_starts_at_log_two_and_logs_its_terms(base: str, tmp_path: Path) -> None:
    module = PreferenceModule(base, implicit(), optimizer=sgd(0.0))
    data = PreferenceDataModule(pairs(4), pairs(4), batch_size=4, show_example=False)
    run = trainer(tmp_path)
    run.fit(module, data)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert logged["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    for key in ("margin", "chosen_score", "rejected_score", "kl"):
        assert logged[f"val/{key}"] == pytest.approx(0.0, abs=1e-5)
    assert logged["val/chosen_logps"] < 0
    assert logged["train/rejected_logps"] < 0


def test_custom_loss_receives_the_tensors_that_it_names(base: str, tmp_path: Path) -> None:
    """From the batches of any loader: its own column, and what the scorer provides."""

    class Weighted(preference.PairLoss):
        def __call__(self, chosen: Any, rejected: Any, *, trust: Any, chosen_lengths: Any, **_: Any) -> Any:
            seen.append((trust.tolist(), chosen_lengths.tolist()))
            return trust * preference.bradley_terry(chosen, rejected)

    seen: list[Any] = []
    ids, loss_mask = torch.arange(3, 27).view(4, 6), torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)
    batch = {"input_ids": ids, "loss_mask": loss_mask.float(), "lengths": torch.full((4,), 6), "weights": torch.ones(2)}
    module = PreferenceModule(base, loss=Weighted(), optimizer=sgd(0.1))
    batches = [{**batch, "trust": torch.tensor([0.5, 1.0])}]
    trainer(tmp_path).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert seen == [([0.5, 1.0], [3.0, 3.0])]


@pytest.mark.parametrize("name", ["kto", "plackett_luce_implicit"])
def test_stored_reference_logprobs_of_labels_and_rankings(name: str, base: str, tmp_path: Path) -> None:
    """Mismatched responses and all answers of a ranking have stored log-probabilities too."""
    results = []
    for store in (False, True):
        loss = preference.KTO() if name == "kto" else preference.PlackettLuce()
        scorer = ImplicitReward(BETA, store=store)
        module = PreferenceModule(base, scorer, loss, optimizer=sgd(0.01), dtype="float64")
        data = PreferenceDataModule(rows_of(loss, 9), batch_size=4, seed=1, show_example=False)
        trainer(tmp_path / str(store), max_epochs=2, precision="64-true").fit(module, data)
        assert (module.reference is None) == store  # the reference was released, and is not used
        results.append(weights(module))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "True" / "reference").is_dir()  # rows of no file
