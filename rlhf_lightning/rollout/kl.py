"""KL penalty on the distance from a reference policy: in the reward or in the loss, fixed or adaptive."""

import copy
import math
from typing import Self, TypedDict

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.files import is_url
from rlhf_lightning.generation.server_reference import endpoint
from rlhf_lightning.models.offload import check_place
from rlhf_lightning.objectives import kl
from rlhf_lightning.objectives.policy.importance import token_ratio
from rlhf_lightning.settings import Settings

LOSS_ESTIMATORS = ("weighted_k3", "k2", "k3")


class KLPenalty(Settings):
    """Penalty on the KL divergence from the reference policy.

    In the reward, the penalty is k1 per token, which enters the advantage of that token and of all earlier ones. In
    the loss, it is `weighted_k3` (ratio · k3, the default) or `k2`, which have the gradient of KL(policy ‖ reference),
    or GRPO's `k3`, which has the gradient of KL(reference ‖ policy). k1 in the loss is rejected, because its expected
    on-policy gradient is zero. Source: J. Schulman, "Approximating KL Divergence" (2020).

    Args:
        coefficient: Weight beta, in reward units per nat; at 0 the KL is only measured.
        place: `reward` or `loss`.
        estimator: Estimator in the loss: `weighted_k3`, `k2` or `k3`.
        discount: Discount factor for the penalties of later tokens, in the reward: 1 gives the gradient of the
            sequence's KL, 0 is Tinker's choice. With GAE, its gamma is used instead.
        centered: True to subtract, from the penalties' part of the advantages, its mean over the round's tokens. With
            discount 0 Tinker does the same. Ignored with a critic or whitening, which already act as a baseline.
        target: KL in nats per episode that the coefficient adapts to (Ziegler et al., arXiv 1909.08593); None for a
            fixed coefficient.
        horizon: Number of episodes over which an adaptive coefficient may change by a factor of about e^±0.2.
        reference: Model folder or Hub id of the reference, or the address of a vLLM server that has it
            (`http://HOST:PORT`); None for the policy at the start of the stage.
        refresh_every: Number of rounds after which the policy becomes the reference; None for never.
        device: Device of a reference with its own weights (`cpu`, `cuda:1`); None for the policy's device.
        offload: True to keep such a reference in CPU memory, except while it is used.

    Raises:
        ConfigError: If a setting is out of range, or two settings conflict.

    Example:
        >>> penalty = KLPenalty(coefficient=0.1, place="reward")
        >>> penalty.token_rewards(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[1.0]]))
        tensor([[-0.1000]])
    """

    def __init__(
        self,
        coefficient: float = 0.05,
        place: str = "loss",
        estimator: str = "weighted_k3",
        discount: float = 1.0,
        centered: bool = True,
        target: float | None = None,
        horizon: float = 10_000,
        reference: str | None = None,
        refresh_every: int | None = None,
        device: str | None = None,
        offload: bool = False,
    ) -> None:
        check_place("kl", device, offload)
        self.device, self.offload = device, offload
        if place not in ("reward", "loss"):
            raise ConfigError(f"kl.place is {place!r}; it must be 'reward' or 'loss'")
        if estimator not in LOSS_ESTIMATORS:
            reason = " (in the loss, the expected on-policy gradient of k1 is zero)" if estimator == "k1" else ""
            raise ConfigError(f"kl.estimator is {estimator!r}{reason}; it must be one of {', '.join(LOSS_ESTIMATORS)}")
        if not 0 <= coefficient < math.inf:
            raise ConfigError(f"kl.coefficient is {coefficient}; it must be finite and not negative")
        if place == "reward" and estimator != "weighted_k3":
            raise ConfigError(
                f"kl.estimator is {estimator!r}, but with kl.place: reward the estimator is always k1. Remove "
                "kl.estimator, or set kl.place: loss"
            )
        if target is None and horizon != 10_000:
            raise ConfigError(
                "kl.horizon has no effect without kl.target (an adaptive coefficient). Set kl.target, or remove "
                "kl.horizon"
            )
        if not 0 <= discount <= 1:
            raise ConfigError(f"kl.discount is {discount}; it must be in [0, 1]")
        if target is not None and not (target > 0 and horizon > 0 and coefficient > 0):
            raise ConfigError(
                f"kl.target is {target}, kl.horizon is {horizon} and kl.coefficient is {coefficient}; for an adaptive "
                "coefficient all three must be above 0"
            )
        if refresh_every is not None:
            check_whole("kl.refresh_every", refresh_every)
        if reference is not None and refresh_every is not None:
            raise ConfigError(
                "kl.reference names a separate model, but kl.refresh_every would replace it with the policy. Set only "
                "one of them"
            )
        self.served = reference is not None and is_url(reference)
        """True if the reference is a server."""
        if reference is not None and self.served:
            endpoint(reference)
            if device is not None or offload:
                raise ConfigError(
                    f"kl.device and kl.offload place a reference on this machine, but {reference} is a server; leave "
                    "them out"
                )
        self.coefficient, self.place, self.estimator, self.discount = coefficient, place, estimator, discount
        self.centered, self.target, self.horizon = centered, target, horizon
        self.reference, self.refresh_every = reference, refresh_every

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the penalty of each token in the loss.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy at the start of the round, `[B, T]`.
            reference_logprobs: The same under the reference, `[B, T]`.
            loss_mask: 1 at sampled tokens, 0 elsewhere, `[B, T]`.

        Returns:
            coefficient · estimate, `[B, T]`, 0 where the mask is 0.
        """
        if self.estimator == "k2":
            estimate = kl.k2(logprobs, reference_logprobs)
        else:
            estimate = kl.k3(logprobs, reference_logprobs)
            if self.estimator == "weighted_k3":
                estimate = estimate * token_ratio(logprobs, old_logprobs, loss_mask)
        return torch.where(loss_mask.bool(), self.coefficient * estimate, 0.0)

    def token_rewards(self, old_logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the penalty of each token as a reward, to be added: it is negative where the KL estimate is positive.

        Args:
            old_logprobs: Log-probability of each token under the policy at the start of the round, in nats, `[B, T]`.
            reference_logprobs: The same under the reference, `[B, T]`.
            loss_mask: 1 at sampled tokens, 0 elsewhere, `[B, T]`.

        Returns:
            -coefficient · k1, `[B, T]`, 0 where the mask is 0.
        """
        return torch.where(loss_mask.bool(), -self.coefficient * kl.k1(old_logprobs, reference_logprobs), 0.0)

    def at(self, coefficient: float) -> Self:
        """The same penalty with another coefficient."""
        other = copy.copy(self)
        object.__setattr__(other, "coefficient", coefficient)
        return other


class KLState(TypedDict):
    """State of a `KLController` in a checkpoint."""

    coefficient: float
    observed: tuple[float, int] | None
    """KL in nats per episode, and number of episodes, that the coefficient has not been adapted to yet."""


class KLController:
    """The KL penalty in a run, whose coefficient may adapt from round to round.

    Args:
        penalty: The settings.

    Attributes:
        penalty: The penalty with its current coefficient.

    Example:
        >>> controller = KLController(KLPenalty(0.1, target=6.0, horizon=1000))
        >>> controller.observe(kl=60.0, episodes=100)
        >>> controller.adapt()
        >>> round(controller.penalty.coefficient, 6)
        0.102
    """

    def __init__(self, penalty: KLPenalty) -> None:
        self.penalty = penalty
        self._observed: tuple[float, int] | None = None

    def observe(self, kl: float, episodes: int) -> None:
        """Record the KL of a round, which changes an adaptive coefficient from the next round on.

        Args:
            kl: Mean KL, in nats per episode.
            episodes: Number of episodes.
        """
        self._observed = (kl, episodes)

    def adapt(self) -> None:
        """Update an adaptive coefficient from the last observed round; called before each round."""
        penalty = self.penalty
        if penalty.target is not None and self._observed is not None:
            observed_kl, episodes = self._observed
            coefficient = kl.adapted_coefficient(
                penalty.coefficient, observed_kl, penalty.target, episodes, penalty.horizon
            )
            self.penalty = penalty.at(coefficient)
        self._observed = None

    def state_dict(self) -> KLState:
        """The coefficient, and the KL that it has not been adapted to yet."""
        return {"coefficient": self.penalty.coefficient, "observed": self._observed}

    def load_state_dict(self, state: KLState) -> None:
        """Restore a `state_dict`; a fixed coefficient stays as configured."""
        if self.penalty.target is not None:
            self.penalty, self._observed = self.penalty.at(state["coefficient"]), state["observed"]
