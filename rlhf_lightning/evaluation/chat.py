"""Chat with a policy. Answers are shown while they are sampled."""

from collections.abc import Callable, Sequence
from typing import Unpack

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Policy, SamplingFilters
from rlhf_lightning.generation.local_engine import LocalEngine, Watch
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.types import Message


class Conversation:
    """A conversation with one policy.

    Args:
        policy: The policy.
        system: System message; by default that of the policy.
        max_tokens: Token budget of an answer.
        temperature: Temperature of an answer.
        seed: Seed of the answers, combined with the number of the turn.
        **filters: `top_p`, `top_k` and `min_p` of `Sampler`.

    Example:
        >>> chat = Conversation(Policy("runs/sft/model"))  # doctest: +SKIP
        >>> chat.reply("Hello!", show=print)  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        **filters: Unpack[SamplingFilters],
    ) -> None:
        self.policy, self.system, self.seed = policy, system, seed
        self.sampler = Sampler(max_tokens, temperature, **filters).build(policy.model, policy.renderer)
        self.turn = 0
        self.messages: list[Message] = []
        self.begin()

    def begin(self) -> None:
        """Start a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """Answer a message.

        Args:
            text: The user's message.
            show: Called with each piece of the answer as soon as it is sampled.

        Returns:
            The whole answer.

        Raises:
            UserError: If the context has no room for an answer, or the chat template refuses the message. The
                conversation is then unchanged.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.policy.renderer.prompt(messages)
        budget = self.sampler.params.max_tokens
        if self.sampler.context and len(ids) + budget > self.sampler.context:
            raise UserError(
                f"the conversation ({len(ids)} tokens) and an answer of {budget} tokens exceed the model's context of "
                f"{self.sampler.context} tokens: start a new conversation with /new, or lower --max_tokens"
            )
        stream = Stream(self.policy.renderer, self.sampler.params.stop_strings, show)
        if isinstance(self.sampler.engine, LocalEngine):
            self.sampler.engine.watch = stream
        [sample] = self.sampler.generate([ids], [1_000_003 * self.seed + self.turn])
        answer = stream.rest(sample.ids)
        self.turn += 1
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


class Stream(Watch):
    """Decodes tokens, and shows text as soon as it is final.

    It holds back incomplete characters, white space that may be at the end, and text that may begin a stop text.

    Args:
        renderer: Renderer that decodes the tokens.
        stops: The sampler's stop texts.
        show: Called with each new piece of text.

    Example:
        >>> stream = Stream(renderer, stops=(), show=print)  # doctest: +SKIP
    """

    def __init__(self, renderer: Renderer, stops: Sequence[str], show: Callable[[str], None]) -> None:
        self.renderer, self.stops, self.show = renderer, stops, show
        self.ids: list[int] = []
        self.shown = ""

    def on_token(self, row: int, token: int, ended: bool) -> None:
        """Add a token, and show the text that is final."""
        self.ids.append(token)
        text = self.renderer.decode(self.ids)
        if text.endswith("\ufffd"):
            return
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._extend(text[: len(text) - held].rstrip())

    def rest(self, ids: Sequence[int]) -> str:
        """Show the rest of an answer, and return the whole answer."""
        text = self.renderer.decode(ids)
        self._extend(text)
        if not text.startswith(self.shown):
            self.show(f"\n{text}")  # later tokens changed the text of earlier ones
        return text

    def _extend(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text
