"""A sequence classifier of transformers, with the probability of one of its labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.tokenizers import added_tokens, load_tokenizer
from rlhf_lightning.errors import ConfigError, quoted
from rlhf_lightning.models.loading import check_source, check_vocabulary, is_adapter, loading
from rlhf_lightning.untrusted import check_files


class TextClassifier(nn.Module):
    """A sequence classifier, frozen. It gives the probability of a label, as the pipeline of transformers does.

    The probability is the softmax over the labels; the sigmoid of the label's own output if the config says
    `multi_label_classification`, or if there is only one label. A text that is longer than the classifier's context is
    classified in windows that overlap by a quarter, and the largest probability counts.

    Args:
        source: Folder or Hub id, with a tokenizer.
        label: Name of the label, as `id2label` in its config has it.
        dtype: Data type of the weights.

    Raises:
        ConfigError: If the classifier cannot be loaded, lacks weights (its head would be random), or has no such label.

    Example:
        >>> classifier = TextClassifier("classifiers/toxicity", label="toxic")  # doctest: +SKIP
        >>> classifier.probabilities(["You are wonderful."])  # doctest: +SKIP
        [0.002]
    """

    def __init__(self, source: str, label: str, dtype: str = "float32") -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        folder = check_source(source)
        if is_adapter(folder):
            raise ConfigError(f"{source} is an adapter; merge it into its base, and give that folder")
        check_files(folder, weights=True)
        with loading(f"the classifier {source!r}"):
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), trust_remote_code=False, output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"{source} lacks weights of a classifier (for example {missing[0]}), which would be random; give the "
                "folder of a trained sequence classifier"
            )
        config = self.model.config
        labels = {str(name): int(index) for index, name in config.id2label.items()}
        if config.problem_type == "regression":
            raise ConfigError(f"{source} predicts a number (problem_type: regression), not labels; use a classifier")
        if label not in labels:
            raise ConfigError(f"the classifier {source} has no label {label!r}; its labels are {quoted(labels)}")
        self.index = labels[label]
        self.sigmoid = config.problem_type == "multi_label_classification" or len(labels) == 1
        self.tokenizer = load_tokenizer(folder)
        check_vocabulary(self.model, self.tokenizer, f"the classifier {source}")
        self._before, self._after = added_tokens(self.tokenizer)
        self.window = self._context() - len(self._before) - len(self._after)
        """Number of tokens of a text that are classified together."""
        self.model.requires_grad_(False).eval()

    def _context(self) -> int:
        """Largest number of tokens of a row."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 512
        for name, part in self.model.named_modules():
            # RoBERTa and its kin number positions from the padding id + 1 on.
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
                longest -= part.padding_idx + 1
        return min(longest, int(min(getattr(self.tokenizer, "model_max_length", longest), longest)))

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], batch_size: int = 16) -> list[float]:
        """Probability of the label for each text; 0 for texts without a token.

        Args:
            texts: The texts, `N` of them.
            batch_size: Number of windows that are classified at once.
        """
        rows, owners = [], []
        for owner, text in enumerate(texts):
            text = text.encode(errors="replace").decode()  # tokenizers refuse unpaired surrogates
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            step = max(1, self.window - self.window // 4)
            for start in range(0, max(1, len(ids) - self.window // 4), step) if ids else ():
                rows.append([*self._before, *ids[start : start + self.window], *self._after])
                owners.append(owner)
        found = [0.0] * len(texts)
        pad = self.model.config.pad_token_id
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = 1 if pad is None else batch_size  # without one, a decoder cannot find the end of a padded row
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            for i, value in zip(batch, self._scores([rows[i] for i in batch], pad or 0).tolist(), strict=True):
                found[owners[i]] = max(found[owners[i]], value)
        return found

    def _scores(self, rows: list[list[int]], pad: int) -> Tensor:
        """Probability of the label for rows of tokens, `[B]`."""
        width = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        outputs: Any = self.model(input_ids=ids, attention_mask=attention)
        logits = outputs.logits.float()
        return (logits.sigmoid() if self.sigmoid else logits.softmax(-1))[:, self.index]
