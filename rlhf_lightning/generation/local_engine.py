"""The built-in sampling engine, with a KV cache and continuous batching.

Rows (a prompt with its response so far) move into slots of the cache as these become free, and keys are written in
place. Rows that are admitted together share the computation of equal prompts.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from rlhf_lightning.distributed import broadcast, safe_point
from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.generation.cuda_graphs import GraphedStep
from rlhf_lightning.generation.fused_decoder import FusedDecoder, supports
from rlhf_lightning.generation.hf_generate import generate
from rlhf_lightning.generation.kv_cache import PrefillCache, SharedPrompts, SlotKVCache
from rlhf_lightning.generation.token_sampling import SamplingParams, check_prompts, record_token, sample_token, uniforms
from rlhf_lightning.models.attention import Decoding
from rlhf_lightning.models.backbone import Backbone, in_mode
from rlhf_lightning.models.compiled_layers import uncompiled
from rlhf_lightning.models.decoding_layers import decoding_layers
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
from rlhf_lightning.types import Completion

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
WIDTHS = 16
"""Attention of a decoding step covers a multiple of this many positions."""
SHARED_KEYS = 2048
"""Attention reads equal prompts once per group if this saves at least so many keys per head. Gathering the queries of
the groups takes as long as reading 1,000 to 2,000 keys (docs/performance.md)."""


class Watch:
    """Observer of an engine's progress; this base class does nothing.

    Example:
        >>> class Count(Watch):
        ...     tokens = 0
        ...     def on_token(self, row, token, ended):
        ...         self.tokens += 1
        >>> watch = Count()  # then: engine.watch = watch
    """

    def begin(self, rows: int) -> None:
        """Sampling of `rows` responses starts."""

    def on_token(self, row: int, token: int, ended: bool) -> None:
        """A token of a row was sampled; `ended` is True if it is the row's last token."""

    def end(self) -> None:
        """Sampling is finished or has failed."""


class LocalEngine:
    """Samples from a model in this process.

    A numerical check detects models without a plain KV cache (recurrent layers, shared keys); they are sampled with
    their own `generate`.

    Args:
        model: A causal model, or a `PeftModel` around one.
        decode: Maps token ids to text, for stop texts.
        slots: Number of responses decoded in parallel.
        cuda_graphs: Replay decoding steps as CUDA graphs; see `cuda_graphs`.
        max_tokens_per_batch: Largest number of prompt tokens in a forward pass; see `PackedForward`. The token budget
            of a response is `SamplingParams.max_tokens`.
        gather: Gather the weights of a sharded model for a round; see `Sampler`.

    Example:
        ```python
        engine = LocalEngine(model, tokenizer.decode)
        params = SamplingParams(max_tokens=32, stop_token_ids=(tokenizer.eos_token_id,))
        (completion,) = engine.generate([prompt_ids], params, seeds=[0])
        ```
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        decode: Callable[[list[int]], str],
        slots: int = 256,
        cuda_graphs: bool = False,
        max_tokens_per_batch: int | None = None,
        gather: bool | None = None,
    ) -> None:
        self.cuda_graphs, self.gather = cuda_graphs, gather
        self._synchronized: SynchronizedCalls | None = None
        self.model, self.decode, self.slots = model, decode, slots
        self.backbone = Backbone(model)
        self.packed_forward = PackedForward(model, self.backbone.decoder, max_tokens_per_batch)
        config = base_of(model).config.get_text_config()
        self.layers = config.num_hidden_layers
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._plain: bool | None = None
        """True if slots reproduce the model's logits, False if it needs its own `generate`; None until checked."""
        self._fuses = True
        """False if `FusedDecoder` does not reproduce the model's logits."""
        self._fused: FusedDecoder | None = None
        """The decoder with the weights of the present `generate` call; None if the model's own modules run."""
        self._kept: FusedDecoder | None = None
        """The decoder that all `generate` calls of a session use."""
        self._in_session = False
        self.watch = Watch()

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Do nothing, because the engine samples with the trained weights themselves."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """Sample a response to each prompt.

        Args:
            prompts: Token ids of each prompt.
            params: How to sample.
            seeds: One seed per prompt.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ConfigError: If a prompt is empty, too long, or has ids outside the vocabulary.
        """
        if not prompts:
            return []
        check_prompts(prompts, params.max_tokens, self.backbone.vocabulary, self.context)
        self.watch.begin(len(prompts))
        try:
            return self._generate(prompts, params, seeds)
        finally:
            self.watch.end()

    def _generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        with self.decoding(max(len(prompt) for prompt in prompts) + params.max_tokens) as in_slots:
            if not in_slots:

                def on_token(row: int, token: int, logprob: float, ended: bool) -> None:
                    self.watch.on_token(row, token, ended)

                return generate(self.model, prompts, params, seeds, self.decode, on_token)
            rows = [BatchRow(tuple(prompts[i]), params, seeds[i], i) for i in range(len(prompts))]
            batch = SlotBatch(self)
            # Longest prompts first, so that buffers rarely grow, and equal prompts together.
            for row in sorted(rows, key=lambda row: (len(row.prompt), row.prompt, -row.index), reverse=True):
                batch.add(row)
            while batch.step():
                pass
            return [row.completion for row in rows]

    @contextmanager
    def decoding(self, length: int) -> Iterator[bool]:
        """Context manager in which rows are sampled. The numerical check runs first, unless an earlier one covers it.

        Args:
            length: Number of tokens of the longest row, with its response.

        Yields:
            True if rows can be sampled with a `SlotBatch`, False if the model needs its own `generate`.
        """
        with self._sampling():
            if not is_sharded(self.model):
                # A sliding window or a position scaling that depends on length makes a difference only in long rows, so
                # check at full length. A sharded model is not checked here, because that needs all ranks at once; the
                # trainer's forward pass checks it.
                self.packed_forward.check(length)
            if self._plain is None:
                self._plain = self._check()
            in_slots = self._plain and self.packed_forward.packs
            with self._prepared() if in_slots else nullcontext():
                yield in_slots

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Context manager in which the decoder is prepared for many steps with the present weights."""
        if not (self._fuses and supports(self.model)):
            with decoding_layers(self.model):
                yield
            return
        weight = next(self.model.parameters())
        autocast = torch.is_autocast_enabled("cpu") and weight.dtype == torch.float32
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        if self._kept is None or self._kept.dtype != dtype:
            self._kept = FusedDecoder(self.model, dtype)
        self._fused = self._kept
        try:
            yield
        finally:
            self._fused = None
            if not self._in_session:
                self._kept = None

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Context manager with eval mode, no gradients, and no compiled code."""
        # For a sharded model not inference mode: weights gathered in it could not be trained afterwards.
        gradients = torch.no_grad() if is_sharded(self.model) else torch.inference_mode()
        with in_mode(self.model, training=False), gradients, uncompiled():
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context manager around the sampling of some episodes, which all ranks enter and leave together.

        The weights must not change within it, because `FusedDecoder` copies them once per session. Ranks may call
        `generate` different numbers of times. A sharded model is gathered on every rank if memory allows. Otherwise
        `_synchronized` is set: each forward pass is announced to the other ranks, and a rank that is done runs `_idle`
        until all are.

        Raises:
            ConfigError: If the model cannot be gathered and is sampled with its own `generate`.
        """
        with unsharded_or_synchronized(self.model, self.gather, self._idle) as self._synchronized:
            if self._synchronized:
                self._check_in_step()
            self._in_session = True
            try:
                yield
            finally:
                self._in_session, self._kept, self._synchronized = False, None, None

    def _check_in_step(self) -> None:
        """Check the model on all ranks together, and reject it if it needs its own `generate`."""
        with self._sampling():
            # Either all ranks check or none; a rank that has not sampled yet has not checked the model.
            if max_over_ranks(int(self._plain is None), self.model):
                self._plain = self._check()
        if not self._plain:
            raise ConfigError(
                "this model is sampled with its own generate(), which cannot be synchronized over ranks, and there is "
                "not enough memory to gather its weights. Set sampler.gather: true, or shard the model over fewer ranks"
            )

    def _idle(self) -> None:
        """Run the decoder once, on a rank that has finished, for the ranks that are still decoding."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(self.model.parameters()).device)
        with self._sampling():
            run_unsharded(self.model, lambda: self.backbone.decoder(input_ids=ids, use_cache=False))

    # -- steps of the model ---------------------------------------------------------------------------------------

    def prefill(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[list[PrefillCache], Tensor, Tensor]:
        """Compute distinct prompts in one forward pass.

        Args:
            prompts: Token ids of each prompt.
            device: Where the model is.

        Returns:
            Keys and values per layer, `[1, heads, n, head size]` each, with the n tokens of all prompts behind each
            other; the index of each prompt's first token among them, `[prompts]`; and the logits after each prompt,
            `[prompts, V]`.
        """
        return self._run(self._prefill, prompts, device)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[list[PrefillCache], Tensor, Tensor]:
        layout = PackedLayout(_prefixes(prompts), device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0)
        starts = ends - torch.tensor([len(prompt) for prompt in prompts], device=device)
        if self._fused:
            cache, states = self._fused.prefill(ids, layout, ends - 1)
        else:
            cache = [PrefillCache() for _ in range(self.layers)]
            states = self._decoder(ids[None], layout.columns[None], Cache(layers=cache), layout)[0][ends - 1]
        return cache, starts, self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, H]`, also of those that the fused decoder leaves in float32."""
        if self._fused and (logits := self._fused.logits(states)) is not None:
            return self.backbone.adjusted(logits)
        return self.backbone.logits(
            states if self.backbone.wide_head else states.to(self.backbone.lm_head.weight.dtype)
        )

    def step(self, kv_cache: SlotKVCache, tokens: Tensor) -> Tensor:
        """Feed the last token of every slot.

        Args:
            kv_cache: The cache.
            tokens: Last token of each slot, `[slots]`.

        Returns:
            Logits after these tokens, `[slots, V]`.
        """
        return self._run(self._step, kv_cache, tokens)

    def _step(self, kv_cache: SlotKVCache, tokens: Tensor) -> Tensor:
        if self._fused:
            return self._logits(self._fused.step(kv_cache, tokens))
        layout = Decoding(kv_cache.positions, kv_cache.width)
        states = self._decoder(tokens[:, None], kv_cache.positions[:, None], kv_cache.cache, layout)[:, -1]
        return self.backbone.logits(states)

    @property
    def shares(self) -> bool:
        """True if the decoder that is prepared computes `SlotKVCache.shared`."""
        return self._fused is not None

    def new_cache(self, slots: int, device: torch.device) -> SlotKVCache:
        """An empty cache for the decoder that is prepared."""
        return SlotKVCache(self.layers, slots, device, transposed=self._fused is not None)

    def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function(*args)` with the weights outside the layers gathered, in step with other ranks if needed."""
        if self._synchronized:
            self._synchronized.call()
        result: T = run_unsharded(self.model, function, *args, **kwargs)
        return result

    def _decoder(self, ids: Tensor, positions: Tensor, cache: Cache, layout: PackedLayout | Decoding) -> Tensor:
        """Hidden states of the decoder, `[B, T, H]`, for `ids` and `positions`, both `[B, T]`.

        The installed attention (`models.attention`) reads `layout`; transformers passes a mask of four dimensions
        through unchanged, so this one is a dummy.
        """
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        return self.backbone.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            layout=layout,
        )[0]

    # -- numerical check ------------------------------------------------------------------------------------------

    def _check(self) -> bool:
        """True if decoding in slots reproduces the model's logits; otherwise log the reason for using `generate`."""
        reason: str | None = "its forward pass cannot be packed"
        name = type(base_of(self.model)).__name__
        if self.backbone.separable and self.packed_forward.packs:
            if self._fuses and supports(self.model):
                self._fused = FusedDecoder(self.model, next(self.model.parameters()).dtype)
                reason, self._fused = self._failure(), None
                if reason is None:
                    return True
                self._fuses = False
                log.info("%s is sampled without fused products (%s)", name, reason)
            reason = self._failure()
        if reason:
            self._check_finite(name)
            log.warning("%s is sampled with its own generate(), because it has no plain KV cache (%s)", name, reason)
        return reason is None

    def _check_finite(self, name: str) -> None:
        """Raise `ConfigError` if the model's own logits are not finite, so that no token could be sampled."""
        if is_sharded(self.model):
            return
        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False).logits
        if not logits.isfinite().any():
            raise ConfigError(
                f"all logits of {name} are NaN or infinite: its weights are damaged, or its data type is too narrow "
                "(try float32 or bfloat16)"
            )

    def _failure(self) -> str | None:
        """The reason why decoding in slots does not reproduce the model's logits; None if it does."""
        try:
            difference = self._difference()
        except FAILURES as error:
            return first_line(error)
        return None if difference < tolerance(self.model, gradients=False) else f"its logits differ by {difference:.1e}"

    def _difference(self) -> float:
        """Relative difference between the logits after two steps in slots and those of a plain forward pass."""
        device = next(self.model.parameters()).device
        # Rows of different lengths, below the capacity; the multiples of a prime spread ids over the vocabulary.
        lengths, capacity, prime = (4, 7, 10), 16, 7919
        rows = [[(prime * (i + j)) % self.backbone.vocabulary for j in range(n)] for i, n in enumerate(lengths)]
        with torch.autocast(device.type, enabled=False):
            kv_cache = self.new_cache(len(rows), device)
            kv_cache.reserve(capacity, capacity)
            prefilled, starts, _ = self.prefill([row[:-2] for row in rows], device)
            for i, row in enumerate(rows):
                columns = torch.arange(len(row) - 2, device=device)
                kv_cache.fill(prefilled, torch.full_like(columns, i), columns, starts[i] + columns)
            kv_cache.positions = torch.tensor([len(row) - 2 for row in rows], device=device)
            for k in (-2, -1):
                kv_cache.width = int(kv_cache.positions.max()) + 1
                ours = self.step(kv_cache, torch.tensor([row[k] for row in rows], device=device))
                kv_cache.positions = kv_cache.positions + 1
            theirs = [self.model(input_ids=torch.tensor([row], device=device), use_cache=False) for row in rows]
        wanted = torch.stack([out.logits[0, -1] for out in theirs])
        return float((ours - wanted).float().norm() / wanted.float().norm().clamp(min=1e-6))


def _prefixes(prompts: Sequence[Sequence[int]]) -> list[SharedPrefix]:
    """A shared prefix for each prompt, which only one row has: the prompt is the prefix, the row's branch is empty."""
    return [SharedPrefix(rows=(i,), prefix=len(prompt), branches=(0,)) for i, prompt in enumerate(prompts)]


@dataclass(eq=False)
class BatchRow:
    """A prompt, with its response so far.

    Args:
        prompt: Token ids of the prompt.
        params: How the response is sampled.
        seed: Seed of the response.
        index: Number of the row, for the engine's watch.

    Attributes:
        completion: The response so far.
        ended: True if the response is complete.

    Example:
        >>> row = BatchRow((5, 6, 7), SamplingParams(max_tokens=8), seed=0)
        >>> row.completion.ids
        []
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    index: int = 0
    completion: Completion = field(default_factory=Completion)
    ended: bool = False

    @property
    def limit(self) -> int:
        """Largest possible number of tokens of the row."""
        return len(self.prompt) + self.params.max_tokens


class SlotBatch:
    """Rows that move through slots of a KV cache. Rows can be added and cancelled between two steps.

    It is used within `LocalEngine.decoding`.

    Args:
        engine: The engine.
        eager: Admit a waiting row as soon as a slot is free, so that it waits less. By default rows are admitted when a
            quarter of the slots is free, so that prompts are computed together.

    Attributes:
        waiting: Rows without a slot; the last one is admitted first.
        row_of_slot: The row in each slot; None if the slot is free.

    Example:
        ```python
        with engine.decoding() as is_batched:
            batch = SlotBatch(engine)
            batch.add(BatchRow(prompt, params, seed=0))
            while batch.step():
                pass
        ```
    """

    def __init__(self, engine: LocalEngine, eager: bool = False) -> None:
        self.engine, self.eager = engine, eager
        self.waiting: deque[BatchRow] = deque()
        self.row_of_slot: list[BatchRow | None] = []
        self.device = next(engine.model.parameters()).device
        self.kv_cache = engine.new_cache(0, self.device)
        self.uniforms = torch.zeros(0, 0, device=self.device)
        """Random numbers in [0, 1), one per token of the response in each slot, `[slots, tokens]`."""
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)
        """Last token of each slot, `[slots]`."""
        self.limit = 0
        """Tokens of the longest possible row."""
        self._grouped = False
        """True if `kv_cache.shared` has the groups of the rows that are in the slots now."""
        # Steps with synchronization between ranks cannot be recorded.
        graphed = engine.cuda_graphs and self.device.type == "cuda" and not engine._synchronized
        self._decode = GraphedStep(engine.step) if graphed else engine.step

    def add(self, row: BatchRow) -> None:
        """Let a row wait for a slot.

        Args:
            row: The row; `check_prompts` has accepted its prompt.
        """
        self.waiting.appendleft(row)
        self.limit = max(self.limit, row.limit)
        self.uniforms = F.pad(self.uniforms, (0, max(0, row.params.max_tokens - self.uniforms.shape[1])))

    def cancel(self, row: BatchRow) -> None:
        """Stop sampling a row, if its response is not complete yet.

        Args:
            row: A row that was added.
        """
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.row_of_slot:
            self.row_of_slot[self.row_of_slot.index(row)] = None

    def step(self) -> bool:
        """Admit waiting rows if enough slots are free, or decode one token of every slot.

        When no rows wait, free slots are dropped, a quarter of them at a time.

        Returns:
            False if no row is left.
        """
        safe_point()
        if self.waiting:
            self._grow()
        free = [slot for slot, row in enumerate(self.row_of_slot) if row is None]
        is_quarter = len(free) * 4 >= len(self.row_of_slot)
        if self.waiting and (is_quarter or (self.eager and free)):
            self._admit(free)
        elif len(free) == len(self.row_of_slot):
            return False
        else:
            if is_quarter:
                self._shrink()
            self._advance()
        return True

    def _grow(self) -> None:
        """Add slots for waiting rows, up to the number that the engine allows."""
        active = len(self.row_of_slot) - self.row_of_slot.count(None)
        more = min(self.engine.slots, active + len(self.waiting)) - len(self.row_of_slot)
        if more > 0:
            self.row_of_slot += [None] * more
            self._grouped = False
            self.tokens = F.pad(self.tokens, (0, more))
            self.uniforms = F.pad(self.uniforms, (0, 0, 0, more))
            self.kv_cache.add_slots(more)

    def _admit(self, free: list[int]) -> None:
        """Move waiting rows into free slots; a prompt that several of them share is computed once."""
        self._grouped = False
        admitted = [self.waiting.pop() for _ in range(min(len(free), len(self.waiting)))]
        distinct = list(dict.fromkeys(row.prompt for row in admitted))
        self.kv_cache.reserve(max(len(prompt) for prompt in distinct) + 1, self.limit)
        for token_group in group_by_token_budget(_prefixes(distinct), self.engine.packed_forward.budget(self.device)):
            # Each prompt of the token group, with its index in it.
            prompts = {distinct[prefix.rows[0]]: i for i, prefix in enumerate(token_group)}
            rows = [row for row in admitted if row.prompt in prompts]
            self._prefill(prompts, rows, [free.pop() for _ in rows])

    def _prefill(self, prompts: dict[tuple[int, ...], int], rows: list[BatchRow], slots: list[int]) -> None:
        """Compute prompts in one forward pass, and write their keys and values into the slots of the rows with them.

        Args:
            prompts: Token ids of each prompt of a token group, with its index in the group.
            rows: The rows that have one of these prompts.
            slots: A free slot for each row.
        """
        prefilled, starts, logits = self.engine.prefill(list(prompts), self.device)
        which = [prompts[row.prompt] for row in rows]
        lengths = [len(row.prompt) for row in rows]
        columns = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        repeats = torch.tensor(lengths, device=self.device)
        slot_ids, source = torch.tensor(slots, device=self.device), torch.tensor(which, device=self.device)
        self.kv_cache.fill(
            prefilled, slot_ids.repeat_interleave(repeats), columns, starts[source].repeat_interleave(repeats) + columns
        )
        self.kv_cache.positions[slot_ids] = repeats
        numbers = torch.zeros(len(rows), self.uniforms.shape[1])
        for i, row in enumerate(rows):
            numbers[i, : row.params.max_tokens] = uniforms([row.seed], row.params.max_tokens)[0]
        self.uniforms[slot_ids] = numbers.to(self.device)
        for row, slot in zip(rows, slots, strict=True):
            self.row_of_slot[slot] = row
        self._sample(slots, logits[source])

    def _advance(self) -> None:
        """Decode one token of every slot."""
        # Positions in use, including that of the token which is fed now.
        width = max(len(row.prompt) + len(row.completion.ids) for row in self.row_of_slot if row is not None)
        self.kv_cache.reserve(width, self.limit)
        # oneDNN generates code for each shape, so widths are rounded up; positions beyond a row's own are masked.
        self.kv_cache.width = min(-(-width // WIDTHS) * WIDTHS, self.kv_cache.capacity)
        if not self._grouped:
            self.kv_cache.shared, self._grouped = self._shared_prompts() if self.engine.shares else None, True
        # Free slots are computed as well and their results ignored; their positions only have to be valid.
        self.kv_cache.positions.clamp_(max=width - 1)
        logits = self._decode(self.kv_cache, self.tokens)
        self.kv_cache.positions += 1
        self._sample(list(range(len(self.row_of_slot))), logits)

    def _shared_prompts(self) -> SharedPrompts | None:
        """Slots with equal prompts; None if computing them in groups would not be faster."""
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, row in enumerate(self.row_of_slot):
            if row is not None:
                slots_of.setdefault(row.prompt, []).append(slot)
        rows, members = sum(map(len, slots_of.values())), list(slots_of.values())
        columns = min(map(len, slots_of)) // WIDTHS * WIDTHS
        padded = len(members) * max(map(len, members))
        if (rows - len(members)) * columns < SHARED_KEYS or padded > 2 * rows:
            return None
        return SharedPrompts.of(members, len(self.row_of_slot), columns, self.device)

    def _sample(self, slots: list[int], logits: Tensor) -> None:
        """Sample a token for the row in each of these slots.

        Args:
            slots: Slots, `[n]`.
            logits: Logits of their next token, `[n, V]`.
        """
        rows = [self.row_of_slot[slot] for slot in slots]
        slot_ids = torch.tensor(slots, device=self.device)
        lengths = torch.tensor([0 if row is None else len(row.completion.ids) for row in rows], device=self.device)
        numbers = self.uniforms[slot_ids, lengths]
        tokens, logprobs = _sample_tokens(rows, logits, numbers, lengths)
        # Within a tensor-parallel group only: rounding must not make its ranks sample different tokens.
        tokens, logprobs = broadcast(tokens), broadcast(logprobs)
        self.tokens[slot_ids] = tokens
        for slot, row, token, logprob in zip(slots, rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row is None:
                continue
            row.ended = record_token(row.completion, token, logprob, row.params, self.engine.decode)
            if row.ended:
                self.row_of_slot[slot] = None
            self.engine.watch.on_token(row.index, token, row.ended)

    def _shrink(self) -> None:
        """Drop free slots once no rows are waiting."""
        kept = torch.tensor([slot for slot, row in enumerate(self.row_of_slot) if row is not None], device=self.device)
        self.row_of_slot = [row for row in self.row_of_slot if row is not None]
        self._grouped = False
        self.tokens, self.uniforms = self.tokens[kept], self.uniforms[kept]
        self.kv_cache.select(kept)


def _sample_tokens(
    rows: Sequence[BatchRow | None], logits: Tensor, numbers: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample a token per row; rows with equal settings together. Those of free slots are arbitrary.

    Args:
        rows: The rows, `[n]`.
        logits: `[n, V]`.
        numbers: Random numbers in [0, 1), `[n]`.
        lengths: Number of tokens sampled so far, `[n]`.

    Returns:
        Tokens and log-probabilities, see `sample_token`.
    """
    groups: dict[Hashable, tuple[SamplingParams, list[int]]] = {}
    for i, row in enumerate(rows):
        if row is not None:
            groups.setdefault(row.params.distribution, (row.params, []))[1].append(i)
    if len(groups) == 1:
        [(params, _)] = groups.values()
        return sample_token(logits, numbers, params, lengths)
    tokens = torch.zeros_like(lengths)
    logprobs = torch.zeros_like(numbers, dtype=torch.promote_types(logits.dtype, torch.float32))
    for params, members in groups.values():
        which = torch.tensor(members, device=logits.device)
        tokens[which], logprobs[which] = sample_token(logits[which], numbers[which], params, lengths[which])
    return tokens, logprobs
