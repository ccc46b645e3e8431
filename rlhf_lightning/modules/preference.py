"""Preference models: a scorer and a loss of pairs, labels or rankings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.heads import has_head, init_head
from rlhf_lightning.models.loading import disable_dropout, read_stage
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.reward_model import Text, score_rows, score_texts
from rlhf_lightning.models.saving import relative_to_run
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, Scorer
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.hf_batches import check_preferences
from rlhf_lightning.modules.preference_metrics import Tables, step_names, step_sums
from rlhf_lightning.modules.preference_rows import SIDES, Named, name_rows, whole_step
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.modules.stored_reference import store_reference
from rlhf_lightning.modules.usage_checks import check_parts
from rlhf_lightning.objectives.preference import BradleyTerry, PreferenceLoss

log = logging.getLogger(__name__)


class PreferenceModule(RLHFModule):
    """Learns to score better responses above worse ones.

    Args:
        model: see `RLHFModule`, which takes the further arguments.
        scorer: what number a response gets: `RewardHead` (default), `SequenceLogprob`, or `ImplicitReward` (DPO).
        loss: what to do with the numbers: a loss of pairs (Bradley-Terry by default), labels or rankings.
        freeze_backbone: train the reward head only; the remedy where it over-fits.

    A batch is a dict: `input_ids` and `loss_mask` `[N, T]`, 1 on the response; and, where the loader knows them,
    `lengths` `[N]` and `weights` `[B]`, 0 for a row that only fills a rank's place. Of pairs N is 2B, chosen first;
    `margin` and `ties`, which may be left out, are `[B]`; of labels N is B and `labels` `[B]`; of rankings `ranking`
    and `ranks` are `[N]`. Logs `loss`, `accuracy`, `margin`, `chosen_score`, `rejected_score` and more
    (docs/preference.md) under `train/`, `val/` and `test/`.
    """

    stage_kind = "preference"
    on_bar = ("accuracy", "margin", "loss")

    def __init__(
        self,
        model: Any,
        scorer: Scorer | None = None,
        loss: PreferenceLoss | None = None,
        freeze_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_parts(scorer=(scorer, "ImplicitReward(beta=0.1)"), loss=(loss, "BradleyTerry()"))
        self.scorer = scorer or RewardHead()
        self.loss = loss or BradleyTerry()
        self.freeze_backbone = freeze_backbone
        if freeze_backbone and (self.lora or not isinstance(self.scorer, RewardHead)):
            raise ConfigError("model.freeze_backbone trains the reward head alone: it needs RewardHead and no lora")
        self.task = self.scorer.task
        check_fit(self.scorer, self.loss)
        self._wanted = self.loss.keywords()
        self.step_numbers = StepNumbers(step_names(self.loss.kind))
        self.tables = nn.ModuleDict({f"{name}_": Tables() for name in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what the loss cannot be trained with."""
        super().setup(stage)
        schedules = any(isinstance(c, GradientAccumulationScheduler) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if stage == "fit" and self.loss.batch_coupled and (self.trainer.accumulate_grad_batches != 1 or schedules):
            raise ConfigError(
                f"{type(self.loss).__name__} compares the rows of a whole optimizer step with each other, so they must "
                "be in one batch: set trainer.accumulate_grad_batches to 1 and raise data.batch_size "
                "(model.gradient_checkpointing keeps its memory small)"
            )

    def build(self) -> None:
        source = self.start_source
        # A model in hand is a classifier already: its head is the user's.
        if isinstance(self.scorer, RewardHead) and not (isinstance(source, nn.Module) or self._has_head()):
            init_head(self.model)
        disable_dropout(self.model)
        self._check_reference()
        self.scorer.max_tokens = self.max_tokens_per_batch
        self.scorer.bind(self.model, self.tokenizer, self.renderer.turn_end_ids, self.fresh_adapter)
        self.frozen = self.scorer.frozen
        if self.freeze_backbone:
            self.model.base_model.requires_grad_(False)

    def _has_head(self) -> bool:
        return has_head(str(self.start_source), bool(self.model_options.get("trust_remote_code")))

    def parts_to_split(self) -> list[Any]:
        return [self.model, *getattr(self.frozen, "parts_to_split", [])]

    @property
    def packed_forward(self) -> PackedForward:
        return self.scorer.packed_forward

    def heads(self) -> list[nn.Module]:
        head = getattr(self.scorer, "head", None)
        return [] if head is None else [head]

    def _check_reference(self) -> None:
        """The folder that `fit` writes must not be the one that scores are measured from; a trained one says what was.

        Raises:
            ConfigError: the run would overwrite its reference.
        """
        reference = getattr(self.scorer, "reference", None) or self.start_source
        if self._trainer is None or not isinstance(self.scorer, ImplicitReward) or isinstance(reference, nn.Module):
            return
        if self._trainer.state.fn != "fit":
            before = (read_stage(reference).get("scorer") or {}).get("init_args", {}).get("reference")
            if before and self.scorer.reference is None:
                log.warning(
                    "%s is measured from itself, so every score is 0; it was trained against %s: set "
                    "model.scorer.init_args.reference to that",
                    reference,
                    before,
                )
        elif Path(reference).resolve() == (Path(self._trainer.default_root_dir) / "model").resolve():
            raise ConfigError(
                f"{reference} is the reference, and the folder that this run would write its model to: name another "
                "trainer.default_root_dir"
            )

    # -- steps ----------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        check_preferences(batch, self.loss.kind)
        return batch

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if isinstance(self.scorer, ImplicitReward) and self.scorer.store:
            store_reference(self.scorer, self.trainer, self.device)
            if not isinstance(self.start_source, nn.Module):
                self.scorer.release()
                self.frozen = self.scorer.frozen

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        named = self._named(batch)
        weights = self._weights(batch, named)
        if self.loss.batch_coupled:
            kept = weights > 0
            there = {name: value[kept] for name, value in named.items()}
            rows = whole_step(there)
            total = self._losses(rows).sum()
            losses = (total.detach() / len(next(iter(rows.values())))).expand(len(weights))
            # A rank whose row only fills its place must have a gradient for every weight as well.
            total = total + 0.0 * sum(named[name].sum() for name in self.loss.inputs[:2] if named[name].requires_grad)
        else:
            losses = self._losses(named)
            total = (losses * weights.to(losses.dtype)).sum()
        sums = step_sums(self.loss.kind, {**named, "loss": losses}, weights)
        self.step_numbers.add((weights != 0).sum() * (batch["loss_mask"] != 0).any(), sums)
        return self.normalized(total, batch, self.loss.kind, float(weights.sum()))

    def why_empty(self) -> str:
        return "Every row of these steps has weight 0, or no token of a response: see the batches' weights and masks."

    def _named(self, batch: dict[str, Any]) -> Named:
        """What is known of each row."""
        if self.loss.kind == "pairs" and getattr(self.scorer, "tail_weight", 1.0) != 1:
            shared = torch.stack(batch["loss_mask"].sum(-1).chunk(2)).amin(0)
            batch = {**batch, "shared_lengths": torch.cat([shared, shared])}
        # One forward for all sides, so that they are computed alike.
        named = self._scored(batch)
        if "mismatched" in batch and "mismatched" in self._wanted:
            with torch.no_grad():
                named["mismatched"] = self.scorer(batch["mismatched"])
        own = self._wanted.keys() & batch.keys() - named.keys()  # columns of a loader of the user's
        return named | {
            name: batch[name].to(batch["loss_mask"].dtype) for name in own if isinstance(batch[name], Tensor)
        }

    def _scored(self, batch: dict[str, Any]) -> Named:
        """Scores of each row; it is as long as its response reaches, where the batch does not say it."""
        if "lengths" not in batch:
            places = torch.arange(1, batch["loss_mask"].shape[1] + 1, device=batch["loss_mask"].device)
            batch = {**batch, "lengths": (places * (batch["loss_mask"] != 0)).amax(-1)}
        return name_rows(self.loss.kind, self.scorer.detailed(batch), batch)

    def _weights(self, batch: dict[str, Any], rows: Named) -> Tensor:
        """1 for each row `[B]` that is one; a loader of the user's has no rows that only fill a rank's place."""
        first = rows[self.loss.inputs[0]]
        return batch["weights"] if "weights" in batch else first.new_ones(len(first))

    def _losses(self, rows: Named) -> Tensor:
        """The loss of each row, `[B]`."""
        known = {**rows, "beta": getattr(self.scorer, "beta", None)}
        if missing := [name for name, required in self._wanted.items() if required and name not in known]:
            raise ConfigError(f"{type(self.loss).__name__} needs {missing[0]!r}, which the batch does not have")
        named = {name: known[name] for name in self._wanted if name in known}
        return self.loss(*(rows[name] for name in self.loss.inputs), **named)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], name: str) -> None:
        named = self._named(batch)
        table: Any = self.tables[f"{name}_"]
        if self.loss.kind == "rankings":
            named = {**named, "loss": self._losses(named)}
        table.update(named, self._weights(batch, named), batch.get("category"), batch.get("category_names"))

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, name: str) -> None:
        """Numbers of all rows at once: exact over uneven batches and ranks, of losses that couple rows too."""
        table: Any = self.tables[f"{name}_"]
        rows = table.compute()
        table.reset()
        if not rows:
            return
        if "loss" not in rows:
            rows["loss"] = self._losses({key: value for key, value in rows.items() if key != "category"})
        self.last_report = table.report(self.loss.kind, rows)
        for key, value in self.last_report["numbers"].items():
            self.log(f"{name}/{key}", value, prog_bar=key in self.on_bar, sync_dist=self.trainer.world_size > 1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """The scores of each row."""
        named = self._scored(batch)
        kept = self._weights(batch, named) > 0
        if self.loss.kind == "pairs":
            sides = [named[side][kept].tolist() for side in SIDES]
            return [{"chosen_score": c, "rejected_score": r} for c, r in zip(*sides, strict=True)]
        if self.loss.kind == "labels":
            numbers = zip(named["scores"][kept].tolist(), named["labels"][kept].tolist(), strict=True)
            return [{"score": score, "label": int(label)} for score, label in numbers]
        there = named["loss_mask"].bool()
        return [{"scores": named["scores"][i][there[i]].tolist()} for i in kept.nonzero()[:, 0].tolist()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores of rows of tokens; the model is loaded if it is not yet.

        A reward head reads the last token of a row. Scorers of log-probabilities count every token but the first as
        part of the response; to score responses to prompts use `score` or `score_tokens`.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: 1 at tokens, 0 at padding, `[B, T]`; all ones by default.

        Returns:
            Scores, `[B]`.
        """
        self.configure_model()
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[mask != 0].tolist() for ids, mask in zip(input_ids, there, strict=True)]
        batch = pad_tokens(rows, [[0, *[1] * (len(row) - 1)] for row in rows], pad_id=0)
        scores: Tensor = self.scorer({name: value.to(input_ids.device) for name, value in batch.items()})
        return scores

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
        if isinstance(self.scorer, ImplicitReward):
            start = str(self.scorer.reference or facts["start"] or "")
            scorer["init_args"]["reference"] = str(Path(start).resolve()) if Path(start).is_dir() else start
            if self._trainer is not None:
                facts["reference"] = relative_to_run(start, Path(self._trainer.default_root_dir) / "model")
        return {**facts, "scorer": scorer}


def check_fit(scorer: Scorer, loss: PreferenceLoss) -> None:
    """Raise `ConfigError` where a loss is not defined for a scorer's numbers, or needs what it does not compute."""
    names = f"model.loss {type(loss).__name__} and model.scorer {type(scorer).__name__}"
    lacking = {"lengths", "logps", "reference_scores", "kl", "beta"} - set(scorer.provides)
    lacking |= {f"{side}_{name}" for side in SIDES for name in lacking}
    if missing := [name for name, required in loss.keywords().items() if required and name in lacking]:
        raise ConfigError(f"{names} do not go together: the loss needs {missing[0]!r}, which this scorer does not give")
    if loss.scores == "log_ratio" and "reference_scores" not in scorer.provides:
        raise ConfigError(f"{names} do not go together: the loss is of log-ratios to a reference, use ImplicitReward")
    mean = getattr(scorer, "length_normalized", False) and getattr(scorer, "beta", None) == 1
    if loss.scores == "mean_logprob" and not (mean and "reference_scores" not in scorer.provides):
        raise ConfigError(
            f"{names} do not go together: the loss is of mean log-probabilities, use SequenceLogprob with "
            "length_normalized: true and beta: 1"
        )
    if getattr(scorer, "tail_weight", 1.0) != 1 and loss.kind != "pairs":
        raise ConfigError(f"scorer.tail_weight compares the two responses of a pair, and the loss is of {loss.kind}")
