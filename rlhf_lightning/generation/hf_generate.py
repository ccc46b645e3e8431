"""Sampling through a model's own `generate`, for models whose cache the built-in engine does not support."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from rlhf_lightning.distributed import broadcast, safe_point
from rlhf_lightning.generation.token_sampling import SamplingParams, record_token, sample_token, uniforms
from rlhf_lightning.types import Completion

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def generate(
    model: "PreTrainedModel | PeftModel",
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    decode: Callable[[list[int]], str],
    on_token: Callable[[int, int, float, bool], None] = lambda row, token, logprob, ended: None,
) -> list[Completion]:
    """Sample a response to each prompt.

    `generate` decodes greedily; a logits processor samples with `sample_token` and masks all other tokens. Prompts of
    equal length are batched, because recurrent layers cannot skip padding.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        params: How to sample.
        seeds: One seed per prompt.
        decode: Maps token ids to text, for stop texts.
        on_token: Called after each token with the row, the token, its log-probability and whether it is the last one.

    Returns:
        The responses, in the order of the prompts.
    """
    samples = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, members in groupby(order, key=lambda i: len(prompts[i])):
        rows = list(members)
        processor = _SamplingProcessor(rows, samples, params, [seeds[row] for row in rows], decode, on_token)
        ids = torch.tensor([prompts[row] for row in rows], device=next(model.parameters()).device)
        with _plain_settings(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=[processor],
                stopping_criteria=[processor.finished],
                eos_token_id=None,
                pad_token_id=0,
            )
    return samples


@contextmanager
def _plain_settings(model: "PreTrainedModel | PeftModel") -> Iterator[None]:
    """Replace the model's generation config, because its penalties and minimum lengths would affect sampling."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _SamplingProcessor:
    """A logits processor that samples a token per row, records it, and masks all other tokens."""

    def __init__(
        self,
        rows: list[int],
        samples: list[Completion],
        params: SamplingParams,
        seeds: list[int],
        decode: Callable[[list[int]], str],
        on_token: Callable[[int, int, float, bool], None],
    ) -> None:
        self.rows, self.samples, self.params, self.decode, self.on_token = rows, samples, params, decode, on_token
        self.uniforms = uniforms(seeds, params.max_tokens)
        self.open = [True] * len(rows)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        safe_point()
        lengths = torch.full((len(scores),), self.step, device=scores.device)
        tokens, logprobs = sample_token(scores, self.uniforms[:, self.step].to(scores.device), self.params, lengths)
        tokens, logprobs = broadcast(tokens), broadcast(logprobs)
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            if self.open[i]:
                row = self.rows[i]
                self.open[i] = not record_token(self.samples[row], token, logprob, self.params, self.decode)
                self.on_token(row, token, logprob, not self.open[i])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)

    def finished(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Stopping criterion: True for rows whose response is complete, `[rows]`."""
        return ~torch.tensor(self.open, device=input_ids.device)
