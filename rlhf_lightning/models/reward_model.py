"""Scores texts or tokens with a scorer: in the preference module, in user code, and as a reward."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.files import read_stage
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.heads import has_head
from rlhf_lightning.models.loading import check_source, check_vocabulary, disable_dropout, load_for_scoring
from rlhf_lightning.models.precision import sparing
from rlhf_lightning.models.reference import load_reference
from rlhf_lightning.models.scorers import LoadedModel, ModelScorer, padded_batches, recorded_reference, scorer_of
from rlhf_lightning.types import JSON, Message, ToolSchema

log = logging.getLogger(__name__)
Text = str | list[Message]
TokenRow = tuple[list[int], list[int]]
"""Token ids and mask of a row; the mask is 1 on the response."""
_EXAMPLE_CHAT: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


@torch.no_grad()
def score_rows(
    scorer: ModelScorer,
    ids: Sequence[list[int]],
    masks: Sequence[list[int]],
    device: torch.device,
    batch_size: int = 16,
) -> Tensor:
    """Score rows of tokens. Rows of similar length are scored together.

    Args:
        scorer: A scorer with a model.
        ids: Token ids of each row.
        masks: 1 on the response, 0 elsewhere, for each row.
        device: Device of the model.
        batch_size: Number of rows scored at once.

    Returns:
        Scores, `[N]`.
    """
    check_whole("batch_size", batch_size)
    scores = torch.zeros(len(ids), device=device)
    for rows, tokens in padded_batches(ids, masks, batch_size, device):
        scores[list(rows)] = scorer(tokens).to(scores.dtype)
    return scores


def score_texts(
    scorer: ModelScorer,
    renderer: Renderer,
    prompts: Sequence[Text],
    responses: Sequence[Text],
    tools: Sequence[list[ToolSchema] | None] | None,
    device: torch.device,
    batch_size: int = 256,
    allow_blank: bool = False,
    close: Callable[[TokenRow], TokenRow] | None = None,
) -> Tensor:
    """Score responses to prompts, each a text or a list of messages.

    Args:
        scorer: A scorer with a model.
        renderer: Turns messages into tokens.
        prompts: Prompt of each row.
        responses: Response of each row.
        tools: Tool definitions of each row, if any.
        device: Device of the model.
        batch_size: Number of rows scored at once.
        allow_blank: Score an empty response by its end token instead of raising an error.
        close: Maps each rendered row to the row that is scored.

    Returns:
        Scores, `[N]`.

    Raises:
        ConfigError: If the numbers of prompts and responses differ.
        DataError: If a row is empty or cannot be rendered.
    """
    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, str):
            raise ConfigError(f"{name} is a single text; it must be a list of texts: [{given[:40]!r}]")
    if len(prompts) != len(responses):
        raise ConfigError(f"there are {len(prompts)} prompts, but {len(responses)} responses; give one for each prompt")
    rendered = [
        renderer.exchange(
            to_messages(prompt), to_messages(response, "assistant"), tools[i] if tools else None, allow_blank
        )
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    rows = [(row.ids, row.loss_mask) for row in rendered]
    if close is not None:
        rows = [close(row) for row in rows]
    return score_rows(scorer, [ids for ids, _ in rows], [loss_mask for _, loss_mask in rows], device, batch_size)


class RewardModel(nn.Module):
    """A trained preference model, frozen, with its own tokenizer and chat template.

    Args:
        folder: Model folder of a preference stage, or any reward model that `AutoModelForSequenceClassification` loads.
        dtype: Data type of its weights.
        shifted: Add the `reward_shift` in `stage.json`, which makes the mean score of its demonstrations 0.
        asked: Rendering settings that replace those of its training, see
            `data.rendering_settings.RenderingSettings`.

    Raises:
        ConfigError: If the folder is not a preference model, or the settings do not fit it.

    Example:
        ```python
        reward_model = RewardModel("runs/demo/preference/model")
        scores = reward_model.score(["What is 2 + 2?"], ["4"])  # [1]
        ```
    """

    def __init__(
        self, folder: str, dtype: str = "float32", shifted: bool = False, asked: Mapping[str, JSON] | None = None
    ) -> None:
        super().__init__()
        folder = model_folder(folder)
        stage = read_stage(folder)
        shift = stage.get("reward_shift") or 0.0
        if not isinstance(shift, int | float):
            raise ConfigError(f"{folder}: stage.json has the reward_shift {shift!r:.100}, which is no number")
        self.shift = float(shift) if shifted else 0.0
        if shifted and "reward_shift" not in stage:
            raise ConfigError(
                f"{folder}: stage.json has no reward_shift; `rlhf score {folder} FILE --set_shift` adds it"
            )
        self.scorer = scorer_of(folder)
        source = recorded_reference(folder) if "reference" in self.scorer.requires else None
        if "reference" in self.scorer.requires and source is None:
            raise ConfigError(
                f"{folder}: the scorer needs a reference model, but stage.json does not name one; restore the file"
            )
        check_source(folder)
        if "head" in self.scorer.requires and not has_head(folder):
            raise ConfigError(
                f"{folder} is not a preference model: it has neither a score head nor a stage.json with another "
                "scorer; a new head would give random scores"
            )
        self.model = load_for_scoring(folder, self.scorer.task, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.asking = RenderingSettings.of(folder, **(asked or {}))
        self.renderer = self.asking.renderer(self.tokenizer)
        if self.renderer.format == "raw" and "format" not in {**self.asking.record, **self.asking.given}:
            log.warning(
                "the tokenizer of the reward model %s has no chat template, so it scores the texts of a conversation "
                "one after another, without roles. If it was trained with a template, save that as chat_template.jinja "
                "in the folder",
                folder,
            )
        disable_dropout(self.model)
        self.renderer.also_stop_at(end_token_ids(folder, self.tokenizer))
        # Before the vocabulary check, because `RewardHead` adds the padding token that its tokenizer was saved with.
        reference = None if source is None else load_reference(source, self.tokenizer, dtype)
        self.reference_copy = None if reference is None else reference.copy
        self.model_scorer = self.scorer.build(
            LoadedModel(self.model, self.tokenizer, self.renderer.turn_end_ids, reference=reference)
        )
        check_vocabulary(self.model, self.tokenizer, f"the reward model {folder}")
        self.model.requires_grad_(False).eval()
        # Other reward models are read at the end of their template, as in their training and in other tools.
        foreign = "head" in self.scorer.requires and "scorer" not in stage and not self.tokenizer.was_ended
        self._after, self._unended = self._closing() if foreign else ([], False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RewardModel":
        # Keep the requested dtype even if the policy's module is cast.
        return super()._apply(sparing(fn, lambda tensor: True), recurse)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def same_tokens(self, renderer: Renderer) -> bool:
        """True if the policy has the same token ids and rendering, so that sampled tokens can be scored unchanged.

        The system message and the tools are not compared; the caller must compare them for each conversation.

        Args:
            renderer: The policy's renderer.
        """
        theirs = renderer.tokenizer
        return (
            self.tokenizer.get_vocab() == theirs.get_vocab()
            and self.tokenizer.chat_template == theirs.chat_template
            and self.renderer.format == renderer.format
            and self.renderer.template_kwargs == renderer.template_kwargs
            and (renderer.format == "chat" or self.renderer.prefix_ids == renderer.prefix_ids)
        )

    def _closing(self) -> tuple[list[int], bool]:
        """Ids that its template writes after the end token of a turn, and True if it omits that end token."""
        if self.renderer.format == "raw" or not self.tokenizer.chat_template:
            return [], False
        ours = self.renderer.exchange(_EXAMPLE_CHAT[:1], _EXAMPLE_CHAT[1:]).ids
        text = self.renderer.template.render(*self.renderer.completed(_EXAMPLE_CHAT))
        theirs = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return theirs[len(ours) :] if theirs[: len(ours)] == ours else [], ours[:-1] == theirs

    def _closed(self, row: TokenRow) -> TokenRow:
        """A row up to the token at which its score is read; a truncated response stays unchanged."""
        ids, loss_mask = row
        if not ids or ids[-1] not in self.renderer.stop_token_ids:
            return row
        if self._unended:
            return ids[:-1], loss_mask[:-1]
        return [*ids, *self._after], [*loss_mask, *[0] * len(self._after)]

    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        tools: Sequence[list[ToolSchema] | None] | None = None,
        allow_blank: bool = False,
    ) -> Tensor:
        """Scores `[N]` of responses to prompts; see `score_texts`."""
        given = (self.model_scorer, self.renderer, prompts, responses, tools, self.device)
        return score_texts(*given, allow_blank=allow_blank, close=self._closed) + self.shift

    def score_tokens(self, ids: Sequence[list[int]], masks: Sequence[list[int]], batch_size: int = 16) -> Tensor:
        """Scores `[N]` of rows of tokens; see `score_rows`."""
        rows = [self._closed(row) for row in zip(ids, masks, strict=True)]
        found = score_rows(
            self.model_scorer, [row for row, _ in rows], [loss_mask for _, loss_mask in rows], self.device, batch_size
        )
        return found + self.shift
