"""Batches of other loaders against a plain transformers forward with attention_mask and cross entropy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf_lightning import PolicyRLModule, PreferenceModule, SFTModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.modules.hf_batches import fitted
from rlhf_lightning.objectives.preference import APOUnpaired, PlackettLuce
from tests.helpers.models import build_model
from tests.helpers.training import trainer

ROWS = [[5, 9, 30, 31, 32], [7, 8, 40], [11, 12, 13, 14, 15, 16, 50], [20, 60, 61, 62]]
TRAINED = [[0, 0, 1, 1, 1], [0, 0, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1]]
PAD = 1


def padded(rows: list[list[int]], value: int, side: str) -> Tensor:
    width = max(map(len, rows)) + 1
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)])


def batch_of(side: str, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """One batch in different common forms."""
    ids, loss_mask = padded(ROWS, PAD, side), padded(TRAINED, 0, side)
    there = padded([[1] * len(row) for row in ROWS], 0, side)
    batch: dict[str, Any] = {"input_ids": ids.to(torch.int32), "attention_mask": there.to(dtype)}
    if form == "labels":
        return {**batch, "labels": torch.where(loss_mask == 1, ids, -100)}
    if form == "positions":
        batch["position_ids"] = (there.cumsum(-1) - 1).clamp(min=0)
    return {**batch, "loss_mask": loss_mask.to(dtype)}


FORMS = [
    (side, form, dtype)
    for side in ("left", "right")
    for form in ("loss_mask", "labels", "positions")
    for dtype in (torch.int64, torch.bool, torch.float16)
]


def oracle(model: Any) -> Tensor:
    """The loss of each trained token, in the order of the rows, computed by transformers alone."""
    ids, there = padded(ROWS, PAD, "right"), padded([[1] * len(row) for row in ROWS], 0, "right")
    labels = torch.where(padded(TRAINED, 0, "right") == 1, ids, -100)[:, 1:]
    logits = model(input_ids=ids, attention_mask=there).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none")[labels != -100]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sft(architecture: str, tokenizer: Any) -> None:
    model = build_model(tokenizer, architecture=architecture)
    wanted = oracle(model).mean()
    gradient = torch.autograd.grad(wanted, next(model.parameters()))[0]
    module = SFTModule(model, tokenizer=tokenizer)
    module.configure_model()
    module.eval()  # without dropout
    for side, form, dtype in FORMS:
        batch = module.on_before_batch_transfer(batch_of(side, form, dtype), 0)
        loss = module.training_step(batch, 0)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(loss, next(model.parameters()))[0]
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_preference(side: str, tokenizer: Any) -> None:
    model = build_model(tokenizer, architecture="llama", task="SEQ_CLS")
    ids, there = padded(ROWS, PAD, "right"), padded([[1] * len(row) for row in ROWS], 0, "right")
    module = PreferenceModule(model, RewardHead(), tokenizer=tokenizer)
    module.configure_model()
    model.config.pad_token_id = PAD
    with torch.no_grad():
        scores = model(input_ids=ids, attention_mask=there).logits[:, 0]
    wanted = -torch.nn.functional.logsigmoid(scores[:2] - scores[2:]).mean()
    for form in ("loss_mask", "labels"):
        batch = module.on_before_batch_transfer(batch_of(side, form, torch.bool), 0)
        torch.testing.assert_close(module.training_step(batch, 0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_policy(side: str, tokenizer: Any) -> None:
    """-r·A, with the log-probabilities of a plain forward."""
    model = build_model(tokenizer, architecture="llama")
    module = PolicyRLModule(model, tokenizer=tokenizer)
    module.configure_model()
    gaps = [[0.1 * (i + j) for j in range(len(row))] for i, row in enumerate(ROWS)]
    loss_mask = padded(TRAINED, 0, "right") == 1
    now = -oracle(model).detach()
    gap = torch.tensor(
        [g for row, trained in zip(gaps, TRAINED, strict=True) for g, t in zip(row, trained, strict=True) if t]
    )
    old = torch.zeros(loss_mask.shape).masked_scatter(loss_mask, now - gap)
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [2.0]])
    batch = batch_of(side, "loss_mask", torch.int64)
    if side == "left":
        lengths = [len(row) for row in ROWS]
        old = torch.stack([row.roll(old.shape[1] - n) for row, n in zip(old, lengths, strict=True)])
    batch |= {"old_logprobs": old, "advantages": advantages}
    loss = module.training_step(module.on_before_batch_transfer(batch, 0), 0)["loss"]
    wanted = -(gap.exp() * advantages.expand(loss_mask.shape)[loss_mask]).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def wrong(change: str) -> dict[str, Any]:
    batch = batch_of("right", "loss_mask", torch.int64)
    ids, loss_mask, there = batch["input_ids"], batch["loss_mask"], batch["attention_mask"]
    changes: dict[str, dict[str, Any]] = {
        "loss_mask of the batch is 1 where attention_mask is 0": {"loss_mask": torch.ones_like(loss_mask)},
        "but input_ids has": {"loss_mask": torch.nn.functional.pad(loss_mask, (0, 1))},
        "attention_mask of the batch has gaps": {"attention_mask": there * (torch.arange(there.shape[1]) != 1)},
        "attention_mask of the batch is": {"attention_mask": there[:, None, None]},
        "or values other than 0 and 1": {"attention_mask": there * 2},
        "loss_mask of the batch has values other than 0 and 1": {"loss_mask": loss_mask * 0.5},
        "position_ids of the batch do not count": {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]] * 4)},
        "not shifted by one": {"labels": torch.where(loss_mask == 1, ids, -100).roll(-1, 1)},
        "contradict each other": {"labels": torch.where(loss_mask.roll(1, 1) * there == 1, ids, -100)},
        "values from -100": {"input_ids": torch.where(there == 1, ids, -100)},
        "the model has 100 embeddings": {"input_ids": torch.where(there == 1, ids + 100, ids)},
        "integer tensor": {"input_ids": ids.float()},
        "must include all trained tokens": {"lengths": torch.tensor([2, 2, 2, 2])},
        "inputs_embeds": {"inputs_embeds": ids},
        "values up to 1": {"old_logprobs": torch.ones(4, 8)},
        "begin with padding": {**batch_of("left", "loss_mask", torch.int64), "attention_mask": None},
        "on the padding after a row": {"loss_mask": torch.ones_like(loss_mask), "attention_mask": None},
        "old_logprobs of the batch has shape": {"old_logprobs": torch.zeros(4, 2)},
    }
    return {name: value for name, value in {**batch, **changes[change]}.items() if value is not None}


REFUSED = [
    *(
        "loss_mask of the batch is 1 where attention_mask is 0",
        "but input_ids has",
        "attention_mask of the batch has gaps",
        "attention_mask of the batch is",
    ),
    *(
        "or values other than 0 and 1",
        "loss_mask of the batch has values other than 0 and 1",
        "position_ids of the batch do not count",
        "not shifted by one",
    ),
    *("contradict each other", "values from -100", "the model has 100 embeddings", "integer tensor"),
    *(
        "must include all trained tokens",
        "inputs_embeds",
        "begin with padding",
        "on the padding after a row",
        "old_logprobs of the batch has shape",
        "values up to 1",
    ),
]


@pytest.mark.parametrize("message", REFUSED)
def test_malformed_batches_are_rejected(message: str, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    assert PAD not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    with pytest.raises(ConfigError, match=message):
        fitted(wrong(message), tokenizer, rows=100)
    fitted(
        {n: v for n, v in batch_of("right", "loss_mask", torch.int64).items() if n != "attention_mask"}, tokenizer, 100
    )


def preference_batch(**more: Any) -> dict[str, Any]:
    return {**batch_of("right", "loss_mask", torch.int64), **more}


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        ("pairs", {n: v[:3] for n, v in preference_batch().items()}, "3 rows; for pairs"),
        ("pairs", {n: v[:0] for n, v in preference_batch().items()}, "no rows"),
        ("pairs", preference_batch(margin=torch.ones(2, 1)), r"margin of the batch is \[2, 1\]"),
        ("pairs", preference_batch(margin=torch.ones(1)), r"margin of the batch is \[1\]"),
        ("pairs", preference_batch(weights=torch.ones(4)), r"weights of the batch is \[4\]"),
        ("pairs", preference_batch(ref_chosen_logps=torch.ones(2)), "rename it to reference_logprobs"),
        ("labels", preference_batch(), "has no labels"),
        ("labels", preference_batch(labels=[1, 0, 1, 0]), "labels of the batch is a list"),
        ("labels", preference_batch(labels=torch.tensor([1, -1, 1, -1])), "must be 0"),
        ("rankings", preference_batch(ranks=torch.ones(4)), "has no ranking"),
        ("rankings", preference_batch(ranking=torch.tensor([0, 1, 0, 1]), ranks=torch.ones(4)), "from 0"),
    ],
)
def test_preference_batches_need_one_value_per_example(
    loss: str, batch: dict[str, Any], message: str, model: Any, tokenizer: Any
) -> None:
    losses = {"pairs": None, "labels": APOUnpaired(), "rankings": PlackettLuce()}
    module = PreferenceModule(model, ImplicitReward(0.1), losses[loss], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=message):
        module.on_before_batch_transfer(batch, 0)
    right = {
        "pairs": {"margin": torch.ones(2), "weights": torch.ones(2)},
        "labels": {"labels": torch.tensor([True, False, True, False])},
        "rankings": {"ranking": torch.tensor([0, 0, 0, 1]), "ranks": torch.ones(4)},
    }[loss]
    module.on_before_batch_transfer(preference_batch(**right), 0)


@pytest.mark.parametrize("name", ["completion_mask", "loss_scale", "weights"])
def test_sft_rejects_keys_that_it_does_not_read(name: str, model: Any, tokenizer: Any) -> None:
    batch = {**batch_of("right", "labels", torch.int64), name: torch.ones(4)}
    with pytest.raises(ConfigError, match=f"the batch has {name}"):
        SFTModule(model, tokenizer=tokenizer).on_before_batch_transfer(batch, 0)

    class Own(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any: ...

    if name != "weights":
        Own(model, tokenizer=tokenizer).on_before_batch_transfer(batch, 0)


@pytest.mark.parametrize("bos", [None, "pad", "other"])
def test_left_padding_is_detected_if_the_pad_token_is_the_eos_token(bos: str | None, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    pad = tokenizer.eos_token_id
    names = {None: None, "pad": tokenizer.eos_token, "other": tokenizer.convert_ids_to_tokens(5)}
    tokenizer.bos_token = names[bos]
    ids, loss_mask = padded(ROWS, pad, "left"), padded(TRAINED, 0, "left")
    with pytest.raises(ConfigError, match="begin with padding"):
        fitted({"input_ids": ids, "loss_mask": loss_mask}, tokenizer)
    once = torch.tensor([[pad, 7, 8, 9]])
    if bos != "other":  # it may stand before a text
        fitted({"input_ids": once, "loss_mask": torch.ones_like(once)}, tokenizer)


def test_validation_reports_missing_keys_of_a_batch(model: Any, tokenizer: Any, tmp_path: Any) -> None:
    good = batch_of("right", "loss_mask", torch.int64)
    bad = {name: value for name, value in good.items() if name != "loss_mask"}
    train, val = (torch.utils.data.DataLoader([batch], batch_size=None) for batch in (good, bad))  # type: ignore
    for module in (
        SFTModule(model, tokenizer=tokenizer),
        PreferenceModule(model, ImplicitReward(), tokenizer=tokenizer),
    ):
        with pytest.raises(ConfigError, match="mask is missing in this batch"):
            trainer(tmp_path).fit(module, train, val)
