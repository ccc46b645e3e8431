"""A check after every sync of weights: trainer and engine score the same tokens, and must agree up to rounding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_lightning.distributed import run_on_leader
from rlhf_lightning.errors import SyncError
from rlhf_lightning.models.lora import adapter_disabled, base_of, is_adapted
from rlhf_lightning.models.token_logprobs import TokenLogprobs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ROWS, LENGTH = 4, 64
"""Number of rows that are scored, and tokens of a row."""
MOST_SCALE, DEVIATIONS = 0.02, 4.0
"""Largest error of an adapter's scale, and standard errors of its estimate on top of it."""


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that can score given tokens, so that its weights are checked after each sync.

    Attributes:
        dtype: The precision in which it computes.
    """

    dtype: torch.dtype

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Compute the log-probability of each token of each row, except the first, given those before it.

        Args:
            rows: Token ids of each row, of at least two tokens.

        Returns:
            Log-probabilities under the full softmax at temperature 1, in nats.
        """


@runtime_checkable
class SeveralCopies(ScoringEngine, Protocol):
    """A `ScoringEngine` with several copies of the weights, for example on several servers."""

    def score_each(self, rows: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """As `score`, with each copy.

        Args:
            rows: Token ids of each row, of at least two tokens.
        """


class Canary:
    """Compares the log-probabilities of fixed tokens, as the trainer and as an engine compute them.

    An engine with stale weights, with an adapter that is scaled differently or merged twice, or with another model
    gives other log-probabilities. Two numbers are checked:

    - The mean absolute difference must not exceed what rounding explains (`bound`).
    - If the policy has an adapter, its effect on the log-probabilities must be that in the trainer, up to a factor
      1 ± `MOST_SCALE`. The factor is estimated by least squares over the tokens, in which rounding averages out, so
      that in bfloat16 it notices much smaller changes than the mean difference.

    Args:
        engine: The engine.
        model: The policy.
        context: Number of positions of the model; None for no limit.
        max_tokens_per_batch: Number of tokens per forward pass, see `PackedForward`.

    Attributes:
        rows: The tokens: pseudo-random ids of the vocabulary, the same in every run, `[ROWS, LENGTH]`.

    Example:
        ```python
        canary = Canary(engine, model)
        engine.sync(PolicyWeights(model), version=3)
        canary.check(version=3)
        ```
    """

    def __init__(
        self,
        engine: ScoringEngine,
        model: "PreTrainedModel | PeftModel",
        context: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.engine, self.model, self.token_logprobs = engine, model, TokenLogprobs(model, max_tokens_per_batch)
        length = min(LENGTH, (context or LENGTH + 1) - 1)  # an engine may have to sample one more token
        vocabulary = self.token_logprobs.backbone.vocabulary
        self.rows = torch.randint(vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def check(self, version: int) -> float:
        """Score the tokens with trainer and engine, after a sync.

        All ranks must call this together, in the precision of training.

        Args:
            version: Version of the weights, for the message.

        Returns:
            The mean absolute difference, in nats per token.

        Raises:
            SyncError: If rounding does not explain it, or the adapter has another scale.
        """
        ours = self._scores()
        base = self._scores_of_base() if is_adapted(self.model) else None
        found = run_on_leader(self._scores_of_engine)
        return max(self._compare(ours, torch.tensor(scores).flatten(), base, version) for scores in found)

    def _scores_of_engine(self) -> list[list[list[float]]]:
        """The engine's log-probabilities of the tokens, for each of its copies of the weights."""
        rows = self.rows.tolist()
        engine = self.engine
        return engine.score_each(rows) if isinstance(engine, SeveralCopies) else [engine.score(rows)]

    def _compare(self, ours: Tensor, theirs: Tensor, base: Tensor | None, version: int) -> float:
        dtype = max(self.engine.dtype, compute_dtype(self.model), key=lambda one: torch.finfo(one).eps)
        gap, most = float((ours - theirs).abs().mean()), self.bound(ours, dtype)
        name = str(dtype).removeprefix("torch.")
        if not gap <= most:
            raise SyncError(
                f"sampler.engine: after the sync of version {version}, trainer and engine differ by {gap:.2g} nats per "
                f"token on {len(ours)} fixed tokens, but rounding in {name} explains at most {most:.2g}. The engine "
                "has other weights (older ones, another scale, another base) or computes another model; check "
                "engine.model and its options"
            )
        if base is not None:
            error, deviation = scale_error(ours, theirs, base)
            if abs(error) > MOST_SCALE + DEVIATIONS * deviation:
                raise SyncError(
                    f"sampler.engine: after the sync of version {version}, the adapter's effect in the engine is "
                    f"{1 + error:.3f} ± {deviation:.3f} times that in the trainer, on {len(ours)} fixed tokens. The "
                    "engine has an older adapter, or scales it differently; check engine.model and its options"
                )
        return gap

    def bound(self, logprobs: Tensor, dtype: torch.dtype) -> float:
        """Largest mean difference that rounding explains, in nats per token.

        √(2 · (layers + 1)) · (u + √width · u₃₂) · mean |log p|: each layer and the head add a rounding error, in
        trainer and engine, of the relative size u, the unit roundoff of `dtype`, and the sums over `width` products in
        float32 have errors of √width · u₃₂. The errors are independent, so their squares add up. SmolLM2-135M in vLLM
        is at 0.06 of the bound in float32, and at 0.17 in bfloat16.

        Args:
            logprobs: The trainer's log-probabilities, in nats.
            dtype: The coarser precision of trainer and engine.
        """
        config = base_of(self.model).config.get_text_config()
        unit, single = (torch.finfo(one).eps / 2 for one in (dtype, torch.float32))
        rounding: float = (2 * (config.num_hidden_layers + 1)) ** 0.5 * (unit + config.hidden_size**0.5 * single)
        return rounding * float(logprobs.abs().mean())

    def _scores(self) -> Tensor:
        """The trainer's log-probabilities of the tokens, `[ROWS * (LENGTH - 1)]`."""
        rows = self.rows.to(next(self.model.parameters()).device)
        loss_mask = torch.ones_like(rows)
        loss_mask[:, 0] = 0
        return self.token_logprobs(rows, loss_mask).logprobs[:, 1:].float().cpu().flatten()

    def _scores_of_base(self) -> Tensor:
        """The same without the adapter."""
        with adapter_disabled(self.model):
            return self._scores()


def scale_error(ours: Tensor, theirs: Tensor, base: Tensor) -> tuple[float, float]:
    """By how much an engine scales the effect of an adapter differently, by least squares.

    The slope, with an intercept, of `theirs - ours` over `ours - base`: 0 if both apply the same adapter, 0.1 if the
    engine scales it by 1.1, about 1 if it is merged twice, -1 if it is missing.

    Args:
        ours: The trainer's log-probabilities, `[N]`.
        theirs: The engine's, `[N]`.
        base: The trainer's without the adapter, `[N]`.

    Returns:
        The slope, and its standard error; infinite if the adapter has no effect.
    """
    effect, difference = (value.double() - value.double().mean() for value in (ours - base, theirs - ours))
    total = float(effect.square().sum())
    if total == 0:
        return 0.0, float("inf")
    slope = float((difference * effect).sum()) / total
    rest = float((difference - slope * effect).square().sum()) / (len(ours) - 2)
    return slope, (rest / total) ** 0.5


def compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """The precision in which the trainer computes here: that of autocast if it is on, or of the model's weights.

    On a GPU it is never finer than float16, whose precision TF32 has: kernels may use it for products in float32.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device.type, parameter.dtype
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if not dtype.is_floating_point:
        return torch.bfloat16  # QLoRA computes in it
    return torch.float16 if device == "cuda" and dtype.itemsize > 2 else dtype
