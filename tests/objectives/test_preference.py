"""Preference losses against values computed by hand, and against TRL's if TRL has them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.objectives import preference
from rlhf_lightning.objectives.calibration import area_under_curve, brier, expected_calibration_error, reliability

C, R = 0.3, -0.5  # scores of one pair
D = C - R


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def odds(logp: float) -> float:
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


HAND: dict[str, tuple[Callable[..., Any], float]] = {
    "bradley_terry": (lambda c, r: preference.bradley_terry(c, r), -log_sigmoid(D)),
    "margin": (lambda c, r: preference.bradley_terry(c, r, 0.2), -log_sigmoid(D - 0.2)),
    "cdpo": (
        lambda c, r: preference.bradley_terry(c, r, label_smoothing=0.1),
        -0.9 * log_sigmoid(D) - 0.1 * log_sigmoid(-D),
    ),
    "robust": (
        lambda c, r: preference.robust(c, r, 0.1),
        (-0.9 * log_sigmoid(D) + 0.1 * log_sigmoid(-D)) / 0.8,
    ),
    "hinge": (preference.hinge, 0.2),
    "ipo": (lambda c, r: preference.ipo(c, r, beta=0.1), (D / 0.1 - 1 / 0.2) ** 2),
    "simpo": (lambda c, r: preference.simpo(c, r, 0.5), -log_sigmoid(D - 0.5)),
    "exo": (
        lambda c, r: preference.exo(c, r, 0.01),
        sigmoid(D) * math.log(sigmoid(D) / 0.99) + sigmoid(-D) * math.log(sigmoid(-D) / 0.01),
    ),
    "nca": (preference.nca, -log_sigmoid(C) - 0.5 * log_sigmoid(-C) - 0.5 * log_sigmoid(-R)),
    "sppo": (lambda c, r: preference.sppo(c, r, beta=0.1), (C / 0.1 - 5) ** 2 + (R / 0.1 + 5) ** 2),
    "apo_zero": (preference.apo_zero, 1 - sigmoid(C) + sigmoid(R)),
    "apo_down": (preference.apo_down, sigmoid(C) + 1 - sigmoid(D)),
    "discopop": (
        lambda c, r: preference.discopop(c, r, 0.5),
        -(1 - sigmoid(D / 0.5)) * log_sigmoid(D) + sigmoid(D / 0.5) * math.exp(-D),
    ),
    "bco": (lambda c, r: preference.bco(c, r, 0.1), -log_sigmoid(C - 0.1) - log_sigmoid(0.1 - R)),
    "davidson": (
        lambda c, r: preference.davidson(c, r, 0.0, 0.7),
        -math.log(math.exp(C) / (math.exp(C) + math.exp(R) + 1.4 * math.exp((C + R) / 2))),
    ),
    "davidson tie": (
        lambda c, r: preference.davidson(c, r, 1.0, 0.7),
        -math.log(1.4 * math.exp((C + R) / 2) / (math.exp(C) + math.exp(R) + 1.4 * math.exp((C + R) / 2))),
    ),
    "rao_kupper": (
        lambda c, r: preference.rao_kupper(c, r, 0.0, 2.0),
        -math.log(math.exp(C) / (math.exp(C) + 2 * math.exp(R))),
    ),
    "rao_kupper tie": (
        lambda c, r: preference.rao_kupper(c, r, 1.0, 2.0),
        -math.log(3 * math.exp(C) * math.exp(R) / ((math.exp(C) + 2 * math.exp(R)) * (2 * math.exp(C) + math.exp(R)))),
    ),
    "centering": (preference.centering, (C + R) ** 2),
}


@pytest.mark.parametrize("name", HAND)
def test_pair_losses_worked_by_hand(name: str) -> None:
    loss, wanted = HAND[name]
    torch.testing.assert_close(loss(t(C, C), t(R, R)), t(wanted, wanted), rtol=1e-12, atol=0)


def test_odds_ratio_and_orpo_worked_by_hand() -> None:
    chosen, rejected = -0.2, -1.5
    ratio = -log_sigmoid(odds(chosen) - odds(rejected))
    torch.testing.assert_close(preference.odds_ratio(t(chosen), t(rejected)), t(ratio), rtol=1e-12, atol=0)
    torch.testing.assert_close(preference.orpo(t(chosen), t(rejected), 0.3), t(0.2 + 0.3 * ratio), rtol=1e-12, atol=0)
    certain = t(0.0, -1e-12, -800.0).requires_grad_()
    preference.odds_ratio(certain, t(-1.0, -1.0, -1.0)).sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_sft_term() -> None:
    torch.testing.assert_close(preference.sft(t(-6.0, -1.0), t(3.0, 2.0)), t(2.0, 0.5))


def test_sorted_losses_worked_by_hand() -> None:
    chosen, rejected = t(1.0, -1.0, 0.5), t(0.2, 0.1, 2.0)
    pairs = [(-1.0, 0.1), (0.5, 0.2), (1.0, 2.0)]  # each side in order
    wanted = t(*(-log_sigmoid(c - r) for c, r in pairs))
    torch.testing.assert_close(preference.aot_unpaired(chosen, rejected), wanted)
    reference = t(2.0, 0.0, 1.0)
    policy = sorted([1.0 - 0.2 + 2.0, -1.0 - 0.1 + 0.0, 0.5 - 2.0 + 1.0])
    wanted = t(*(-log_sigmoid(p - m) for p, m in zip(policy, [0.0, 1.0, 2.0], strict=True)))
    torch.testing.assert_close(preference.aot(chosen, rejected, reference), wanted)


def test_labels_worked_by_hand() -> None:
    scores, labels = t(1.0, -0.6), t(1.0, 0.0)
    wanted = t(2 * (1 - sigmoid(0.8)), 3 * (1 - sigmoid(0.8)))
    torch.testing.assert_close(preference.kto(scores, labels, 0.2, 2.0, 3.0), wanted)
    torch.testing.assert_close(preference.apo_zero_unpaired(scores, labels), t(1 - sigmoid(1.0), sigmoid(-0.6)))
    wanted = t(-2 * log_sigmoid(0.9), -3 * log_sigmoid(0.7))
    torch.testing.assert_close(preference.bco_unpaired(scores, labels, 0.1, 2.0, 3.0), wanted)


def test_plackett_luce_worked_by_hand() -> None:
    scores, ranks = torch.tensor([[0.3, 1.0, -0.2]]).double(), torch.tensor([[1, 0, 2]])
    e = [math.exp(x) for x in (0.3, 1.0, -0.2)]
    wanted = -math.log(e[1] / sum(e)) - math.log(e[0] / (e[0] + e[2]))
    torch.testing.assert_close(preference.plackett_luce(scores, ranks, torch.ones(1, 3)), t(wanted))
    padded = torch.cat([scores, torch.full((1, 2), 77.0)], 1).requires_grad_()
    loss_mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    loss = preference.plackett_luce(padded, torch.tensor([[1, 0, 2, 0, 0]]), loss_mask)
    torch.testing.assert_close(loss.detach(), t(wanted))
    loss.sum().backward()
    assert padded.grad is not None
    assert padded.grad[0, 3:].tolist() == [0.0, 0.0]
    assert torch.isfinite(padded.grad).all()


@given(st.floats(-20, 20), st.floats(-20, 20))
@settings(max_examples=50, deadline=None)
def test_properties_of_pair_losses(c: float, r: float) -> None:
    chosen, rejected = t(c), t(r)
    plain = preference.bradley_terry(chosen, rejected)
    two = torch.stack([chosen, rejected], -1)
    torch.testing.assert_close(preference.plackett_luce(two, torch.tensor([[0, 1]]), torch.ones(1, 2)), plain)
    tied = preference.plackett_luce(two, torch.tensor([[0, 0]]), torch.ones(1, 2))
    torch.testing.assert_close(tied, 2 * preference.bradley_terry(chosen, rejected, label_smoothing=0.5))
    torch.testing.assert_close(preference.robust(chosen, rejected, 0.0), plain)
    torch.testing.assert_close(preference.aot_unpaired(chosen, rejected), plain)
    for loss in (preference.davidson, preference.rao_kupper):
        parts = [loss(chosen, rejected, 0.0), loss(rejected, chosen, 0.0), loss(chosen, rejected, 1.0)]
        torch.testing.assert_close(sum((-part).exp() for part in parts), t(1.0))  # win, lose, tie


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_losses_and_gradients_are_finite_for_extreme_scores(size: float) -> None:
    for name, (loss, _) in HAND.items():
        for sign in (1, -1):
            c, r = torch.tensor([sign * size], requires_grad=True), torch.tensor([-sign * size], requires_grad=True)
            if name == "discopop" and sign * size < -40:
                continue  # exp(-d) itself is beyond float32
            value = loss(c, r).sum()
            value.backward()
            assert c.grad is not None
            assert math.isfinite(float(value)), name
            assert torch.isfinite(c.grad).all(), name


def test_loss_classes_equal_their_functions() -> None:
    c, r = t(C, 1.0), t(R, 2.0)
    torch.testing.assert_close(
        preference.BradleyTerry(0.1)(c, r, ties=t(0.0, 1.0)),
        torch.cat(
            [
                preference.bradley_terry(c[:1], r[:1], label_smoothing=0.1),
                preference.bradley_terry(c[1:], r[1:], label_smoothing=0.5),
            ]
        ),
    )
    both = preference.WeightedSum([preference.BradleyTerry(), preference.SFT()], [2.0, 0.5])
    assert both.keywords() == {"margin": False, "ties": False, "chosen_logps": True, "chosen_lengths": True}
    found = both(c, r, chosen_logps=t(-2.0, -4.0), chosen_lengths=t(2.0, 2.0))
    torch.testing.assert_close(found, 2 * preference.bradley_terry(c, r) + 0.5 * t(1.0, 2.0))
    kto = preference.KTO()(t(1.0, -1.0), t(1.0, 0.0), mismatched=t(0.4, -0.2))
    torch.testing.assert_close(kto, preference.kto(t(1.0, -1.0), t(1.0, 0.0), 0.1))
    torch.testing.assert_close(
        preference.KTO()(t(1.0), t(1.0), mismatched=t(-3.0)), preference.kto(t(1.0), t(1.0), 0.0)
    )


def test_bco_keeps_running_means_of_training_scores() -> None:
    loss = preference.BCO()
    first = loss(t(1.0, 2.0), t(0.0, -1.0))
    torch.testing.assert_close(first, preference.bco(t(1.0, 2.0), t(0.0, -1.0), 0.5))
    second = loss(t(6.0), t(0.0))  # means 3 and -1/3
    torch.testing.assert_close(second, preference.bco(t(6.0), t(0.0), (3 - 1 / 3) / 2))
    restored = preference.BCO()
    restored.load_state_dict(loss.state_dict())
    for one in (loss.eval(), restored.eval()):
        torch.testing.assert_close(one(t(6.0), t(0.0)), second)
    unpaired = preference.BCOUnpaired()
    found = unpaired(t(1.0, 2.0, 0.0, -1.0), t(1.0, 1.0, 0.0, 0.0))
    torch.testing.assert_close(found[:2] + found[2:], first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preference.BradleyTerry(0.5), "label_smoothing is 0.5"),
        (lambda: preference.EXO(0.0), "label_smoothing is 0.0; it must be above 0"),
        (lambda: preference.RaoKupper(1.0), "nu is 1.0"),
        (lambda: preference.Davidson(0.0), "nu is 0.0"),
        (lambda: preference.DiscoPOP(0.0), "temperature is 0.0"),
        (lambda: preference.KTO(-1.0), "desirable_weight is -1.0"),
        (lambda: preference.WeightedSum([]), "at least one"),
        (lambda: preference.WeightedSum([preference.Hinge()], [1.0, 2.0]), "got 1 losses and 2 weights"),
        (lambda: preference.WeightedSum([preference.ORPO(), preference.NCA()]), "different scores"),
    ],
)
def test_invalid_options_are_rejected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_calibration_worked_by_hand() -> None:
    confidence, correct = t(0.55, 0.58, 0.95, 1.0), t(1.0, 0.0, 1.0, 1.0)
    mean, accuracy, count = reliability(confidence, correct)
    assert count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    torch.testing.assert_close(mean[[1, 9]], t(0.565, 0.975))
    torch.testing.assert_close(accuracy[[1, 9]], t(0.5, 1.0))
    torch.testing.assert_close(
        expected_calibration_error(confidence, correct), torch.tensor(0.5 * 0.065 + 0.5 * 0.025).double()
    )
    assert float(brier(t(0.9, 0.4))) == pytest.approx((0.01 + 0.36) / 2)
    assert float(area_under_curve(t(3.0, 1.0, 2.0, 1.0), t(1.0, 1.0, 0.0, 0.0))) == pytest.approx((2 + 0.5) / 4)
