"""Supervised fine-tuning."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lightning.data.prompts import PromptBatch, kept_prompts
from rlhf_lightning.errors import ConfigError, check_object
from rlhf_lightning.generation.sampler import Sampler
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
        ['nll', 'perplexity', 'bits_per_byte', 'tokens']
    """

    def __init__(self) -> None:
        super().__init__()
        self.nll, self.perplexity = MeanMetric(), Perplexity()
        self.bits_per_byte, self.tokens = BitsPerByte(), Count()


class SFTModule(RLHFModule[SFTBatch]):
    """Supervised fine-tuning: next-token prediction on the trained tokens of each row.

    A batch is a dict with `input_ids` and `loss_mask` (1 at trained tokens), both `[B, T]`, padded on the right. Logs
    `train/nll` and `val/nll` (nats per token), `val/perplexity`, `val/bits_per_byte`, and `train/tokens` (trained
    tokens of the epoch).

    Args:
        model: Folder, Hub id or object of the model to start from; see `RLHFModule` for further arguments.
        sampler: Samples the responses of `predict`; by default greedy, up to 128 tokens.

    Example:
        >>> module = SFTModule("Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> trainer.fit(module, SFTDataModule("conversations.jsonl"))  # doctest: +SKIP
    """

    stage_kind = "sft"
    on_bar = ("nll",)

    def __init__(self, model: Any, sampler: Sampler | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        check_object("model.sampler", sampler, "Sampler(max_tokens=64)")
        self.sampler = sampler or Sampler(temperature=0.0)
        self.step_numbers, self.train_tokens = StepNumbers(("nll",)), Count()
        self.heldout = nn.ModuleDict({name: HeldOutLikelihood() for name in ("val", "test")})

    def build(self) -> None:
        """Build what computes log-probabilities with the model."""
        self.token_logprobs = TokenLogprobs(self.model, self.max_tokens_per_batch)

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
        total, count = self._nll(batch)
        self.step_numbers.add(count, {"nll": (total, count)})
        self.train_tokens.update(count)
        self.log("train/tokens", self.train_tokens, on_step=False, on_epoch=True)
        return self.normalized(total, batch, "tokens", count)

    def _nll(self, batch: SFTBatch) -> tuple[Tensor, Tensor]:
        """Sum of the negative log-likelihoods of the trained tokens, in nats, and the number of these tokens."""
        loss_mask = batch["loss_mask"]
        total = nll(self.token_logprobs(batch["input_ids"], loss_mask).logprobs, loss_mask).sum()
        return total, loss_mask.sum()

    def why_empty(self) -> str:
        return (
            "No row of these steps has a trained token. Run `rlhf data check` to see the masks, which depend on "
            "data.train_on and data.max_length."
        )

    def on_predict_start(self) -> None:
        self.model_sampler = self.sampler.build(self.model, self.renderer)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Answer]:
        """Sample one response to each prompt."""
        return answers(self.model_sampler, self.renderer, kept_prompts(batch), seed=0)

    def evaluate(self, batch: SFTBatch, name: str) -> None:
        """Add a batch to the metrics of `HeldOutLikelihood`, and log them.

        Args:
            batch: The batch.
            name: `val` or `test`.
        """
        total, count = self._nll(batch)
        metrics = self.heldout[name]
        assert isinstance(metrics, HeldOutLikelihood)
        mean = total / count.clamp(min=1)
        metrics.nll.update(mean, weight=count)
        metrics.perplexity.update(mean, weight=count)
        metrics.tokens.update(count)
        if "text_bytes" in batch:
            metrics.bits_per_byte.update(total, batch["text_bytes"].sum())
            self.log(f"{name}/bits_per_byte", metrics.bits_per_byte)
        self.log(f"{name}/nll", metrics.nll, prog_bar=True)
        self.log(f"{name}/perplexity", metrics.perplexity)
        self.log(f"{name}/tokens", metrics.tokens)
