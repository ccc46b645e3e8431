"""Sampling from a causal model: one prefill per distinct prompt, finished rows leave the batch, own seed per row."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.lora import base_of


@dataclass
class Sample:
    """A response: its token ids (stop token included), the log-probability of each when drawn, and why it ended."""

    ids: list[int]
    logprobs: list[float]
    stop_reason: str
    """`stop` (a stop token or text) or `length` (the budget)."""


class Sampler:
    """Draws responses. Log-probabilities are those of the full softmax at the sampling temperature.

    A row's random numbers come from its own seed: they do not depend on its neighbours, batch or rank.

    Args:
        max_tokens: budget of a response.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens of this mass; the recorded log-probabilities are not cut, so importance
            ratios are biased where it is set.
        top_k: draw from so many of the likeliest tokens, 0 for all; biased likewise.
        batch_rows: rows decoded side by side.
    """

    def __init__(
        self,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_rows: int = 256,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"sampler.max_tokens is {max_tokens}; it must be at least 1")
        if temperature < 0:
            raise ConfigError(f"sampler.temperature is {temperature}; it must not be negative")
        if not 0 < top_p <= 1:
            raise ConfigError(f"sampler.top_p is {top_p}; it must be in (0, 1]")
        self.max_tokens, self.temperature = max_tokens, temperature
        self.top_p, self.top_k, self.batch_rows = top_p, top_k, batch_rows

    def bind(self, model: Any, renderer: Renderer) -> None:
        """Take the model, and the renderer that knows what ends a turn."""
        self.model, self.renderer = model, renderer
        self.stop_token_ids = set(renderer.stop_token_ids)
        base = base_of(model)
        keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.forward_options = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
        self.context = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float | None = None
    ) -> list[Sample]:
        """A response to each prompt (token ids); equal prompts in the same batch share their prefill."""
        temperature = self.temperature if temperature is None else temperature
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        samples: list[Sample | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_rows):
            part = order[start : start + self.batch_rows]
            drawn = self._batch([prompts[i] for i in part], [seeds[i] for i in part], temperature)
            for i, sample in zip(part, drawn, strict=True):
                samples[i] = sample
        return [sample for sample in samples if sample is not None]

    def _batch(self, prompts: list[list[int]], seeds: list[int], temperature: float) -> list[Sample]:
        device = next(self.model.parameters()).device
        state = _Decoding(self, prompts, device)
        uniforms = torch.stack([torch.rand(self.max_tokens, generator=_generator(seed)) for seed in seeds]).to(device)
        samples = [Sample([], [], "length") for _ in prompts]
        alive = list(range(len(prompts)))
        for step in range(self.max_tokens):
            logprobs = state.logits.float() if temperature == 0 else state.logits.float() / temperature
            logprobs = logprobs.log_softmax(-1)
            tokens = self._draw(logprobs, uniforms[alive, step], temperature)
            drawn = logprobs.gather(-1, tokens[:, None]).squeeze(-1).tolist()
            keep = []
            for place, (row, token, logprob) in enumerate(zip(alive, tokens.tolist(), drawn, strict=True)):
                samples[row].ids.append(token)
                samples[row].logprobs.append(logprob)
                if self._ends(samples[row].ids):
                    samples[row].stop_reason = "stop"
                else:
                    keep.append(place)
            alive = [alive[place] for place in keep]
            if not alive or step + 1 == self.max_tokens:
                break
            state.advance(tokens, keep)
        return samples

    def _draw(self, logprobs: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
        if temperature == 0:
            return logprobs.argmax(-1)
        probabilities = logprobs.exp()
        if self.top_k or self.top_p < 1:
            probabilities = _cut(probabilities, self.top_k, self.top_p)
        cumulative = probabilities.cumsum(-1)
        # Scaled by the last entry, which rounding and cutting keep from being 1.
        threshold = uniforms[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logprobs.shape[-1] - 1)

    def _ends(self, ids: list[int]) -> bool:
        if ids[-1] in self.stop_token_ids:
            return True
        stops = self.renderer.stop_strings
        # A stop text is a few tokens long; the tail is enough to see it end.
        return bool(stops) and any(stop in self.renderer.tokenizer.decode(ids[-32:]) for stop in stops)


class _Decoding:
    """The cache, mask and positions of the rows that are still being written."""

    def __init__(self, sampler: Sampler, prompts: list[list[int]], device: torch.device) -> None:
        self.model, self.options = sampler.model, sampler.forward_options
        distinct = sorted({tuple(prompt) for prompt in prompts}, key=lambda p: (len(p), p))
        width = max(len(prompt) for prompt in distinct)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in distinct], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
        # Explicit positions: models with absolute positions would else count the padding.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **self.options)
        self.cache = out.past_key_values
        place = {prompt: i for i, prompt in enumerate(distinct)}
        rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        self.cache.batch_select_indices(rows)
        self.mask, self.position = mask[rows], positions[rows, -1:]
        self.logits = out.logits[rows, -1]

    def advance(self, tokens: Tensor, keep: list[int]) -> None:
        """Feed the drawn tokens of the rows in `keep`; the others leave."""
        if len(keep) < len(tokens):
            rows = torch.tensor(keep, device=tokens.device)
            self.cache.batch_select_indices(rows)
            self.mask, self.position, tokens = self.mask[rows], self.position[rows], tokens[rows]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.position = self.position + 1
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            **self.options,
        )
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cut(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to 0 what top-k and top-p leave out; a token that crosses top_p is kept."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    dropped = before >= top_p
    if top_k:
        dropped[:, top_k:] = True
    return probabilities.scatter(-1, order, ordered.masked_fill(dropped, 0.0))
