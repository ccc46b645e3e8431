"""Detects two common failures of preference learning, and writes the reliability curve of validation to a file."""

import logging
import math
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rlhf_lightning.files import write_json
from rlhf_lightning.modules.preference import PreferenceModule

if TYPE_CHECKING:
    from rlhf_lightning.modules.preference_metrics import Report
    from rlhf_lightning.types import PreferenceBatch, StateDict

log = logging.getLogger(__name__)


class PreferenceWatch(pl.Callback):
    """Warns once if chosen responses become less likely, and once if training and validation metrics diverge.

    Args:
        window: Number of optimizer steps that are averaged into one point.
        falls: Number of consecutive decreases of these points before the warning about chosen responses.

    Example:
        >>> PreferenceWatch(window=20).falls
        4
    """

    def __init__(self, window: int = 10, falls: int = 4) -> None:
        self.window, self.falls = window, falls
        self._recent: list[float] = []
        self._points: deque[float] = deque(maxlen=falls + 1)
        self._train: list[tuple[float, float]] = []
        self._best = math.inf
        self._warned: set[str] = set()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: "PreferenceBatch",
        batch_idx: int,
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # the optimizer step is not complete
        metrics = trainer.callback_metrics
        if "train/accuracy" in metrics and "train/loss" in metrics:
            self._train.append((float(metrics["train/accuracy"]), float(metrics["train/loss"])))
        # Relative to the reference if there is one, because log-probabilities depend on the lengths of a step's rows.
        change = metrics.get("train/chosen_score") if "train/kl" in metrics else metrics.get("train/chosen_logps")
        if change is not None:
            self._recent.append(float(change))
        if len(self._recent) == self.window:
            self._points.append(sum(self._recent) / self.window)
            self._recent.clear()
            self._check_chosen(trainer)

    def _check_chosen(self, trainer: pl.Trainer) -> None:
        points = list(self._points)
        falling = len(points) > self.falls and all(b < a for a, b in pairwise(points))
        if not falling or "chosen" in self._warned:
            return
        self._warned.add("chosen")
        log.warning(
            "step %d: chosen responses have become less likely over %d steps (%.4g to %.4g); the loss falls only "
            "because rejected responses become less likely even faster. Usual remedy: a lower learning rate, a larger "
            "beta, an SFT term (WeightedSum with SFT), or NCA or APOZero as the loss.",
            trainer.global_step,
            self.window * self.falls,
            points[0],
            points[-1],
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        report = pl_module.last_report if isinstance(pl_module, PreferenceModule) else None
        if report and trainer.is_global_zero:
            write_json(
                Path(trainer.default_root_dir) / "preference_report.json", {"step": trainer.global_step, **report}
            )
        self._check_gap(trainer, report)

    def _check_gap(self, trainer: pl.Trainer, report: "Report | None") -> None:
        metrics, train = trainer.callback_metrics, self._train
        if not train or report is None or "val/accuracy" not in metrics:
            return
        accuracy, loss = (sum(values) / len(train) for values in zip(*train, strict=True))
        val_accuracy, val_loss = float(metrics["val/accuracy"]), float(metrics["val/loss"])
        best, self._best = self._best, min(self._best, val_loss)
        self._train = []
        pairs = sum(part["pairs"] for part in report.get("reliability", [])) or 1.0
        error = math.sqrt(val_accuracy * (1 - val_accuracy) / pairs)
        # The gap must be significant for this number of pairs, and the loss must have passed its minimum; otherwise the
        # model is still learning.
        if accuracy - val_accuracy <= 2 * error or val_loss <= best or "gap" in self._warned:
            return
        self._warned.add("gap")
        log.warning(
            "step %d: the model overfits. Accuracy is %.3f in training and %.3f in validation (%d pairs, standard "
            "error %.3f), loss is %.3f in training and %.3f in validation, and the validation loss is above its best "
            "of %.3f. Usual remedy: model.freeze_backbone: true (RewardHead without lora), a lower learning rate, "
            "fewer epochs, or --export best with a ModelCheckpoint.",
            trainer.global_step,
            accuracy,
            val_accuracy,
            int(pairs),
            error,
            loss,
            val_loss,
            best,
        )

    def state_dict(self) -> "StateDict":
        return {
            "recent": list(self._recent),
            "points": list(self._points),
            "train": [list(pair) for pair in self._train],
            "best": self._best,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: "StateDict") -> None:
        self._recent, self._best = list(state_dict["recent"]), state_dict["best"]
        self._points = deque(state_dict["points"], maxlen=self.falls + 1)
        self._train = [(a, b) for a, b in state_dict["train"]]
        self._warned = set(state_dict["warned"])
