"""Interfaces of the preference losses: the scores that a loss takes, and the additional tensors it requests by name."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from rlhf_lightning.settings import Settings


class PreferenceLoss(Settings, ABC):
    """Base class of `PairLoss`, `LabelLoss` and `RankingLoss`.

    Example:
        >>> from rlhf_lightning.objectives.preference import BradleyTerry
        >>> BradleyTerry().keywords()
        {'margin': False, 'ties': False}
    """

    kind: ClassVar[str]
    """The kind of data that the loss is for: `pairs`, `labels` or `rankings`."""
    inputs: ClassVar[tuple[str, ...]]
    """Names of the positional arguments of `__call__`."""
    batch_coupled: bool = False
    """True if a row's loss depends on the other rows of the optimizer step."""
    score_type: str | None = None
    """The only scores that the loss is defined for: `mean_logprob` (mean log-probability per token in nats, beta 1), or
    `log_ratio` (beta · (log π − log π_ref)); None for any."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss of each row, `[B]`."""

    def keywords(self) -> dict[str, bool]:
        """Names of the additional tensors that `__call__` takes, each with True if it is required."""
        parameters = inspect.signature(self.__call__).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


class PairLoss(PreferenceLoss):
    """Base class of losses of preference pairs, for `PreferenceModule(loss=...)`.

    `__call__(chosen, rejected, *, ...)` takes the scores of both responses, `[B]` each, and returns the loss `[B]`.

    Example:
        >>> class SquaredHinge(PairLoss):
        ...     def __call__(self, chosen, rejected, *, margin=0.0):
        ...         return (1 - (chosen - rejected - margin)).clamp(min=0).square()
        >>> SquaredHinge().keywords()
        {'margin': False}
    """

    kind = "pairs"
    inputs = ("chosen", "rejected")


class LabelLoss(PreferenceLoss):
    """Base class of losses of single responses, each labeled 1 (desirable) or 0 (undesirable).

    `__call__(scores, labels, *, ...)` takes `[B]` each and returns the loss `[B]`. If it has the argument `mismatched`,
    it gets the score of each prompt with the response to another prompt, `[B]`.

    Example:
        >>> class SquaredError(LabelLoss):
        ...     def __call__(self, scores, labels):
        ...         return (scores.sigmoid() - labels).square()
        >>> SquaredError().kind
        'labels'
    """

    kind = "labels"
    inputs = ("scores", "labels")


class RankingLoss(PreferenceLoss):
    """Base class of losses of up to K ranked answers per prompt.

    `__call__(scores, ranks, answer_mask)` takes `[B, K]` each and returns the loss `[B]`. Rank 0 is the best. The mask
    is 1 where there is an answer, 0 where a prompt has fewer than K.

    Example:
        >>> class BestOfK(RankingLoss):
        ...     def __call__(self, scores, ranks, answer_mask):
        ...         scores = scores.masked_fill(answer_mask == 0, -torch.inf)
        ...         return scores.logsumexp(-1) - scores.gather(-1, ranks.argmin(-1, keepdim=True)).squeeze(-1)
        >>> BestOfK().inputs
        ('scores', 'ranks', 'answer_mask')
    """

    kind = "rankings"
    inputs = ("scores", "ranks", "answer_mask")
