"""KL to the policy that the stage started from, in the reward or in the loss."""

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.objectives import kl
from rlhf_lightning.objectives.advantage import discounted_future_sum

LOSS_ESTIMATORS = ("weighted_k3", "k2", "k3")


class KLPenalty:
    """A penalty on the distance from the reference.

    In the reward it is k1 per token, folded into the advantage of every token up to its place, centred over the
    batch. In the loss it is `weighted_k3` (ratio · k3, the default) or `k2`, whose gradient is that of
    KL(policy ‖ reference); `k3` as GRPO has it has the gradient of KL(reference ‖ policy). k1 in the loss is refused:
    its expected on-policy gradient is zero.

    Args:
        coefficient: beta, in reward units a nat; 0 only measures.
        place: `reward` or `loss`.
        estimator: of the loss: `weighted_k3`, `k2` or `k3`.
        discount: of a later token's penalty, in the reward; 1 is the gradient of the sequence's KL, 0 is Tinker's.
    """

    def __init__(
        self, coefficient: float = 0.05, place: str = "loss", estimator: str = "weighted_k3", discount: float = 1.0
    ) -> None:
        if place not in ("reward", "loss"):
            raise ConfigError(f"kl.place is {place!r}; 'reward' or 'loss'")
        if estimator not in LOSS_ESTIMATORS:
            reason = " (k1 in the loss has no expected on-policy gradient)" if estimator == "k1" else ""
            raise ConfigError(f"kl.estimator is {estimator!r}{reason}; one of {', '.join(LOSS_ESTIMATORS)}")
        if coefficient < 0:
            raise ConfigError(f"kl.coefficient is {coefficient}; it must not be negative")
        self.coefficient, self.place, self.estimator, self.discount = coefficient, place, estimator, discount

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """coefficient · estimate of each token, `[B, T]`, 0 where the mask is 0."""
        if self.estimator == "k2":
            estimate = kl.k2(logprobs, reference_logprobs)
        else:
            estimate = kl.k3(logprobs, reference_logprobs)
            if self.estimator == "weighted_k3":
                estimate = estimate * torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
        return torch.where(mask.bool(), self.coefficient * estimate, 0.0)

    def fold(self, old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """What to add to the advantages of a round's rows, `[B, T]`."""
        penalty = torch.where(mask.bool(), kl.k1(old_logprobs, reference_logprobs), 0.0)
        centred = torch.where(mask.bool(), penalty - penalty.sum() / mask.sum().clamp(min=1), 0.0)
        return -self.coefficient * discounted_future_sum(centred, mask, self.discount)
