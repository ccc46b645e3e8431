"""State of an unfinished episode: the tokens that the policy sees next, and the responses so far."""

from collections.abc import Sequence
from functools import partial

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.environments.base import MessageEnv
from rlhf_lightning.types import Completion, Episode, Message, TrainingSample


class EpisodeState:
    """State of an unfinished episode.

    Args:
        prompt: The prompt.
        sample: Index of the episode in its group.

    Example:
        >>> prompt = Prompt([{"role": "user", "content": "2 + 2?"}], {}, index=0, ids=[5, 6])  # doctest: +SKIP
        >>> EpisodeState(prompt, sample=0).turn  # doctest: +SKIP
        0
    """

    def __init__(self, prompt: Prompt, sample: int) -> None:
        self.prompt, self.sample, self.attempt = prompt, sample, 0
        self.begin()

    def begin(self) -> None:
        """Start the episode, or start it again."""
        prompt = self.prompt
        self.env: MessageEnv | None = None
        self.episode = Episode(prompt.messages, prompt.row, prompt.index, self.sample, prompt.tools, where=prompt.where)
        self.turn = 0
        self.text = ""
        """Rendered prompt of the last turn, including its generation prompt."""
        self.body, self.ending = "", ""
        """Text of the last response, and the text of what ended it."""
        self.last = -1
        """The last sampled token."""

    def seed(self, parts: Sequence[int]) -> int:
        """Seed of the next response.

        Args:
            parts: Seed of the run and of the round.
        """
        place = (self.prompt.index, self.sample, self.turn)
        return mix_seeds(*parts, *place, self.attempt) if self.attempt else mix_seeds(*parts, *place)

    def next_prompt(self, renderer: Renderer) -> tuple[list[int], bool]:
        """Token ids to add before the next response.

        Sampled tokens are kept as they were sampled; only new text is tokenized.

        Args:
            renderer: Turns messages into tokens.

        Returns:
            The ids, and True if they continue the current training sample, False if they begin another one.
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
        """Add prompt tokens to the training samples, and return all tokens that precede the next response.

        Args:
            ids: The ids, as `next_prompt` returns them.
            goes_on: True if they continue the current training sample.
        """
        if not goes_on:
            self.episode.training_samples.append(TrainingSample([], [], []))
        return list(_extend(self.episode.training_samples[-1], ids, [0.0] * len(ids), sampled=0).ids)

    def act(self, sample: Completion, renderer: Renderer, stops: Sequence[str]) -> Message:
        """Add a response, and return it as a message.

        Args:
            sample: The sampled response.
            renderer: Turns tokens into text.
            stops: The sampler's stop texts; the message ends before the first of them.
        """
        _extend(self.episode.training_samples[-1], sample.ids, sample.logprobs, sampled=1)
        if self.env is not None:
            self.body, self.ending = _split_ending(sample, renderer, stops)
            self.last = sample.ids[-1]
        content = renderer.decode(sample.ids)
        for stop in stops:
            content = content.partition(stop)[0].strip()
        message: Message = {"role": "assistant", "content": content}
        self.episode.responses.append(message)
        self.episode.stop_reason = sample.stop_reason
        self.episode.stopped_by_text = bool(stops) and _by_own_text(sample, renderer)
        self.turn += 1
        return message

    def drop(self, error: Exception) -> None:
        """Mark the episode as failed and clear its results; it then only counts as a failure."""
        episode = self.episode
        episode.stop_reason, episode.error = "failed", reason(error)
        episode.training_samples, episode.environment_reward, episode.metrics = [], 0.0, {}


def _extend(training_sample: TrainingSample, ids: list[int], logprobs: list[float], sampled: int) -> TrainingSample:
    training_sample.ids += ids
    training_sample.loss_mask += [sampled] * len(ids)
    training_sample.sampling_logprobs += logprobs
    return training_sample


def _split_ending(sample: Completion, renderer: Renderer, stops: Sequence[str]) -> tuple[str, str]:
    """Split a response into its text and what ended it.

    The ending is a stop token, or a stop text together with the rest of the token that completed it.
    """
    decode = partial(renderer.tokenizer.decode, skip_special_tokens=False)
    if sample.ids and sample.ids[-1] in renderer.stop_token_ids:
        return decode(sample.ids[:-1]), decode(sample.ids[-1:])
    text = decode(sample.ids)
    places = [place for stop in (*renderer.stop_strings, *stops) if (place := text.find(stop)) >= 0]
    cut = min(places, default=len(text))
    return text[:cut], text[cut:]


def _added(text: str, previous: str, body: str, ending: str) -> str | None:
    """Text that a rendering adds to the previous rendering and the response.

    White space around the response is ignored: messages are stripped, and the policy continues from the tokens it
    sampled.

    Returns:
        The added text, or None if the template rendered the previous text or the response in another way.
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
    """True if one of the sampler's stop texts ended a response, not the template's end of turn."""
    if sample.stop_reason != "stop" or sample.ids[-1] in renderer.stop_token_ids:
        return False
    text = renderer.tokenizer.decode(sample.ids)
    return not any(stop in text for stop in renderer.stop_strings)


def _tokens_after(renderer: Renderer, ending: str, last: int, added: str) -> list[int]:
    """Tokenize a text as the continuation of what ended the response: the stop token `last`, or a stop text.

    Tokenized alone, its first token might differ: some tokenizers put a space before a text, and some end tokens absorb
    a following space.
    """
    tokenizer = renderer.tokenizer
    stopped = last in renderer.stop_token_ids
    lead = [last] if stopped else tokenizer(ending, add_special_tokens=False)["input_ids"]
    whole = tokenizer(ending + added, add_special_tokens=False, verbose=False)["input_ids"]
    if whole[: len(lead)] == lead:
        return list(whole[len(lead) :])
    return list(tokenizer(added, add_special_tokens=False, verbose=False)["input_ids"])


def reason(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
