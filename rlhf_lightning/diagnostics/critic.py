"""Check of the critic."""

from rlhf_lightning.diagnostics.check import Check, Numbers
from rlhf_lightning.diagnostics.curves import Curves


class UselessCritic(Check):
    """The critic explains none of the variance of the returns.

    Args:
        rounds: Number of consecutive rounds with an explained variance of at most 0.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> UselessCritic(rounds=1).severity(Curves.of(explained_variance=[-0.5]))
        1.5
    """

    name, watched = "useless_critic", ("explained_variance",)
    meaning = (
        "The critic's values explain none of the variance of the returns; advantages are noisier than without a critic."
    )
    remedy = (
        "Usual remedy: critic.warmup_rounds, a higher learning rate for the critic, a critic initialized from the "
        "reward model, or group advantages instead of a critic."
    )

    def __init__(self, rounds: int = 10) -> None:
        super().__init__(rounds)

    def severity(self, curves: Curves) -> float | None:
        values = curves.last("explained_variance", self.rounds)
        return 1.0 - max(values) if len(values) == self.rounds else None

    def numbers(self, curves: Curves) -> Numbers:
        return {"explained_variance": max(curves["explained_variance"].last(self.rounds))}
