"""Per-token Monte Carlo estimators of KL(policy || reference), and the adaptive KL coefficient.

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.

Each estimator takes the log-probabilities of the sampled tokens under the policy and the reference, in nats and of any
equal shape, and returns a tensor of that shape. With d = log policy - log reference and tokens sampled from the policy,
k1 and k3 are unbiased estimators of the KL.
"""

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on log-ratios, in nats; exp(20) is 5e8. Larger ones come from stale or wrong weights and would overflow exp."""


def bounded(log_ratio: Tensor) -> Tensor:
    """Clamp log-ratios to ±`LOG_RATIO_LIMIT` before exp, as verl and OpenRLHF do. The gradient is 0 where it clamps."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def beyond(log_ratio: Tensor) -> Tensor:
    """True where `bounded` clamps a log-ratio; bool, same shape."""
    return log_ratio.abs() > LOG_RATIO_LIMIT


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The estimator d: unbiased, may be negative.

    Its expected on-policy gradient is zero, so it does nothing as a loss term; subtract it from the reward instead.

    Args:
        logprobs: Log-probability of each token under the policy, in nats, of any shape.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        The estimate of each token in nats, same shape.
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The estimator d² / 2: biased in value, but its on-policy gradient is that of KL(policy || reference).

    Args:
        logprobs: Log-probability of each token under the policy, in nats, of any shape.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        The estimate of each token in nats, same shape.
    """
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The estimator exp(-d) + d - 1: unbiased and never negative.

    As a plain loss, its gradient is that of KL(reference || policy). Multiply it by the importance ratio
    exp(logprobs - old_logprobs), with gradient, to get the gradient of KL(policy || reference). d is clamped to ±20
    (`bounded`) so that exp cannot overflow.

    Args:
        logprobs: Log-probability of each token under the policy, in nats, of any shape.
        reference_logprobs: The same under the reference, same shape.

    Returns:
        The estimate of each token in nats, same shape.
    """
    difference = bounded(logprobs - reference_logprobs)
    return (-difference).exp() + difference - 1


def adapted_coefficient(coefficient: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Move a KL coefficient toward a target KL: coefficient · (1 + clip(kl / target - 1, ±0.2) · episodes / horizon).

    Source: Ziegler et al., arXiv 1909.08593 sec. 2.2.

    Args:
        coefficient: Current value.
        kl: Measured KL, in nats per episode.
        target: Target KL, in nats per episode.
        episodes: Episodes since the last update of the coefficient.
        horizon: Episodes over which the coefficient may change by a factor of about e^±0.2.

    Returns:
        The new coefficient.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)
