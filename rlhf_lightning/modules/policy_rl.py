"""Policy RL: rollouts, rewards, advantages, and a policy loss on the sampled tokens."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from rlhf_lightning.data.batching import Example, MixedOrder, run_seed
from rlhf_lightning.data.prompt_stream import StreamedPrompts
from rlhf_lightning.data.prompts import Prompt, PromptBatch, PromptDataModule, kept_prompts
from rlhf_lightning.data.shards import data_ranks, shard_spec_of
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.environments.base import Limits, environment_factory
from rlhf_lightning.errors import ConfigError, check_object, check_whole
from rlhf_lightning.generation.sampler import EngineSettings, ModelSampler, Sampler
from rlhf_lightning.generation.server_reference import ServerReference
from rlhf_lightning.models.critic import Critic, ValueModel
from rlhf_lightning.models.distillation import Distillation
from rlhf_lightning.models.loading import disable_dropout
from rlhf_lightning.models.memory import trained
from rlhf_lightning.models.packed_forward import PackedForward
from rlhf_lightning.models.reference import Reference, load_reference
from rlhf_lightning.models.scorers import padded_batches
from rlhf_lightning.models.sharding import zero3_gathered
from rlhf_lightning.models.token_logprobs import TokenLogprobs, TokenLogprobsOutput
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.data_answers import answer_episode, check_answers, split_prompts
from rlhf_lightning.modules.hf_batches import Columns
from rlhf_lightning.modules.memory import StepSizes, round_sizes
from rlhf_lightning.modules.policy_checks import (
    MOST_TIMES,
    check_algorithm,
    check_distillation,
    check_groups,
    check_minibatches,
    check_producer,
    check_recorded,
    check_reference,
    check_rewards,
    check_rounds,
    check_sampling,
    check_staleness,
)
from rlhf_lightning.modules.policy_metrics import (
    LARGEST,
    NUMBERS,
    OF_REWARD,
    RETURNED,
    ROUND_ON_BAR,
    HeldOut,
    reference_distance,
    step_sums,
    why_empty,
)
from rlhf_lightning.modules.recipes import build_recipe
from rlhf_lightning.modules.step import StepNumbers
from rlhf_lightning.modules.trainer_state import overfits, row_data_of
from rlhf_lightning.objectives.aggregate import DENOMINATORS, aggregate
from rlhf_lightning.objectives.kl import beyond
from rlhf_lightning.objectives.policy import ImportanceSampling, ImportanceWeights, PolicyObjective
from rlhf_lightning.objectives.policy.importance import token_log_ratio
from rlhf_lightning.objectives.value import value_loss
from rlhf_lightning.rewards import Reward, RewardTerm, check_finite
from rlhf_lightning.rollout.advantages import Advantage, GroupCentered
from rlhf_lightning.rollout.collector import CHUNK, RolloutCollector, TokenFunctions, answers
from rlhf_lightning.rollout.curriculum import Curriculum, PromptSampler
from rlhf_lightning.rollout.dataloader import Producer, RolloutDataLoader, StreamedItems
from rlhf_lightning.rollout.kl import KLController, KLPenalty
from rlhf_lightning.rollout.producer import RolloutProducer
from rlhf_lightning.rollout.recorded import Recorded, by_group, read_recorded
from rlhf_lightning.rollout.runner import EpisodeRunner
from rlhf_lightning.rollout.statistics import Sums
from rlhf_lightning.types import Answer, Episode, TrainingSample

if TYPE_CHECKING:
    from rlhf_lightning.types import RolloutBatch, Row, StateDict

T = TypeVar("T")
log = logging.getLogger(__name__)
VALIDATION = 1_000_003  # part of the seed of validation rollouts, so that it differs from any training round's
SANITY_PROMPTS = 8
"""Number of prompts per batch in the sanity check of Lightning, which only looks for errors."""


class PolicyRLModule(RLHFModule[PromptBatch]):
    """Reinforcement learning of a policy inside `Trainer.fit`, with automatic optimization.

    Logs under `train/`, for each round: `reward` and its terms, `kl` (nats per episode), `response_tokens`,
    `truncated`, `zero_variance_groups`, `kl_coefficient`, and with a critic `explained_variance`. Without the prefix,
    `reward_source_prm`: 1 if a model scores, else 0 (the MinT recipe's name; "PRM" is preference reward model there).
    For each optimizer step, again under `train/`: `loss`, `entropy`, `log_ratio_max` and `log_ratio_mean` (of the
    absolute values, in nats), `log_ratio_clamped`, `clip_fraction`, `logprob_gap` (mean absolute difference between the
    log-probabilities of sampler and trainer, in nats, in the first optimizer step of a round), and with a critic
    `value_loss`.

    In the formulas of the recipes, log p are the current log-probabilities, log q the `old_logprobs`, and
    r = exp(log p - log q) is the ratio of a token; R is the reward of an episode and A an advantage. A sequence is one
    training sample: without an environment a prompt with its response, with one it may hold several turns.

    Args:
        model: The policy to start from, by default also the reference of the KL; see `RLHFModule` for further
            arguments.
        objective: Policy loss; importance sampling by default.
        rewards: Terms of the reward, which are weighted and added.
        advantage: Computes advantages from rewards; group-centered by default.
        kl: Penalty on the KL from the reference; none by default. With coefficient 0 the KL is only measured.
        critic: Value model, which GAE needs; none by default.
        sampler: Token budget and temperature of responses.
        environment: Class, function or dotted path that creates a `MessageEnv` from a data row; by default a response
            ends its episode.
        environment_args: Keyword arguments of the environment, in addition to the row.
        limits: Turns, tokens and time of an episode, and what to do if its environment fails.
        truncated_reward: Replaces the reward of an episode that ended because a response ran out of tokens.
        mask_truncated: Do not train on such an episode, including its earlier turns. Its reward still counts in its
            group's mean.
        entropy_coefficient: Weight of the mean entropy (nats per token), which is added to the maximized objective.
        importance_weights: Correct for a sampler whose distribution differs from the trainer's (older weights, another
            engine or precision). The trainer then recomputes the log-probabilities at the start of each round, and each
            token's loss is multiplied by exp(recomputed - sampling log-probability), within bounds. True for the
            defaults (per token, truncated at 2), False for none. By default True with `max_staleness`, or with an
            engine that differs from the trainer by more than the rounding of float32 (vLLM in bfloat16), else False.
        max_staleness: Number of rounds that a thread samples ahead while the policy trains; 0 (the default) samples
            each round before it is trained on. Above 0, `importance_weights` are required.
        resample_groups: Maximum number of times that a zero-variance group is sampled again; 0 by default.
        curriculum: Sample prompts whose responses all succeeded or all failed less often; None (the default) for each
            prompt once in an epoch.
        distillation: Also learn a teacher's distributions at the sampled tokens: adds `distillation.coefficient` times
            the mean divergence per token to the loss. No reward is needed then. None by default.
        recipe: Name of an algorithm that sets objective, advantage, kl, critic and resample_groups unless they are
            given: `dapo`, `distill`, `distill_pg`, `dr_grpo`, `grpo`, `gspo`, `mint`, `ppo`, `reinforce_pp` or `rloo`.
            The constructor of the same name documents what it sets, and why.

    Raises:
        ConfigError: If settings are invalid or incompatible.

    Example:
        >>> module = PolicyRLModule.grpo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        >>> trainer.fit(module, PromptDataModule("prompts.jsonl"))  # doctest: +SKIP
    """

    stage_kind = "policy"
    on_bar = ("entropy", "divergence")
    smaller_batch = "raise data.minibatches and"
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
        importance_weights: ImportanceWeights | bool | None = None,
        max_staleness: int = 0,
        resample_groups: int | None = None,
        curriculum: Curriculum | None = None,
        distillation: Distillation | None = None,
        recipe: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if recipe is not None:
            preset = build_recipe(recipe)
            objective, advantage = objective or preset["objective"], advantage or preset["advantage"]
            kl, critic = kl or preset.get("kl"), critic or preset.get("critic")
            resample_groups = preset.get("resample_groups") if resample_groups is None else resample_groups
        check_object("model.objective", objective, "ClippedSurrogate()")
        check_object("model.advantage", advantage, "GroupCentered()")
        check_object("model.kl", kl, "KLPenalty(0.1)")
        check_object("model.sampler", sampler, "Sampler(max_tokens=64)")
        check_object("model.critic", critic, "Critic()")
        check_object("model.limits", limits, "Limits()")
        check_object("model.curriculum", curriculum, "Curriculum()")
        check_object("model.distillation", distillation, "Distillation('Qwen/Qwen3-8B')")
        check_rewards(rewards)
        self.objective, self.advantage = objective or ImportanceSampling(), advantage or GroupCentered()
        self.rewards = list(rewards or [])
        self.kl, self.critic, self.sampler, self.distillation = kl, critic, sampler or Sampler(), distillation
        # `kl` are the settings; the current coefficient is that of `kl_controller.penalty`.
        self.kl_controller = None if kl is None else KLController(kl)
        self.environment = environment_factory(environment, environment_args)
        self.limits = limits or Limits()
        self.truncated_reward, self.mask_truncated = truncated_reward, mask_truncated
        self.entropy_coefficient, self.resample_groups = entropy_coefficient, resample_groups or 0
        check_staleness(max_staleness, self.objective, bool(importance_weights))
        self.max_staleness = max_staleness
        self.importance_weights = _importance_weights(importance_weights, max_staleness, self.sampler)
        self.producer: RolloutProducer | None = None
        """Samples rounds ahead of training; None if `max_staleness` is 0, or before training."""
        check_algorithm(self.objective, self.advantage, self.kl, self.critic)
        check_distillation(distillation, self.kl, self.rewarded, self.resample_groups, max_staleness)
        check_reference(kl, self.sampler)
        check_finite("model.truncated_reward", truncated_reward)
        check_finite("model.entropy_coefficient", entropy_coefficient)
        check_whole("model.resample_groups", self.resample_groups, 0, MOST_TIMES)
        if curriculum is not None and self.resample_groups:
            raise ConfigError(
                "model.curriculum and model.resample_groups are both set, but groups that are sampled again show no "
                "success rate of their prompt; leave one of the two out (some recipes set resample_groups)"
            )
        if curriculum is not None and not self.rewarded:
            raise ConfigError(
                "model.curriculum needs a reward that measures success; set model.rewards, or leave it out"
            )
        self.prompt_sampler = None if curriculum is None else PromptSampler(curriculum)
        self.value_model: ValueModel | None
        self.register_module("value_model", None)  # so that its parameters come before the policy's
        self.seed, self.last_statistics = run_seed(), dict[str, float]()
        self.step_numbers = StepNumbers(NUMBERS, LARGEST)
        self.reference: Reference | ServerReference | None = None
        self.samples_rollouts = False
        """True if the policy samples the episodes that it is trained on; False if they are recorded."""
        self.heldout = nn.ModuleDict({f"{name}_": HeldOut() for name in ("val", "test")})

    # -- recipes --------------------------------------------------------------------------------------------------

    @classmethod
    def _of_recipe(cls, recipe: str, model: Any, rewards: list[Reward] | None, settings: dict[str, Any]) -> Self:
        """A module with the settings of a recipe, except those in `settings`."""
        return cls(model, rewards=rewards, **{**build_recipe(recipe), **settings})

    @classmethod
    def grpo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """GRPO (DeepSeekMath, arXiv 2402.03300 eq. 3): the clipped surrogate with group-relative advantages.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4) over the episodes of a group; the loss is
        -min(r·A, clamp(r, 0.8, 1.2)·A) + 0.04·k3, averaged over the tokens of each sequence, then over sequences.

        The recipe sets `objective` ClippedSurrogate(clip_low=0.2, clip_high=0.2, aggregation="sequence_mean"),
        `advantage` GroupCentered(scale="std"), `kl` KLPenalty(0.04, place="loss", estimator="k3").

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.grpo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("grpo", model, rewards, settings)

    @classmethod
    def dr_grpo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """Dr. GRPO (arXiv 2503.20783): GRPO without the two normalizations that bias it, and without KL.

        A_i = R_i - mean(R); the loss -min(r·A, clamp(r, 0.8, 1.2)·A) is summed over the tokens of each sequence,
        divided by the token budget `sampler.max_tokens`, and averaged over sequences.

        The recipe sets `objective` ClippedSurrogate(clip_low=0.2, clip_high=0.2, aggregation="constant"), `advantage`
        GroupCentered(scale="none").

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.dr_grpo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("dr_grpo", model, rewards, settings)

    @classmethod
    def dapo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """DAPO (arXiv 2503.14476 eq. 8): higher upper clip, loss over all tokens, dynamic sampling, no KL.

        The loss is -min(r·A, clamp(r, 0.8, 1.28)·A), averaged over all tokens of the optimizer step, with GRPO's
        advantage. Zero-variance groups are sampled again, here up to 3 times with the same prompts. The paper's
        soft overlong punishment is a reward: add `rewards.OverlongPenalty`.

        The recipe sets `objective` ClippedSurrogate(clip_low=0.2, clip_high=0.28, aggregation="token_mean"),
        `advantage` GroupCentered(scale="std"), `resample_groups` 3.

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.dapo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("dapo", model, rewards, settings)

    @classmethod
    def gspo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """GSPO (arXiv 2507.18071 eq. 5-7): one importance ratio per sequence, without KL.

        s = exp(mean over the sequence of log p - log q); the loss is -min(s·A, clamp(s, 1 - 3e-4, 1 + 4e-4)·A),
        averaged over sequences, with GRPO's advantage.

        The recipe sets `objective` SequenceClippedSurrogate(normalized=True, clip_low=3e-4, clip_high=4e-4,
        aggregation="sequence_mean"), `advantage` GroupCentered(scale="std").

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.gspo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("gspo", model, rewards, settings)

    @classmethod
    def rloo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """RLOO (arXiv 2402.14740 sec. 3): REINFORCE on whole sequences with a leave-one-out baseline.

        A_i = R_i - mean of the other rewards of the group, less the episode's penalty 0.05·Σ (log q - log p_ref), of
        which the mean over the round is subtracted; s = exp(Σ (log p - log q)) over the sequence; the loss is
        -min(s·A, clamp(s, 0.8, 1.2)·A), averaged over sequences. The clip and the KL coefficient are TRL's defaults.

        The recipe sets `objective` SequenceClippedSurrogate(normalized=False, clip_low=0.2, clip_high=0.2,
        aggregation="sequence_mean"), `advantage` LeaveOneOut(), `kl` KLPenalty(0.05, place="reward").

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.rloo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("rloo", model, rewards, settings)

    @classmethod
    def reinforce_pp(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """REINFORCE++ (arXiv 2501.03262): PPO without a critic; advantages whitened over all tokens of the round.

        A_t = R - 0.01·Σ over this and later tokens of (log q - log p_ref), then whitened over the round; the loss is
        -min(r·A, clamp(r, 0.8, 1.2)·A) over all tokens. The coefficient is OpenRLHF's default.

        The recipe sets `objective` ClippedSurrogate(clip_low=0.2, clip_high=0.2, aggregation="token_mean"), `advantage`
        GlobalWhitened(baseline="none"), `kl` KLPenalty(0.01, place="reward").

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.reinforce_pp("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("reinforce_pp", model, rewards, settings)

    @classmethod
    def ppo(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """PPO with a critic (arXiv 1707.06347 eq. 7; for language models arXiv 1909.08593).

        Token rewards are -0.05·(log q - log p_ref), plus R at the last token; advantages by GAE(γ=1, λ=0.95, arXiv
        1506.02438), whitened over the round; the loss is -min(r·A, clamp(r, 0.8, 1.2)·A) over all tokens, plus 0.1
        times the value loss, clipped at 0.2. These are the defaults of the PPO trainer that TRL had.

        The recipe sets `objective` ClippedSurrogate(clip_low=0.2, clip_high=0.2, aggregation="token_mean"), `advantage`
        GAE(gamma=1.0, lam=0.95, whiten=True), `kl` KLPenalty(0.05, place="reward"), `critic` Critic(clip=0.2,
        coefficient=0.1).

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.ppo("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("ppo", model, rewards, settings)

    @classmethod
    def distill(
        cls, model: Any, teacher: str | Distillation, rewards: list[Reward] | None = None, **settings: Any
    ) -> Self:
        """On-policy distillation (GKD, arXiv 2306.13649): the student answers, the teacher's distributions are learned.

        At each token that the student sampled, p is its distribution over the vocabulary and q the teacher's. The loss
        is KL(p ‖ q) by default (`Distillation.beta` selects others), averaged over all tokens of the optimizer step.
        As in GKD and TRL, its gradient does not include the effect of a token on later ones. Rewards may be added; the
        loss then includes their policy loss, with the advantages R_i - mean(R).

        The recipe sets `objective` ImportanceSampling(aggregation="token_mean"), `advantage`
        GroupCentered(scale="none"), and the constructor `distillation`.

        Args:
            model: See `PolicyRLModule`.
            teacher: The teacher: a model folder or Hub id, or a `Distillation` with further settings.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.distill("Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-8B")  # doctest: +SKIP
        """
        distillation = Distillation(teacher) if isinstance(teacher, str) else teacher
        return cls._of_recipe("distill", model, rewards, {"distillation": distillation, **settings})

    @classmethod
    def distill_pg(cls, model: Any, teacher: str, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """On-policy distillation as a policy gradient, as in tinker-cookbook: the reverse KL of a token is its reward.

        A_t = R_i - mean(R) - (log q - log p_teacher) of the sampled token; the loss is -r·A, averaged over all tokens.
        Its expected gradient is that of `distill` with the reverse KL, but it only needs the teacher's
        log-probabilities of the sampled tokens. (tinker-cookbook sums over tokens instead of averaging.)

        The recipe sets `objective` ImportanceSampling(aggregation="token_mean"), `advantage`
        GroupCentered(scale="none"), `kl` KLPenalty(1.0, place="reward", discount=0.0, centered=False), whose
        `reference` is the teacher.

        Args:
            model: See `PolicyRLModule`.
            teacher: Model folder or Hub id of the teacher, or the address of a vLLM server that has it.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.distill_pg("Qwen/Qwen3-0.6B", teacher="Qwen/Qwen3-8B")  # doctest: +SKIP
        """
        kl = KLPenalty(1.0, place="reward", discount=0.0, centered=False, reference=teacher)
        return cls._of_recipe("distill_pg", model, rewards, {"kl": kl, **settings})

    @classmethod
    def mint(cls, model: Any, rewards: list[Reward] | None = None, **settings: Any) -> Self:
        """The RL stage of the MinT and Tinker recipe: importance sampling with a KL penalty in the reward.

        A_t = R_i - mean(R) - 0.05·(log q - log p_ref of the token, less its mean over the round); the loss is -r·A,
        summed over tokens, as Tinker's `importance_sampling` is.

        The recipe sets `objective` ImportanceSampling(aggregation="token_sum"), `advantage`
        GroupCentered(scale="none"), `kl` KLPenalty(0.05, place="reward", discount=0.0).

        Args:
            model: See `PolicyRLModule`.
            rewards: See `PolicyRLModule`.
            **settings: Further arguments of `PolicyRLModule`; they override those of the recipe.

        Example:
            >>> module = PolicyRLModule.mint("Qwen/Qwen3-0.6B", rewards=[reward])  # doctest: +SKIP
        """
        return cls._of_recipe("mint", model, rewards, settings)

    # -- building -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Build what uses the model; `configure_model` calls it once the model is loaded."""
        disable_dropout(self.model)
        tokens_per_batch, shared_head = self.max_tokens_per_batch, None
        if self.critic is not None:
            # Before the reference is created, because that adds an adapter to the model.
            self.value_model = self.critic.build(self.model, self.tokenizer, tokens_per_batch, self.dtype_name)
            shared_head = self.value_model.head if self.critic.shared else None
        self.token_logprobs = TokenLogprobs(self.model, tokens_per_batch, value_head=shared_head)
        if self.kl is not None:
            self.reference = self._make_reference(self.kl)
            self.reference_copy = self.reference.copy
        if self.distillation is not None:
            self.load_teacher(self.distillation, self.sampler.temperature)
        self.model_sampler = self.sampler.build(self.model, self.renderer, tokens_per_batch)
        terms = [RewardTerm(reward, self.renderer, self.model_sampler.stop) for reward in self.rewards]
        self.reward_terms = nn.ModuleList(terms)
        self.collector = RolloutCollector(
            sampler=self.model_sampler,
            renderer=self.renderer,
            terms=terms,
            advantage=self.advantage,
            seed=self.seed,
            kl_controller=self.kl_controller,
            reference=None if isinstance(self.reference, ServerReference) else self.reference,
            token_functions=self._token_functions(),
            environment=self.environment,
            limits=self.limits,
            truncated_reward=self.truncated_reward,
            mask_truncated=self.mask_truncated,
            resample_groups=self.resample_groups,
            sequence_level=self.objective.sequence_level,
            sampling_context=self.sampling_context,
        )

    def _make_reference(self, kl: KLPenalty) -> Reference | ServerReference:
        """The policy at the start of the stage, or the model that `kl.reference` names; raises `ConfigError`."""
        if kl.reference is None:
            return Reference(
                self.model,
                fresh_adapter=self.fresh_adapter,
                max_tokens_per_batch=self.max_tokens_per_batch,
                moves=bool(kl.refresh_every),
                device=kl.device,
                offload=kl.offload,
            )
        if kl.served:
            return ServerReference(kl.reference, self.tokenizer)
        return load_reference(
            kl.reference,
            self.tokenizer,
            self.dtype_name,
            max_tokens_per_batch=self.max_tokens_per_batch,
            device=kl.device,
            offload=kl.offload,
        )

    def _token_functions(self) -> TokenFunctions:
        """Functions that compute what the settings need of each training sample; None for the rest."""
        temperature = self.sampler.temperature
        reference, recompute = self.reference, self.importance_weights is not None

        return TokenFunctions(
            reference_logprobs=None
            if reference is None
            else lambda ids, loss_mask: reference.logprobs(ids, loss_mask, temperature),
            recomputed_logprobs=self._recomputed_logprobs if recompute else None,
            values=None if self.value_model is None else self.critic_values,
        )

    def modules_to_shard(self) -> list[nn.Module]:
        """The policy, the teacher, and the backbones of critic and reference if these have their own weights."""
        critic = None if self.value_model is None else self.value_model.backbone
        reference = [] if self.reference is None else self.reference.modules_to_shard
        return [*super().modules_to_shard(), *([] if critic is None else [critic]), *reference]

    @property
    def packed_forward(self) -> PackedForward:
        """The packed forward pass of the policy."""
        return self.token_logprobs.packed_forward

    def forward_passes(self) -> list[PackedForward]:
        """The packed forward passes of the policy, and of a critic with its own backbone."""
        own = None if self.value_model is None else self.value_model.packed_forward
        return [self.packed_forward, *([] if own is None else [own])]

    def heads(self) -> list[nn.Module]:
        """The critic's value head, which stays in float32 at any precision."""
        return [] if self.value_model is None else [self.value_model.head]

    def longest_row(self) -> int:
        """Number of tokens of the longest row that training can meet: prompt and response; 0 if unknown."""
        longest = super().longest_row()
        data = row_data_of(self.trainer)
        recorded = isinstance(data, PromptDataModule) and data.recorded
        return longest + self.sampler.max_tokens if longest and not recorded else longest

    def step_sizes(self) -> StepSizes | None:
        """The sizes of the largest mini-batch and of a round; None if they are unknown."""
        data = row_data_of(self.trainer)
        if not isinstance(data, PromptDataModule):
            return super().step_sizes()
        prepared = data.prepared.get("train")
        if data.recorded or not prepared or not isinstance(prepared.rows, list) or not prepared.rows:
            return None
        prompts = -(-min(data.prompts_per_round, len(prepared.rows)) // data_ranks(self.trainer)[1])
        return round_sizes(prepared.rows, prompts, data.group_size, data.minibatches, self.sampler)

    @property
    def offload_settings(self) -> str:
        """Settings of frozen models that can be kept on the CPU."""
        return "model.kl, model.distillation and reward models"

    def parameter_groups(self) -> ParamsT:
        """The trained parameters; those of a critic with its own learning rate are a group."""
        if self.critic is None or self.value_model is None or self.critic.learning_rate is None:
            return super().parameter_groups()
        own = {id(p) for p in self.value_model.parameters()}
        groups: list[dict[str, list[nn.Parameter] | float]] = [
            {"params": [p for p in trained(self) if id(p) not in own]},
            {"params": [p for p in trained(self) if id(p) in own], "lr": self.critic.learning_rate},
        ]
        return groups

    # -- rollouts -------------------------------------------------------------------------------------------------

    def rollout_loader(self, data: PromptDataModule) -> RolloutDataLoader[Prompt] | RolloutDataLoader[list[Recorded]]:
        """Check the settings, and create the dataloader that collects rounds and yields their mini-batches.

        Args:
            data: The data module.
        """
        if data.stream is not None:
            return self._streaming_loader(data, data.stream)
        prepared = data.prepared["train"].rows
        recorded = [row for row in prepared if isinstance(row, Recorded)]
        prompts = [row for row in prepared if isinstance(row, Prompt)]
        self._check_data(data, recorded, prompts)
        self.samples_rollouts = not data.recorded
        rows: list[Recorded | Prompt] = [*recorded, *prompts]
        where = {row.index: row.where for row in rows if row.where}
        self.rollouts: RolloutDataLoader[Prompt] | RolloutDataLoader[list[Recorded]]
        if data.recorded:
            self.rollouts = self._loader(data, by_group(recorded), self.collector.collect_recorded, where)
        else:
            self.producer = self._make_producer(data.group_size) if self.max_staleness else None
            collect = partial(self._collect, group_size=data.group_size, producer=self.producer)
            draw = None
            if self.prompt_sampler is not None:
                indices = [prompt.index for prompt in prompts]
                draw = partial(self.prompt_sampler.order, indices=indices, seed=data.seed)
            order = data.prepared["train"].order(data.mixture, data.seed)
            self.rollouts = self._loader(data, prompts, collect, where, self.producer, draw, order)
        return self.rollouts

    def _streaming_loader(self, data: PromptDataModule, stream: TrainingStream[Example]) -> RolloutDataLoader[Prompt]:
        """The dataloader of streamed prompts."""
        for setting, value in (("model.curriculum", self.prompt_sampler), ("model.max_staleness", self.max_staleness)):
            if value:
                raise ConfigError(
                    f"{setting} needs all prompts of an epoch, but data.streaming is set; remove one of them"
                )
        if self.distillation is not None and self.distillation.on_policy_fraction < 1:
            raise ConfigError(
                "distillation.on_policy_fraction is below 1, which needs an answer in every row; that cannot be "
                "checked with data.streaming. Leave it out"
            )
        self._check_data(data, [], [row for row in stream.checked if isinstance(row, Prompt)])
        self.samples_rollouts = True
        collect = partial(self._collect, group_size=data.group_size, producer=None)
        rollouts: RolloutDataLoader[Prompt] = self._loader(data, [], collect, {}, stream=StreamedPrompts(stream))
        self.rollouts = rollouts
        return rollouts

    def _make_producer(self, group_size: int) -> RolloutProducer:
        check_producer(self.trainer.strategy, self.model, self.sampler)

        def make_runner(sampler: ModelSampler, seed: Sequence[int]) -> EpisodeRunner:
            return EpisodeRunner(sampler, self.renderer, (self.seed, *seed), self.environment, self.limits)

        plugin = self.trainer.precision_plugin
        return RolloutProducer(
            self.model,
            lambda model: self.sampler.build(model, self.renderer, self.max_tokens_per_batch),
            make_runner,
            group_size,
            self.max_staleness,
            shares_engine=self.sampler.engine is not None,
            # The contexts of other plugins set the default data type of all threads.
            context=plugin.forward_context if isinstance(plugin, MixedPrecision) else nullcontext,
        )

    def _collect(
        self, prompts: Sequence[Prompt], round_index: int, group_size: int, producer: RolloutProducer | None
    ) -> tuple[list[TrainingSample], Sums]:
        """Collect a round, and mix in the answers of the data that `distillation.on_policy_fraction` asks for."""
        if self.distillation is None or self.distillation.on_policy_fraction == 1:
            return self._sampled(prompts, round_index, group_size, producer)
        sampled, answered = split_prompts(prompts, self.distillation.on_policy_fraction, (self.seed, round_index))
        samples, sums = self._sampled(sampled, round_index, group_size)
        given = [answer_episode(self.renderer, prompt, self.sampler.max_tokens) for prompt in answered]
        with torch.no_grad(), self.sampling_context():
            # With the policy's log-probabilities, ratios are 1 on these tokens too.
            self.collector.fill(given, TokenFunctions(recomputed_logprobs=self._recomputed_logprobs))
        for episode in given:
            for sample in episode.training_samples:
                sample.sampling_logprobs, sample.group = sample.recomputed_logprobs, episode.group
                samples.append(sample)
        return samples, {**sums, "on_policy": (float(len(sampled)), len(prompts))}

    def _sampled(
        self, prompts: Sequence[Prompt], round_index: int, group_size: int, producer: RolloutProducer | None = None
    ) -> tuple[list[TrainingSample], Sums]:
        """Collect a round, and pass the results of its prompts to the curriculum."""
        samples, sums = self.collector.collect(prompts, round_index, group_size, producer)
        if self.prompt_sampler is not None:
            sums = sums | self.prompt_sampler.observe(self.collector.episodes)
        return samples, sums

    def _recomputed_logprobs(self, ids: Tensor, loss_mask: Tensor) -> Tensor:
        return self.token_logprobs(ids, loss_mask, self.sampler.temperature).logprobs

    def _loader(
        self,
        data: PromptDataModule,
        items: Sequence[T],
        collect: Callable[[list[T], int], tuple[list[TrainingSample], Sums]],
        where: Mapping[int, str],
        producer: Producer[T] | None = None,
        draw: Callable[[int, int], list[int]] | None = None,
        order: MixedOrder | None = None,
        stream: StreamedItems[T] | None = None,
    ) -> RolloutDataLoader[T]:
        return RolloutDataLoader(
            items,
            collect,
            items_per_round=data.prompts_per_round,
            update_epochs=data.update_epochs,
            minibatches=data.minibatches,
            pad_id=data.pad_id,
            seed=data.seed,
            shard_spec=shard_spec_of(self.trainer, training=True),
            shuffle=not overfits(self.trainer),
            where=where,
            producer=producer,
            draw=draw,
            order=order,
            stream=stream,
        )

    def _check_data(self, data: PromptDataModule, recorded: Sequence[Recorded], prompts: Sequence[Prompt]) -> None:
        """Raise `ConfigError` if the module and the data module are incompatible."""
        check_rounds(data, self.objective, self.trainer.accumulate_grad_batches)
        if data.mixture is not None and self.prompt_sampler is not None:
            raise ConfigError(
                "model.curriculum chooses prompts, so data.train must not have weights; remove one of them"
            )
        if data.recorded:
            if self.prompt_sampler is not None:
                raise ConfigError("model.curriculum chooses prompts, but data.episodes are recorded; leave it out")
            if self.distillation is not None and self.distillation.on_policy_fraction < 1:
                raise ConfigError(
                    "distillation.on_policy_fraction is below 1, but data.episodes are not sampled; leave it out"
                )
            recomputes = self.importance_weights is not None
            samples_again = bool(self.resample_groups or self.max_staleness)
            check_recorded(recorded, self.objective, self.advantage, self.kl, self.critic, recomputes, samples_again)
            check_minibatches(data.minibatches, len(recorded))
            return
        check_minibatches(data.minibatches, data.prompts_per_round * data.group_size)
        if self.rewarded:
            check_groups(data.group_size, self.advantage, self.resample_groups)
        check_sampling(self.sampler, prompts, self.model_sampler.context)
        if isinstance(self.reference, ServerReference):
            self.reference.check_length(max(prompt.tokens for prompt in prompts) + self.sampler.max_tokens)
        self._check_signal()
        if self.distillation is not None and self.distillation.on_policy_fraction < 1:
            check_answers(prompts, data.group_size)
        for term in self.collector.terms:
            term.check(prompts)

    @property
    def rewarded(self) -> bool:
        """True if episodes get a reward, from `rewards` or from their environment."""
        return bool(self.rewards) or self.environment is not None

    def _check_signal(self) -> None:
        """Raise `ConfigError` if there is nothing to learn from: neither a reward nor a teacher."""
        if self.rewarded or self.distillation is not None:
            return
        if self.kl is None or self.kl.reference is None or not self.kl.coefficient:
            raise ConfigError(
                "there is no reward. Set model.rewards or model.environment; or, to learn from a teacher, "
                "model.distillation"
            )
        rank_zero_only(log.warning)("there is no reward: the policy only learns from the KL to %s", self.kl.reference)

    def on_train_batch_start(self, batch: Columns, batch_idx: int) -> None:
        """Pass the statistics of a new round, over all ranks, to the collector."""
        super().on_train_batch_start(batch, batch_idx)
        if batch.get("statistics"):
            self.last_statistics = batch["statistics"]
            self.collector.observe(batch["statistics"])

    @property
    def last_episodes(self) -> list[Episode]:
        """Episodes of the last round, on this rank."""
        return self.collector.episodes

    @contextmanager
    def sampling_context(self) -> Iterator[None]:
        """Context manager for the precision of training, so that sampler and trainer agree on log-probabilities.

        Weights that DeepSpeed shards (ZeRO-3) are gathered in it, so all ranks must enter it together.
        """
        precision = nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()
        with zero3_gathered(self), precision:
            yield

    def recorded_episode(self, data: "Row") -> list[Recorded]:
        """Read and check a row of recorded episodes."""
        return [read_recorded(data, len(self.tokenizer))]

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: "RolloutBatch", batch_idx: int) -> dict[str, Tensor]:
        """Compute the loss of a mini-batch.

        Adds its metrics to those of the optimizer step (`step_numbers`, logged by `StepEnd`).

        Args:
            batch: The mini-batch.
            batch_idx: Index of the mini-batch in its epoch.

        Returns:
            `loss`, a scalar with gradient, and metrics of this mini-batch.
        """
        ids, loss_mask = batch["input_ids"], batch["loss_mask"]
        comparison = None if self.teacher is None else self.teacher(ids, loss_mask)
        # `[B, T]` each; column t belongs to the token `ids[:, t]`.
        output = self.token_logprobs(ids, loss_mask, self.sampler.temperature, details=True, teacher=comparison)
        sums, largest = step_sums(output, batch, self.objective, self._clamped(output.logprobs.detach(), batch))
        metrics = {name: sums[name][0] / sums[name][1].clamp(min=1) for name in RETURNED}
        if self.reference is not None and batch.get("first"):
            metrics |= reference_distance(output, batch)
        loss, active_count = self._policy_loss(output, batch)
        if self.critic is not None:
            value_total = self._value_losses(self.critic_values(ids, loss_mask, output), batch).sum()
            sums["value_loss"] = value_total, loss_mask.sum()
            critic_loss = self.normalized(value_total, batch, "tokens", loss_mask.sum())
            policy_weight = 0.0 if self._warming_up else 1.0
            loss = policy_weight * loss + self.critic.coefficient * critic_loss
        self.step_numbers.add(active_count, {**sums, "loss": self.share(loss, batch)}, largest)
        self._log_round(batch)
        return {"loss": loss, **largest, **metrics}

    @property
    def _warming_up(self) -> bool:
        """True while only the critic is trained."""
        return self.critic is not None and 0 < self.collector.started <= self.critic.warmup_rounds

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the policy's gradients during the critic's warm-up.

        Zero gradients would still decay Adam's moments and, with weight decay, the weights.
        """
        if self._warming_up:
            for parameter in self.model.parameters():
                parameter.grad = None

    def _policy_loss(self, output: TokenLogprobsOutput, batch: "RolloutBatch") -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the number of tokens that may have a gradient.

        These are the tokens with a nonzero advantage, clipped or not, or all of them with KL in the loss; in both cases
        without those of importance weight 0. With entropy, a critic or a teacher, they are all tokens.
        """
        loss_mask, old = batch["loss_mask"], batch["old_logprobs"]
        kl = None if self.kl_controller is None else self.kl_controller.penalty
        per_token = self.objective(output.logprobs, old, batch["advantages"], loss_mask)
        may_have_gradient = (loss_mask != 0) & (batch["advantages"] != 0)
        if kl is not None and kl.place == "loss":
            per_token = per_token + kl.loss(output.logprobs, old, batch["reference_logprobs"], loss_mask)
            may_have_gradient = loss_mask != 0 if kl.coefficient else may_have_gradient
        if self.importance_weights is not None:
            weights = self.importance_weights(old, batch["sampling_logprobs"], loss_mask)
            per_token, may_have_gradient = per_token * weights, may_have_gradient & (weights != 0)
        loss = self._aggregated(per_token, batch)
        if self.entropy_coefficient:
            assert output.entropy is not None
            bonus = self.normalized(output.entropy.sum(), batch, "tokens", loss_mask.sum())
            loss = loss - self.entropy_coefficient * bonus
        if self.distillation is not None:
            assert output.divergence is not None
            divergence = self.normalized(output.divergence.sum(), batch, "tokens", loss_mask.sum())
            loss = loss + self.distillation.coefficient * divergence
        if self.entropy_coefficient or self.critic is not None or self.distillation is not None:
            may_have_gradient = loss_mask != 0
        return loss, may_have_gradient.sum()

    def critic_values(self, ids: Tensor, loss_mask: Tensor, output: TokenLogprobsOutput | None = None) -> Tensor:
        """Compute the critic's values. With a shared backbone they come from the policy's forward pass.

        Args:
            ids: Token ids, `[B, T]`.
            loss_mask: 1 at sampled tokens, 0 elsewhere, `[B, T]`.
            output: Result of the policy's forward pass on these tokens, if already computed.

        Returns:
            Values in reward units, `[B, T]`.
        """
        assert self.value_model is not None
        if self.value_model.backbone is not None:
            values: Tensor = self.value_model(ids, loss_mask)
            return values
        found = output or self.token_logprobs(ids, loss_mask, self.sampler.temperature, details=True)
        assert found.values is not None, "TokenLogprobs has the value head"
        return found.values

    def _clamped(self, logprobs: Tensor, batch: "RolloutBatch") -> Tensor:
        """1 at tokens with a log-ratio beyond ±20 (in the loss, its KL or the importance weights), `[B, T]`."""
        old, loss_mask = batch["old_logprobs"], batch["loss_mask"]
        clamped = self.objective.clamped(logprobs, old, loss_mask)
        if self.kl is not None and self.kl.place == "loss":
            clamped = clamped | beyond(token_log_ratio(logprobs, batch["reference_logprobs"], loss_mask))
        if self.importance_weights is not None:
            clamped = clamped | beyond(token_log_ratio(old, batch["sampling_logprobs"], loss_mask))
        return clamped.to(loss_mask.dtype)

    def _value_losses(self, values: Tensor, batch: "RolloutBatch") -> Tensor:
        """The critic's loss of each token, `[B, T]`."""
        assert self.critic is not None
        return value_loss(values, batch["values"], batch["returns"], batch["loss_mask"], self.critic.clip)

    def _aggregated(self, per_token: Tensor, batch: "RolloutBatch") -> Tensor:
        """The loss of the mini-batch, a scalar, from per-token losses `[B, T]`, aggregated as the objective says."""
        mode, length = self.objective.aggregation, self.objective.length or self.sampler.max_tokens
        total, local = aggregate(per_token, batch["loss_mask"], mode, length)
        if mode == "constant":
            # `aggregate` counts `length` tokens per sequence, the step's denominator counts sequences: convert both.
            total, local = total / length, local / length
        return self.normalized(total, batch, DENOMINATORS[mode], local)

    def _log_round(self, batch: "RolloutBatch") -> None:
        """Log the statistics of a round, over all ranks, at its first mini-batch.

        The metrics of an optimizer step are logged at its end, by `StepEnd`.
        """
        for name, number in (batch.get("statistics") or {}).items():
            if name in OF_REWARD and not self.rewarded:
                continue
            self.log(f"train/{name}", number, on_step=True, on_epoch=False, prog_bar=name in ROUND_ON_BAR)
        source = float(any(reward.scored_by_model for reward in self.rewards))
        self.log("reward_source_prm", source, on_step=True, on_epoch=False)

    def why_empty(self) -> str:
        """Why a step may have had no trained token, according to the last round, and what to change."""
        return why_empty(self.last_statistics)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[Episode]:
        """Answer held-out prompts at temperature 0 with the current weights, one rewarded episode each.

        All ranks must call this together.

        Args:
            prompts: Prompts of this rank.
        """
        with self.producer.paused() if self.producer else nullcontext():
            self._sync_engine()
            with self.sampling_context():
                return self.collector.rollout(prompts, 1, (VALIDATION,), temperature=0.0)

    def _sync_engine(self) -> None:
        # An engine with its own copy of the weights still has those from the start of the last round. The version is
        # the optimizer step here and the round in training; see `Engine.sync`.
        with self.sampling_context():
            self.model_sampler.sync(self.global_step)

    # Lightning calls these after WeightAveraging has put the averaged weights in place, which are then sampled from.
    on_test_epoch_start = on_predict_epoch_start = _sync_engine

    def on_validation_epoch_start(self) -> None:
        if self.producer:
            self.producer.pause()
        self._sync_engine()

    def on_validation_epoch_end(self) -> None:
        if self.producer:
            self.producer.resume()

    def evaluate(self, batch: PromptBatch, name: str) -> None:
        """Answer each prompt greedily and at the sampler's temperature, and log what `HeldOut` measures.

        Args:
            batch: The prompts.
            name: `val` or `test`.
        """
        self._check_signal()
        prompts = kept_prompts(batch)
        if self.trainer.sanity_checking:
            prompts = prompts[:SANITY_PROMPTS]
        metrics = self.heldout[f"{name}_"]
        assert isinstance(metrics, HeldOut)
        with self.sampling_context():
            greedy = self.collector.rollout(prompts, 1, (VALIDATION,), temperature=0.0) if self.rewarded else []
            sampled = self.collector.rollout(prompts, 1, (VALIDATION,))
            if self.reference is not None:
                self.collector.fill(sampled, TokenFunctions(self.collector.token_functions.reference_logprobs))
            metrics.add(greedy, sampled)
            self._add_divergence(sampled, metrics)
        without = {"kl": self.reference is None, "divergence": self.teacher is None}
        for key, metric in metrics.logged([name for name in without if without[name]], rewarded=self.rewarded):
            on_bar = key == "reward_sampled" or (key == "divergence" and not self.rewarded)
            self.log(f"{name}/{key}", metric, prog_bar=on_bar, batch_size=max(1, len(prompts)))

    def _add_divergence(self, episodes: Sequence[Episode], metrics: HeldOut) -> None:
        """Add the divergence from the teacher at the sampled tokens. All ranks must call this together."""
        if self.teacher is None:
            return
        samples = [sample for episode in episodes for sample in episode.training_samples if sample.actions]
        ids, masks = [sample.ids for sample in samples], [sample.loss_mask for sample in samples]
        for _, batch in padded_batches(ids, masks, CHUNK, self.device, range(len(samples)), even=True):
            tokens, loss_mask = batch["input_ids"], batch["loss_mask"]
            comparison = self.teacher(tokens, loss_mask)
            output = self.token_logprobs(tokens, loss_mask, self.sampler.temperature, teacher=comparison)
            assert output.divergence is not None
            count = loss_mask.sum()
            metrics.divergence.update(output.divergence.sum() / count.clamp(min=1), weight=count)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Answer]:
        """Sample one response to each prompt."""
        with self.sampling_context():
            return answers(self.model_sampler, self.renderer, kept_prompts(batch), self.seed)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: "StateDict") -> None:
        """Save the collector's state in addition to the trained weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["collector"] = self.collector.state_dict()
        if self.prompt_sampler is not None:
            checkpoint["curriculum"] = self.prompt_sampler.state_dict()

    def on_load_checkpoint(self, checkpoint: "StateDict") -> None:
        """Restore the collector's state in addition to the trained weights."""
        super().on_load_checkpoint(checkpoint)
        self.collector.load_state_dict(checkpoint["collector"])
        if self.prompt_sampler is not None and "curriculum" in checkpoint:
            self.prompt_sampler.load_state_dict(checkpoint["curriculum"])


def _importance_weights(
    given: ImportanceWeights | bool | None, max_staleness: int, sampler: Sampler
) -> ImportanceWeights | None:
    """The importance weights of a run, from its settings."""
    if isinstance(given, ImportanceWeights):
        return given
    if given is None:
        given = bool(max_staleness) or (isinstance(sampler.engine, EngineSettings) and sampler.engine.low_precision)
    elif not given and max_staleness:
        raise ConfigError(
            f"model.importance_weights is false, but with model.max_staleness: {max_staleness} older policies sample, "
            "which importance weights correct; leave one of the two out"
        )
    return ImportanceWeights() if given else None
