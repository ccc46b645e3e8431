"""Policy RL: rollouts, rewards, advantages, and a policy loss on what was sampled."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from rlhf_lightning.data.batching import run_seed
from rlhf_lightning.data.prompts import PromptDataModule, kept_prompts
from rlhf_lightning.distributed import gather
from rlhf_lightning.environments.base import Limits, environment_factory
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.loading import check_vocabulary, disable_dropout, load_for_scoring
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.token_logprobs import TokenLogprobs, TokenLogprobsOutput
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.policy_checks import check_data, check_rewarded, check_rewards, check_settings
from rlhf_lightning.modules.policy_metrics import LARGEST, NUMBERS, OUTPUTS, ROUND_ON_BAR, HeldOut, step_sums, why_empty
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.modules.usage_checks import check_parts
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.kl import beyond
from rlhf_lightning.objectives.policy import ImportanceSampling, ImportanceWeights, PolicyObjective
from rlhf_lightning.objectives.policy.importance import token_log_ratio
from rlhf_lightning.objectives.value import value_loss
from rlhf_lightning.rewards import EnsembleReward, ModelReward, Reward
from rlhf_lightning.rollout.advantages import Advantage, GroupCentered
from rlhf_lightning.rollout.collector import RolloutCollector, SampleScorers, answers
from rlhf_lightning.rollout.dataloader import RolloutLoader
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.policy_snapshot import PolicySnapshot
from rlhf_lightning.rollout.recorded import Recorded, by_group, read_recorded
from rlhf_lightning.sampling.sampler import Sampler
from rlhf_lightning.types import Episode

COUNTS = {"token_sum": None, "token_mean": "tokens", "sequence_mean": "sequences", "constant": "sequences"}
VALIDATION = 1_000_003  # keeps the samples of validation apart from those of rounds


class PolicyRLModule(RLHFModule):
    """Reinforcement learning of a policy inside `Trainer.fit`, with automatic optimization.

    Args:
        model: the policy to start from, and the reference of KL; see `RLHFModule`, which takes the further arguments.
        objective: policy loss; importance sampling by default.
        rewards: parts of the reward, weighted and added.
        advantage: from rewards to advantages; group-centered by default.
        kl: penalty on the distance from the start; none by default. A coefficient of 0 only measures it.
        critic: value model, which GAE needs; none by default.
        sampler: budget and temperature of responses.
        environment: makes a `MessageEnv` from a row of data: a class or function, or its dotted path; by default a
            response ends its episode.
        environment_args: given to it after the row, by name.
        limits: turns, tokens and time of an episode, and what follows when its environment fails.
        truncated_reward: replaces the reward of a response that ran out of tokens.
        mask_truncated: do not train on a response that ran out of tokens; its reward still counts in its group's mean.
        entropy_coefficient: weight of the mean entropy (nats a token), which is added to what is maximized.
        importance_weights: for rows that the sampler's distribution, not the trainer's, has sampled: the trainer's
            log-probabilities are computed again at the start of a round, and the difference weighs the loss.
        staleness: 1 samples each round with the weights that the round before was sampled for; then
            `importance_weights` are used, token by token up to 2 unless others are given.
        resample_groups: times that a group whose rewards are all equal is sampled again.

    Logs under `train/`, of the round: `reward` and its parts, `kl` (nats a response), `response_tokens`, `truncated`,
    `zero_variance_groups`; `kl_coefficient`; with a critic `explained_variance`; and `reward_source_prm` (1 where a
    preference model rewards). Of the optimizer step: `loss`, `entropy`, `log_ratio_max`, `log_ratio_mean`,
    `log_ratio_clamped`, `clip_fraction`, `logprob_gap` (mean difference of sampler and trainer before the first update
    of a round), with a critic `value_loss`.
    """

    stage_kind = "policy"
    on_bar = ("entropy",)
    requires = ("input_ids", "loss_mask", "old_logprobs", "advantages")
    measures_batches = False

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
        critic: Critic | None = None,
        entropy_coefficient: float = 0.0,
        importance_weights: ImportanceWeights | None = None,
        staleness: int = 0,
        resample_groups: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        check_parts(
            objective=(objective, "PPO()"),
            advantage=(advantage, "GroupCentered()"),
            kl=(kl, "KLPenalty(0.1)"),
            sampler=(sampler, "Sampler(max_tokens=64)"),
            critic=(critic, "Critic()"),
            limits=(limits, "Limits()"),
        )
        check_rewards(rewards)
        self.objective, self.advantage = objective or ImportanceSampling(), advantage or GroupCentered()
        self.rewards = nn.ModuleList(rewards or [])
        self.kl, self.critic, self.sampler = kl, critic, sampler or Sampler()
        self.environment = environment_factory(environment, environment_args)
        self.limits = limits or Limits()
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated
        self.entropy_coefficient, self.resample_groups = entropy_coefficient, resample_groups
        self.staleness = staleness
        self.importance_weights = importance_weights or (ImportanceWeights() if staleness else None)
        check_settings(self)
        self.seed, self.last_statistics = run_seed(), dict[str, float]()
        self.step_numbers = StepNumbers(NUMBERS, LARGEST)
        self.reference: Reference | None = None
        self.heldout = nn.ModuleDict({f"{name}_": HeldOut() for name in ("val", "test")})

    def build(self) -> None:
        disable_dropout(self.model)
        self.token_logprobs = TokenLogprobs(self.model, self.max_tokens_per_batch)
        if self.critic is not None:
            # Before the reference, which adds an adapter to the model.
            self.critic.bind(
                self.model, self.tokenizer, self.token_logprobs, self.max_tokens_per_batch, self.dtype_name
            )
        if self.kl is not None:
            self.reference = self._make_reference(self.kl)
        self.sampler.bind(self.model, self.renderer, self.max_tokens_per_batch)
        rewards: list[Any] = list(self.rewards)
        for reward in rewards:
            reward.bind(self.renderer)
            reward.hide(self.sampler.stop)
        self.collector = RolloutCollector(
            self.sampler,
            self.renderer,
            rewards,
            self.advantage,
            self.seed,
            self.kl,
            self.reference,
            self._sample_scorers(),
            self.environment,
            self.limits,
            self.truncated_reward,
            self.mask_truncated,
            self.resample_groups,
            self.objective.sequence_level,
            PolicySnapshot(self.model) if self.staleness else None,
            self.sampling_context,
        )

    def _make_reference(self, kl: KLPenalty) -> Reference:
        """The policy as the stage starts it, or the model that is named; raises `ConfigError`."""
        budget = self.max_tokens_per_batch
        if kl.reference is None:
            moves = bool(kl.refresh_every)
            return Reference(self.model, self.fresh_adapter, budget, moves, kl.device, kl.offload)
        model = load_for_scoring(kl.reference, self.task, self.dtype_name)
        check_vocabulary(model, self.tokenizer, "the reference")
        return Reference.of(model, budget, kl.device, kl.offload)

    def _sample_scorers(self) -> SampleScorers:
        temperature = self.sampler.temperature
        reference, recompute = self.reference, self.importance_weights is not None

        def recomputed(ids: Tensor, loss_mask: Tensor) -> Tensor:
            return self.token_logprobs(ids, loss_mask, temperature).logprobs

        return SampleScorers(
            None if reference is None else lambda ids, loss_mask: reference.logprobs(ids, loss_mask, temperature),
            recomputed if recompute else None,
            None if self.critic is None else self.critic_values,
        )

    def parts_to_split(self) -> list[Any]:
        own = [] if self.critic is None or self.critic.shared else [self.critic.backbone]
        return [self.model, *own, *(self.reference.parts_to_split if self.reference else [])]

    @property
    def packed_forward(self) -> PackedForward:
        return self.token_logprobs.packed_forward

    def forward_passes(self) -> list[PackedForward]:
        own = self.critic is not None and not self.critic.shared
        return [self.packed_forward, *([self.critic.packed_forward] if self.critic is not None and own else [])]

    def heads(self) -> list[nn.Module]:
        # Also asked for after a failure half-way through `build`.
        head = getattr(self.critic, "head", None)
        return [] if head is None else [head]

    def longest_row(self) -> int:
        longest = super().longest_row()
        recorded = getattr(getattr(self.trainer, "datamodule", None), "recorded", False)
        return longest + self.sampler.max_tokens if longest and not recorded else longest

    # -- rollouts -------------------------------------------------------------------------------------------------

    def rollout_loader(self, data: PromptDataModule) -> RolloutLoader:
        """The loader that plays a round of episodes whenever its mini-batches are used up; checks the settings."""
        from rlhf_lightning.data.base import shard_spec_of

        examples = data.prepared["train"].rows
        items: list[Any] = by_group(examples) if data.recorded else examples
        check_data(self, data)
        collect = self.collector.collect_recorded
        if not data.recorded:
            collect = partial(self.collector.collect, group_size=data.group_size)
        self.samples_rollouts = not data.recorded
        self.rollouts = RolloutLoader(
            items,
            collect,
            data.prompts_per_round,
            data.update_epochs,
            data.minibatches,
            data.pad_id,
            data.seed,
            shard_spec_of(self.trainer, training=True),
            gather=gather,
        )
        return self.rollouts

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Tell the collector how the round that begins has gone, over all ranks."""
        super().on_train_batch_start(batch, batch_idx)
        if batch.get("statistics"):
            self.last_statistics = batch["statistics"]
            self.collector.observe(batch["statistics"])

    @property
    def last_episodes(self) -> list[Episode]:
        """Of the last round, on this rank."""
        return self.collector.episodes

    def sampling_context(self) -> AbstractContextManager[Any]:
        """The precision of training: without it sampler and trainer would disagree on log-probabilities."""
        return nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()

    def recorded_episode(self, data: dict[str, Any]) -> list[Recorded]:
        """A row of recorded episodes, checked."""
        return [read_recorded(data, len(self.tokenizer))]

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        ids, loss_mask = batch["input_ids"], batch["loss_mask"]
        scores = self.token_logprobs(ids, loss_mask, self.sampler.temperature, details=True)
        sums, largest = step_sums(scores, batch, self.objective, self._clamped(scores.logprobs.detach(), batch))
        outputs = {name: sums[name][0] / sums[name][1].clamp(min=1) for name in OUTPUTS}
        loss, learned = self._policy_loss(scores, batch)
        if self.critic is not None:
            values = self._value_losses(self.critic_values(ids, loss_mask, scores), batch).sum()
            sums["value_loss"] = values, loss_mask.sum()
            value = self.normalized(values, batch, "tokens", loss_mask.sum())
            loss = loss * (not self._warming_up) + self.critic.coefficient * value
        self.step_numbers.add(learned, {**sums, "loss": self.share(loss, batch)}, largest)
        self._log_round(batch)
        return {"loss": loss, **largest, **outputs}

    @property
    def _warming_up(self) -> bool:
        """Whether the critic learns alone."""
        return self.critic is not None and 0 < self.collector.started <= self.critic.warmup_rounds

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """No step on what is not trained: gradients of zero would age Adam's moments, and decay the weights."""
        if self._warming_up:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _policy_loss(self, scores: TokenLogprobsOutput, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss, and the number of tokens that have something to teach."""
        loss_mask, old, kl = batch["loss_mask"], batch["old_logprobs"], self.kl
        per_token = self.objective(scores.logprobs, old, batch["advantages"], loss_mask)
        learned = (loss_mask != 0) & (batch["advantages"] != 0)
        if kl is not None and kl.place == "loss":
            per_token = per_token + kl.loss(scores.logprobs, old, batch["reference_logprobs"], loss_mask)
            learned = loss_mask != 0 if kl.coefficient else learned
        if self.importance_weights is not None:
            weights = self.importance_weights(old, batch["sampling_logprobs"], loss_mask)
            per_token, learned = per_token * weights, learned & (weights != 0)
        loss = self._aggregated(per_token, batch)
        if self.entropy_coefficient:
            assert scores.entropy is not None
            bonus = self.normalized(scores.entropy.sum(), batch, "tokens", loss_mask.sum())
            loss = loss - self.entropy_coefficient * bonus
        if self.entropy_coefficient or self.critic is not None:
            learned = loss_mask != 0
        return loss, learned.sum()

    def critic_values(self, ids: Tensor, loss_mask: Tensor, scores: TokenLogprobsOutput | None = None) -> Tensor:
        """The critic's values `[B, T]`; where it shares the policy's backbone, from the policy's own forward."""
        assert self.critic is not None
        if not self.critic.shared:
            values: Tensor = self.critic(ids, loss_mask)
            return values
        found = scores or self.token_logprobs(ids, loss_mask, self.sampler.temperature, details=True)
        assert found.values is not None, "bind() has put the value head on the policy"
        return found.values

    def _clamped(self, logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
        """1 at the tokens `[B, T]` with a log-ratio beyond ±20, which the loss, its KL or its weights cut off."""
        old, loss_mask = batch["old_logprobs"], batch["loss_mask"]
        cut = self.objective.clamped(logprobs, old, loss_mask)
        if self.kl is not None and self.kl.place == "loss":
            cut = cut | beyond(token_log_ratio(logprobs, batch["reference_logprobs"], loss_mask))
        if self.importance_weights is not None:
            cut = cut | beyond(token_log_ratio(old, batch["sampling_logprobs"], loss_mask))
        return cut.to(loss_mask.dtype)

    def _value_losses(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        assert self.critic is not None
        return value_loss(values, batch["values"], batch["returns"], batch["loss_mask"], self.critic.clip)

    def _aggregated(self, per_token: Tensor, batch: dict[str, Any]) -> Tensor:
        mode, length = self.objective.aggregation, self.objective.length
        total, local = aggregate(per_token, batch["loss_mask"], mode, length)
        if mode == "constant":
            assert length is not None
            total, local = total / length, local / length
        return self.normalized(total, batch, COUNTS[mode], local)

    def _log_round(self, batch: dict[str, Any]) -> None:
        """What is known of the round, over all ranks, with its first mini-batch; the rest is logged with the step."""
        for name, number in (batch.get("statistics") or {}).items():
            self.log(f"train/{name}", number, on_step=True, on_epoch=False, prog_bar=name in ROUND_ON_BAR)
        source = float(any(isinstance(part, ModelReward | EnsembleReward) for part in self.rewards))
        self.log("reward_source_prm", source, on_step=True, on_epoch=False)

    def why_empty(self) -> str:
        return why_empty(self.last_statistics)

    def _sync_engine(self) -> None:
        # One that has weights of its own would answer with those of the last round's start.
        self.sampler.sync(self.global_step)

    on_validation_start = on_test_start = on_predict_start = _sync_engine

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], name: str) -> None:
        check_rewarded(self)
        prompts = kept_prompts(batch)
        metrics: Any = self.heldout[f"{name}_"]
        with self.sampling_context():
            greedy = self.collector.rollout(prompts, 1, (VALIDATION,), temperature=0.0)
            sampled = self.collector.rollout(prompts, 1, (VALIDATION,))
            if self.reference is not None:
                only = SampleScorers(self.collector.scorers.reference_logprobs)
                self.collector.score(sampled, only)
        metrics.add(greedy, sampled)
        for key, metric in metrics.logged(kl=self.reference is not None):
            self.log(f"{name}/{key}", metric, prog_bar=key == "reward_sampled", batch_size=max(1, len(prompts)))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[Any]:
        policy = super().parameter_groups()
        if self.critic is None or self.critic.learning_rate is None:
            return policy
        own = {id(p) for p in self.critic.parameters()}
        return [
            {"params": [p for p in policy if id(p) not in own]},
            {"params": [p for p in policy if id(p) in own], "lr": self.critic.learning_rate},
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside the weights that are trained, what the collector keeps from round to round."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["collector"] = self.collector.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.collector.load_state_dict(checkpoint["collector"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A response to each prompt."""
        with self.sampling_context():
            return answers(self.sampler, self.renderer, kept_prompts(batch), self.seed)
