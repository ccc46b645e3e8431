"""The quickstart's figures: every model on held-out prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.prompts import Prompt, prompt_example
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.reward_model import RewardModel, load_for_scoring
from rlhf_lightning.models.scoring import TokenScorer
from rlhf_lightning.rollout.episodes import Episode
from rlhf_lightning.rollout.runner import run_episodes
from rlhf_lightning.rollout.sampler import Sampler

Gold = Callable[[str, dict[str, Any]], float]


class Policy:
    """A causal LM folder, loaded to answer and to be scored."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.renderer = Renderer.suited(self.tokenizer)
        self.model = load_for_scoring(folder, "CAUSAL_LM")
        disable_dropout(self.model)
        self.tokens = TokenScorer(self.model)

    def prompts(self, file: str, limit: int) -> list[Prompt]:
        """The first prompts of a file, numbered."""
        rows = read_rows(file, "prompt")[:limit]
        return [prompt_example(self.renderer, row.data, index) for index, row in enumerate(rows)]

    def answer(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[Episode]:
        """A response to each prompt at temperature 1."""
        sampler = Sampler(max_tokens)
        sampler.bind(self.model, self.renderer)
        return run_episodes([(prompt, 0) for prompt in prompts], sampler, self.renderer, (seed, 7))

    @torch.no_grad()
    def logprobs(self, episodes: Sequence[Episode]) -> list[float]:
        """Σ log π of each episode's response, nats."""
        sums = []
        for episode in episodes:
            row = episode.segments[0]
            batch = pad_tokens([row.ids], [row.mask], pad_id=0)
            sums.append(float(self.tokens(batch["input_ids"], batch["mask"]).logprobs.sum()))
        return sums

    @torch.no_grad()
    def nll(self, conversations: str, limit: int) -> float:
        """Mean negative log-likelihood a trained token of held-out conversations, nats."""
        from rlhf_lightning.data.conversations import conversation, tool_schemas

        total = count = 0.0
        for row in read_rows(conversations)[:limit]:
            for rendered in self.renderer.conversation(conversation(row.data), tool_schemas(row.data)):
                batch = pad_tokens([rendered.ids], [rendered.mask], pad_id=0)
                total -= float(self.tokens(batch["input_ids"], batch["mask"]).logprobs.sum())
                count += rendered.trained
        return total / count


def figures(
    episodes: Sequence[Episode], judge: RewardModel, kl: float | None, gold: Gold | None
) -> dict[str, float | None]:
    """The row of the final table for one model."""
    rewards = [gold(episode.response, episode.row) for episode in episodes] if gold else []
    # The drawn tokens, not their text: an answer that is empty or was cut off has a score as well.
    segments = [episode.segments[-1] for episode in episodes]
    scores = judge.score_tokens([segment.ids for segment in segments], [segment.mask for segment in segments])
    return {
        "gold_reward": sum(rewards) / len(rewards) if gold else None,
        "reward_model_score": float(scores.mean()),
        "kl": kl,
        "response_tokens": sum(episode.response_tokens for episode in episodes) / len(episodes),
        "truncated_fraction": sum(episode.truncated for episode in episodes) / len(episodes),
    }
