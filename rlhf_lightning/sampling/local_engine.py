"""The built-in sampling engine: a prompt is computed once, keys are written in place, waiting rows take free slots."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rlhf_lightning.distributed import broadcast
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.attention import Decoding
from rlhf_lightning.models.backbone import Backbone, evaluating, few_rows
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packed_forward import FAILURES, PackedForward, tolerance
from rlhf_lightning.models.packing import PackedLayout, SharedPrefix, group_by_token_budget
from rlhf_lightning.models.sharding import (
    SynchronizedCalls,
    is_sharded,
    max_over_ranks,
    run_unsharded,
    unsharded_or_synchronized,
)
from rlhf_lightning.safe_points import safe_point
from rlhf_lightning.sampling.cuda_graphs import GraphedStep
from rlhf_lightning.sampling.hf_generate import generate
from rlhf_lightning.sampling.kv_cache import PrefillCache, SlotKVCache
from rlhf_lightning.sampling.token_sampling import Completion, SamplingParams, is_complete, sample_token, uniforms

log = logging.getLogger(__name__)


class Watch:
    """Is told what an engine samples while it samples; this one does nothing with it.

    A model that is sampled by its own `generate` is told of only at the beginning and the end.
    """

    def begin(self, rows: int) -> None:
        """So many responses are asked for."""

    def on_token(self, row: int, token: int, ended: bool) -> None:
        """A token of a row; whether the row ends with it."""

    def end(self) -> None:
        """All are sampled, or the sampling failed."""


class LocalEngine:
    """Samples from a model in this process.

    A model whose cache is not that of plain attention (recurrent layers, shared keys) is found out by numbers, and
    sampled by its own `generate`.

    Args:
        model: a causal model, or peft around one. decode: from token ids to text, for stop strings.
        rows: decoded side by side. cuda_graphs: replay steps on a GPU, see `graphs`.
        max_tokens: of prompts computed at once, see `PackedForward`.
        gather: the weights of a split model for a round, see `Sampler`.
    """

    def __init__(
        self,
        model: Any,
        decode: Callable[[list[int]], str],
        rows: int = 256,
        cuda_graphs: bool = False,
        max_tokens: int | None = None,
        gather: bool | None = None,
    ) -> None:
        self.cuda_graphs, self.gather = cuda_graphs, gather
        self._lock: SynchronizedCalls | None = None
        self.model, self.decode, self.rows = model, decode, rows
        self.backbone = Backbone(model)
        self.packed_forward = PackedForward(model, self.backbone.decoder, max_tokens)
        self.layers = base_of(model).config.get_text_config().num_hidden_layers
        self._plain: bool | None = None
        self.watch = Watch()

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing to do: the weights are those that are trained."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """A response to each prompt (token ids), each sampled with its own seed."""
        if not prompts:
            return []
        self.watch.begin(len(prompts))
        try:
            return self._generate(prompts, params, seeds)
        finally:
            self.watch.end()

    def _generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        with self._sampling():
            if not is_sharded(self.model):
                # Windows and positions that depend on the length show at that length only. What is split is checked
                # where all ranks are: in training, by the trainer's own forward.
                self.packed_forward.check(max(len(prompt) for prompt in prompts) + params.max_tokens)
            if self._plain is None:
                self._plain = self._check()
            if not (self._plain and self.packed_forward.packs):
                return generate(self.model, prompts, params, seeds, self.decode)
            with few_rows(self.model):
                return _Batch(self, prompts, params, seeds).run()

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        # Weights that are gathered in inference mode could not be trained on.
        gradients = torch.no_grad() if is_sharded(self.model) else torch.inference_mode()
        with evaluating(self.model), gradients, torch.compiler.set_stance("force_eager"):
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """See `Sampler.session`. A split model is gathered on every rank where that leaves room, else all go in step.

        Raises:
            ConfigError: there is no room, and the model is sampled by its own `generate`.
        """
        with unsharded_or_synchronized(self.model, self.gather, self._idle) as self._lock:
            if self._lock:
                self._check_in_step()
            try:
                yield
            finally:
                self._lock = None

    def _check_in_step(self) -> None:
        with self._sampling():
            # All or none: a rank that has sampled nothing so far has not looked yet.
            if max_over_ranks(int(self._plain is None), self.model):
                self._plain = self._check()
        if not self._plain:
            raise ConfigError(
                "this model is sampled by its own generate, which cannot go in step over ranks, and there is no room "
                "to gather its weights: set sampler.gather: true, or split it over fewer ranks"
            )

    def _idle(self) -> None:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(self.model.parameters()).device)
        with self._sampling():
            run_unsharded(self.model, lambda: self.backbone.decoder(input_ids=ids, use_cache=False))

    # -- steps of the model ---------------------------------------------------------------------------------------

    def prefill(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[list[PrefillCache], Tensor, Tensor]:
        """Keys and values of distinct prompts side by side, the place where each begins, and the logits after each."""
        return self._together(self._prefill, prompts, device)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[list[PrefillCache], Tensor, Tensor]:
        cache = [PrefillCache() for _ in range(self.layers)]
        layout = PackedLayout([SharedPrefix((i,), len(prompt), (0,)) for i, prompt in enumerate(prompts)], device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        states = self._decoder(ids[None], layout.columns[None], Cache(layers=cache), layout)[0]
        is_complete = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0)
        starts = is_complete - torch.tensor([len(prompt) for prompt in prompts], device=device)
        return cache, starts, self.backbone.logits(states[is_complete - 1])

    def step(self, slots: SlotKVCache, tokens: Tensor) -> Tensor:
        """Feed the last token of every slot; the logits after it, `[slots, V]`."""
        return self._together(self._step, slots, tokens)

    def _step(self, slots: SlotKVCache, tokens: Tensor) -> Tensor:
        layout = Decoding(slots.positions, slots.width)
        states = self._decoder(tokens[:, None], slots.positions[:, None], slots.cache, layout)[:, -1]
        return self.backbone.logits(states)

    def _together(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._lock:
            self._lock.call()
        return run_unsharded(self.model, function, *args)

    def _decoder(self, ids: Tensor, positions: Tensor, cache: Cache, layout: Any) -> Tensor:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        return self.backbone.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            layout=layout,
        )[0]

    # -- can this model do it? ------------------------------------------------------------------------------------

    def _check(self) -> bool:
        reason = "its forward cannot be packed"
        if self.backbone.separable and self.packed_forward.packs:
            try:
                difference = self._difference()
            except FAILURES as error:
                reason = str(error).strip().splitlines()[0]
            else:
                if difference < tolerance(self.model):
                    return True
                reason = f"its logits differ by {difference:.1e}"
        name = type(base_of(self.model)).__name__
        log.warning("%s is sampled by its own generate: its cache is not that of plain attention (%s)", name, reason)
        return False

    def _difference(self) -> float:
        """Of logits after two steps in slots, with prompts of unlike length, from those of a plain forward."""
        device = next(self.model.parameters()).device
        rows = [[(7919 * (i + j)) % self.backbone.vocabulary for j in range(4 + 3 * i)] for i in range(3)]
        with torch.autocast(device.type, enabled=False):
            slots = SlotKVCache(self.layers, 3, device)
            slots.reserve(16, 16)
            cache, starts, _ = self.prefill([row[:-2] for row in rows], device)
            for i, row in enumerate(rows):
                place = torch.arange(len(row) - 2, device=device)
                slots.fill(cache, torch.full_like(place, i), place, starts[i] + place)
            slots.positions = torch.tensor([len(row) - 2 for row in rows], device=device)
            for k in (-2, -1):
                slots.width = int(slots.positions.max()) + 1
                ours = self.step(slots, torch.tensor([row[k] for row in rows], device=device))
                slots.positions = slots.positions + 1
            theirs = [self.model(input_ids=torch.tensor([row], device=device), use_cache=False) for row in rows]
        wanted = torch.stack([out.logits[0, -1] for out in theirs])
        return float((ours - wanted).float().norm() / wanted.float().norm().clamp(min=1e-6))


class _Batch:
    """Prompts on their way through the slots."""

    def __init__(
        self, engine: LocalEngine, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> None:
        self.engine, self.params = engine, params
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.samples = [Completion() for _ in prompts]
        self.device = next(engine.model.parameters()).device
        self.uniforms = uniforms(seeds, params.max_tokens).to(self.device)
        # Taken from the end: equal prompts side by side, the longest first, so that buffers seldom grow.
        self.waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), self.prompts[i], -i))
        self.limit = max(len(prompt) for prompt in prompts) + params.max_tokens
        self.rows: list[int | None] = [None] * min(engine.rows, len(prompts))
        """The row in each slot."""
        self.slots = SlotKVCache(engine.layers, len(self.rows), self.device)
        self.tokens = torch.zeros(len(self.rows), dtype=torch.long, device=self.device)
        # Steps in which ranks tell each other of them cannot be recorded.
        graphed = engine.cuda_graphs and self.device.type == "cuda" and not engine._lock
        self.step = GraphedStep(engine.step) if graphed else engine.step

    def run(self) -> list[Completion]:
        while True:
            safe_point()
            free = [slot for slot, row in enumerate(self.rows) if row is None]
            if self.waiting and len(free) * 4 >= len(self.rows):
                self._admit(free)
            elif len(free) == len(self.rows):
                return self.samples
            else:
                if len(free) * 4 >= len(self.rows):
                    self._shrink()
                self._advance()

    def _admit(self, free: list[int]) -> None:
        """Waiting prompts into free slots: the prompt is computed once for all rows that have it."""
        taken = [self.waiting.pop() for _ in range(min(len(free), len(self.waiting)))]
        distinct = list(dict.fromkeys(self.prompts[row] for row in taken))
        trees = [SharedPrefix((i,), len(prompt), (0,)) for i, prompt in enumerate(distinct)]
        self.slots.reserve(max(len(prompt) for prompt in distinct) + 1, self.limit)
        for group in group_by_token_budget(trees, self.engine.packed_forward.budget(self.device)):
            prompts = {distinct[tree.rows[0]]: i for i, tree in enumerate(group)}
            rows = [row for row in taken if self.prompts[row] in prompts]
            self._prefill(prompts, rows, [free.pop() for _ in rows])

    def _prefill(self, prompts: dict[tuple[int, ...], int], rows: list[int], slots: list[int]) -> None:
        cache, starts, logits = self.engine.prefill(list(prompts), self.device)
        which = [prompts[self.prompts[row]] for row in rows]
        lengths = [len(self.prompts[row]) for row in rows]
        columns = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        repeats = torch.tensor(lengths, device=self.device)
        slot, source = torch.tensor(slots, device=self.device), torch.tensor(which, device=self.device)
        self.slots.fill(
            cache, slot.repeat_interleave(repeats), columns, starts[source].repeat_interleave(repeats) + columns
        )
        self.slots.positions[slot] = repeats
        for row, place in zip(rows, slots, strict=True):
            self.rows[place] = row
        self._take(slots, logits[source])

    def _advance(self) -> None:
        width = max(len(self.prompts[row]) + len(self.samples[row].ids) for row in self.rows if row is not None)
        self.slots.width = width
        self.slots.reserve(width, self.limit)
        # An empty slot's position may be anywhere: it is fed too, and what comes out is dropped.
        self.slots.positions.clamp_(max=width - 1)
        logits = self.step(self.slots, self.tokens)
        self.slots.positions += 1
        self._take(list(range(len(self.rows))), logits)

    def _take(self, slots: list[int], logits: Tensor) -> None:
        """Sample a token for the row in each of these slots."""
        sampled = [len(self.samples[row].ids) if row is not None else 0 for row in (self.rows[slot] for slot in slots)]
        rows = torch.tensor([self.rows[slot] or 0 for slot in slots], device=self.device)
        lengths = torch.tensor(sampled, device=self.device)
        tokens, logprobs = sample_token(logits, self.uniforms[rows, lengths], self.params, lengths)
        tokens, logprobs = broadcast(tokens), broadcast(logprobs)
        self.tokens[torch.tensor(slots, device=self.device)] = tokens
        for slot, token, logprob in zip(slots, tokens.tolist(), logprobs.tolist(), strict=True):
            row = self.rows[slot]
            if row is None:
                continue
            sample = self.samples[row]
            sample.ids.append(token)
            sample.logprobs.append(logprob)
            if is_complete(sample.ids, self.params, self.engine.decode):
                sample.stop_reason = "stop"
            ended = sample.stop_reason == "stop" or len(sample.ids) == self.params.max_tokens
            if ended:
                self.rows[slot] = None
            self.engine.watch.on_token(row, token, ended)

    def _shrink(self) -> None:
        kept = torch.tensor([slot for slot, row in enumerate(self.rows) if row is not None], device=self.device)
        self.rows = [row for row in self.rows if row is not None]
        self.tokens = self.tokens[kept]
        self.slots.select(kept)
