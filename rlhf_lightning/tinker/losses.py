"""Tinker's losses, made of the package's objectives: sums over all tokens of a request.

Source of names, inputs and signs: https://tinker-docs.thinkingmachines.ai/losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.errors import quoted
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.policy import CISPO, DRO, ClippedSurrogate, ImportanceSampling, PolicyObjective
from rlhf_lightning.objectives.supervised import nll
from rlhf_lightning.serving.fields import RequestError

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""Tinker's default bounds of the ratio."""
OPTIONS: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": CLIP,
    "cispo": CLIP,
    "dro": {"beta": 0.05},
}
"""Losses with their options and defaults."""


@dataclass(frozen=True)
class Loss:
    """A loss of a batch of datums.

    Args:
        name: Tinker's name.
        objective: The policy objective; None for cross-entropy.

    Example:
        >>> import torch
        >>> loss = loss_of("cross_entropy", {})
        >>> loss(torch.tensor([[-1.0, -2.0]]), {"weights": torch.tensor([[1.0, 0.5]])})
        tensor(2.)
    """

    name: str
    objective: PolicyObjective | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a datum must have, in addition to `target_tokens`."""
        return ("weights",) if self.objective is None else ("logprobs", "advantages")

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a datum may have."""
        return () if self.objective is None else ("weights",)

    def scored(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """True at the positions whose log-probabilities are computed, bool of the inputs' shape.

        A policy loss skips positions where the recorded log-probability and the advantage are both 0, or the weight is.
        These are the prompt's positions in the cookbook's data, so that samples of one prompt share its computation. Of
        the losses only `dro`, which has a term without advantage, depends on this.

        Args:
            inputs: See `__call__`.
        """
        if self.objective is None:
            return torch.ones_like(inputs["weights"], dtype=torch.bool)
        return (inputs["weights"] != 0) & ((inputs["logprobs"] != 0) | (inputs["advantages"] != 0))

    def __call__(self, logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the sum of the loss over all tokens.

        Args:
            logprobs: Log-probability of each target under the model, in nats, `[B, T]`.
            inputs: `weights`, and for a policy loss `logprobs` and `advantages`, `[B, T]` each, 0 where a row has no
                token.

        Returns:
            A scalar.
        """
        weights = inputs["weights"]
        if self.objective is None:
            return nll(logprobs, weights).sum()
        per_token = self.objective(logprobs, inputs["logprobs"], inputs["advantages"], self.scored(inputs))
        total, _ = aggregate(per_token, weights, "token_sum")
        return total


def loss_of(name: str, options: Mapping[str, float]) -> Loss:
    """The loss of a request.

    Args:
        name: Tinker's name of it.
        options: `loss_fn_config` of the request.

    Raises:
        RequestError: If the loss or an option is unknown, or an option is out of range.
    """
    if name not in OPTIONS:
        raise RequestError(
            f"loss_fn is {name!r}; this server has {quoted(OPTIONS)}. Compute another loss with forward_backward_custom"
        )
    if unknown := options.keys() - OPTIONS[name].keys():
        raise RequestError(
            f"loss_fn_config has {quoted(sorted(unknown))}, but {name} has the options {quoted(OPTIONS[name])}"
        )
    given = {**OPTIONS[name], **options}
    try:
        return Loss(name, _objective(name, given))
    except ValueError as error:
        raise RequestError(f"loss_fn_config is {given}: {error}") from None


def _objective(name: str, options: Mapping[str, float]) -> PolicyObjective | None:
    """The objective of a policy loss; None for cross-entropy."""
    if name == "cross_entropy":
        return None
    if name == "importance_sampling":
        return ImportanceSampling("token_sum")
    if name == "dro":
        return DRO(options["beta"], "token_sum")
    low, high = options["clip_low_threshold"], options["clip_high_threshold"]
    if name == "cispo":
        return CISPO(low, high, "token_sum")
    return ClippedSurrogate(1 - low, high - 1, aggregation="token_sum")
