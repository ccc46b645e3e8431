"""A generative reward model: a causal language model reads a response and writes its score as text."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import ConfigError, UserError, short
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.language_model import LanguageModel
from rlhf_lightning.rewards.base import EpisodeScorer, check_finite
from rlhf_lightning.rewards.model import ModelBased, PlacedModel
from rlhf_lightning.rewards.normalization import Normalizer
from rlhf_lightning.rewards.verifiers import absent, as_number, compiled, find_answer
from rlhf_lightning.types import Episode, Message

log = logging.getLogger(__name__)
FAILURES = ("skip", "lowest", "fail")
PROMPT = """Rate how well the response answers the prompt.

Prompt:
{prompt}

Response:
{response}

Write one line, "Score: NUMBER", with a number from {minimum} (worst) to {maximum} (best)."""
SCORE = r"[Ss]core[^:\n]*:\s*([-+]?(?:\d+\.?\d*|\.\d+))"
"""Finds the number in `Score: 0.7` or `Score of the response: 0.7`."""
_NAME = re.compile(r"\{(\w+)\}")
_KNOWN = ("prompt", "response", "minimum", "maximum")


class GenerativeReward(ModelBased):
    """A causal language model that grades responses in text: the number in its answer to a grading prompt is the score.

    The model may be any causal language model, including a preference model of this kind (`SequenceLogprob`,
    `ImplicitReward`). Equal responses get equal scores, because an answer is seeded by its grading prompt.

    A response cannot end the judge's prompt, because special tokens of the judge's tokenizer are removed from it. It
    can still address the judge in words, so compare the scores with another reward.

    Args:
        model: Model folder, Hub id or GGUF file.
        prompt: The grading prompt. `{prompt}` is replaced by the conversation before the response, `{response}` by the
            response, `{minimum}` and `{maximum}` by the bounds, and any other name by a column of the data.
        answer_start: Start of the judge's answer, which the judge continues. Empty for none.
        pattern: Regular expression that finds the number in the judge's answer, including `answer_start`: its last
            match, or that match's first group.
        minimum: Lowest score.
        maximum: Highest score.
        on_failure: What to do with an answer without a number within the bounds, or a grading prompt that is too long
            for the judge's context: `skip` (the term does not apply to the episode), `lowest` (the score is `minimum`)
            or `fail` (the run ends). The fraction of failures is logged as `reward_NAME_failed`.
        system: System message of the judge; by default the one that it was trained with.
        sampler: Sampling settings of the judge; by default greedy, with 16 tokens.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        dtype: Data type of the judge's weights.
        device: Device of the judge (`cpu`, `cuda:1`); by default the policy's device.
        normalize: Normalizes scores before they are clipped and weighted.
        clip: Largest absolute value after normalization.
        offload: Keep the weights in CPU memory except while a round is scored.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Raises:
        ConfigError: If the prompt lacks `{response}`, the pattern is invalid, `minimum` is not below `maximum`, or
            `on_failure` is unknown.

    Example:
        ```python
        reward = GenerativeReward("runs/mint/reward_model/model", minimum=1, maximum=10)
        ```
    """

    def __init__(
        self,
        model: str,
        prompt: str = PROMPT,
        answer_start: str = "Score:",
        pattern: str = SCORE,
        minimum: float = 0.0,
        maximum: float = 1.0,
        on_failure: str = "skip",
        system: str | None = None,
        sampler: Sampler | None = None,
        weight: float = 1.0,
        name: str = "generative",
        dtype: str = "float32",
        device: str | None = None,
        normalize: Normalizer | None = None,
        clip: float | None = None,
        offload: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name, dtype, device, normalize, clip, offload)
        self.skip_special_tokens = skip_special_tokens
        if "{response}" not in prompt:
            raise ConfigError(
                f"the reward {name}: the prompt has no {{response}}, so the judge would not see the response"
            )
        check_finite(f"the minimum of the reward {name}", minimum)
        check_finite(f"the maximum of the reward {name}", maximum)
        if minimum >= maximum:
            raise ConfigError(
                f"the reward {name}: minimum is {minimum} and maximum is {maximum}; minimum must be below maximum"
            )
        if on_failure not in FAILURES:
            raise ConfigError(
                f"the reward {name}: on_failure is {on_failure!r}; it must be one of {', '.join(FAILURES)}"
            )
        self.model, self.prompt, self.answer_start, self.system = model, prompt, answer_start, system
        self.pattern = compiled(pattern, f"the reward {name}: pattern")
        self.minimum, self.maximum, self.on_failure = minimum, maximum, on_failure
        self.sampler = sampler or Sampler(max_tokens=16, temperature=0.0)
        self.columns = sorted({*_NAME.findall(prompt)} - {*_KNOWN})

    def check(self, prompts: Sequence[Prompt]) -> None:
        super().check(prompts)
        check_columns(f"the reward {self.name}: the prompt contains", self.columns, prompts, _KNOWN)

    def build(self, renderer: Renderer) -> EpisodeScorer:
        asked = {} if self.system is None else {"system": self.system}
        return GenerativeScores(self, LanguageModel(self.model, self.dtype, asked))


@dataclass(frozen=True)
class _Graded:
    """The judge's result for an episode: a score, or the reason why there is none."""

    score: float | None
    failure: str = ""


class GenerativeScores(PlacedModel):
    """The scores of a judge.

    Args:
        reward: The settings.
        judge: The judge.
    """

    def __init__(self, reward: GenerativeReward, judge: LanguageModel) -> None:
        super().__init__(judge, reward.device, reward.offload)
        self.reward, self.renderer = reward, judge.renderer
        self.sampler = reward.sampler.build(judge.model, judge.renderer)
        self._start = judge.tokenizer(reward.answer_start, add_special_tokens=False)["input_ids"]

    def score(self, episodes: Sequence[Episode]) -> Sequence[float | None]:
        """See `Reward.score`; None for an episode without a response or without a column that the prompt contains."""
        indices = [i for i, episode in enumerate(episodes) if applies(episode, self.reward.columns)]
        scores: list[float | None] = [None] * len(episodes)
        graded = self._graded([episodes[i] for i in indices])
        for i, grade in zip(indices, graded, strict=True):
            episodes[i].details[f"{self.reward.name}_failed"] = float(bool(grade.failure))
            scores[i] = self.reward.minimum if grade.failure and self.reward.on_failure == "lowest" else grade.score
        self._report([episodes[i] for i in indices], graded)
        return scores

    def _graded(self, episodes: Sequence[Episode]) -> list[_Graded]:
        prompts = [self.renderer.prompt_ids(self._question(episode)) for episode in episodes]
        longest = None if self.sampler.context is None else self.sampler.context - self.sampler.params.max_tokens
        fits = [longest is None or len(ids) <= longest for ids in prompts]
        with self.on_device():
            rows = [ids for ids, fit in zip(prompts, fits, strict=True) if fit]
            answers = iter(self.sampler.generate(rows, [_seed(ids) for ids in rows]))
        return [
            self._read(self.renderer.decode([*self._start, *next(answers).ids]))
            if fit
            else _Graded(None, f"its grading prompt has {len(ids)} tokens, but the judge has room for only {longest}")
            for ids, fit in zip(prompts, fits, strict=True)
        ]

    def _question(self, episode: Episode) -> str:
        """The text that the judge continues."""
        values = {
            **{column: str(episode.row[column]) for column in self.reward.columns},
            "prompt": transcript_before(episode),
            "response": self.reward.text(episode),
            "minimum": f"{self.reward.minimum:g}",
            "maximum": f"{self.reward.maximum:g}",
        }
        # In one pass, so that names in inserted texts are not replaced.
        text = _NAME.sub(lambda match: self._spelled(values[match[1]]), self.reward.prompt)
        return self.renderer.prompt_text([{"role": "user", "content": text}]) + self.reward.answer_start

    def _spelled(self, text: str) -> str:
        """A text without the special tokens of the judge's tokenizer, which could end the judge's prompt."""
        for marker in self.renderer.template.markers:
            text = text.replace(marker, " ")
        return text

    def _read(self, text: str) -> _Graded:
        """The number in an answer, which includes `answer_start`."""
        found = find_answer(self.reward.pattern, text)
        number = None if found is None else as_number(found)
        if number is None or not self.reward.minimum <= number <= self.reward.maximum:
            bounds = f"from {self.reward.minimum:g} to {self.reward.maximum:g}"
            return _Graded(None, f"the pattern finds no number {bounds} in the judge's answer {short(text)}")
        return _Graded(float(number))

    def _report(self, episodes: Sequence[Episode], graded: Sequence[_Graded]) -> None:
        """Raise an error about a failure, or warn if most answers have no number."""
        failed = [(e, g.failure) for e, g in zip(episodes, graded, strict=True) if g.failure]
        if not failed:
            return
        episode, why = failed[0]
        first = f"the reward {self.reward.name}, {episode.label}: {why}"
        if self.reward.on_failure == "fail":
            raise UserError(f"{first}. Change prompt, answer_start, pattern or sampler, or set on_failure: skip")
        if 2 * len(failed) > len(graded):
            log.warning("%d of %d responses got no score. The first: %s", len(failed), len(graded), first)


def check_columns(what: str, columns: Sequence[str], prompts: Sequence[Prompt], known: Sequence[str] = ()) -> None:
    """Raise `ConfigError` if no row has one of the columns that a judge is shown.

    Args:
        what: Where the columns are named, for the message.
        columns: The columns.
        prompts: Prompts of the training data.
        known: Other names that are available.
    """
    available = [*known, *sorted({key for prompt in prompts for key in prompt.row})]
    for column in columns:
        if prompts and all(absent(prompt.row.get(column)) for prompt in prompts):
            raise ConfigError(f"{what} {{{column}}}, but no row has this column; available are {', '.join(available)}")


def applies(episode: Episode, columns: Sequence[str]) -> bool:
    """True if an episode has a response, and its row has a value in each of the columns that a judge is shown."""
    answered = any(message["role"] == "assistant" for message in episode.responses)
    return answered and not any(absent(episode.row.get(column)) for column in columns)


def transcript_before(episode: Episode) -> str:
    """The conversation before the policy's last message, as text."""
    last = max(i for i, message in enumerate(episode.responses) if message["role"] == "assistant")
    return transcript([*episode.prompt, *episode.responses[:last]])


def transcript(messages: Sequence[Message]) -> str:
    """Messages as text: the content of a single message, or a paragraph with the role for each of several."""
    if len(messages) == 1:
        return messages[0]["content"] or ""
    return "\n\n".join(f"{message['role']}: {message['content'] or ''}" for message in messages)


def _seed(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:4], "big")
