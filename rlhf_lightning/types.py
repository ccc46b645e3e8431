"""Episodes, and the training samples that they leave."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.conversations import Message

STOP_REASONS = ("stop", "length", "tokens", "turns", "context", "failed")


@dataclass
class TrainingSample:
    """One row of tokens of an episode. A conversation whose template re-renders earlier turns leaves several.

    All lists have the length of `ids`, or are empty if not computed; numbers are 0 where `loss_mask` is 0.

    Attributes:
        ids: Token ids of prompt, responses and the environment's messages.
        advantages: Advantage of each token, in reward units.
        reference_logprobs: The reference's log-probabilities, in nats, at the sampling temperature.

    Example:
        >>> sample = TrainingSample(ids=[1, 2, 3], loss_mask=[0, 1, 1], sampling_logprobs=[0.0, -0.1, -0.7])
        >>> sample.actions
        2
    """

    ids: list[int]
    loss_mask: list[int]
    """1 on the tokens that the policy sampled, 0 elsewhere."""
    sampling_logprobs: list[float]
    """The sampler's log-probabilities when the tokens were sampled, in nats, at its temperature."""
    advantages: list[float] = field(default_factory=list)
    reference_logprobs: list[float] = field(default_factory=list)
    recomputed_logprobs: list[float] = field(default_factory=list)
    """The trainer's log-probabilities before its first update of the round, in nats; empty if they are not needed."""
    values: list[float] = field(default_factory=list)
    """The critic's estimates before each sampled token, in reward units."""
    returns: list[float] = field(default_factory=list)
    """The critic's targets, in reward units."""
    group: int = 0
    """Group of its episode. Rows of a group are kept together, so that their common prompt is computed once."""

    @property
    def old_logprobs(self) -> list[float]:
        """Log-probabilities of the policy at the start of the round, in nats: recomputed ones, else the sampler's."""
        return self.recomputed_logprobs or self.sampling_logprobs

    @property
    def actions(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.loss_mask)

    def counts(self) -> dict[str, float]:
        """What the row adds to the denominators of its optimizer step."""
        return {"tokens": float(self.actions), "sequences": float(self.actions > 0)}


@dataclass
class Episode:
    """One conversation of the policy with an environment, and its reward.

    Attributes:
        prompt: Messages that the policy saw first.
        row: The data row.
        tools: Schemas of the tools that the template shows.
        environment_reward: Sum of the rewards that the environment gave.
        terms: Score of each reward by name, unweighted; None where it does not apply.
        reward: The total reward.
        advantage: The episode's advantage, once it is computed.
        metrics: Metrics that the environment reported.

    Example:
        >>> reply = [{"role": "assistant", "content": "4"}]
        >>> episode = Episode(prompt=[{"role": "user", "content": "2 + 2?"}], row={}, group=0, responses=reply)
        >>> episode.response
        '4'
    """

    prompt: list[Message]
    row: dict[str, Any]
    group: int
    """Index of the prompt in its data; episodes of one group answer the same prompt."""
    sample: int = 0
    """Index of the response within its group."""
    tools: list[Any] | None = None
    responses: list[Message] = field(default_factory=list)
    """Messages after the prompt, both the policy's and the environment's."""
    training_samples: list[TrainingSample] = field(default_factory=list)
    stop_reason: str = ""
    """Why the episode ended.

    - `stop`: it ended with a complete response.
    - `length`: a response ran out of tokens and was truncated.
    - `tokens`: no tokens were left for another turn.
    - `turns`: the limit on turns was reached.
    - `context`: the model's context had no room for another response.
    - `failed`: its environment failed, and the episode was dropped.
    """
    stopped_by_text: bool = False
    """True if one of the sampler's stop texts ended the last response, which then lacks the template's end of turn."""
    environment_reward: float = 0.0
    terms: dict[str, float | None] = field(default_factory=dict)
    reward: float = 0.0
    advantage: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    """What rewards measured besides their scores, by name; logged as `reward_NAME`."""
    where: str = ""
    """File and line of the prompt, if known."""
    masked: bool = False
    """True if the episode is not trained on; its reward still counts in its group."""
    error: str | None = None
    """Why it failed; None if it did not."""

    @property
    def failed(self) -> bool:
        """True if its environment failed; it then has no rows and no reward, and is not counted."""
        return self.error is not None

    @property
    def label(self) -> str:
        """The episode's name in error messages."""
        return f"{self.where or f'prompt {self.group}'}, sample {self.sample}"

    @property
    def response(self) -> str:
        """The policy's last message."""
        spoken = [message["content"] for message in self.responses if message["role"] == "assistant"]
        return spoken[-1] if spoken else ""

    @property
    def truncated(self) -> bool:
        """True if a response ran out of tokens."""
        return self.stop_reason == "length"

    @property
    def response_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(training_sample.actions for training_sample in self.training_samples)

    def sampled_turns(self) -> list[list[int]]:
        """Tokens that the policy sampled in each of its turns, including what ended the turn."""
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
        """The episode as a row of `samples.jsonl`."""
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
        """Indicators (0 or 1) of how it ended; their means over episodes are fractions."""
        ended = {f"stop_{reason}": float(self.stop_reason == reason) for reason in STOP_REASONS if reason != "failed"}
        return {**ended, "failed_episodes": float(self.failed)}
