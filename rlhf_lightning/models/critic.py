"""The critic of PPO: it estimates the reward to expect before each token that the policy samples."""

import copy
import math
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import (
    check_source,
    check_vocabulary,
    disable_dropout,
    load_for_scoring,
    merge,
)
from rlhf_lightning.models.lora import LoRA, base_of, is_adapted, is_quantized
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.models.token_logprobs import TokenLogprobs, state_values
from rlhf_lightning.settings import Settings


class Critic(Settings, nn.Module):
    """A value head on its own backbone or on the policy's.

    The head starts at zero, so an untrained critic predicts 0 everywhere.

    Args:
        model: Model folder or Hub id that its backbone starts from, for example a reward model; by default the policy
            as the stage starts it.
        shared: Put the head on the policy's backbone, which then learns from both losses. Takes less memory and one
            forward for both.
        lora: Train adapters of its own backbone instead of all its weights.
        learning_rate: Learning rate of the critic; by default the optimizer's.
        clip: Value clipping: largest step from the value at sampling time, in reward units; None for none.
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
        super().__init__()
        if shared and (model or lora):
            raise ConfigError("critic.shared uses the policy's backbone: leave out critic.model and critic.lora")
        for name, value in (("coefficient", coefficient), ("clip", clip), ("learning_rate", learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"critic.{name} is {value}; it must be above 0")
        check_whole("critic.warmup_rounds", warmup_rounds, 0)
        self.source, self.shared, self.lora, self.learning_rate = model, shared, lora, learning_rate
        self.clip, self.coefficient, self.warmup_rounds = clip, coefficient, warmup_rounds

    def bind(self, policy: Any, tokenizer: Any, tokens: TokenLogprobs, max_tokens: int | None, dtype: str) -> None:
        """Build the head, and the backbone if it is not shared; called once, before training.

        Args:
            policy: The policy as the stage starts it.
            tokenizer: The policy's tokenizer.
            tokens: The policy's `TokenLogprobs`, which computes the values of a shared critic.
            max_tokens: See `PackedForward`.
            dtype: Type of the backbone's weights, for example `float32`.

        Raises:
            ConfigError: If the critic's model has another vocabulary, or the policy cannot share its backbone.
        """
        config = base_of(policy).config.get_text_config()
        if self.shared:
            if not tokens.backbone.separable:
                raise ConfigError(
                    f"critic.shared: the hidden states of {type(base_of(policy)).__name__} cannot be computed without "
                    "its head"
                )
            tokens.value_head = self._head(config.hidden_size, policy)
            return
        self.backbone = self._backbone(policy, dtype)
        check_vocabulary(self.backbone, tokenizer, "the critic")
        base = base_of(self.backbone)
        disable_dropout(base)
        self._head(base.config.get_text_config().hidden_size, policy)
        self.packed_forward = PackedForward(self.backbone, base, max_tokens)

    def _head(self, width: int, policy: Any) -> nn.Linear:
        """Make the zero-initialized head, on the policy's device."""
        self.head = nn.Linear(width, 1, device=next(policy.parameters()).device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        return self.head

    def _backbone(self, policy: Any, dtype: str) -> Any:
        """Load or copy the backbone, trainable, with adapters if so configured."""
        if self.source is None:
            if is_quantized(policy):
                raise ConfigError(
                    "the critic starts from the policy, whose 4-bit weights (lora.quantize) cannot be trained: set "
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
        from peft import get_peft_model

        return get_peft_model(backbone, self.lora.config(backbone, "FEATURE_EXTRACTION"))

    def forward(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Values before each token whose mask is 1; only for a critic with its own backbone.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Values in reward units, `[B, T]`, 0 where the mask is 0.
        """
        kept = loss_mask[:, 1:] != 0
        if nothing := not kept.any():
            # Keep one token and multiply by 0: all ranks must run the model, and every weight must get a gradient.
            kept[0, 0] = True
        hidden = run_unsharded(
            self.backbone, self.packed_forward, input_ids, pad(kept, (0, 1)), prefix_lengths(loss_mask)
        )
        values = state_values(self.head, hidden.states) * (not nothing)
        return values.new_zeros(loss_mask.shape).index_put((hidden.rows, hidden.columns + 1), values)
