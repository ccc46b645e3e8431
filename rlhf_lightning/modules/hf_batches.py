"""Converts batches of other dataloaders into the modules' format, or raises a clear error.

The modules need right-padded rows with positions counted from 0, and a mask of the trained tokens. Batches of Hugging
Face collators (left padding, `labels` with -100, `attention_mask`, other dtypes) are converted.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_lightning.types import Tokenizer

Columns = dict[str, Any]
"""A batch of any dataloader, by name. The types of a user's batch are unknown until it is checked."""
IGNORED = -100  # Hugging Face's label of tokens that are not trained on
_PER_TOKEN = ("loss_mask", "old_logprobs", "advantages", "reference_logprobs", "sampling_logprobs", "values", "returns")
_NOT_USED = ("inputs_embeds", "pixel_values", "input_features", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_OTHER_NAMES = {
    "loss_mask": ("completion_mask", "assistant_masks", "assistant_mask", "response_mask", "loss_scale"),
    "weights": ("sample_weight", "sample_weights", "loss_weights"),
    "reference_logprobs": ("ref_chosen_logps", "ref_rejected_logps", "ref_logprobs", "ref_log_prob"),
}
"""Names that other libraries use for the keys that the modules read."""
_SEE = "; see docs/reuse.md"


def fitted(batch: Columns, tokenizer: "Tokenizer | None", rows: int | None = None) -> Columns:
    """Convert a batch into the modules' format.

    Batches of the package's own loaders, and batches without `input_ids`, are returned unchanged.

    Args:
        batch: The batch.
        tokenizer: Tells which tokens are padding if there is no attention_mask.
        rows: Number of rows of the model's embedding matrix.

    Returns:
        The batch in the modules' format.

    Raises:
        ConfigError: If the batch is malformed, or the module would not train on exactly the tokens that it specifies.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch or "denominators" in batch:
        return batch
    batch = dict(batch)
    if unused := [name for name in _NOT_USED if batch.get(name) is not None]:
        raise ConfigError(
            f"the batch has {unused[0]}, which is not supported. Give each example one row of token ids{_SEE}"
        )
    ids = batch["input_ids"] = _ids(batch["input_ids"], rows)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape == ids.shape:
        batch["loss_mask"] = _of_labels(labels, ids, batch.get("loss_mask"))
        del batch["labels"]
    if "loss_mask" not in batch:
        return batch  # the module reports the missing key
    loss_mask = batch["loss_mask"] = _mask(batch["loss_mask"], ids)
    for name in _PER_TOKEN:
        shape = tuple(batch[name].shape) if isinstance(batch.get(name), Tensor) else ids.shape
        if shape != ids.shape and not (name == "advantages" and shape == (len(ids), 1)):
            raise ConfigError(f"{name} of the batch has shape {list(shape)}, but input_ids has {list(ids.shape)}{_SEE}")
    attention = batch.pop("attention_mask", None)
    positions = batch.pop("position_ids", None)
    if attention is None:
        _check_padding(ids, loss_mask, tokenizer)
        _check_positions(positions, torch.ones_like(ids))
    else:
        attention = _attention(attention, ids)
        if bool(((loss_mask != 0) & ~attention).any()):
            raise ConfigError(
                f"loss_mask of the batch is 1 where attention_mask is 0, so padding would be trained on{_SEE}"
            )
        _check_positions(positions, attention.long())
        _move_padding_right(batch, attention)
    _check_lengths(batch)
    old = batch.get("old_logprobs")
    if isinstance(old, Tensor) and bool(((old > 1e-3) & (batch["loss_mask"] != 0).to(old.device)).any()):
        raise ConfigError(
            f"old_logprobs of the batch has values up to {float(old.max()):.4g}; log-probabilities must not be above "
            f"0{_SEE}"
        )
    batch["loss_mask"] = batch["loss_mask"].clone()
    batch["loss_mask"][:, 0] = 0  # the first token has no context to be predicted from
    return batch


def refuse_other_names(batch: Columns, read: Container[str] = ()) -> None:
    """Raise `ConfigError` if a batch uses another library's name for a key, which would otherwise be ignored silently.

    Args:
        batch: The batch.
        read: Other keys that the module reads.
    """
    if not isinstance(batch, Mapping) or "denominators" in batch:
        return
    for name, others in _OTHER_NAMES.items():
        if found := [other for other in others if batch.get(other) is not None and other not in read]:
            raise ConfigError(f"the batch has {found[0]}, which is not used; rename it to {name}{_SEE}")


def check_preferences(batch: Columns, kind: str) -> None:
    """Raise `ConfigError` if a preference batch of another dataloader is malformed.

    Args:
        batch: The batch.
        kind: What an example is: `pairs` (chosen rows, then rejected ones), `labels` or `rankings`.
    """
    if not isinstance(batch, Mapping) or "denominators" in batch or not isinstance(batch.get("input_ids"), Tensor):
        return
    rows = len(batch["input_ids"])
    if kind == "pairs" and rows % 2:
        raise ConfigError(
            f"the batch has {rows} rows; for pairs, it must have the chosen rows, followed by as many rejected "
            f"rows{_SEE}"
        )
    wanted: dict[str, int | None] = {"weights": rows}
    if kind == "pairs":
        wanted = dict.fromkeys(("margin", "ties", "weights"), rows // 2)
    elif kind == "labels":
        wanted["labels"] = rows
    else:
        wanted = {"ranking": rows, "ranks": rows, "weights": None}
    for name, count in wanted.items():
        value = batch.get(name)
        if value is None and name in ("labels", "ranking", "ranks"):
            raise ConfigError(f"the batch has no {name}; it needs one number for each of its {rows} rows{_SEE}")
        if value is not None and (
            not isinstance(value, Tensor) or value.dim() != 1 or len(value) != (count or len(value))
        ):
            shown = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ConfigError(f"{name} of the batch is {shown}; it must be a tensor with one number per example{_SEE}")
    if kind == "labels" and not bool(((batch["labels"] == 0) | (batch["labels"] == 1)).all()):
        raise ConfigError(f"labels of the batch must be 0 (undesirable) or 1 (desirable){_SEE}")
    if kind == "rankings":
        steps = batch["ranking"].diff()
        if int(batch["ranking"][0]) != 0 or not bool(((steps == 0) | (steps == 1)).all()):
            raise ConfigError(
                "ranking of the batch must number the examples from 0, with the rows of each example next to each "
                f"other{_SEE}"
            )


def _ids(ids: Tensor, rows: int | None) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        shown = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"input_ids of the batch is {shown}; it must be an integer tensor of shape [B, T]{_SEE}")
    if not len(ids):
        raise ConfigError(f"the batch has no rows{_SEE}")
    ids = ids.long()
    if ids.numel() and (int(ids.min()) < 0 or (rows is not None and int(ids.max()) >= rows)):
        raise ConfigError(
            f"input_ids of the batch has values from {int(ids.min())} to {int(ids.max())}, but the model has {rows} "
            "embeddings"
        )
    return ids


def _of_labels(labels: Tensor, ids: Tensor, loss_mask: Tensor | None) -> Tensor:
    """The loss mask of Hugging Face `labels`, which are aligned with the tokens, not shifted."""
    trained = labels != IGNORED
    if bool((labels.long() != ids)[trained].any()):
        raise ConfigError(
            f"labels of the batch differ from input_ids where they are not {IGNORED}; a label must be the token at "
            f"the same position (which is predicted from the tokens before it), not shifted by one{_SEE}"
        )
    if loss_mask is not None and not (
        isinstance(loss_mask, Tensor)
        and loss_mask.shape == trained.shape
        and torch.equal((loss_mask != 0)[:, 1:].cpu(), trained[:, 1:].cpu())
    ):
        raise ConfigError(f"labels and loss_mask of the batch contradict each other; leave one out{_SEE}")
    return trained


def _shaped(name: str, value: Tensor, ids: Tensor) -> Tensor:
    """Return a tensor after checking that it has one number per token; raises `ConfigError`."""
    if not isinstance(value, Tensor) or value.shape != ids.shape:
        shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{name} of the batch is {shown}, but input_ids has shape {list(ids.shape)}{_SEE}")
    return value


def _mask(loss_mask: Tensor, ids: Tensor) -> Tensor:
    loss_mask = _shaped("loss_mask", loss_mask, ids)
    wide = loss_mask if loss_mask.dtype == torch.float64 else loss_mask.float()
    if not bool(((wide == 0) | (wide == 1)).all()):
        raise ConfigError(
            f"loss_mask of the batch has values other than 0 and 1; it must be 1 for trained tokens, else 0{_SEE}"
        )
    return wide


def _attention(attention: Tensor, ids: Tensor) -> Tensor:
    """True at tokens, False at padding, bool `[B, T]`; a row's tokens are contiguous, with padding on either side."""
    attention = _shaped("attention_mask", attention, ids)
    is_token = attention != 0
    begins = is_token & ~torch.nn.functional.pad(is_token, (1, 0))[:, :-1]
    if bool((begins.sum(-1) > 1).any()) or not bool(((attention == 0) | (attention == 1)).all()):
        raise ConfigError(
            "attention_mask of the batch has gaps, or values other than 0 and 1 (is it packed?). Give each example one "
            f"row, with padding before or after it; the modules pack rows themselves{_SEE}"
        )
    return is_token


def _move_padding_right(batch: Columns, is_token: Tensor) -> None:
    """Move padding from the left to the right, in every tensor with one value per token."""
    first, width = is_token.int().argmax(-1, keepdim=True), is_token.shape[1]
    if not bool(first.any()):
        return
    columns = (torch.arange(width, device=is_token.device) + first) % width
    for name in ("input_ids", *_PER_TOKEN):
        if isinstance(batch.get(name), Tensor) and batch[name].shape == is_token.shape:
            batch[name] = batch[name].gather(1, columns.to(batch[name].device))


def _check_padding(ids: Tensor, loss_mask: Tensor, tokenizer: "Tokenizer | None") -> None:
    """Without an attention_mask, reject padding before a row, and padding after a row that would be trained on."""
    if tokenizer is None or (pad := tokenizer.pad_token_id) is None or not ids.numel():
        return
    # A single padding token may be the start of the text, if it is also the bos_token, or an eos_token used as one.
    few = 2 if pad == tokenizer.bos_token_id or (pad == tokenizer.eos_token_id and not tokenizer.bos_token) else 1
    begins = (ids[:, :few] == pad).all(-1) & (loss_mask != 0).any(-1)  # an untrained row may be all padding
    if ids.shape[1] > few and bool(begins.any()):
        raise ConfigError(f"rows of the batch begin with padding, but there is no attention_mask; add one{_SEE}")
    padded = (ids == pad).flip(1).long().cumprod(1).flip(1)  # the padding after each row
    trained = (padded * (loss_mask != 0)).sum(-1)
    if bool((trained > (1 if pad == tokenizer.eos_token_id else 0)).any()):
        raise ConfigError(
            f"loss_mask of the batch is 1 on the padding after a row, so padding would be trained on{_SEE}"
        )


def _check_positions(positions: Tensor | None, is_token: Tensor) -> None:
    if positions is None:
        return
    wanted = is_token.cumsum(-1) - 1
    same = isinstance(positions, Tensor) and positions.shape[-2:] == is_token.shape
    if not same or bool((positions.to(wanted.device) != wanted)[..., is_token.bool()].any()):
        raise ConfigError(
            "position_ids of the batch do not count each row's tokens from 0 (is it packed?). Give each example one "
            f"row; the modules pack rows themselves{_SEE}"
        )


def _check_lengths(batch: Columns) -> None:
    lengths, loss_mask = batch.get("lengths"), batch["loss_mask"]
    if lengths is None:
        return
    width = loss_mask.shape[1]
    ends = (torch.arange(1, width + 1, device=loss_mask.device) * (loss_mask != 0)).amax(-1)
    if lengths.shape != ends.shape or bool((lengths.to(ends.device) < ends).any()) or int(lengths.max()) > width:
        raise ConfigError(
            f"lengths of the batch must include all trained tokens, and must not exceed the width of the rows{_SEE}"
        )
    batch["lengths"] = lengths.long()
