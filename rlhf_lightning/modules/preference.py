"""Preference learning: a scorer, and a loss on pairs, labels or rankings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError, check_object
from rlhf_lightning.files import real_path
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.heads import has_head, init_head
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.reference import Reference, load_reference
from rlhf_lightning.models.reward_model import Text, score_rows, score_texts
from rlhf_lightning.models.saving import relative_to_run
from rlhf_lightning.models.scorers import LoadedModel, ModelScorer, RewardHead, Scorer, padded, recorded_scorer
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.hf_batches import Columns, check_preferences
from rlhf_lightning.modules.preference_metrics import Report, Tables, step_names, step_sums
from rlhf_lightning.modules.preference_rows import SIDES, Named, name_rows, whole_step
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.modules.stored_reference import store_reference
from rlhf_lightning.modules.trainer_state import callbacks_of
from rlhf_lightning.objectives.preference import BradleyTerry, PreferenceLoss
from rlhf_lightning.types import PreferenceBatch

if TYPE_CHECKING:
    from rlhf_lightning.types import JSON, Row, ToolSchema

log = logging.getLogger(__name__)


class PreferenceModule(RLHFModule[PreferenceBatch]):
    """Learns to score preferred responses above others.

    A batch is a dict with `input_ids` and `loss_mask` `[N, T]` (1 on the response), and optionally `lengths` `[N]` and
    `weights` `[B]` (0 for a filler that keeps the ranks in step). For pairs, N is 2B with the chosen rows first, and
    `margin` and `ties` `[B]` are optional. For labels, N is B, with `labels` `[B]`. For rankings, `ranking` and `ranks`
    are `[N]`.

    Logs `loss`, `accuracy`, `margin`, `chosen_score`, `rejected_score` and more (docs/preference.md) under `train/`,
    `val/` and `test/`.

    Args:
        model: Folder, Hub id or object of the model to start from; see `RLHFModule` for further arguments.
        scorer: Scores a response: `RewardHead` (default), `SequenceLogprob`, or `ImplicitReward` (DPO).
        loss: A loss on pairs (Bradley-Terry by default), labels or rankings.
        freeze_backbone: Train only the reward head, for example if training all weights overfits.

    Raises:
        ConfigError: If scorer and loss are incompatible.

    Example:
        >>> from rlhf_lightning.models.scorers import ImplicitReward
        >>> dpo = PreferenceModule("Qwen/Qwen3-0.6B", scorer=ImplicitReward(beta=0.1))  # doctest: +SKIP
    """

    stage_kind = "preference"
    on_bar = ("accuracy", "margin", "loss")
    model_scorer: ModelScorer
    """The scorer with its model; set once the model is loaded."""

    def __init__(
        self,
        model: Any,
        scorer: Scorer | None = None,
        loss: PreferenceLoss | None = None,
        freeze_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_object("model.scorer", scorer, "ImplicitReward(beta=0.1)")
        check_object("model.loss", loss, "BradleyTerry()")
        self.scorer = scorer or RewardHead()
        self.loss = loss or BradleyTerry()
        self.freeze_backbone = freeze_backbone
        if freeze_backbone and (self.lora or "head" not in self.scorer.requires):
            raise ConfigError(
                "model.freeze_backbone trains only the reward head. Use the scorer RewardHead, and leave out model.lora"
            )
        self.task = self.scorer.task
        check_fit(self.scorer, self.loss)
        self.reference: Reference | None = None
        self._wanted = self.loss.keywords()
        self.step_numbers = StepNumbers(step_names(self.loss.kind))
        self.last_report: Report | None = None
        self.tables = nn.ModuleDict({f"{name}_": Tables() for name in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Check, before the model is loaded, that the Trainer's settings suit the loss."""
        super().setup(stage)
        schedules = any(isinstance(c, GradientAccumulationScheduler) for c in callbacks_of(self.trainer))
        if stage == "fit" and self.loss.batch_coupled and (self.trainer.accumulate_grad_batches != 1 or schedules):
            raise ConfigError(
                f"{type(self.loss).__name__} compares the rows of a whole optimizer step with each other, so they must "
                "be in one batch. Set trainer.accumulate_grad_batches to 1 and raise data.batch_size "
                "(model.gradient_checkpointing saves memory)"
            )

    def build(self) -> None:
        """Build the scorer, and the reference if the scorer needs one."""
        source = self.start_source
        # A model passed as an object is a classifier already and keeps its head.
        if "head" in self.scorer.requires and not (isinstance(source, nn.Module) or self._has_head()):
            init_head(self.model)
        disable_dropout(self.model)
        budget = self.max_tokens_per_batch
        if "reference" in self.scorer.requires:
            self._check_reference()
            self.reference = self._make_reference()
            self.reference_copy = self.reference.copy
        loaded = LoadedModel(self.model, self.tokenizer, self.renderer.turn_end_ids, budget, self.reference)
        self.model_scorer = self.scorer.build(loaded)
        if self.freeze_backbone:
            self.model.base_model.requires_grad_(False)

    def _has_head(self) -> bool:
        return has_head(str(self.start_source), bool(self.model_options.get("trust_remote_code")))

    def _make_reference(self) -> Reference:
        """The policy at the start of the stage, or the model that `scorer.reference` names; raises `ConfigError`."""
        if self.scorer.reference is None:
            return Reference(self.model, self.fresh_adapter, self.max_tokens_per_batch)
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return load_reference(self.scorer.reference, self.tokenizer, dtype, self.max_tokens_per_batch)

    def modules_to_shard(self) -> list[nn.Module]:
        """The trained model, and a reference with its own weights."""
        return [self.model, *(self.reference.modules_to_shard if self.reference else [])]

    @property
    def packed_forward(self) -> PackedForward:
        """The packed forward pass of the scorer's model."""
        return self.model_scorer.packed_forward

    def heads(self) -> list[nn.Module]:
        """The reward head, which stays in float32 at any precision."""
        # Also called after a failure within `build`, when there is no head yet.
        head = self.model_scorer.head if hasattr(self, "model_scorer") else None
        return [] if head is None else [head]

    def _check_reference(self) -> None:
        """Check the reference of the scorer.

        `fit` must not overwrite the reference model's folder. A trained folder records its reference in `stage.json`; a
        warning names it if the model would be compared with itself.

        Raises:
            ConfigError: If the run would overwrite its reference.
        """
        reference = self.scorer.reference or self.start_source
        if self._trainer is None or isinstance(reference, nn.Module):
            return
        if self._trainer.state.fn != "fit":
            trained_with = recorded_scorer(reference)
            before = trained_with and trained_with["init_args"].get("reference")
            if before and self.scorer.reference is None:
                log.warning(
                    "%s is compared with itself, so every score is 0. It was trained against the reference %s: set "
                    "model.scorer.init_args.reference to that model",
                    reference,
                    before,
                )
        elif real_path(reference) == real_path(Path(self._trainer.default_root_dir) / "model"):
            raise ConfigError(
                f"{reference} is the reference, but this run would write its model to the same folder. Choose another "
                "trainer.default_root_dir"
            )

    # -- steps ----------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Columns, dataloader_idx: int) -> Columns:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        check_preferences(batch, self.loss.kind)
        return batch

    def on_fit_start(self) -> None:
        """With `scorer.store`, compute the reference's log-probabilities of all rows once, and free its memory."""
        super().on_fit_start()
        if self.scorer.store and self.reference is not None:
            store_reference(self.model_scorer, self.reference, self.trainer, self.device)
            # A reference that is the policy with another adapter takes no memory.
            if self.reference.copy is not None and not isinstance(self.start_source, nn.Module):
                self.model_scorer.release_reference()
                self.reference = self.reference_copy = None

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a micro-batch, a scalar with gradient."""
        named = self._named(batch)
        weights = self._weights(batch, named)
        if self.loss.batch_coupled:
            # The loss of all rows of the optimizer step; each rank has the gradient of its own rows.
            kept = weights > 0
            rows = whole_step({name: value[kept] for name, value in named.items()})
            total = self._losses(rows).sum()
            losses = (total.detach() / len(next(iter(rows.values())))).expand(len(weights))
            # A rank with only filler rows must still have a gradient for every weight.
            total = total + 0.0 * sum(named[name].sum() for name in self.loss.inputs[:2] if named[name].requires_grad)
        else:
            losses = self._losses(named)
            total = (losses * weights.to(losses.dtype)).sum()
        sums = step_sums(self.loss.kind, {**named, "loss": losses}, weights)
        self.step_numbers.add((weights != 0).sum() * (batch["loss_mask"] != 0).any(), sums)
        return self.normalized(total, batch, self.loss.kind, float(weights.sum()))

    def why_empty(self) -> str:
        return "Every row of these steps has weight 0 or no response token. Check weights and loss_mask of the batches."

    def _named(self, batch: PreferenceBatch) -> Named:
        """Values of each example that the loss may need, by name, `[B]`; for rankings `[B, K]`."""
        if self.loss.kind == "pairs" and self.scorer.tail_weight != 1:
            shared = torch.stack(batch["loss_mask"].sum(-1).chunk(2)).amin(0)
            batch = {**batch, "shared_lengths": torch.cat([shared, shared])}
        # One forward pass for all sides, so that they are computed in the same way.
        named = self._scored(batch)
        if "mismatched" in batch and "mismatched" in self._wanted:
            with torch.no_grad():
                named["mismatched"] = self.model_scorer(batch["mismatched"])
        own = self._wanted.keys() & batch.keys() - named.keys()  # columns of the user's own dataloader
        dtype = batch["loss_mask"].dtype
        return named | {n: value.to(dtype) for n, value in batch.items() if n in own and isinstance(value, Tensor)}

    def _scored(self, batch: PreferenceBatch) -> Named:
        """Score each row, see `name_rows`. Without `lengths` in the batch, a row ends with its last response token."""
        if "lengths" not in batch:
            ends = torch.arange(1, batch["loss_mask"].shape[1] + 1, device=batch["loss_mask"].device)
            batch = {**batch, "lengths": (ends * (batch["loss_mask"] != 0)).amax(-1)}
        return name_rows(self.loss.kind, self.model_scorer.detailed(batch), batch)

    def _weights(self, batch: PreferenceBatch, rows: Named) -> Tensor:
        """Weight of each example, `[B]`; all 1 if the batch has no weights."""
        first = rows[self.loss.inputs[0]]
        return batch["weights"] if "weights" in batch else first.new_ones(len(first))

    def _losses(self, rows: Named) -> Tensor:
        """Loss of each example, `[B]`."""
        known = {**rows, "beta": self.scorer.beta}
        if missing := [name for name, required in self._wanted.items() if required and name not in known]:
            raise ConfigError(f"{type(self.loss).__name__} needs {missing[0]!r}, which is missing in the batch")
        named = {name: known[name] for name in self._wanted if name in known}
        return self.loss(*(rows[name] for name in self.loss.inputs), **named)

    def evaluate(self, batch: PreferenceBatch, name: str) -> None:
        """Collect the scores of a batch in `tables`; they are reported at the end of the epoch.

        Args:
            batch: The batch.
            name: `val` or `test`.
        """
        named = self._named(batch)
        table = self.tables[f"{name}_"]
        assert isinstance(table, Tables)
        if self.loss.kind == "rankings":
            named = {**named, "loss": self._losses(named)}
        table.update(named, self._weights(batch, named), batch.get("category"), batch.get("category_names"))

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, name: str) -> None:
        """Log metrics that are computed on all rows at once.

        They are exact over uneven batches and ranks, also for losses that couple rows.
        """
        table = self.tables[f"{name}_"]
        assert isinstance(table, Tables)
        rows = table.compute()
        table.reset()
        if not rows:
            return
        if "loss" not in rows:
            rows["loss"] = self._losses({key: value for key, value in rows.items() if key != "category"})
        self.last_report = table.report(self.loss.kind, rows)
        for key, value in self.last_report["numbers"].items():
            self.log(f"{name}/{key}", value, prog_bar=key in self.on_bar, sync_dist=self.trainer.world_size > 1)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> "list[Row]":
        """Compute the scores of each pair, labeled response or ranking, without those of weight 0."""
        named = self._scored(batch)
        kept = self._weights(batch, named) > 0
        if self.loss.kind == "pairs":
            sides = [named[side][kept].tolist() for side in SIDES]
            return [{"chosen_score": c, "rejected_score": r} for c, r in zip(*sides, strict=True)]
        if self.loss.kind == "labels":
            numbers = zip(named["scores"][kept].tolist(), named["labels"][kept].tolist(), strict=True)
            return [{"score": score, "label": int(label)} for score, label in numbers]
        is_answer = named["answer_mask"].bool()
        return [{"scores": named["scores"][i][is_answer[i]].tolist()} for i in kept.nonzero()[:, 0].tolist()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score rows of tokens. Loads the model if it is not loaded yet.

        A reward head reads the last token of a row. Scorers based on log-probabilities treat every token but the first
        as response; to score responses to prompts, use `score` or `score_tokens`.

        Args:
            input_ids: Token ids, `[B, T]`, padded on either side.
            attention_mask: 1 at tokens, 0 at padding, `[B, T]`; all ones by default.

        Returns:
            Scores, `[B]`.
        """
        self.configure_model()
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[mask != 0].tolist() for ids, mask in zip(input_ids, attention, strict=True)]
        masks = [[0, *[1] * (len(row) - 1)] for row in rows]
        return self.model_scorer(padded(rows, masks, input_ids.device))

    # -- scoring without a Trainer --------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        tools: "Sequence[list[ToolSchema] | None] | None" = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Score responses, on the module's device; see `models.reward_model.score_texts`.

        Args:
            prompts: Prompts, `N` of them.
            responses: Responses, `N` of them.
            tools: Tool schemas of each prompt.
            batch_size: Number of rows per forward pass.

        Returns:
            Scores, `[N]`.
        """
        self.configure_model()
        return score_texts(self.model_scorer, self.renderer, prompts, responses, tools, self.device, batch_size)

    def score_tokens(self, ids: list[list[int]], masks: list[list[int]], batch_size: int = 256) -> Tensor:
        """Score rows of tokens.

        Args:
            ids: Token ids of each row.
            masks: 1 on the response, 0 elsewhere, for each row.
            batch_size: Number of rows per forward pass.

        Returns:
            Scores, `[N]`.
        """
        self.configure_model()
        return score_rows(self.model_scorer, ids, masks, self.device, batch_size)

    def stage_facts(self) -> "dict[str, JSON]":
        facts = super().stage_facts()
        scorer = self.scorer.settings()
        if "reference" in self.scorer.requires:
            start = model_folder(str(self.scorer.reference or facts["start"] or ""))
            scorer["init_args"]["reference"] = str(Path(start).resolve()) if Path(start).is_dir() else start
            if self._trainer is not None:
                facts["reference"] = relative_to_run(start, Path(self._trainer.default_root_dir) / "model")
        return {**facts, "scorer": {"name": scorer["name"], "init_args": scorer["init_args"]}}


def check_fit(scorer: Scorer, loss: PreferenceLoss) -> None:
    """Check that a loss and a scorer are compatible.

    Args:
        scorer: The scorer.
        loss: The loss.

    Raises:
        ConfigError: If the loss is not defined for the scorer's scores, or needs values that the scorer does not
            compute.
    """
    names = f"model.loss {type(loss).__name__} and model.scorer {type(scorer).__name__}"
    lacking = {"lengths", "logps", "reference_scores", "kl", "beta"} - set(scorer.provides)
    lacking |= {f"{side}_{name}" for side in SIDES for name in lacking}
    if missing := [name for name, required in loss.keywords().items() if required and name in lacking]:
        raise ConfigError(
            f"{names} are incompatible: the loss needs {missing[0]!r}, which this scorer does not provide"
        )
    if loss.score_type == "log_ratio" and "reference_scores" not in scorer.provides:
        raise ConfigError(f"{names} are incompatible: the loss needs log-ratios to a reference. Use ImplicitReward")
    mean = scorer.length_normalized and scorer.beta == 1
    if loss.score_type == "mean_logprob" and not (mean and "reference_scores" not in scorer.provides):
        raise ConfigError(
            f"{names} are incompatible: the loss needs mean log-probabilities. Use SequenceLogprob with "
            "length_normalized: true and beta: 1"
        )
    if scorer.tail_weight != 1 and loss.kind != "pairs":
        raise ConfigError(f"scorer.tail_weight compares the two responses of a pair, but the loss is for {loss.kind}")
