"""Score heads: finds and initializes them, and provides the padding token that stock pooling skips."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.backbone import in_mode
from rlhf_lightning.models.loading import adapter_config, adapter_task, is_adapter, loading
from rlhf_lightning.models.lora import HEADS, base_of
from rlhf_lightning.models.packed_forward import FAILURES
from rlhf_lightning.models.sharding import run_unsharded
from rlhf_lightning.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def find_head(model: nn.Module) -> nn.Module:
    """The score head of a sequence classifier.

    Raises:
        ConfigError: If the model has no score head with a known name.
    """
    for name in HEADS:
        if isinstance(head := getattr(model, name, None), nn.Module):
            return head
    raise ConfigError(f"{type(model).__name__} has no known score head; set model.scorer to SequenceLogprob")


@torch.no_grad()
def check_head(model: "PreTrainedModel") -> None:
    """Check numerically that a classifier's output is its head at the last token, which is where scores are read.

    Encoders pool the first token or all of them, and some heads are more than a layer.

    Args:
        model: A Hugging Face sequence classifier, without a `PeftModel` around it.

    Raises:
        ConfigError: If it computes its output in another way, or has several labels.
    """
    embeddings, head = model.get_input_embeddings(), find_head(model)
    numbers = [number * 7919 % embeddings.weight.shape[0] for number in range(1, 13)]
    padding = model.config.get_text_config().pad_token_id
    ids = torch.tensor([[number for number in numbers if number != padding][:6]], device=embeddings.weight.device)

    dtype = next(head.parameters()).dtype
    # The head may be wider than the rest of the model (see `HeadScores`).
    cast = head.register_forward_pre_hook(lambda module, args: args[0].to(dtype))
    try:
        with in_mode(model, training=False), torch.autocast(ids.device.type, enabled=False):
            ours = run_unsharded(model, lambda: head(model.base_model(input_ids=ids)[0][:, -1]))
            theirs: Tensor = model(input_ids=ids).logits
        agree = ours.shape == theirs.shape == (1, 1) and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)
    except FAILURES:
        agree = False
    finally:
        cast.remove()
    if not agree:
        raise ConfigError(
            f"{type(model).__name__} is no reward model of a supported kind: its output is not one number, computed by "
            f"its head ({type(head).__name__}) from the last hidden state of the last token, as that of causal models "
            "is. Use a reward model made from a causal language model"
        )


def has_head(source: str, trust_remote_code: bool = False) -> bool:
    """True if a model folder or Hub id has a trained score head."""
    if is_adapter(source):
        return adapter_task(adapter_config(source), source) == "SEQ_CLS"
    from transformers import AutoConfig

    with loading(f"the model {source!r}"):
        names = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).architectures or []
        return any(name.endswith("ForSequenceClassification") for name in names)


def task_of(source: str) -> str:
    """`SEQ_CLS` for a saved reward model with a score head, `CAUSAL_LM` for any other model or adapter."""
    return "SEQ_CLS" if has_head(source) else "CAUSAL_LM"


def init_head(model: nn.Module) -> None:
    """Initialize the score head with standard deviation 1/√(hidden + 1) and no bias."""
    head = find_head(base_of(model))
    # peft keeps the head twice, the loaded and the trained one; both get the same weights.
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if len({layer.weight.shape for layer in layers}) != 1:
        raise ConfigError(
            f"the score head of {type(base_of(model)).__name__} ({type(head).__name__}) is not a linear layer; start "
            "from a causal language model"
        )
    nn.init.normal_(layers[0].weight, std=(layers[0].in_features + 1) ** -0.5)
    for layer in layers:
        layer.load_state_dict({"weight": layers[0].weight}, strict=False)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def pad_token(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> str:
    """A padding token that never ends a response; added to the tokenizer if it has none."""
    candidates = [tokenizer.pad_token, tokenizer.unk_token]
    special = sorted(tokenizer.added_tokens_decoder.items())
    candidates += [str(token) for _, token in special if token.special and "pad" in str(token).lower()]
    candidates += [str(token) for _, token in special if str(token) == "<|endoftext|>"]
    for token in candidates:
        if token and tokenizer.convert_tokens_to_ids(token) not in stop_token_ids:
            return token
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    log.info("the tokenizer has no padding token other than stop tokens; <|pad|> was added")
    return "<|pad|>"
