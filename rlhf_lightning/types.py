"""Episodes and the rows of tokens they leave to train on."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.conversations import Message

STOP_REASONS = ("stop", "length", "tokens", "turns", "context", "failed")


@dataclass
class TrainingSample:
    """One row of tokens of an episode. A conversation whose template re-renders earlier turns leaves several.

    All lists have the length of `ids`; numbers are 0 where `loss_mask` is 0.
    """

    ids: list[int]
    loss_mask: list[int]
    """1 on the tokens that the policy sampled."""
    sampling_logprobs: list[float]
    """The sampler's, in nats, at its temperature, recorded when the token was sampled."""
    advantages: list[float] = field(default_factory=list)
    reference_logprobs: list[float] = field(default_factory=list)
    recomputed_logprobs: list[float] = field(default_factory=list)
    """The trainer's own before its first update of the round, where the sampler's are not the ones to compare with."""
    values: list[float] = field(default_factory=list)
    """What the critic expected before each sampled token."""
    returns: list[float] = field(default_factory=list)
    """What the critic is to learn."""
    group: int = 0
    """Of its episode: rows of one group stay together, since what they share is computed once."""

    @property
    def old_logprobs(self) -> list[float]:
        """Of the policy at the start of the round: the trainer's own where they were computed, else the sampler's."""
        return self.recomputed_logprobs or self.sampling_logprobs

    @property
    def actions(self) -> int:
        """How many tokens the policy sampled."""
        return sum(self.loss_mask)

    def counts(self) -> dict[str, float]:
        """What the row adds to the denominators of its optimizer step."""
        return {"tokens": float(self.actions), "sequences": float(self.actions > 0)}


@dataclass
class Episode:
    """One conversation of the policy with an environment, and what it earned."""

    prompt: list[Message]
    row: dict[str, Any]
    group: int
    """The prompt's index in its data: episodes of one group answer one prompt."""
    sample: int = 0
    """Which of the group's responses this is."""
    tools: list[Any] | None = None
    responses: list[Message] = field(default_factory=list)
    """What was said after the prompt: the policy's messages and the environment's."""
    training_samples: list[TrainingSample] = field(default_factory=list)
    stop_reason: str = ""
    """`stop`, `length` (a response ran out of tokens: truncated), `tokens` (none left for another turn), `turns` (out
    of turns), `context` (no room for another turn) or `failed` (its environment did, and it was dropped)."""
    stopped_by_text: bool = False
    """One of the sampler's stop texts ended the last response, which so lacks the end that its template gives it."""
    environment_reward: float = 0.0
    terms: dict[str, float | None] = field(default_factory=dict)
    reward: float = 0.0
    advantage: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    """What rewards measured beside their scores, by name; logged as `reward_NAME`."""
    where: str = ""
    """File and line of the prompt, where they are known."""
    masked: bool = False
    """Not trained on; its reward still counts in its group."""
    error: str | None = None
    """Why it failed."""

    @property
    def failed(self) -> bool:
        """Whether its environment failed: then it has no rows and no reward, and counts for nothing."""
        return self.error is not None

    @property
    def label(self) -> str:
        """The episode as error messages name it."""
        return f"{self.where or f'prompt {self.group}'}, sample {self.sample}"

    @property
    def response(self) -> str:
        """The policy's last message."""
        spoken = [message["content"] for message in self.responses if message["role"] == "assistant"]
        return spoken[-1] if spoken else ""

    @property
    def truncated(self) -> bool:
        """Whether a response ran out of tokens."""
        return self.stop_reason == "length"

    @property
    def response_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(training_sample.actions for training_sample in self.training_samples)

    def sampled_turns(self) -> list[list[int]]:
        """The tokens that the policy sampled in each of its turns, what ended it included."""
        turns: list[list[int]] = []
        for training_sample in self.training_samples:
            before = 0
            for token, sampled in zip(training_sample.ids, training_sample.loss_mask, strict=True):
                if sampled and not before:
                    turns.append([])
                if sampled:
                    turns[-1].append(token)
                before = sampled
        return turns

    def record(self) -> dict[str, Any]:
        """A row of `samples.jsonl`."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "responses": self.responses,
            "reward": self.reward,
            "terms": self.terms,
            "advantage": self.advantage,
            "stop_reason": self.stop_reason,
            "response_tokens": self.response_tokens,
            **({"error": self.error} if self.failed else {}),
        }

    def counted(self) -> dict[str, float]:
        """How it ended, as 0 or 1 for each way: their means over episodes are fractions."""
        ended = {f"stop_{reason}": float(self.stop_reason == reason) for reason in STOP_REASONS if reason != "failed"}
        return {**ended, "failed_episodes": float(self.failed)}
