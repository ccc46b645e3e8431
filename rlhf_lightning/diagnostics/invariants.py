"""Invariants of the first update after a rollout, checked during training."""

import logging
import math
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.lora import base_of, is_quantized
from rlhf_lightning.models.precision import NARROW, logprob_rounding
from rlhf_lightning.modules.policy_rl import PolicyRLModule

if TYPE_CHECKING:
    from rlhf_lightning.types import RolloutBatch

log = logging.getLogger(__name__)
MAX_DISTANCE = 1e-4
MAX_CLIPPED = 0.05
"""In low precision. Rounding to bfloat16 alone clipped 1.1% of the tokens of SmolLM2-135M at a clip range of 0.2."""


class FirstStepInvariants(pl.Callback):
    """Checks that trainer and sampler agree before the first update of a round, when the importance ratio is 1.

    In float32 the largest |log ratio| must be at most 1e-4, and no token may be clipped. In lower precision the mean
    must be at most `models.precision.logprob_rounding`, and rounding may clip at most 5% of the tokens. Before the
    first update of the run, the policy equals the reference if that is the start of the stage, and their
    log-probabilities, both computed by the trainer, must agree within the same bounds.

    Args:
        strict: True to raise `UserError` instead of logging a warning (once per kind).

    Example:
        >>> FirstStepInvariants(strict=True).strict
        True
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._warned: set[str] = set()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: "RolloutBatch",
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, PolicyRLModule) or not pl_module.samples_rollouts or not batch.get("first"):
            return
        if not isinstance(outputs, dict) or "log_ratio_max" not in outputs:
            return
        rounding = logprob_bound(pl_module)
        self._ratio(trainer, rounding, *_worst(outputs["log_ratio_max"], outputs["log_ratio_mean"]))
        if "clip_fraction" in outputs:
            self._clipped(trainer, rounding, *_worst(outputs["clip_fraction"]))
        names = ("reference_distance_max", "reference_distance_mean")
        if _is_start(trainer, batch_idx) and _starts_as_reference(pl_module) and outputs.keys() >= {*names}:
            self._kl(trainer, rounding, *_worst(*(outputs[name] for name in names)))

    def _ratio(self, trainer: pl.Trainer, rounding: float | None, largest: float, mean: float) -> None:
        if _outside(rounding, largest, mean):
            self._tell(
                "ratio",
                f"step {trainer.global_step}: sampler and trainer disagree on newly sampled episodes: |log ratio| is "
                f"up to {largest:.2e}, {mean:.2e} on average (precision {trainer.precision}). Their log-probabilities "
                "should be equal within rounding; check for dropout, padding, or a model with an inexact KV cache.",
            )

    def _clipped(self, trainer: pl.Trainer, rounding: float | None, fraction: float) -> None:
        if fraction > (0.0 if rounding is None else MAX_CLIPPED):
            self._tell(
                "clip",
                f"step {trainer.global_step}: {fraction:.2%} of the tokens of newly sampled episodes are clipped "
                f"(precision {trainer.precision}). Before the first update the importance ratio is 1, so no token "
                "should be clipped; check whether sampler and trainer agree, and whether the clip range contains 1.",
            )

    def _kl(self, trainer: pl.Trainer, rounding: float | None, largest: float, mean: float) -> None:
        if _outside(rounding, largest, mean):
            self._tell(
                "kl",
                f"step {trainer.global_step}: the policy differs from its reference before any update: their "
                f"log-probabilities differ by up to {largest:.2e}, and by {mean:.2e} on average (precision "
                f"{trainer.precision}). The KL should be 0 here; check for dropout, and for a reference with different "
                "weights or precision.",
            )

    def _tell(self, kind: str, message: str) -> None:
        if kind in self._warned:
            return
        self._warned.add(kind)
        if self.strict:
            raise UserError(message)
        log.warning(message)


def _worst(*numbers: Tensor | float) -> list[float]:
    """The largest value of each number over all ranks (NaN if any is NaN), so that all ranks warn or stop together."""
    ranks = zip(*gather([float(number) for number in numbers]), strict=True)
    return [max(values, key=lambda value: (math.isnan(value), value)) for values in ranks]


def logprob_bound(module: PolicyRLModule) -> float | None:
    """Bound on the mean distance of log-probabilities in low precision; None in float32 or wider.

    Args:
        module: A module with a Trainer.
    """
    weights, precision = next(module.parameters()).dtype, str(module.trainer.precision)
    if weights not in NARROW and "16" not in precision and not is_quantized(module.model):
        return None
    dtype = torch.float16 if weights == torch.float16 or precision.startswith("16") else torch.bfloat16
    config = base_of(module.model).config.get_text_config()
    return logprob_rounding(dtype, config.num_hidden_layers, module.token_logprobs.backbone.wide_head)


def _outside(rounding: float | None, largest: float, mean: float) -> bool:
    # Not written with `>`, so that NaN counts as outside.
    return not (largest <= MAX_DISTANCE if rounding is None else mean <= rounding)


def _is_start(trainer: pl.Trainer, batch_idx: int) -> bool:
    """True if the batch was computed before the first update of the run."""
    return trainer.current_epoch == 0 and batch_idx < trainer.accumulate_grad_batches


def _starts_as_reference(module: PolicyRLModule) -> bool:
    """True if there is a reference, and it is the policy at the start of the stage."""
    return module.reference is not None and module.kl is not None and module.kl.reference is None
