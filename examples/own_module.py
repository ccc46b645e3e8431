"""Your own LightningModule from the components of `PolicyRLModule`: policy RL and SFT in one loss (PPO-ptx).

The batches are your own: prompts to answer and demonstrations to imitate. Sampler, token scorer, objective, advantage
and aggregation are the package's; the model is any causal model of transformers. Each step is one round, on one device,
without the further features of `PolicyRLModule` (several passes, ranks, environments, resume within a round).
"""

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.data.batching import mix_seeds, pad_right, pad_tokens
from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.data.rendering import Rendered, Renderer
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from rlhf_lightning.objectives.advantage import group_centered
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.policy import clipped_surrogate
from rlhf_lightning.objectives.supervised import nll
from rlhf_lightning.types import TokenBatch

ROWS: Any = [
    {"prompt": "How are you?", "answer": "Fine, thank you."},
    {"prompt": "What is 2 + 3?", "answer": "2 + 3 is 5."},
]


class Sampled(TokenBatch):
    """Rows of answers."""

    old_logprobs: Tensor


class PolicyWithDemonstrations(pl.LightningModule):
    """Answers each prompt several times, rewards the answers, and learns from them and from the demonstration.

    Args:
        model: Folder or Hub id.
        group_size: Answers to each prompt.
        sft_weight: Weight of the demonstrations' negative log-likelihood (arXiv 2203.02155, eq. 2).
    """

    def __init__(self, model: str, group_size: int = 4, sft_weight: float = 0.1) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        disable_dropout(self.model)  # otherwise sampler and trainer would not be the same policy
        self.renderer = Renderer(self.tokenizer)
        self.group_size, self.sft_weight = group_size, sft_weight
        self.token_logprobs = TokenLogprobs(self.model)
        self.sampler = Sampler(max_tokens=16).build(self.model, self.renderer)

    def reward(self, prompt: str, response: str) -> float:
        """Your reward; here a preference for short answers."""
        return -float(len(response.split()))

    def training_step(self, rows: list[dict[str, str]], batch_idx: int) -> Tensor:
        """One round: answers, rewards, advantages, one loss."""
        sampled, rewards, advantages = self.play(rows)
        logprobs = self.token_logprobs(sampled["input_ids"], sampled["loss_mask"]).logprobs
        per_token = clipped_surrogate(logprobs, sampled["old_logprobs"], advantages[:, None], sampled["loss_mask"])
        total, count = aggregate(per_token, sampled["loss_mask"], "token_mean")
        shown = self.batch([self.renderer.exchange(*exchange(row["prompt"], row["answer"])) for row in rows])
        sft = (
            nll(self.token_logprobs(shown["input_ids"], shown["loss_mask"]).logprobs, shown["loss_mask"]).sum()
            / shown["loss_mask"].sum()
        )
        self.log_dict({"reward": rewards.mean(), "policy_loss": total / count, "nll": sft}, batch_size=len(rows))
        return total / count + self.sft_weight * sft

    @torch.no_grad()
    def play(self, rows: list[dict[str, str]]) -> tuple[Sampled, Tensor, Tensor]:
        """Rows of answers with their `old_logprobs`, `[B, T]`, their rewards and their advantages, `[B]`."""
        prompts = [self.renderer.prompt(to_messages(row["prompt"])) for row in rows for _ in range(self.group_size)]
        seeds = [mix_seeds(self.global_step, i) for i in range(len(prompts))]
        samples = self.sampler.generate(prompts, seeds)
        groups = torch.arange(len(rows)).repeat_interleave(self.group_size)
        answers = [self.renderer.decode(sample.ids) for sample in samples]
        rewards = torch.tensor([self.reward(rows[g]["prompt"], a) for g, a in zip(groups, answers, strict=True)])
        ids = [prompt + list(sample.ids) for prompt, sample in zip(prompts, samples, strict=True)]
        masks = [[0] * len(prompt) + [1] * len(sample.ids) for prompt, sample in zip(prompts, samples, strict=True)]
        old = [[0.0] * len(prompt) + list(sample.logprobs) for prompt, sample in zip(prompts, samples, strict=True)]
        old_logprobs = pad_right(old, 0.0, torch.float32, self.device)
        batch: Sampled = {**pad_tokens(ids, masks, 0, self.device), "old_logprobs": old_logprobs}
        return batch, rewards, group_centered(rewards, groups).to(self.device)

    def batch(self, rendered: list[Rendered]) -> TokenBatch:
        """Rows padded on the right, `[B, T]`."""
        return pad_tokens([row.ids for row in rendered], [row.loss_mask for row in rendered], 0, self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any torch optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def exchange(prompt: str, answer: str) -> tuple[list[Any], list[Any]]:
    """A prompt and its answer as messages."""
    return to_messages(prompt), to_messages(answer, "assistant")


def main(model: str, folder: str = "runs/examples") -> pl.Trainer:
    """Train three rounds."""
    trainer = pl.Trainer(
        max_epochs=3, gradient_clip_val=1.0, default_root_dir=folder, logger=False, enable_checkpointing=False
    )
    trainer.fit(PolicyWithDemonstrations(model), DataLoader(ROWS, batch_size=2, collate_fn=list))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
