"""What a loss of preference learning is: which scores it takes, and which further tensors it wants by name."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor


class PreferenceLoss(ABC):
    """What to do with scores; see `PairLoss`, `LabelLoss` and `RankingLoss`."""

    kind: ClassVar[str]
    """`pairs`, `labels` or `rankings`: the rows that it learns from."""
    inputs: ClassVar[tuple[str, ...]]
    """What `__call__` takes first."""
    batch_coupled: bool = False
    """Whether a row's loss depends on the other rows of its optimizer step."""
    scores: ClassVar[str | None] = None
    """Where set, the scores that it is defined for: `mean_logprob` (a token, beta 1) or `log_ratio`."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Loss of each row, `[B]`."""

    def keywords(self) -> dict[str, bool]:
        """The further tensors that it takes by name, and whether it cannot do without."""
        parameters = inspect.signature(self.__call__).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


class PairLoss(PreferenceLoss):
    """A loss of pairs with its options, for `PreferenceModule(loss=...)`: `__call__(chosen, rejected, *, …)`."""

    kind = "pairs"
    inputs = ("chosen", "rejected")


class LabelLoss(PreferenceLoss):
    """A loss of single responses, each with a label (1 desirable, 0 not): `__call__(scores, labels, *, …)`."""

    kind = "labels"
    inputs = ("scores", "labels")
    mismatched: bool = False
    """Whether it takes `mismatched`: the scores `[B]` of each prompt with the response to another one."""


class RankingLoss(PreferenceLoss):
    """A loss of K ranked answers to each prompt: `__call__(scores, ranks, mask)`, `[B, K]` each."""

    kind = "rankings"
    inputs = ("scores", "ranks", "loss_mask")
