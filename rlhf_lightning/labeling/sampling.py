"""Samples the answers that people compare, in the background, ahead of the annotators."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.evaluation.policy import Policy, SamplingSettings
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.labeling.comparisons import Candidate, Comparison, Question, distinct
from rlhf_lightning.labeling.ensemble import Ensemble
from rlhf_lightning.labeling.queue import LabelQueue
from rlhf_lightning.types import JSON, Episode

log = logging.getLogger(__name__)


@dataclass
class AnsweringModel:
    """A model that answers the prompts.

    Attributes:
        name: Name in the records.
        policy: The model.
        prompts: All prompts, rendered for this model.
        sampling: Sampling settings.
    """

    name: str
    policy: Policy
    prompts: list[Prompt]
    sampling: SamplingSettings

    def sampling_record(self, max_tokens: int) -> dict[str, JSON]:
        """All sampling settings as plain values, also those that have their default.

        Args:
            max_tokens: Token budget of an answer.
        """
        params = Sampler(max_tokens, **self.sampling).params
        return {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
        }


class AnswerSampler:
    """Samples two answers to each prompt, until enough comparisons are ready for the annotators.

    One model answers each prompt twice. Of several models, two answer a prompt; the pairs of models take turns.

    Args:
        queue: Receives the comparisons.
        models: The models.
        max_tokens: Token budget of an answer.
        seed: Seed of the answers.
        chunk: Number of prompts that are answered together.
        ahead: Number of comparisons that are kept ready for each annotator.
        ensemble: Preference models whose disagreement about each comparison is recorded.

    Raises:
        ConfigError: If a prompt and `max_tokens` exceed a model's context.

    Example:
        >>> sampler = AnswerSampler(queue, [model], max_tokens=256, seed=0)  # doctest: +SKIP
        >>> sampler.start()  # doctest: +SKIP
        >>> sampler.stop()  # doctest: +SKIP
    """

    def __init__(
        self,
        queue: LabelQueue,
        models: Sequence[AnsweringModel],
        max_tokens: int,
        seed: int,
        chunk: int = 4,
        ahead: int = 32,
        ensemble: Ensemble | None = None,
    ) -> None:
        for model in models:
            model.policy.check_room(model.prompts, max_tokens)
        self.queue, self.models, self.max_tokens, self.seed = queue, models, max_tokens, seed
        self.chunk, self.ahead, self.ensemble = chunk, ahead, ensemble
        self._pairs = list(combinations(range(len(models)), 2)) or [(0, 0)]
        self._stopping = threading.Event()
        self._executor = ThreadPoolExecutor(1, "sampling")
        self._running: Future[None] | None = None

    def start(self) -> None:
        """Begin to sample in another thread."""
        self._running = self._executor.submit(self.run)

    @property
    def is_running(self) -> bool:
        """True while more answers may come."""
        return self._running is not None and not self._running.done()

    @property
    def failed(self) -> bool:
        """True if sampling ended with an error, which `stop` raises."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def stop(self) -> None:
        """Wait until the answers that are being sampled are complete; raises the error of sampling, if any."""
        self._stopping.set()
        if self._running is not None:
            self._running.result()
        self._executor.shutdown()

    def run(self) -> None:
        """Sample until all prompts are answered or `stop` is called."""
        for prompts in self._chunks():
            while not self.queue.wait_until_short(self.ahead, timeout=0.5):
                if self._stopping.is_set():
                    return
            if self._stopping.is_set():
                return
            comparisons = distinct(self._compare(prompts))
            if self.ensemble is not None:
                comparisons = self.ensemble.scored(comparisons)
            self.queue.add(comparisons)
        log.info("all prompts are answered")

    def _chunks(self) -> Iterator[list[int]]:
        """Numbers of the prompts without a comparison; first one alone, so that the first page soon has answers."""
        answered = {comparison.question.key for comparison in list(self.queue.store.comparisons.values())}
        left = []
        for index, prompt in enumerate(self.models[0].prompts):
            if (key := _question(prompt).key) not in answered:
                answered.add(key)
                left.append(index)
        yield from (part for part in (left[:1], *_parts(left[1:], self.chunk)) if part)

    def _compare(self, prompts: Sequence[int]) -> Iterator[Comparison]:
        """Comparisons of the answers to some prompts, sampled together for each model."""
        asked = {index: self._pairs[index % len(self._pairs)] for index in prompts}
        answers: dict[tuple[int, int], list[Candidate]] = {}
        for number, model in enumerate(self.models):
            own = [model.prompts[index] for index, pair in asked.items() if number in pair]
            samples = 2 if len(self.models) == 1 else 1
            if own:
                sampled = model.policy.answer(own, self.max_tokens, self.seed, samples, **model.sampling)
                for episode in sampled:
                    answers.setdefault((episode.group, number), []).append(self._candidate(model, episode))
        for index, (one, other) in asked.items():
            first, second = answers[index, one][0], answers[index, other][-1]
            yield Comparison(_question(self.models[0].prompts[index]), (first, second))

    def _candidate(self, model: AnsweringModel, episode: Episode) -> Candidate:
        source: dict[str, JSON] = {
            "model": model.name,
            "sampling": {**model.sampling_record(self.max_tokens), "seed": self.seed},
            "prompt": episode.group,
            "sample": episode.sample_index,
            "stop_reason": episode.stop_reason,
            "response_tokens": episode.response_tokens,
        }
        return Candidate(episode.responses, source)


def _question(prompt: Prompt) -> Question:
    category = prompt.row.get("category")
    return Question(prompt.messages, prompt.tools, None if category is None else str(category))


def _parts(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    yield from (list(numbers[start : start + size]) for start in range(0, len(numbers), size))
