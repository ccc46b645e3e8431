"""The critic of PPO: what a policy may expect to earn, before each token it draws."""

import copy
import math
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.heads import task_of
from rlhf_lightning.models.loading import (
    check_source,
    check_vocabulary,
    disable_dropout,
    load_for_scoring,
    merge,
)
from rlhf_lightning.models.lora import LoRA, base_of, is_quantised
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.scoring import TokenScorer, state_values
from rlhf_lightning.models.sharding import through


class Critic(nn.Module):
    """A value head on a backbone of its own, or on the policy's.

    The head starts at zero: before it has learned, it expects nothing.

    Args:
        model: model folder or Hub id whose backbone it starts from, a reward model for example; by default the policy
            as the stage starts it.
        shared: the head stands on the policy's backbone, which then learns from both losses; less memory, and one
            forward for both.
        lora: train adapters of its own backbone in place of all its weights.
        learning_rate: of the critic; by default the optimizer's.
        clip: value clipping: half-width around the value at the time of drawing; null for none.
        coefficient: weight of the value loss.
        warmup_rounds: rounds at the beginning that train the critic alone.
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
            raise ConfigError("critic.shared stands on the policy's backbone: leave out critic.model and critic.lora")
        for name, value in (("coefficient", coefficient), ("clip", clip), ("learning_rate", learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"critic.{name} is {value}; it must be above 0")
        check_whole("critic.warmup_rounds", warmup_rounds, 0)
        self.source, self.shared, self.lora, self.learning_rate = model, shared, lora, learning_rate
        self.clip, self.coefficient, self.warmup_rounds = clip, coefficient, warmup_rounds

    def bind(self, policy: Any, tokenizer: Any, tokens: TokenScorer, max_tokens: int | None, dtype: str) -> None:
        """Take the policy as the stage starts it; called once, before it is trained.

        Raises:
            ConfigError: the critic's model has another vocabulary, or the policy cannot share its backbone.
        """
        config = base_of(policy).config.get_text_config()
        if self.shared:
            if not tokens.parts.apart:
                raise ConfigError(f"critic.shared: {type(base_of(policy)).__name__} hides its backbone's states")
            tokens.value_head = self._head(config.hidden_size, policy)
            return
        self.backbone = self._backbone(policy, dtype)
        check_vocabulary(self.backbone, tokenizer, "the critic")
        base = base_of(self.backbone)
        disable_dropout(base)
        self._head(base.config.get_text_config().hidden_size, policy)
        self.forward_pass = Forward(self.backbone, base, max_tokens)

    def _head(self, width: int, policy: Any) -> nn.Linear:
        self.head = nn.Linear(width, 1, device=next(policy.parameters()).device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        return self.head

    def _backbone(self, policy: Any, dtype: str) -> Any:
        if self.source is None:
            if is_quantised(policy):
                raise ConfigError(
                    "the critic starts from the policy, whose weights are in 4 bits (lora.quantize) and cannot be "
                    "trained: name critic.model, or set critic.shared"
                )
            model = copy.deepcopy(policy)
        else:
            folder = check_source(self.source)
            model = load_for_scoring(folder, task_of(folder), dtype)
        if hasattr(model, "peft_config"):
            model = merge(model)
        backbone = model.base_model.requires_grad_(self.lora is None)
        if self.lora is None:
            return backbone
        from peft import get_peft_model

        return get_peft_model(backbone, self.lora.config(backbone, "FEATURE_EXTRACTION"))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The value before each token whose mask is 1, `[B, T]`, 0 elsewhere; with a backbone of its own."""
        kept = mask[:, 1:] != 0
        if nothing := not kept.any():
            # One token, times 0: all ranks must go through the model, and every weight must get a gradient.
            kept[0, 0] = True
        hidden = through(self.backbone, self.forward_pass, input_ids, pad(kept, (0, 1)), prefix_lengths(mask))
        values = state_values(self.head, hidden.states) * (not nothing)
        return values.new_zeros(mask.shape).index_put((hidden.rows, hidden.columns + 1), values)
