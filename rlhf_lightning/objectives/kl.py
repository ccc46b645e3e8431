"""Per-token estimators of KL(policy || reference) from tokens drawn by the policy.

Source: J. Schulman, "Approximating KL Divergence" (2020). Each takes the log-probabilities of the drawn
tokens under policy and reference, of any equal shape, in nats, and returns the same shape. With
d = log policy - log reference and tokens drawn by the policy, the expectation of k1 and k3 is the KL.
"""

from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d. Unbiased, may be negative. As a loss its expected on-policy gradient is zero: use it in the reward."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d² / 2. Biased in value, but on-policy its gradient is that of KL(policy || reference)."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1. Unbiased and never negative; as a plain loss its gradient is that of KL(reference || policy).

    Multiply it by the importance ratio exp(logp - old logp), with its gradient, to get that of KL(policy || reference).
    """
    difference = logprobs - reference_logprobs
    return (-difference).exp() + difference - 1


def adapted_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: float) -> float:
    """coefficient · (1 + clip(kl / target - 1, -0.2, 0.2) · samples / horizon). Source: arXiv 1909.08593 sec. 2.2.

    Args:
        kl, target: nats a response. samples: responses since the last change. horizon: responses over which the
            coefficient may change by a factor of about e^±0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
