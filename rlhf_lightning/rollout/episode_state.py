"""An episode under way: what its policy sees next, as text and as tokens, and what it said."""

from collections.abc import Sequence
from functools import partial

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.base import MessageEnv
from rlhf_lightning.sampling.token_sampling import Completion
from rlhf_lightning.types import Episode, TrainingSample


class EpisodeState:
    """An episode under way."""

    def __init__(self, prompt: Prompt, sample: int) -> None:
        self.prompt, self.sample, self.attempt = prompt, sample, 0
        self.begin()

    def begin(self) -> None:
        """From the start."""
        prompt = self.prompt
        self.env: MessageEnv | None = None
        self.episode = Episode(prompt.messages, prompt.row, prompt.index, self.sample, prompt.tools, where=prompt.where)
        self.turn = 0
        self.text = ""
        """What the template rendered for the last turn, its generation prompt included."""
        self.body, self.ending = "", ""
        """The text of the last response, and what ended it."""
        self.last = -1
        """The last token sampled."""

    def seed(self, parts: Sequence[int]) -> int:
        """Of the next sample."""
        place = (self.prompt.index, self.sample, self.turn)
        return mix_seeds(*parts, *place, self.attempt) if self.attempt else mix_seeds(*parts, *place)

    def next_prompt(self, renderer: Renderer) -> tuple[list[int], bool]:
        """Token ids that come next, and whether they go on from the row in hand or begin another.

        What was sampled stays as it was sampled: only what is new is tokenized.
        """
        if self.env is None:
            return list(self.prompt.ids), False
        text = renderer.prompt_text(self.episode.prompt + self.episode.responses, self.episode.tools)
        previous, self.text = self.text, text
        added = _added(text, previous, self.body, self.ending) if self.turn else None
        if added is None:
            return renderer.prompt_ids(text), False
        return _tokens_after(renderer, self.ending, self.last, added), True

    def feed(self, ids: list[int], goes_on: bool) -> list[int]:
        """Put what comes next into the rows; the whole prompt of the next sample."""
        if not goes_on:
            self.episode.training_samples.append(TrainingSample([], [], []))
        return list(_extend(self.episode.training_samples[-1], ids, [0.0] * len(ids), sampled=0).ids)

    def act(self, sample: Completion, renderer: Renderer, stops: Sequence[str]) -> Message:
        """Take a response; its text as a message."""
        _extend(self.episode.training_samples[-1], sample.ids, sample.logprobs, sampled=1)
        if self.env is not None:
            self.body, self.ending = _split_ending(sample, renderer, stops)
            self.last = sample.ids[-1]
        content = renderer.decode(sample.ids)
        for stop in stops:
            content = content.partition(stop)[0].strip()
        message = {"role": "assistant", "content": content}
        self.episode.responses.append(message)
        self.episode.stop_reason = sample.stop_reason
        self.episode.stopped_by_text = bool(stops) and _by_own_text(sample, renderer)
        self.turn += 1
        return message

    def drop(self, error: Exception) -> None:
        """It failed, and counts for nothing but that."""
        episode = self.episode
        episode.stop_reason, episode.error = "failed", reason(error)
        episode.training_samples, episode.environment_reward, episode.metrics = [], 0.0, {}


def _extend(training_sample: TrainingSample, ids: list[int], logprobs: list[float], sampled: int) -> TrainingSample:
    training_sample.ids += ids
    training_sample.loss_mask += [sampled] * len(ids)
    training_sample.sampling_logprobs += logprobs
    return training_sample


def _split_ending(sample: Completion, renderer: Renderer, stops: Sequence[str]) -> tuple[str, str]:
    """The text of a response, and what ended it: a stop token, or a stop text with what its last token has beyond."""
    decode = partial(renderer.tokenizer.decode, skip_special_tokens=False)
    if sample.ids and sample.ids[-1] in renderer.stop_token_ids:
        return decode(sample.ids[:-1]), decode(sample.ids[-1:])
    text = decode(sample.ids)
    places = [place for stop in (*renderer.stop_strings, *stops) if (place := text.find(stop)) >= 0]
    cut = min(places, default=len(text))
    return text[:cut], text[cut:]


def _added(text: str, previous: str, body: str, ending: str) -> str | None:
    """What a rendering adds to the one before it and a response, or None where it shows either of them anew.

    White space around the response does not count: messages are stripped, and the policy goes on from what it sampled.
    """
    if not ending or not text.startswith(previous):
        return None
    rest, body = text[len(previous) :].lstrip(), body.strip()
    if not rest.startswith(body):
        return None
    rest = rest[len(body) :]
    for after in (rest, rest.lstrip()):
        if after.startswith(ending):
            return after[len(ending) :]
    return None


def _by_own_text(sample: Completion, renderer: Renderer) -> bool:
    """Whether one of the sampler's stop texts ended a response, not the end that its template gives a turn."""
    if sample.stop_reason != "stop" or sample.ids[-1] in renderer.stop_token_ids:
        return False
    text = renderer.tokenizer.decode(sample.ids)
    return not any(stop in text for stop in renderer.stop_strings)


def _tokens_after(renderer: Renderer, ending: str, last: int, added: str) -> list[int]:
    """Ids of a text as they are after what ended the response: a stop token, `last`, or a text.

    By itself its first token might differ: some tokenizers put a space before a text, some end tokens swallow one.
    """
    tokenizer = renderer.tokenizer
    stopped = last in renderer.stop_token_ids
    lead = [last] if stopped else tokenizer(ending, add_special_tokens=False)["input_ids"]
    whole = tokenizer(ending + added, add_special_tokens=False, verbose=False)["input_ids"]
    if whole[: len(lead)] == lead:
        return list(whole[len(lead) :])
    return list(tokenizer(added, add_special_tokens=False, verbose=False)["input_ids"])


def reason(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
