"""Scoring text or tokens with a scorer: in the preference module, by hand, and as a reward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.conversations import Message, to_messages
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.heads import has_head
from rlhf_lightning.models.loading import check_source, check_vocabulary, disable_dropout, load_for_scoring, read_stage
from rlhf_lightning.models.precision import sparing
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead, Scorer, scorer_of
from rlhf_lightning.safe_points import safe_point

Text = str | list[Message]
Row = tuple[list[int], list[int]]
"""Tokens, and a mask that is 1 on the response."""
_SAID: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


@torch.no_grad()
def score_rows(
    scorer: Scorer, ids: Sequence[list[int]], masks: Sequence[list[int]], device: Any, batch_size: int = 16
) -> Tensor:
    """Scores `[N]` of rows of tokens, a mask being 1 on the response. Rows of like length are scored together."""
    check_whole("batch_size", batch_size)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = torch.zeros(len(ids), device=device)
    for start in range(0, len(order), batch_size):
        safe_point()
        part = order[start : start + batch_size]
        batch = pad_tokens([ids[i] for i in part], [masks[i] for i in part], pad_id=0)
        scores[part] = scorer({name: value.to(device) for name, value in batch.items()}).to(scores.dtype)
    return scores


def score_texts(
    scorer: Scorer,
    renderer: Renderer,
    prompts: Sequence[Text],
    responses: Sequence[Text],
    tools: Sequence[list[Any] | None] | None,
    device: Any,
    batch_size: int = 256,
    allow_blank: bool = False,
    close: Callable[[Row], Row] | None = None,
) -> Tensor:
    """Scores `[N]` of responses to prompts, text or messages each; `allow_blank` scores an empty response by its end.

    `close` is asked for each row where it ends.

    Raises:
        ConfigError: not one response to each prompt. DataError: an exchange that is empty or cannot be rendered.
    """
    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, str):
            raise ConfigError(f"{name} is a text; it must be a list of them: [{given[:40]!r}]")
    if len(prompts) != len(responses):
        raise ConfigError(f"{len(prompts)} prompts and {len(responses)} responses: one response to each prompt")
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
    """A trained preference model, frozen, with its own tokenizer and template.

    Args:
        folder: of a preference stage, or any reward model that `AutoModelForSequenceClassification` opens.
        dtype: of its weights.
        shifted: add the `reward_shift` of `stage.json`, so that the mean score of its demonstrations is 0.
        asked: settings in place of those that it was trained with, see `data.rendering_settings.RenderingSettings`.
    """

    def __init__(
        self, folder: str, dtype: str = "float32", shifted: bool = False, asked: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        stage = read_stage(folder)
        self.shift = float(stage.get("reward_shift") or 0.0) if shifted else 0.0
        if shifted and "reward_shift" not in stage:
            raise ConfigError(
                f"{folder}: stage.json has no reward_shift; `rlhf score {folder} FILE --set_shift` adds it"
            )
        self.scorer = scorer_of(folder)
        if isinstance(self.scorer, ImplicitReward) and not self.scorer.reference:
            raise ConfigError(f"{folder} scores against the model it started from, and stage.json does not name that")
        check_source(folder)
        if isinstance(self.scorer, RewardHead) and not has_head(folder):
            raise ConfigError(
                f"{folder} is no preference model: it has no score head, and no stage.json that names another scorer. "
                "A head made now would give random numbers."
            )
        self.model = load_for_scoring(folder, self.scorer.task, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.asking = RenderingSettings.of(folder, **(asked or {}))
        self.renderer = self.asking.renderer(self.tokenizer)
        disable_dropout(self.model)
        self.renderer.also_stop_at(end_token_ids(folder, self.tokenizer))
        # First: a head adds the padding token that its tokenizer was saved with.
        self.scorer.bind(self.model, self.tokenizer, self.renderer.turn_end_ids)
        self.frozen = self.scorer.frozen
        check_vocabulary(self.model, self.tokenizer, f"the reward model {folder}")
        self.model.requires_grad_(False).eval()
        # One of another tool was trained where its template ends, and everybody reads it there.
        foreign = isinstance(self.scorer, RewardHead) and "scorer" not in stage and not self.tokenizer.was_ended
        self._after, self._unended = self._closing() if foreign else ([], False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RewardModel":
        # Of the type that was asked for, whatever the policy beside it is cast to.
        return super()._apply(sparing(fn, lambda tensor: True), recurse)

    @property
    def device(self) -> torch.device:
        """Where it scores."""
        return next(self.model.parameters()).device

    def same_tokens(self, renderer: Renderer) -> bool:
        """Whether the policy's token ids mean the same here, so that they can be scored as they were sampled.

        That the conversation has the same system message and tools for both is to be asked of each.
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
        """What its template writes after the end of a turn; and whether we end a turn that it does not end."""
        if self.renderer.format == "raw" or not self.tokenizer.chat_template:
            return [], False
        ours = self.renderer.exchange(_SAID[:1], _SAID[1:]).ids
        text = self.renderer.template.render(*self.renderer.completed(_SAID))
        theirs = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return theirs[len(ours) :] if theirs[: len(ours)] == ours else [], ours[:-1] == theirs

    def _closed(self, row: Row) -> Row:
        """A row as far as its score is read; one that was cut off as it is."""
        ids, loss_mask = row
        if not ids or ids[-1] not in self.renderer.stop_token_ids:
            return row
        if self._unended:
            return ids[:-1], loss_mask[:-1]
        return [*ids, *self._after], [*loss_mask, *[0] * len(self._after)]

    def score(
        self, prompts: Sequence[Text], responses: Sequence[Text], tools: Any = None, allow_blank: bool = False
    ) -> Tensor:
        """Scores `[N]`; see `score_texts`."""
        given = (prompts, responses, tools, self.device)
        return score_texts(self.scorer, self.renderer, *given, allow_blank=allow_blank, close=self._closed) + self.shift

    def score_tokens(self, ids: Sequence[list[int]], masks: Sequence[list[int]], batch_size: int = 16) -> Tensor:
        """Scores `[N]`; see `score_rows`."""
        rows = [self._closed(row) for row in zip(ids, masks, strict=True)]
        found = score_rows(
            self.scorer, [row for row, _ in rows], [loss_mask for _, loss_mask in rows], self.device, batch_size
        )
        return found + self.shift
