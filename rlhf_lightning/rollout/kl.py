"""KL to the policy that the stage started from, in the reward or in the loss, fixed or adaptive."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.offload import check_place
from rlhf_lightning.objectives import kl
from rlhf_lightning.objectives.policy.importance import token_ratio

LOSS_ESTIMATORS = ("weighted_k3", "k2", "k3")


class KLPenalty:
    """A penalty on the distance from the reference.

    In the reward it is k1 per token, folded into the advantage of every token up to its place. In the loss it is
    `weighted_k3` (ratio · k3, the default) or `k2`, whose gradient is that of KL(policy ‖ reference); `k3` as GRPO has
    it has the gradient of KL(reference ‖ policy). k1 in the loss is refused: its expected on-policy gradient is zero.

    Args:
        coefficient: beta, in reward units a nat; 0 only measures.
        place: `reward` or `loss`.
        estimator: of the loss: `weighted_k3`, `k2` or `k3`.
        discount: of a later token's penalty, in the reward; 1 is the gradient of the sequence's KL, 0 is Tinker's.
            With GAE its gamma counts instead.
        centred: the mean penalty of a round's tokens is taken off, as Tinker does; not with a critic or whitening,
            which see to that themselves.
        target: KL (nats a response) that the coefficient is adapted to (Ziegler et al., arXiv 1909.08593); fixed by
            default.
        horizon: responses over which an adaptive coefficient may change by a factor of about e^±0.2.
        reference: model folder or Hub id to measure from; by default the policy that the stage starts from.
        refresh_every: rounds after which the policy becomes the reference; never by default.
        device: where a reference with weights of its own stays and runs (`cpu`, `cuda:1`); the policy's by default.
        offload: such a reference is in the memory of the CPU, except while it scores a round.
    """

    def __init__(
        self,
        coefficient: float = 0.05,
        place: str = "loss",
        estimator: str = "weighted_k3",
        discount: float = 1.0,
        centred: bool = True,
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
            raise ConfigError(f"kl.place is {place!r}; 'reward' or 'loss'")
        if estimator not in LOSS_ESTIMATORS:
            reason = " (k1 in the loss has no expected on-policy gradient)" if estimator == "k1" else ""
            raise ConfigError(f"kl.estimator is {estimator!r}{reason}; one of {', '.join(LOSS_ESTIMATORS)}")
        if not 0 <= coefficient < math.inf:
            raise ConfigError(f"kl.coefficient is {coefficient}; it must not be negative, nor infinite")
        if place == "reward" and estimator != "weighted_k3":
            raise ConfigError(f"kl.estimator ({estimator}) is of the loss; in the reward it is k1: leave it out")
        if target is None and horizon != 10_000:
            raise ConfigError("kl.horizon is of an adaptive coefficient: set kl.target, or leave it out")
        if not 0 <= discount <= 1:
            raise ConfigError(f"kl.discount is {discount}; it must be in [0, 1]")
        if target is not None and not (target > 0 and horizon > 0 and coefficient > 0):
            raise ConfigError("kl.target, kl.horizon and kl.coefficient must be above 0 for an adaptive coefficient")
        if refresh_every is not None:
            check_whole("kl.refresh_every", refresh_every)
        if reference is not None and refresh_every is not None:
            raise ConfigError(
                "kl.reference names a model of its own, which kl.refresh_every would replace by the policy: set one"
            )
        self.coefficient, self.place, self.estimator, self.discount = coefficient, place, estimator, discount
        self.centred, self.target, self.horizon = centred, target, horizon
        self.reference, self.refresh_every = reference, refresh_every
        self._observed: tuple[float, int] | None = None

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """coefficient · estimate of each token, `[B, T]`, 0 where the mask is 0."""
        if self.estimator == "k2":
            estimate = kl.k2(logprobs, reference_logprobs)
        else:
            estimate = kl.k3(logprobs, reference_logprobs)
            if self.estimator == "weighted_k3":
                estimate = estimate * token_ratio(logprobs, old_logprobs, mask)
        return torch.where(mask.bool(), self.coefficient * estimate, 0.0)

    def penalties(self, old_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The reward of each token, `[B, T]`: -coefficient · k1, 0 where the mask is 0."""
        return torch.where(mask.bool(), -self.coefficient * kl.k1(old_logprobs, reference_logprobs), 0.0)

    # -- the controller -------------------------------------------------------------------------------------------

    def observe(self, kl: float, responses: int) -> None:
        """Take the mean KL (nats a response) of a round; it counts from the next round on."""
        self._observed = (kl, responses)

    def adapt(self) -> None:
        """Before a round: move an adaptive coefficient by what was observed in the last."""
        if self.target is not None and self._observed is not None:
            seen, responses = self._observed
            self.coefficient = kl.adapted_coefficient(self.coefficient, seen, self.target, responses, self.horizon)
        self._observed = None

    def state_dict(self) -> dict[str, Any]:
        """What an adaptive coefficient has come to."""
        return {"coefficient": self.coefficient, "observed": self._observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if self.target is not None:
            self.coefficient, self._observed = state["coefficient"], state["observed"]
