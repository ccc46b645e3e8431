"""Preference models: a scorer and a pair loss."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.loading import disable_dropout, is_adapter
from rlhf_lightning.models.reward_model import Text, score_rows, score_texts
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, Scorer, init_head
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.metrics import PairAccuracy
from rlhf_lightning.objectives.preference import BradleyTerry, PairLoss


class PreferenceModule(RLHFModule):
    """Learns to score chosen responses above rejected ones.

    Args:
        model: see `RLHFModule`, which takes the further arguments.
        scorer: what number a response gets: `RewardHead` (default), `SequenceLogprob`, or `ImplicitReward` (DPO).
        loss: what to do with two numbers: a pair loss, Bradley-Terry by default.
        freeze_backbone: train the reward head only; the remedy where it over-fits.

    A batch is a dict: `input_ids`, `mask` `[2B, T]` and `lengths` `[2B]`, chosen rows first; `weights` `[B]`, and any
    tensor that the loss names as a keyword (`margin`). Logs `loss`, `accuracy`, `margin`, `chosen_score`,
    `rejected_score` under `train/`, `val/` and `test/`.
    """

    stage_kind = "preference"

    def __init__(
        self,
        model: Any,
        scorer: Scorer | None = None,
        loss: PairLoss | None = None,
        freeze_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.scorer = scorer or RewardHead()
        self.loss = loss or BradleyTerry()
        self.freeze_backbone = freeze_backbone
        if freeze_backbone and (self.lora or not isinstance(self.scorer, RewardHead)):
            raise ConfigError("model.freeze_backbone trains the reward head alone: it needs RewardHead and no lora")
        self.task = self.scorer.task
        self._loss_keywords = [
            name for name, p in inspect.signature(self.loss.__call__).parameters.items() if p.kind is p.KEYWORD_ONLY
        ]
        self.logged = nn.ModuleDict({f"{name}_": _pair_metrics() for name in ("train", "val", "test")})

    def build(self) -> None:
        if isinstance(self.scorer, RewardHead) and not self._has_head():
            init_head(self.model)
        disable_dropout(self.model)
        self.scorer.max_tokens = self.max_tokens_per_batch
        self.scorer.bind(self.model, self.tokenizer, self.renderer.stop_token_ids, self.fresh_adapter)
        self.frozen = self.scorer.frozen
        if self.freeze_backbone:
            self.model.base_model.requires_grad_(False)

    @property
    def forward_pass(self) -> Forward:
        return self.scorer.forward

    def _has_head(self) -> bool:
        source = self.start_source
        if isinstance(source, nn.Module):
            return True  # a classification model in hand: its head is the user's
        if is_adapter(str(source)):
            from peft import PeftConfig

            return PeftConfig.from_pretrained(source).task_type == "SEQ_CLS"
        from transformers import AutoConfig

        names = AutoConfig.from_pretrained(str(source)).architectures or []
        return any(name.endswith("ForSequenceClassification") for name in names)

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        total, pairs = self._pairs(batch, "train")
        return self.normalised(total, batch, "pairs", pairs)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._pairs(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._pairs(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, float]]:
        """The scores of each pair."""
        chosen, rejected = self.scorer(batch).chunk(2)
        kept = batch["weights"] > 0
        return [
            {"chosen_score": float(c), "rejected_score": float(r)}
            for c, r in zip(chosen[kept], rejected[kept], strict=True)
        ]

    def _pairs(self, batch: dict[str, Any], name: str) -> tuple[Tensor, float]:
        # One forward for both sides, so that they are computed alike.
        chosen, rejected = self.scorer(batch).chunk(2)
        weights = batch["weights"].to(chosen.dtype)
        extra = {key: batch[key].to(chosen.dtype) for key in self._loss_keywords if key in batch}
        losses = self.loss(chosen, rejected, **extra) * weights
        self._log(name, chosen.detach(), rejected.detach(), losses.detach(), weights)
        return losses.sum(), float(weights.sum())

    def _log(self, name: str, chosen: Tensor, rejected: Tensor, losses: Tensor, weights: Tensor) -> None:
        metrics: Any = self.logged[f"{name}_"]
        metrics["accuracy"](chosen, rejected, weights)
        for key, value in (
            ("loss", losses),
            ("margin", chosen - rejected),
            ("chosen_score", chosen),
            ("rejected_score", rejected),
        ):
            metrics[key](value, weight=weights)
        training = name == "train"
        for key, metric in metrics.items():
            bar = key in ("accuracy", "margin", "loss")
            self.log(f"{name}/{key}", metric, on_step=training, on_epoch=not training, prog_bar=bar)

    # -- scoring without a Trainer --------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        tools: Sequence[list[Any] | None] | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Score responses, `[N]`, on the module's device; see `models.reward_model.score_texts`."""
        self.configure_model()
        return score_texts(self.scorer, self.renderer, prompts, responses, tools, self.device, batch_size)

    def score_tokens(self, ids: list[list[int]], masks: list[list[int]], batch_size: int = 256) -> Tensor:
        """Score rows of tokens, `[N]`; a mask is 1 on the response."""
        self.configure_model()
        return score_rows(self.scorer, ids, masks, self.device, batch_size)

    def stage_facts(self) -> dict[str, Any]:
        facts = super().stage_facts()
        scorer = self.scorer.settings()
        if isinstance(self.scorer, ImplicitReward) and self.scorer.reference is None:
            start = str(facts["start"] or "")
            scorer["init_args"]["reference"] = str(Path(start).resolve()) if Path(start).is_dir() else start
        return {**facts, "scorer": scorer}


def _pair_metrics() -> nn.ModuleDict:
    means = {key: MeanMetric() for key in ("loss", "margin", "chosen_score", "rejected_score")}
    return nn.ModuleDict({"accuracy": PairAccuracy(), **means})
