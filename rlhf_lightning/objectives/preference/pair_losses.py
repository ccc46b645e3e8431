"""Pair losses as functions of the scores of a chosen and a rejected response, `[B]` each.

Scores include any beta: for DPO's implicit reward, c = beta·(log π − log π_ref). Every function returns the loss to be
minimized, `[B]`. In the formulas c is `chosen`, r is `rejected`, d = c − r, and σ is the logistic function.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_lightning.objectives.kl import LOG_RATIO_LIMIT


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0, label_smoothing: float | Tensor = 0.0
) -> Tensor:
    """-(1 - ε)·log σ(d - margin) - ε·log σ(-(d - margin)).

    Sources: Bradley & Terry 1952; as a reward-model loss, Ziegler et al., arXiv 1909.08593; DPO, arXiv 2305.18290
    eq. 7; margin, Llama 2, arXiv 2307.09288 eq. 2; smoothing, E. Mitchell's conservative DPO (2023).

    Args:
        chosen: Scores c, `[B]`.
        rejected: Scores r, `[B]`.
        margin: Subtracted from d, `[B]` or a number.
        label_smoothing: ε, `[B]` or a number; ½ for a tie.

    Returns:
        Loss of each pair, `[B]`.

    Example:
        >>> bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([0.3133])
    """
    logit = chosen - rejected - margin
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def robust(chosen: Tensor, rejected: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """(-(1 - ε)·log σ(d) + ε·log σ(-d)) / (1 - 2ε): unbiased if a fraction ε of the labels is flipped.

    Source: robust DPO, Chowdhury et al., arXiv 2403.00409.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        label_smoothing: ε, the fraction of flipped labels, in [0, ½).

    Returns:
        Loss of each pair, `[B]`.
    """
    clean, flipped = F.logsigmoid(chosen - rejected), F.logsigmoid(rejected - chosen)
    return (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor) -> Tensor:
    """max(0, 1 - d). Source: SLiC, arXiv 2305.10425, normalized as in RSO, arXiv 2309.06657.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return F.relu(1 - (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(d - ½)² / beta², for scores that include beta. Source: IPO, arXiv 2310.12036 eq. 17, scores times beta.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        beta: Beta, which the scores include.

    Returns:
        Loss of each pair, `[B]`.
    """
    return ((chosen - rejected) - 0.5).square() / beta**2


def simpo(chosen: Tensor, rejected: Tensor, gamma: float = 1.0) -> Tensor:
    """-log σ(d - γ), for scores that are beta times the mean log-probability. Source: SimPO, arXiv 2405.14734 eq. 6.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        gamma: γ, the target margin.

    Returns:
        Loss of each pair, `[B]`.
    """
    return bradley_terry(chosen, rejected, gamma)


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) with p = exp(logprob), same shape; p is capped at the largest float below 1.

    Args:
        logprob: Log-probabilities, in nats, of any shape.

    Returns:
        Log-odds, same shape.
    """
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    # Two forms of log(1 - e^x): log1p(-exp(x)) loses digits near x = 0, log(-expm1(x)) far from it.
    near = torch.log(-torch.expm1(logprob))
    return logprob - torch.where(logprob > -math.log(2), near, torch.log1p(-torch.exp(logprob)))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(log odds(c) - log odds(r)), for mean log-probabilities per token. Source: ORPO, arXiv 2403.07691 eq. 7.

    Args:
        chosen: Mean log-probability per token of the chosen responses, in nats, `[B]`.
        rejected: The same for the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def orpo(chosen: Tensor, rejected: Tensor, weight: float = 0.1) -> Tensor:
    """-c + weight·odds_ratio(c, r), for mean log-probabilities per token. Source: ORPO, arXiv 2403.07691 eq. 6.

    Args:
        chosen: Mean log-probability per token of the chosen responses, in nats, `[B]`.
        rejected: The same for the rejected responses, `[B]`.
        weight: Weight of the odds ratio.

    Returns:
        Loss of each pair, `[B]`.
    """
    return -chosen + weight * odds_ratio(chosen, rejected)


def exo(chosen: Tensor, rejected: Tensor, label_smoothing: float = 1e-3) -> Tensor:
    """KL((σ(d), σ(-d)) || (1 - ε, ε)) with ε > 0: the reverse of the KL that Bradley-Terry minimizes.

    Source: EXO, arXiv 2402.00856 eq. 16, with two responses.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        label_smoothing: ε, the probability that a label is wrong, in (0, ½).

    Returns:
        Loss of each pair, `[B]`.
    """
    d = chosen - rejected
    win = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-label_smoothing))
    return win + (-d).sigmoid() * (F.logsigmoid(-d) - math.log(label_smoothing))


def nca(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(c) - ½·log σ(-c) - ½·log σ(-r): keeps the chosen response likely. Source: NCA, arXiv 2402.05369.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """((c - ½)² + (r + ½)²) / beta², for scores that include beta.

    Source: SPPO, arXiv 2405.00675 eq. 4.7 times beta, with probability 1 that the chosen response wins.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        beta: Beta, which the scores include.

    Returns:
        Loss of each pair, `[B]`.
    """
    return ((chosen - 0.5).square() + (rejected + 0.5).square()) / beta**2


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 - σ(c) + σ(r), for chosen responses better than the policy's own. Source: APO-zero, arXiv 2408.06266 eq. 7.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """σ(c) + 1 - σ(d), for chosen responses worse than the policy's own. Source: APO-down, arXiv 2408.06266 eq. 8.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def discopop(chosen: Tensor, rejected: Tensor, temperature: float = 0.05) -> Tensor:
    """-(1 - σ(d/τ))·log σ(d) + σ(d/τ)·exp(-d), τ = temperature. Source: DiscoPOP, arXiv 2406.08414 eq. 5.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        temperature: τ, above 0.

    Returns:
        Loss of each pair, `[B]`.
    """
    d = chosen - rejected
    # σ(d/τ)·exp(-d) as one exponential: computed apart, the factors become 0 and infinity, whose product is NaN.
    # With τ above 1 the exponential could still overflow, hence the clamp.
    exponential = torch.exp((F.logsigmoid(d / temperature) - d).clamp(max=LOG_RATIO_LIMIT))
    return exponential - (-d / temperature).sigmoid() * F.logsigmoid(d)


def bco(chosen: Tensor, rejected: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """-log σ(c - δ) - log σ(-(r - δ)), with δ = `shift`, the mean reward so far. Source: BCO, arXiv 2404.04656.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        shift: δ, the mean reward so far, without gradient.

    Returns:
        Loss of each pair, `[B]`.
    """
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def aot(chosen: Tensor, rejected: Tensor, reference_margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`bradley_terry` of the k-th smallest policy margin against the k-th smallest reference margin.

    Minimizing it makes the policy's margins stochastically dominate those of the reference. The sort couples the rows
    of the batch. Source: AOT, paired, arXiv 2406.05882.

    Args:
        chosen: beta·(log π - log π_ref) of the chosen responses, `[B]`.
        rejected: The same for the rejected responses, `[B]`.
        reference_margin: m = beta·(log π_ref(chosen) - log π_ref(rejected)), `[B]`; c - r + m is the policy's margin.
        label_smoothing: As in `bradley_terry`.

    Returns:
        Loss of each pair of quantiles, `[B]`.
    """
    policy = (chosen - rejected + reference_margin).sort().values
    return bradley_terry(policy, reference_margin.sort().values, label_smoothing=label_smoothing)


def aot_unpaired(chosen: Tensor, rejected: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`bradley_terry` of the k-th smallest c against the k-th smallest r.

    The sort couples the rows of the batch. Source: AOT, unpaired, arXiv 2406.05882.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        label_smoothing: As in `bradley_terry`.

    Returns:
        Loss of each pair of quantiles, `[B]`.
    """
    return bradley_terry(chosen.sort().values, rejected.sort().values, label_smoothing=label_smoothing)


def davidson(chosen: Tensor, rejected: Tensor, ties: Tensor | float = 0.0, nu: float = 1.0) -> Tensor:
    """-log P(outcome), with P(win) : P(loss) : P(tie) = e^(d/2) : e^(-d/2) : 2ν; `ties` is 1 where neither won.

    Sources: Davidson 1970; DPO with ties, arXiv 2409.17431.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        ties: 1 where neither response is better, else 0, `[B]` or a number.
        nu: ν, the weight of ties, above 0.

    Returns:
        Loss of each pair, `[B]`.
    """
    d = chosen - rejected
    outcomes = torch.stack([d / 2, -d / 2, torch.full_like(d, math.log(2 * nu))])
    win, _, tie = outcomes.log_softmax(0)
    return -torch.lerp(win, tie, torch.as_tensor(ties, dtype=d.dtype, device=d.device).expand_as(d))


def rao_kupper(chosen: Tensor, rejected: Tensor, ties: Tensor | float = 0.0, nu: float = 3.0) -> Tensor:
    """-log P(outcome), with P(win) = σ(d - log ν) and P(tie) = (ν² - 1)·σ(d - log ν)·σ(-d - log ν), ν > 1.

    `ties` is 1 where neither won. Sources: Rao & Kupper 1967; DPO with ties, arXiv 2409.17431.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.
        ties: 1 where neither response is better, else 0, `[B]` or a number.
        nu: ν, above 1; a tie becomes likely when the scores differ by less than log ν.

    Returns:
        Loss of each pair, `[B]`.
    """
    d, threshold = chosen - rejected, math.log(nu)
    win = F.logsigmoid(d - threshold)
    tie = win + F.logsigmoid(-d - threshold) + math.log(nu**2 - 1)
    return -torch.lerp(win, tie, torch.as_tensor(ties, dtype=d.dtype, device=d.device).expand_as(d))


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(c + r)²: keeps the mean score of a pair near 0. Source: arXiv 2312.09244.

    Args:
        chosen: Scores c of the chosen responses, `[B]`.
        rejected: Scores r of the rejected responses, `[B]`.

    Returns:
        Loss of each pair, `[B]`.
    """
    return (chosen + rejected).square()


def sft(logps: Tensor, lengths: Tensor) -> Tensor:
    """-log π(y) / |y|: the mean negative log-likelihood per token, in nats. Source: RPO, arXiv 2404.19733.

    Args:
        logps: Σ log π of each response, in nats, `[B]`.
        lengths: Number of tokens of each response, `[B]`.

    Returns:
        Loss of each response, `[B]`.
    """
    return -logps / lengths
