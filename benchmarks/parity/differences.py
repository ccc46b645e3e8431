"""Known differences, each with an experiment that shows it with the numbers of both sides."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.parity import cases, losses, our_side, setup, trl_side
from benchmarks.parity.setup import Folders, Step
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives import policy, preference
from rlhf_lightning.rollout.advantages import GroupCentered

Numbers = list[tuple[str, float | str, float | str]]


@dataclass
class Difference:
    """One difference: the measured values (name, ours, TRL's), which side is right, and why."""

    name: str
    right: str
    why: str
    show: Callable[[Folders, Path], Numbers]
    numbers: Numbers = field(default_factory=list)


def _moved(first: Step, second: Step) -> float:
    """Relative difference of the gradients of two computations that should agree."""
    return second.distance(first)


def _scorer(folders: Folders, **options: Any) -> ImplicitReward:
    return ImplicitReward(losses.BETA, folders.reference, **options)


def stop_line(folders: Folders, root: Path) -> Numbers:
    """ChatML with its line break after the stop token."""
    with tempfile.TemporaryDirectory() as folder:
        made = setup.make_folders(Path(folder), template=None)
        rows = setup.conversations(cases.ROWS)
        ours, theirs = (side.supervised("sft", made, rows, root)[0] for side in (our_side, trl_side))
        tokenizer = AutoTokenizer.from_pretrained(made.policy)
    ends = [
        repr(tokenizer.decode([ids[i] for i, trained in enumerate(loss_mask) if trained][-1:]))
        for ids, loss_mask in (ours.rows[0], theirs.rows[0])
    ]
    counts = [sum(sum(loss_mask) for _, loss_mask in step.rows) for step in (ours, theirs)]
    return [
        ("last trained token of a row", ends[0], ends[1]),
        ("trained tokens", counts[0], counts[1]),
        ("NLL", ours.loss, theirs.loss),
    ]


def stop_as_pad(folders: Folders, root: Path) -> Numbers:
    """A reward model whose padding token is the stop token, on rows that end with it."""
    with tempfile.TemporaryDirectory() as folder:
        made = setup.make_folders(Path(folder), pad_is_eos=True)
        rows = setup.pairs(cases.ROWS)
        ours, theirs = (side.supervised("reward", made, rows, root)[0] for side in (our_side, trl_side))
        at_stop, before = (_plain_loss(made, rows, back) for back in (1, 2))
    return [
        ("loss", ours.loss, theirs.loss),
        ("loss by a plain forward of each row, read at its stop token", at_stop, ""),
        ("… read one token before", "", before),
        ("gradient's relative difference", "", theirs.distance(ours)),
    ]


@torch.no_grad()
def _plain_loss(folders: Folders, rows: list[Any], back: int) -> float:
    """Bradley-Terry loss of rewards read `back` tokens from the end, for each row alone without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folders.classifier)
    model = AutoModelForSequenceClassification.from_pretrained(folders.classifier, num_labels=1).eval()

    def reward(row: dict[str, Any], side: str) -> torch.Tensor:
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        return model.score(model.model(torch.tensor([ids]))[0][0, -back])

    margins = torch.stack([reward(row, "chosen") - reward(row, "rejected") for row in rows])
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def sft_term(folders: Folders, root: Path) -> Numbers:
    """DPO's `sft` term on responses of different lengths, at once and in 3 micro-batches."""
    rows = setup.pairs(cases.ROWS)
    ours = [
        our_side.supervised("dpo", folders, rows, root, scorer=_scorer(folders), loss=preference.SFT(), micro=micro)[0]
        for micro in (None, 2)
    ]
    return _at_once_and_in_parts(ours, _trl_dpo(folders, rows, root, "sft"))


def _whole_and_parted(folders: Folders, rows: list[Any], root: Path, loss: Any, tokens: int) -> list[Step]:
    """Our step, computed at once and in groups of a given number of tokens."""
    options = {"scorer": _scorer(folders), "loss": loss}
    return [
        our_side.supervised("dpo", folders, rows, root, **options, max_tokens_per_batch=budget)[0]
        for budget in (None, tokens)
    ]


def _trl_dpo(folders: Folders, rows: list[Any], root: Path, name: str) -> list[Step]:
    options = cases.trl_dpo(name)
    return [trl_side.supervised("dpo", folders, rows, root, micro=micro, **options)[0] for micro in (None, 2)]


def _at_once_and_in_parts(ours: list[Step], theirs: list[Step]) -> Numbers:
    return [
        ("loss, all rows at once", ours[0].loss, theirs[0].loss),
        ("loss, in parts", ours[1].loss, theirs[1].loss),
        ("gradient's relative change", _moved(*ours), _moved(*theirs)),
    ]


def aot(folders: Folders, root: Path) -> Numbers:
    """AOT, which sorts scores over the batch, at once and in parts. Ours can only split the forward."""
    rows = setup.pairs(cases.ROWS)
    loss = preference.AOTUnpaired(losses.SMOOTHING)
    ours = _whole_and_parted(folders, rows, root, loss, 64)
    return _at_once_and_in_parts(ours, _trl_dpo(folders, rows, root, "aot_unpaired"))


def ipo(folders: Folders, root: Path) -> Numbers:
    """IPO as in the paper, whose score is a sum over the response."""
    rows = setup.pairs(cases.ROWS)
    ours = our_side.supervised("dpo", folders, rows, root, scorer=_scorer(folders), loss=preference.IPO())[0]
    theirs = trl_side.supervised("dpo", folders, rows, root, **cases.trl_dpo("ipo"))[0]
    normalized = our_side.supervised(
        "dpo", folders, rows, root, scorer=_scorer(folders, length_normalized=True), loss=preference.IPO()
    )[0]
    return [
        ("loss", ours.loss, theirs.loss),
        ("loss, ours with length_normalized: true", normalized.loss, theirs.loss),
    ]


def kto(folders: Folders, root: Path) -> Numbers:
    """KTO at once and in parts; ours splits only the forward."""
    rows = setup.labels(cases.ROWS)
    ours = [
        our_side.supervised(
            "kto",
            folders,
            rows[::-1],
            root,
            scorer=_scorer(folders),
            loss=preference.KTO(),
            max_tokens_per_batch=budget,
        )[0]
        for budget in (None, 64)
    ]
    options = {"beta": losses.BETA, "loss_type": "kto", "disable_dropout": True}
    theirs = [trl_side.supervised("kto", folders, rows, root, micro=micro, **options)[0] for micro in (None, 2)]
    return _at_once_and_in_parts(ours, theirs)


def bco(folders: Folders, root: Path) -> Numbers:
    """BCO with its running mean δ."""
    rows = setup.pairs(cases.ROWS)
    ours = our_side.supervised("dpo", folders, rows, root, scorer=_scorer(folders), loss=preference.BCO())[0]
    theirs = trl_side.supervised("dpo", folders, rows, root, **cases.trl_dpo("bco_pair"))[0]
    return [("loss", ours.loss, theirs.loss), ("gradient's relative difference", "", theirs.distance(ours))]


def _accumulated(loss_type: str, objective: policy.PolicyObjective) -> Callable[[Folders, Path], Numbers]:
    def show(folders: Folders, root: Path) -> Numbers:
        """One round of 12 responses in one micro-batch and in 3."""
        sides = [
            trl_side.Rollouts(
                folders, cases.prompts(), cases.GROUP, root, loss_type=loss_type, beta=0.0, steps=1, micro=micro
            )
            for micro in (None, cases.GROUP)
        ]
        if sides[0].steps[0].rows != sides[1].steps[0].rows:
            raise RuntimeError("TRL sampled other responses with other micro-batches: nothing can be compared")
        ours = [
            our_side.recorded(
                folders,
                sides[0].episodes,
                root,
                objective=objective,
                advantage=GroupCentered("std"),
                steps=1,
                minibatches=parts,
            )[0]
            for parts in (1, 3)
        ]
        return _at_once_and_in_parts(ours, [side.steps[0] for side in sides])

    return show


def sft_accumulated(folders: Folders, root: Path) -> Numbers:
    """SFT on answers of different lengths, at once and in 3 micro-batches."""
    rows = setup.conversations(cases.ROWS)
    sides = [
        [side.supervised("sft", folders, rows, root, micro=micro)[0] for micro in (None, 2)]
        for side in (our_side, trl_side)
    ]
    return _at_once_and_in_parts(*sides)


def discopop(folders: Folders, root: Path) -> Numbers:
    """Effect of rounding alone on DiscoPOP: ours computed in other groups of rows."""
    rows = setup.pairs(cases.ROWS)
    loss = preference.DiscoPOP(losses.TEMPERATURE)
    ours = _whole_and_parted(folders, rows, root, loss, 16)
    theirs = _trl_dpo(folders, rows, root, "discopop")
    return [
        ("gradient's relative difference, ours to TRL", "", theirs[0].distance(ours[0])),
        ("gradient's relative change, rows computed in other groups", _moved(*ours), _moved(*theirs)),
    ]


ALL = [
    Difference(
        "SFT, line break after the stop token",
        "ours",
        "Sampling ends at the stop token; what a template writes after it is never drawn. TRL's completion is all that "
        "the template adds, so a token that needs no learning is in the mean.",
        stop_line,
    ),
    Difference(
        "reward model, padding is the stop token",
        "ours",
        "transformers' pooling, which TRL uses, takes the last token that is not padding: where padding is the stop "
        "token, that is the one before it. Ours reads at the end of the row, and saves a padding token of its own.",
        stop_as_pad,
    ),
    Difference(
        "DPO's sft term",
        "ours",
        "TRL divides by the tokens of the micro-batch: a long response weighs more, and accumulation changes the loss. "
        "RPO (arXiv 2404.19733) divides each response by its length, as ours does.",
        sft_term,
    ),
    Difference(
        "DPO, ipo",
        "both",
        "The paper (arXiv 2310.12036) takes the log-ratio of the response, a sum; TRL its mean over tokens, always. "
        "Here it is a setting.",
        ipo,
    ),
    Difference(
        "DPO, bco_pair",
        "ours",
        "The paper (arXiv 2404.04656) shifts rewards by δ, their running mean; TRL's `bco_pair` has δ = 0.",
        bco,
    ),
    Difference(
        "DPO, aot_unpaired, in parts",
        "ours",
        "The loss compares sorted scores of a batch: under accumulation TRL sorts each micro-batch by itself. Ours "
        "refuses accumulation, and bounds memory by `max_tokens_per_batch`, which changes nothing.",
        aot,
    ),
    Difference(
        "KTO, in parts",
        "ours",
        "TRL joins prompts with responses of others inside a preprocessing batch of the micro-batch's size, and takes "
        "the reference point of the micro-batch. Ours joins within the file and takes that of the optimizer step.",
        kto,
    ),
    Difference(
        "GRPO's bnpo, in parts",
        "ours",
        "TRL divides by the tokens of the micro-batch, so accumulation weighs tokens unequally; ours by those of the "
        "optimizer step.",
        _accumulated("bnpo", policy.ClippedSurrogate()),
    ),
    Difference(
        "GRPO, in parts",
        "both",
        "Means over responses, and micro-batches of as many: no difference.",
        _accumulated("grpo", policy.ClippedSurrogate(aggregation="sequence_mean")),
    ),
    Difference(
        "SFT, in parts",
        "both",
        "Both divide by the tokens of the whole optimizer step: no difference in TRL 1.16.0.",
        sft_accumulated,
    ),
    Difference(
        "DPO, discopop, rounding",
        "both",
        "The loss divides scores by a temperature of 0.05, and so multiplies their rounding by 20: TRL is as far from "
        "itself, to a factor of 2, when it computes the rows in other micro-batches. As functions in float64 the two "
        "agree (tests/objectives/test_preference_trl.py).",
        discopop,
    ),
]
