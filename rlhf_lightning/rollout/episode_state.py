"""State of an unfinished episode: the responses so far, and the tokens that precede the next response."""

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
        sample_index: Index of the episode in its group.

    Example:
        >>> prompt = Prompt([{"role": "user", "content": "2 + 2?"}], {}, index=0, ids=[5, 6])  # doctest: +SKIP
        >>> EpisodeState(prompt, sample_index=0).turn  # doctest: +SKIP
        0
    """

    def __init__(self, prompt: Prompt, sample_index: int) -> None:
        self.prompt, self.sample_index, self.attempt = prompt, sample_index, 0
        self.begin()

    def begin(self) -> None:
        """Start or restart the episode."""
        prompt = self.prompt
        self.env: MessageEnv | None = None
        self.episode = Episode(
            prompt.messages, prompt.row, prompt.index, self.sample_index, prompt.tools, where=prompt.where
        )
        self.turn = 0
        self.text = ""
        """Rendered prompt of the last turn, including its generation prompt."""
        self.body, self.ending = "", ""
        """Text of the last response, and the text that ended it."""
        self.last = -1
        """The last sampled token."""

    def seed(self, parts: Sequence[int]) -> int:
        """Seed of the next response.

        Args:
            parts: Seeds of the run and of the round.
        """
        position = (self.prompt.index, self.sample_index, self.turn)
        return mix_seeds(*parts, *position, self.attempt) if self.attempt else mix_seeds(*parts, *position)

    def next_prompt(self, renderer: Renderer) -> tuple[list[int], bool]:
        """Token ids to add before the next response.

        Sampled tokens are kept as they were sampled; only new text is tokenized.

        Args:
            renderer: Turns messages into tokens.

        Returns:
            The ids, and True if they continue the current training sample, False if they begin a new one.
        """
        if self.env is None:
            return list(self.prompt.ids), False
        text = renderer.prompt_text(self.episode.prompt + self.episode.responses, self.episode.tools)
        previous, self.text = self.text, text
        added = _added_text(text, previous, self.body, self.ending) if self.turn else None
        if added is None:
            return renderer.prompt_ids(text), False
        return _tokenize_after(renderer, self.ending, self.last, added), True

    def add_prompt(self, ids: list[int], continues: bool) -> list[int]:
        """Add prompt tokens to the training samples, and return all tokens that precede the next response.

        Args:
            ids: The ids, as `next_prompt` returns them.
            continues: True if they continue the current training sample.
        """
        if not continues:
            self.episode.training_samples.append(TrainingSample([], [], []))
        return list(_extend(self.episode.training_samples[-1], ids, [0.0] * len(ids), sampled=0).ids)

    def add_response(self, completion: Completion, renderer: Renderer, stops: Sequence[str]) -> Message:
        """Add a response, and return it as a message.

        Args:
            completion: The sampled response.
            renderer: Turns tokens into text.
            stops: The sampler's stop texts; the message ends before the first of them.
        """
        _extend(self.episode.training_samples[-1], completion.ids, completion.logprobs, sampled=1)
        if self.env is not None:
            self.body, self.ending = _split_ending(completion, renderer, stops)
            self.last = completion.ids[-1]
        content = renderer.decode(completion.ids)
        for stop in stops:
            content = content.partition(stop)[0].strip()
        message: Message = {"role": "assistant", "content": content}
        self.episode.responses.append(message)
        self.episode.stop_reason = completion.stop_reason
        self.episode.stopped_by_text = bool(stops) and _stopped_by_sampler_text(completion, renderer)
        self.turn += 1
        return message

    def drop(self, error: Exception) -> None:
        """Mark the episode as failed, and clear its results."""
        episode = self.episode
        episode.stop_reason, episode.error = "failed", reason(error)
        episode.training_samples, episode.environment_reward, episode.metrics = [], 0.0, {}


def _extend(training_sample: TrainingSample, ids: list[int], logprobs: list[float], sampled: int) -> TrainingSample:
    training_sample.ids += ids
    training_sample.loss_mask += [sampled] * len(ids)
    training_sample.sampling_logprobs += logprobs
    return training_sample


def _split_ending(completion: Completion, renderer: Renderer, stops: Sequence[str]) -> tuple[str, str]:
    """Split a response into its text and its ending.

    The ending is a stop token, or a stop text together with the rest of the token that completed it.
    """
    decode = partial(renderer.tokenizer.decode, skip_special_tokens=False)
    if completion.ids and completion.ids[-1] in renderer.stop_token_ids:
        return decode(completion.ids[:-1]), decode(completion.ids[-1:])
    text = decode(completion.ids)
    positions = [position for stop in (*renderer.stop_strings, *stops) if (position := text.find(stop)) >= 0]
    cut = min(positions, default=len(text))
    return text[:cut], text[cut:]


def _added_text(text: str, previous: str, body: str, ending: str) -> str | None:
    """Text that a rendering appends to the previous rendering and the response.

    Whitespace around the response is ignored, because messages are stripped but the policy continues from the tokens
    that it sampled.

    Args:
        text: The new rendering.
        previous: The previous rendering, the prompt of the response.
        body: The text of the response.
        ending: The text that ended the response.

    Returns:
        The appended text, or None if the template rendered the previous text or the response differently.
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


def _stopped_by_sampler_text(completion: Completion, renderer: Renderer) -> bool:
    """True if a stop text of the sampler ended the response, rather than the template's end of turn."""
    if completion.stop_reason != "stop" or completion.ids[-1] in renderer.stop_token_ids:
        return False
    text = renderer.tokenizer.decode(completion.ids)
    return not any(stop in text for stop in renderer.stop_strings)


def _tokenize_after(renderer: Renderer, ending: str, last: int, added: str) -> list[int]:
    """Tokenize a text as the continuation of the response's ending: the stop token `last`, or a stop text.

    Tokenized alone, its first token might differ: some tokenizers prepend a space to a text, and some end tokens absorb
    a following space.
    """
    tokenizer = renderer.tokenizer
    is_token = last in renderer.stop_token_ids
    prefix = [last] if is_token else tokenizer(ending, add_special_tokens=False)["input_ids"]
    both = tokenizer(ending + added, add_special_tokens=False, verbose=False)["input_ids"]
    if both[: len(prefix)] == prefix:
        return list(both[len(prefix) :])
    return list(tokenizer(added, add_special_tokens=False, verbose=False)["input_ids"])


def reason(error: Exception) -> str:
    """Class and message of an exception."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
