"""Per-token estimators of KL(policy || reference) from tokens sampled by the policy.

Source: J. Schulman, "Approximating KL Divergence" (2020). Each takes the log-probabilities of the sampled
tokens under policy and reference, of any equal shape, in nats, and returns the same shape. With
d = log policy - log reference and tokens sampled by the policy, the expectation of k1 and k3 is the KL.
"""

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Nats; exp(20) is 5e8. A log ratio beyond it comes from stale or wrong weights, and exp would overflow."""


def bounded(log_ratio: Tensor) -> Tensor:
    """Log ratios within ±20, as verl and OpenRLHF keep them before exp; the gradient is 0 where that cuts one off."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def beyond(log_ratio: Tensor) -> Tensor:
    """Where `bounded` cuts a log ratio off, bool."""
    return log_ratio.abs() > LOG_RATIO_LIMIT


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d. Unbiased, may be negative. As a loss its expected on-policy gradient is zero: use it in the reward."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d² / 2. Biased in value, but on-policy its gradient is that of KL(policy || reference)."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1. Unbiased and never negative; as a plain loss its gradient is that of KL(reference || policy).

    Multiply it by the importance ratio exp(logp - old logp), with its gradient, to get that of KL(policy || reference).
    d is kept within ±20 (`bounded`), so that exp cannot overflow.
    """
    difference = bounded(logprobs - reference_logprobs)
    return (-difference).exp() + difference - 1


def adapted_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: float) -> float:
    """coefficient · (1 + clip(kl / target - 1, -0.2, 0.2) · samples / horizon). Source: arXiv 1909.08593 sec. 2.2.

    Args:
        kl, target: nats a response. samples: responses since the last change. horizon: responses over which the
            coefficient may change by a factor of about e^±0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
