"""Supervised fine-tuning, and distillation on the tokens of the data."""

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lightning.data.prompts import PromptBatch, kept_prompts
from rlhf_lightning.errors import ConfigError, check_object
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.distillation import Distillation
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.hf_batches import Columns
from rlhf_lightning.modules.metrics import BitsPerByte, Count, Perplexity
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.objectives.supervised import nll
from rlhf_lightning.rollout.collector import answers
from rlhf_lightning.types import Answer, SFTBatch


class HeldOutLikelihood(nn.Module):
    """Metrics of held-out rows, exact over batches and ranks.

    Example:
        >>> [name for name, metric in HeldOutLikelihood().named_children()]
        ['nll', 'perplexity', 'bits_per_byte', 'tokens', 'divergence']
    """

    def __init__(self) -> None:
        super().__init__()
        self.nll, self.perplexity = MeanMetric(), Perplexity()
        self.bits_per_byte, self.tokens = BitsPerByte(), Count()
        self.divergence = MeanMetric()


class _Sums(NamedTuple):
    """Sums over the trained tokens of a batch.

    Attributes:
        nll: Negative log-likelihoods, in nats.
        divergence: Divergences from the teacher, in nats; None without a teacher.
        tokens: Number of trained tokens.
    """

    nll: Tensor
    divergence: Tensor | None
    tokens: Tensor


class SFTModule(RLHFModule[SFTBatch]):
    """Supervised fine-tuning: next-token prediction on the trained tokens of each row.

    A batch is a dict with `input_ids` and `loss_mask` (1 at trained tokens), both `[B, T]`, padded on the right. Logs
    `train/nll` and `val/nll` (nats per token), `val/perplexity`, `val/bits_per_byte`, and `train/tokens` (trained
    tokens of the epoch); with distillation also `train/divergence` and `val/divergence` (nats per token).

    Args:
        model: Folder, Hub id or object of the model to start from; see `RLHFModule` for further arguments.
        sampler: Samples the responses of `predict`; by default greedy, up to 128 tokens.
        distillation: Learn a teacher's distributions at the trained tokens (off-policy distillation). The loss is
            `distillation.coefficient` times the divergence, plus `nll_coefficient` times the negative log-likelihood.
        nll_coefficient: Weight of the negative log-likelihood beside distillation; 0 by default. Only with
            `distillation`.

    Raises:
        ConfigError: If a setting is out of range or has no effect.

    Example:
        >>> module = SFTModule("Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> trainer.fit(module, SFTDataModule("conversations.jsonl"))  # doctest: +SKIP
    """

    stage_kind = "sft"
    on_bar = ("nll", "divergence")

    def __init__(
        self,
        model: Any,
        sampler: Sampler | None = None,
        distillation: Distillation | None = None,
        nll_coefficient: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_object("model.sampler", sampler, "Sampler(max_tokens=64)")
        check_object("model.distillation", distillation, "Distillation('Qwen/Qwen3-8B')")
        if distillation is None and nll_coefficient is not None:
            raise ConfigError("model.nll_coefficient has no effect without model.distillation; leave it out")
        if nll_coefficient is not None and not 0 <= nll_coefficient < math.inf:
            raise ConfigError(f"model.nll_coefficient is {nll_coefficient}; it must be finite and not negative")
        if distillation is not None and distillation.on_policy_fraction < 1:
            raise ConfigError(
                f"distillation.on_policy_fraction is {distillation.on_policy_fraction}, but SFT trains only on the "
                "answers of the data; leave it out, or use a policy stage"
            )
        self.sampler = sampler or Sampler(temperature=0.0)
        self.distillation = distillation
        self.nll_coefficient = (nll_coefficient or 0.0) if distillation else 1.0
        self.step_numbers, self.train_tokens = StepNumbers(("nll", "divergence")), Count()
        self.heldout = nn.ModuleDict({name: HeldOutLikelihood() for name in ("val", "test")})

    def build(self) -> None:
        """Build what computes log-probabilities with the model."""
        self.token_logprobs = TokenLogprobs(self.model, self.max_tokens_per_batch)
        if self.distillation is not None:
            self.load_teacher(self.distillation, temperature=1.0)

    @property
    def packed_forward(self) -> PackedForward:
        """The packed forward pass of the trained model."""
        return self.token_logprobs.packed_forward

    def on_before_batch_transfer(self, batch: Columns, dataloader_idx: int) -> Columns:
        if isinstance(batch, dict) and "denominators" not in batch and batch.get("weights") is not None:
            raise ConfigError(
                "the batch has weights, which SFT does not support. Set loss_mask to 0 for rows that must not be "
                "trained on, and repeat rows that must count more than once"
            )
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a micro-batch, a scalar: its share of the mean over the step's trained tokens."""
        sums = self._sums(batch)
        numbers = {"nll": (sums.nll, sums.tokens)}
        loss = self.nll_coefficient * sums.nll
        if self.distillation is not None and sums.divergence is not None:
            numbers["divergence"] = sums.divergence, sums.tokens
            loss = loss + self.distillation.coefficient * sums.divergence
        self.step_numbers.add(sums.tokens, numbers)
        self.train_tokens.update(sums.tokens)
        self.log("train/tokens", self.train_tokens, on_step=False, on_epoch=True)
        return self.normalized(loss, batch, "tokens", sums.tokens)

    def _sums(self, batch: SFTBatch) -> _Sums:
        ids, loss_mask = batch["input_ids"], batch["loss_mask"]
        comparison = None if self.teacher is None else self.teacher(ids, loss_mask)
        found = self.token_logprobs(ids, loss_mask, teacher=comparison)
        divergence = None if found.divergence is None else (found.divergence * loss_mask).sum()
        return _Sums(nll(found.logprobs, loss_mask).sum(), divergence, loss_mask.sum())

    def why_empty(self) -> str:
        return (
            "No row of these steps has a trained token. Run `rlhf data check` to see the masks, which depend on "
            "data.train_on and data.max_length."
        )

    def on_predict_start(self) -> None:
        self.model_sampler = self.sampler.build(self.model, self.renderer)
        with self.trainer.precision_plugin.forward_context():
            self.model_sampler.sync(self.global_step)  # for an engine with its own copy of the weights

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Answer]:
        """Sample one response to each prompt."""
        return answers(self.model_sampler, self.renderer, kept_prompts(batch), seed=0)

    def evaluate(self, batch: SFTBatch, name: str) -> None:
        """Add a batch to the metrics of `HeldOutLikelihood`, and log them.

        Args:
            batch: The batch.
            name: `val` or `test`.
        """
        total, divergence, count = self._sums(batch)
        metrics = self.heldout[name]
        assert isinstance(metrics, HeldOutLikelihood)
        mean = total / count.clamp(min=1)
        if divergence is not None:
            metrics.divergence.update(divergence / count.clamp(min=1), weight=count)
            self.log(f"{name}/divergence", metrics.divergence)
        metrics.nll.update(mean, weight=count)
        metrics.perplexity.update(mean, weight=count)
        metrics.tokens.update(count)
        if "text_bytes" in batch:
            metrics.bits_per_byte.update(total, batch["text_bytes"].sum())
            self.log(f"{name}/bits_per_byte", metrics.bits_per_byte)
        self.log(f"{name}/nll", metrics.nll, prog_bar=True)
        self.log(f"{name}/perplexity", metrics.perplexity)
        self.log(f"{name}/tokens", metrics.tokens)
