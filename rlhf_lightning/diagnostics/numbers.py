"""Check for metrics that are not finite."""

import math

from rlhf_lightning.diagnostics.check import Check, Numbers
from rlhf_lightning.diagnostics.curves import Curves


class NotFinite(Check):
    """The reward, loss, KL or entropy of the last round is NaN or infinite.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> NotFinite().severity(Curves.of(loss=[math.nan]))
        1.0
    """

    name, watched = "not_finite", ("loss", "reward", "kl", "entropy")
    meaning = "A logged metric is not finite; the weights may already be damaged."
    remedy = (
        "Usual remedy: resume from an earlier checkpoint with a lower learning rate, gradient_clip_val, or bf16 or "
        "float32 instead of 16-mixed; --trainer.detect_anomaly true finds the operation that caused it."
    )

    def __init__(self) -> None:
        super().__init__(rounds=1)

    def severity(self, curves: Curves) -> float | None:
        return float(bool(self.numbers(curves)))

    def numbers(self, curves: Curves) -> Numbers:
        newest = {name: curves[name].recent[-1] for name in self.watched if name in curves}
        return {name: value for name, value in newest.items() if value is not None and not math.isfinite(value)}
