"""The critic of PPO: estimates the expected return before each token that the policy samples."""

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import (
    check_same_tokens,
    check_source,
    check_vocabulary,
    disable_dropout,
    load_for_scoring,
    merge,
)
from rlhf_lightning.models.lora import LoRA, base_of, is_adapted, is_quantized
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import kept_positions, prefix_lengths
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.token_logprobs import state_values
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Critic(Settings):
    """Settings of the critic: a value head on its own backbone or on the policy's.

    Args:
        model: Model folder or Hub id that its backbone starts from, for example a reward model; by default the policy
            at the start of the stage.
        shared: Put the head on the policy's backbone, which then learns from both losses. This takes less memory, and
            one forward pass for both.
        lora: Train adapters of its own backbone instead of all weights.
        learning_rate: Learning rate of the critic; by default that of the optimizer.
        clip: Value clipping: largest change from the value at sampling time, in reward units; None for no clipping.
        coefficient: Weight of the value loss.
        warmup_rounds: Number of first rounds that train only the critic.

    Raises:
        ConfigError: If `shared` is combined with `model` or `lora`, or a number is out of range.

    Example:
        >>> critic = Critic(learning_rate=1e-5, warmup_rounds=2)
        >>> critic.shared
        False
    """

    def __init__(
        self,
        model: str | None = None,
        shared: bool = False,
        lora: LoRA | None = None,
        learning_rate: float | None = None,
        clip: float | None = 0.2,
        coefficient: float = 0.1,
        warmup_rounds: int = 0,
    ) -> None:
        if shared and (model or lora):
            raise ConfigError("critic.shared uses the policy's backbone; leave out critic.model and critic.lora")
        for name, value in (("coefficient", coefficient), ("clip", clip), ("learning_rate", learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"critic.{name} is {value}; it must be above 0")
        check_whole("critic.warmup_rounds", warmup_rounds, 0)
        self.source, self.shared, self.lora, self.learning_rate = model, shared, lora, learning_rate
        self.clip, self.coefficient, self.warmup_rounds = clip, coefficient, warmup_rounds

    def build(
        self, policy: "PreTrainedModel | PeftModel", tokenizer: Tokenizer, max_tokens_per_batch: int | None, dtype: str
    ) -> "ValueModel":
        """Make the value model; called once, before training.

        Args:
            policy: The policy at the start of the stage.
            tokenizer: The policy's tokenizer.
            max_tokens_per_batch: See `PackedForward`.
            dtype: Data type of the backbone's weights, for example `float32`.

        Raises:
            ConfigError: If the critic's model has another vocabulary, or the policy's weights cannot be trained.
        """
        device = next(policy.parameters()).device
        if self.shared:
            return ValueModel(None, base_of(policy).config.get_text_config().hidden_size, device)
        if self.source is not None:
            check_same_tokens(self.source, tokenizer, "the critic")
        backbone = self._backbone(policy, dtype)
        check_vocabulary(backbone, tokenizer, "the critic")
        disable_dropout(base_of(backbone))
        return ValueModel(
            backbone, base_of(backbone).config.get_text_config().hidden_size, device, max_tokens_per_batch
        )

    def _backbone(self, policy: "PreTrainedModel | PeftModel", dtype: str) -> "PreTrainedModel | PeftModel":
        """Load or copy the trainable backbone, with adapters if configured."""
        if self.source is None:
            if is_quantized(policy):
                raise ConfigError(
                    "the critic starts from the policy, but its 4-bit weights (lora.quantize) cannot be trained; set "
                    "critic.model or critic.shared"
                )
            model = copy.deepcopy(policy)
        else:
            folder = check_source(self.source)
            model = load_for_scoring(folder, task_of(folder), dtype)
        if is_adapted(model):
            model = merge(model)
        backbone = model.base_model.requires_grad_(self.lora is None)
        if self.lora is None:
            return backbone
        return self.lora.add_to(backbone, "FEATURE_EXTRACTION")


class ValueModel(nn.Module):
    """A value head, and its backbone if it has its own.

    The head starts at zero, so an untrained critic predicts 0 everywhere. The values of a head on the policy's backbone
    are computed by `TokenLogprobs`, which gets the head.

    Args:
        backbone: Model that computes hidden states; None for that of the policy.
        width: Size of a hidden state.
        device: Device of the head.
        max_tokens_per_batch: Number of tokens computed at once, see `PackedForward`.

    Example:
        ```python
        value_model = Critic().build(policy, tokenizer, max_tokens_per_batch=None, dtype="float32")
        values = value_model(input_ids, loss_mask)  # [B, T]
        ```
    """

    def __init__(
        self,
        backbone: "PreTrainedModel | PeftModel | None",
        width: int,
        device: torch.device,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.packed_forward = (
            None if backbone is None else PackedForward(backbone, base_of(backbone), max_tokens_per_batch)
        )

    def forward(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Values before each token with mask 1. Needs a critic with its own backbone.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Values in reward units, `[B, T]`, 0 where the mask is 0.
        """
        assert self.backbone is not None, "values of a shared backbone come from TokenLogprobs"
        assert self.packed_forward is not None
        kept, counts = kept_positions(loss_mask)
        hidden = run_unsharded(
            self.backbone, self.packed_forward, input_ids, pad(kept, (0, 1)), prefix_lengths(loss_mask)
        )
        values = state_values(self.head, hidden.states) * counts
        return values.new_zeros(loss_mask.shape).index_put((hidden.rows, hidden.columns + 1), values)
