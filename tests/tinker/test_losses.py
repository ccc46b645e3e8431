"""Tinker's losses against its formulas, computed number by number."""

from math import exp

import pytest
import torch

from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.losses import Loss, loss_of

LOGPROBS = [[-1.0, -0.3, -2.0], [-0.5, -1.7, 0.0]]
OLD = [[-1.2, -0.9, -1.1], [-0.4, -1.0, 0.0]]
ADVANTAGES = [[1.0, 0.5, -2.0], [-0.7, 1.5, 0.0]]
WEIGHTS = [[1.0, 0.0, 0.25], [-2.0, 1.0, 0.0]]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def by_hand(name: str, low: float = 0.8, high: float = 1.2, beta: float = 0.05) -> tuple[float, list[float]]:
    """The sum of the loss over all tokens, and its derivative by each log-probability."""
    total, slopes = 0.0, []
    for p, q, a, w in zip(*map(flat, (LOGPROBS, OLD, ADVANTAGES, WEIGHTS)), strict=True):
        ratio = exp(p - q)
        clipped = min(max(ratio, low), high)
        if name == "cross_entropy":
            value, slope = -p * w, -w
        elif name == "importance_sampling":
            value, slope = -ratio * a, -ratio * a
        elif name == "ppo":
            value = -min(ratio * a, clipped * a)
            slope = -ratio * a if ratio * a <= clipped * a else 0.0
        elif name == "cispo":
            value, slope = -clipped * p * a, -clipped * a
        else:
            value, slope = -(p * a - 0.5 * beta * (p - q) ** 2), -(a - beta * (p - q))
        total += value
        slopes.append(slope)
    return total, slopes


def computed(loss: Loss, weights: list[list[float]] | None = None) -> tuple[float, list[float]]:
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    given = [[1.0] * 3] * 2 if weights is None else weights
    inputs = {"weights": given, "logprobs": OLD, "advantages": ADVANTAGES}
    total = loss(logprobs, {name: torch.tensor(rows, dtype=torch.float64) for name, rows in inputs.items()})
    [gradient] = torch.autograd.grad(total, [logprobs])
    return total.item(), gradient.flatten().tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_entropy", {}),
        ("importance_sampling", {}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 1.5}),
        ("dro", {}),
        ("dro", {"beta": 0.3}),
    ],
)
def test_loss_is_tinkers_formula(name: str, options: dict[str, float]) -> None:
    known = {"clip_low_threshold": "low", "clip_high_threshold": "high", "beta": "beta"}
    total, slopes = by_hand(name, **{known[option]: value for option, value in options.items()})
    found, gradient = computed(loss_of(name, options), WEIGHTS if name == "cross_entropy" else None)
    assert found == pytest.approx(total, abs=1e-12)
    assert gradient == pytest.approx(slopes, abs=1e-12)


def test_weights_of_a_policy_loss_and_the_prompt_of_dro() -> None:
    """Weights leave tokens out; positions with neither log-probability nor advantage are the prompt's."""
    weights = [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    whole, left = computed(loss_of("dro", {})), computed(loss_of("dro", {}), weights)
    first = -(-1.0 * 1.0 - 0.5 * 0.05 * (-1.0 + 1.2) ** 2)
    assert whole[0] - left[0] == pytest.approx(first, abs=1e-12)
    assert left[1][0] == 0
    logprobs = torch.tensor([[-3.0]])
    zeros = {"weights": torch.ones(1, 1), "logprobs": torch.zeros(1, 1), "advantages": torch.zeros(1, 1)}
    assert float(loss_of("dro", {})(logprobs, zeros)) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gspo", {}, "loss_fn is 'gspo'; this server has 'cross_entropy', 'importance_sampling'"),
        ("ppo", {"beta": 1.0}, "loss_fn_config has 'beta', but ppo has the options 'clip_low_threshold'"),
        ("ppo", {"clip_low_threshold": 1.1}, "clip_low must be in"),
        ("cispo", {"clip_high_threshold": 0.5}, "they must contain 1"),
        ("dro", {"beta": 0.0}, "beta is 0.0; it must be above 0"),
    ],
)
def test_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        loss_of(name, options)
