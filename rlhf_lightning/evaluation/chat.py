"""Chat with a policy. Answers are shown while they are sampled."""

from collections.abc import Callable
from typing import Unpack

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Policy, SamplingFilters
from rlhf_lightning.filtering.filter import Filter
from rlhf_lightning.generation.local_engine import LocalEngine, Watch
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.generation.text_stream import TextStream
from rlhf_lightning.types import FilterDecision, Message


class Conversation:
    """A conversation with one policy.

    Args:
        policy: The policy.
        system: System message; by default that of the policy.
        max_tokens: Token budget of an answer.
        temperature: Temperature of an answer.
        seed: Seed of the answers, combined with the number of the turn.
        filter: Checks the user's messages and the answers; None to show everything.
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
        filter: Filter | None = None,
        **filters: Unpack[SamplingFilters],
    ) -> None:
        self.filter = filter
        self.decisions: list[FilterDecision] = []
        """What the filter decided about the last message and, if that was answered, about its answer."""
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

        With a filter, an answer is shown when it is complete. The refusal of the filter replaces an answer that is
        dropped or blocked, and is the answer to a message that is; neither becomes part of the conversation. Block also
        starts a new conversation.

        Args:
            text: The user's message.
            show: Called with each piece of the answer as soon as it is sampled.

        Returns:
            The whole answer, as it was shown.

        Raises:
            UserError: If the context has no room for an answer, or the chat template refuses the message. The
                conversation is then unchanged.
        """
        self.decisions = []
        if self.filter is not None and self._withheld(self.filter, text, "user"):
            show(self.filter.refusal)
            return self.filter.refusal
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.policy.renderer.prompt(messages)
        budget = self.sampler.params.max_tokens
        if self.sampler.context and len(ids) + budget > self.sampler.context:
            raise UserError(
                f"the conversation ({len(ids)} tokens) and an answer of {budget} tokens exceed the model's context of "
                f"{self.sampler.context} tokens: start a new conversation with /new, or lower --max_tokens"
            )
        stream = TextStream(self.policy.renderer, self.sampler.params.stop_strings)
        assert isinstance(self.sampler.engine, LocalEngine)  # no other one is configured
        self.sampler.engine.watch = _Shown(stream, show if self.filter is None else _hold_back)
        self.sampler.generate([ids], [1_000_003 * self.seed + self.turn])
        rest = stream.finish()
        self.turn += 1
        if self.filter is not None and self._withheld(self.filter, stream.text, "assistant"):
            show(self.filter.refusal)
            return self.filter.refusal
        show(rest if self.filter is None else stream.text)
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _withheld(self, filter: Filter, text: str, role: str) -> bool:
        """True if a text must not be shown; after a block, a new conversation begins."""
        decision = filter.check(text, role)
        self.decisions.append(decision)
        if decision.action == "block":
            self.begin()
        return decision.withheld


def _hold_back(piece: str) -> None:
    """Show nothing: the filter decides about the complete answer."""


class _Shown(Watch):
    """Passes tokens to a stream, and shows the text that is final."""

    def __init__(self, stream: TextStream, show: Callable[[str], None]) -> None:
        self.stream, self.show = stream, show

    def on_token(self, row: int, token: int, ended: bool) -> None:
        self.show(self.stream.add(token))
