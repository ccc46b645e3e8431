"""Policy RL: rollouts, rewards, advantages, and a policy loss on what was drawn."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lightning.data.batching import run_seed
from rlhf_lightning.data.prompts import Prompt, PromptDataModule, kept_prompts
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.forward import Forward
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scoring import TokenScorer
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.policy import ImportanceSampling, PolicyObjective
from rlhf_lightning.rollout.advantages import Advantage, GroupCentered
from rlhf_lightning.rollout.collect import Collector, answers
from rlhf_lightning.rollout.environments import Limits, environment_factory
from rlhf_lightning.rollout.episodes import Episode, Segment
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.loader import RolloutLoader
from rlhf_lightning.rollout.ranks import gather
from rlhf_lightning.rollout.recorded import Recorded, read_recorded
from rlhf_lightning.rollout.rewards import EnsembleReward, ModelReward, Reward, check_finite
from rlhf_lightning.rollout.sampler import Sampler
from rlhf_lightning.rollout.statistics import Sums

COUNTS = {"token_sum": None, "token_mean": "tokens", "sequence_mean": "sequences", "constant": "sequences"}
VALIDATION = 1_000_003  # keeps the draws of validation apart from those of rounds


class PolicyRLModule(RLHFModule):
    """Reinforcement learning of a policy inside `Trainer.fit`, with automatic optimization.

    Args:
        model: the policy to start from, and the reference of KL; see `RLHFModule`, which takes the further arguments.
        objective: policy loss; importance sampling by default.
        rewards: parts of the reward, weighted and added.
        advantage: from rewards to advantages; group-centred by default.
        kl: penalty on the distance from the start; none by default. A coefficient of 0 only measures it.
        sampler: budget and temperature of responses.
        environment: makes a `MessageEnv` from a row of data: a class or function, or its dotted path; by default a
            response ends its episode.
        environment_args: given to it after the row, by name.
        limits: turns, tokens and time of an episode, and what follows when its environment fails.
        truncated_reward: replaces the reward of a response that ran out of tokens.
        mask_truncated: do not train on a response that ran out of tokens; its reward still counts in its group's mean.

    Logs under `train/`: `reward` and its parts, `kl` (nats a response), `entropy`, `response_tokens`, `truncated`,
    `zero_signal_groups`, `log_ratio_max`, `logprob_gap` (mean difference of sampler and trainer before the first update
    of a round), `loss`; and `reward_source_prm` (1 where a preference model rewards).
    """

    stage_kind = "policy"

    def __init__(
        self,
        model: Any,
        objective: PolicyObjective | None = None,
        rewards: list[Reward] | None = None,
        advantage: Advantage | None = None,
        kl: KLPenalty | None = None,
        sampler: Sampler | None = None,
        environment: str | Callable | None = None,
        environment_args: dict[str, Any] | None = None,
        limits: Limits | None = None,
        truncated_reward: float | None = None,
        mask_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.objective, self.advantage = objective or ImportanceSampling(), advantage or GroupCentered()
        self.rewards = nn.ModuleList(rewards or [])
        names = [part.name for part in rewards or []]
        if len(set(names)) < len(names):
            raise ConfigError(f"model.rewards: two parts have the same name ({', '.join(names)}); set name")
        self.kl, self.sampler = kl, sampler or Sampler()
        self.environment = environment_factory(environment, environment_args)
        self.limits, self.mask_truncated = limits or Limits(), mask_truncated
        self.truncated_reward = truncated_reward
        check_finite("model.truncated_reward", truncated_reward)
        self.seed = run_seed()
        self.reference: Reference | None = None
        self.heldout = nn.ModuleDict({f"{name}_": _heldout_metrics() for name in ("val", "test")})

    def build(self) -> None:
        disable_dropout(self.model)
        self.tokens = TokenScorer(self.model, self.max_tokens_per_batch)
        if self.kl is not None:
            self.reference = Reference(self.model, self.fresh_adapter, self.max_tokens_per_batch)
        self.sampler.bind(self.model, self.renderer, self.max_tokens_per_batch)
        parts: list[Any] = list(self.rewards)
        for part in parts:
            part.bind(self.renderer)
        self.collector = Collector(
            self.sampler,
            self.renderer,
            parts,
            self.advantage,
            self.seed,
            self.kl,
            self.reference,
            self.environment,
            self.limits,
            self.truncated_reward,
            self.mask_truncated,
        )

    @property
    def forward_pass(self) -> Forward:
        return self.tokens.forward

    def longest_row(self) -> int:
        longest = super().longest_row()
        recorded = getattr(getattr(self.trainer, "datamodule", None), "recorded", False)
        return longest + self.sampler.max_tokens if longest and not recorded else longest

    # -- rollouts -------------------------------------------------------------------------------------------------

    def rollout_loader(self, data: PromptDataModule) -> RolloutLoader:
        """The loader that plays a round of episodes whenever its mini-batches are used up; checks the settings."""
        from rlhf_lightning.data.base import layout_of

        examples = data.prepared["train"].rows
        items: list[Any] = _by_group(examples) if data.recorded else examples
        if not data.recorded:
            self._check_rollouts(examples, data.group_size)
        self.group_size = data.group_size
        self.drew_itself = not data.recorded
        self.rollouts = RolloutLoader(
            items,
            self._collect,
            data.prompts_per_round,
            data.update_epochs,
            data.minibatches,
            data.pad_id,
            data.seed,
            layout_of(self.trainer, training=True),
            reduce=self._sum_over_ranks,
            gather=gather,
        )
        return self.rollouts

    def _sum_over_ranks(self, table: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return table  # and MPS, always alone, has no float64
        return self.trainer.strategy.reduce(table.to(self.device), reduce_op="sum").cpu()

    def _check_rollouts(self, prompts: list[Prompt], group_size: int) -> None:
        if group_size == 1 and self.advantage.needs_group:
            raise ConfigError(
                f"data.group_size is 1, but {type(self.advantage).__name__} compares the responses of a group: "
                "every advantage would be 0. Set data.group_size to 2 or more."
            )
        self.sampler.warn_of_bias()
        if self.sampler.temperature == 0:
            raise ConfigError("sampler.temperature is 0: every response of a group would be the same")
        self._check_rewarded()
        parts: list[Any] = list(self.rewards)
        for part in parts:
            part.check(prompts)
        longest = max(prompt.tokens for prompt in prompts)
        if self.sampler.context and longest + self.sampler.max_tokens > self.sampler.context:
            raise ConfigError(
                f"the longest prompt ({longest} tokens) and sampler.max_tokens ({self.sampler.max_tokens}) are over "
                f"the model's {self.sampler.context} positions; lower max_tokens or data.max_prompt_tokens"
            )

    def _check_rewarded(self) -> None:
        if not len(self.rewards) and self.environment is None:
            raise ConfigError("nothing rewards the policy: set model.rewards, or model.environment")

    @torch.no_grad()
    def _collect(self, items: list[Any], round_number: int) -> tuple[list[Segment], Sums]:
        with self.sampling_context():
            self.sampler.sync(round_number)
            if self.drew_itself:
                episodes = self.collector.play(items, self.group_size, (round_number,), running="update")
            else:
                episodes = [one.episode(group[0].index) for group in items for one in group]
            rows = self.collector.rows(episodes)
        self.last_episodes = episodes
        return rows, self.collector.statistics(episodes)

    def sampling_context(self) -> AbstractContextManager[Any]:
        """The precision of training: without it sampler and trainer would disagree on log-probabilities."""
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()

    def recorded_episode(self, data: dict[str, Any]) -> list[Recorded]:
        """A row of recorded episodes, checked."""
        return [read_recorded(data, len(self.tokenizer))]

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        mask, old = batch["mask"], batch["old_logprobs"]
        scores = self.tokens(batch["input_ids"], mask, self.sampler.temperature, details=True)
        loss = self._aggregated(self.objective(scores.logprobs, old, batch["advantages"], mask), batch)
        if self.kl is not None and self.kl.place == "loss":
            loss = loss + self._aggregated(self.kl.loss(scores.logprobs, old, batch["reference_logprobs"], mask), batch)
        log_ratio = ((scores.logprobs - old) * mask).detach().abs()
        entropy = scores.entropy
        assert entropy is not None
        count = mask.sum().clamp(min=1)
        if batch.get("first"):
            self.log("train/logprob_gap", log_ratio.sum() / count, on_step=True, on_epoch=False)
        self._log_step(loss.detach(), log_ratio.max(), entropy.detach().sum() / count, batch.get("statistics"))
        return {"loss": loss, "log_ratio_max": log_ratio.max(), "log_ratio_mean": log_ratio.sum() / count}

    def _aggregated(self, per_token: Tensor, batch: dict[str, Any]) -> Tensor:
        mode, length = self.objective.aggregation, self.objective.length
        total, local = aggregate(per_token, batch["mask"], mode, length)
        if mode == "constant":
            assert length is not None
            total, local = total / length, local / length
        return self.normalised(total, batch, COUNTS[mode], local)

    def _log_step(self, loss: Tensor, ratio: Tensor, entropy: Tensor, statistics: dict[str, float] | None) -> None:
        for name, number in (statistics or {}).items():
            bar = name in ("reward", "kl", "truncated")
            self.log(f"train/{name}", number, on_step=True, on_epoch=False, prog_bar=bar)
        for name, value in (("entropy", entropy), ("loss", loss), ("log_ratio_max", ratio)):
            self.log(f"train/{name}", value, on_step=True, on_epoch=False, prog_bar=name == "entropy")
        source = float(any(isinstance(part, ModelReward | EnsembleReward) for part in self.rewards))
        self.log("reward_source_prm", source, on_step=True, on_epoch=False)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], name: str) -> None:
        self._check_rewarded()
        prompts = kept_prompts(batch)
        metrics: Any = self.heldout[f"{name}_"]
        if prompts:
            with self.sampling_context():
                greedy = self.collector.play(prompts, 1, (VALIDATION,), temperature=0.0)
                sampled = self.collector.play(prompts, 1, (VALIDATION,))
            _update(metrics["reward_greedy"], greedy, lambda episode: episode.reward)
            _update(metrics["reward_sampled"], sampled, lambda episode: episode.reward)
            _update(metrics["response_tokens"], sampled, lambda episode: float(episode.response_tokens))
            _update(metrics["truncated"], sampled, lambda episode: float(episode.truncated))
        for key, metric in metrics.items():
            self.log(f"{name}/{key}", metric, prog_bar=key == "reward_sampled", batch_size=max(1, len(prompts)))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A response to each prompt."""
        with self.sampling_context():
            return answers(self.sampler, self.renderer, kept_prompts(batch), self.seed)


def _heldout_metrics() -> nn.ModuleDict:
    keys = ("reward_greedy", "reward_sampled", "response_tokens", "truncated")
    return nn.ModuleDict({key: MeanMetric() for key in keys})


def _update(metric: MeanMetric, episodes: list[Episode], value: Any) -> None:
    for episode in episodes:
        metric.update(value(episode))


def _by_group(examples: list[Recorded]) -> list[list[Recorded]]:
    """Recorded episodes of one group side by side, in the order of their first."""
    groups: dict[str, list[Recorded]] = {}
    for i, example in enumerate(examples):
        key = example.group if example.advantage is None else f"alone {i}"
        groups.setdefault(key, []).append(example)
    return list(groups.values())
