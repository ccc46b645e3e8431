"""Checks for incompatible settings of policy RL, before the model is loaded or before the first round."""

from collections import Counter
from collections.abc import Sequence

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from rlhf_lightning.data.prompts import Prompt, PromptDataModule
from rlhf_lightning.errors import ConfigError, DataError, check_whole
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.distillation import Distillation
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.objectives.policy import PolicyObjective
from rlhf_lightning.rewards import Reward
from rlhf_lightning.rollout.advantages import Advantage
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.rollout.recorded import Recorded

MOST_ROUNDS = 100
"""Maximum of `max_staleness`; beyond a few rounds importance weights vanish."""
MOST_TIMES = 1000
"""Maximum of `resample_groups`, because a group whose rewards are always equal is resampled that many times."""


def check_rewards(rewards: Sequence[Reward] | None) -> None:
    """Raise `ConfigError` unless `rewards` is a list of rewards with different names, or None."""
    if rewards is None:
        return
    if not isinstance(rewards, list | tuple):
        raise ConfigError(f"model.rewards is {_named(rewards)}; it must be a list of rewards: [{_wrapped(rewards)}]")
    for part in rewards:
        if not isinstance(part, Reward):
            raise ConfigError(f"model.rewards contains {_named(part)}; each must be a Reward: {_wrapped(part)}")
    names = [part.name for part in rewards]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"model.rewards: two rewards have the same name ({', '.join(names)}); set the name of one of them"
        )


def _named(value: Reward | Sequence[Reward]) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value)[:80] if isinstance(value, str) else f"a {type(value).__name__}"


def _wrapped(value: Reward | Sequence[Reward]) -> str:
    if isinstance(value, type):
        return f"{value.__name__}(…)"
    return f"{type(value).__name__}(…)" if isinstance(value, Reward | nn.Module) else "FunctionReward(my_function)"


def check_algorithm(
    objective: PolicyObjective, advantage: Advantage, kl: KLPenalty | None, critic: Critic | None
) -> None:
    """Raise `ConfigError` if the settings of an algorithm are incompatible.

    Args:
        objective: The policy loss.
        advantage: Computes advantages from rewards.
        kl: The KL penalty, if any.
        critic: The critic, if any.
    """
    name = type(advantage).__name__
    if advantage.needs_values and critic is None:
        raise ConfigError(f"model.advantage {name} needs the values of a critic. Set model.critic")
    if critic is not None and not advantage.needs_values:
        raise ConfigError(f"model.critic is set, but {name} does not use values. Set model.advantage to GAE")
    if critic is not None and critic.shared and critic.warmup_rounds:
        raise ConfigError(
            f"critic.warmup_rounds is {critic.warmup_rounds}; with critic.shared it must be 0, because training the "
            "critic changes the policy"
        )
    loss = type(objective).__name__
    if objective.sequence_level and advantage.needs_values:
        raise ConfigError(
            f"{loss} treats a sequence as one action, but GAE gives each token its own advantage. Use ClippedSurrogate"
        )
    unnormalized = objective.sequence_level and not getattr(objective, "normalized", True)
    if unnormalized and kl is not None and kl.place == "loss" and kl.coefficient:
        raise ConfigError(
            f"{loss}(normalized=False) treats a sequence as one action, but kl.place is loss, which penalizes tokens. "
            "Set kl.place to reward"
        )


def check_staleness(max_staleness: int, objective: PolicyObjective, weighted: bool) -> None:
    """Raise `ConfigError` if the loss is not valid for rounds that older weights have sampled.

    Args:
        max_staleness: Largest age in rounds.
        objective: The policy loss.
        weighted: True if importance weights were set.
    """
    check_whole("model.max_staleness", max_staleness, 0, MOST_ROUNDS)
    if max_staleness and not objective.valid_off_policy and not weighted:
        raise ConfigError(
            f"model.max_staleness is {max_staleness}, but {type(objective).__name__} has neither a clip nor an "
            "importance ratio, so it cannot correct for responses that an older policy sampled. Use ClippedSurrogate "
            "or ImportanceSampling, or set model.importance_weights"
        )


def check_producer(strategy: Strategy, model: nn.Module, sampler: Sampler) -> None:
    """Raise `ConfigError` if the policy cannot be sampled while it is trained.

    Args:
        strategy: The strategy of the run.
        model: The policy.
        sampler: The sampler's settings.
    """
    # Not a subclass of DDPStrategy: that of DeepSpeed shards weights.
    if is_sharded(model) or not (isinstance(strategy, SingleDeviceStrategy) or type(strategy) is DDPStrategy):
        raise ConfigError(
            "model.max_staleness is set, but the weights may be sharded over ranks, so a thread cannot sample without "
            f"the other ranks ({type(strategy).__name__}). Use one device or DDP, or set model.max_staleness: 0"
        )
    if sampler.engine is None and sampler.cuda_graphs:
        raise ConfigError(
            "model.max_staleness and sampler.cuda_graphs are set, but a CUDA graph cannot be recorded while the model "
            "trains on the same GPU. Set sampler.cuda_graphs: false"
        )


def check_distillation(
    distillation: Distillation | None, kl: KLPenalty | None, rewarded: bool, resample_groups: int, max_staleness: int
) -> None:
    """Raise `ConfigError` if distillation does not fit the other settings.

    Args:
        distillation: The settings of distillation, if any.
        kl: The KL penalty, if any.
        rewarded: True if episodes get a reward.
        resample_groups: See `PolicyRLModule`.
        max_staleness: See `PolicyRLModule`.
    """
    if distillation is None:
        return
    fraction = distillation.on_policy_fraction
    if fraction < 1 and (rewarded or kl is not None):
        raise ConfigError(
            f"distillation.on_policy_fraction is {fraction}, so answers of the data are mixed in, "
            "but rewards and a KL penalty need sampled answers. Set it to 1, or leave out model.rewards, "
            "model.environment and model.kl"
        )
    if fraction < 1 and max_staleness:
        raise ConfigError(
            f"distillation.on_policy_fraction is {fraction}, which is not possible when a thread samples rounds ahead "
            "(model.max_staleness); leave out one of them"
        )
    if resample_groups and not rewarded:
        raise ConfigError("model.resample_groups has no effect without rewards; leave it out")


def check_reference(kl: KLPenalty | None, sampler: Sampler) -> None:
    """Raise `ConfigError` if a server cannot compute the reference's log-probabilities for these samples.

    Args:
        kl: The KL penalty, if any.
        sampler: The sampler's settings.
    """
    if kl is not None and kl.served and sampler.temperature != 1:
        raise ConfigError(
            f"sampler.temperature is {sampler.temperature}, but with a server as kl.reference the log-probabilities "
            "are those at temperature 1, which is all that vLLM computes for given tokens; set it to 1"
        )


def check_rounds(data: PromptDataModule, objective: PolicyObjective, accumulate: int) -> None:
    """Raise `ConfigError` if the rounds of the data do not fit the loss.

    Args:
        data: The data module, after its setup.
        objective: The policy loss.
        accumulate: Number of micro-batches of an optimizer step.
    """
    steps = data.update_epochs * data.minibatches // accumulate
    if steps > 1 and not objective.valid_off_policy:
        raise ConfigError(
            f"a round has {steps} optimizer steps (data.update_epochs, data.minibatches), but "
            f"{type(objective).__name__} has neither a clip nor an importance ratio, so it is only valid for the first "
            "step, before the policy changes. Use ClippedSurrogate or ImportanceSampling, or one step per round "
            "(trainer.accumulate_grad_batches)."
        )


def check_minibatches(minibatches: int, episodes: int) -> None:
    """Raise `ConfigError` if a round has more mini-batches than episodes."""
    if minibatches > episodes:
        raise ConfigError(f"data.minibatches is {minibatches}, but a round has only {episodes} episodes")


def check_recorded(
    rows: Sequence[Recorded],
    objective: PolicyObjective,
    advantage: Advantage,
    kl: KLPenalty | None,
    critic: Critic | None,
    recomputes: bool,
    samples_again: bool,
) -> None:
    """Raise `ConfigError` if recorded episodes do not fit the algorithm.

    Args:
        rows: The recorded episodes.
        objective: See `check_algorithm`.
        advantage: See `check_algorithm`.
        kl: See `check_algorithm`.
        critic: See `check_algorithm`.
        recomputes: True if importance weights correct for another sampler.
        samples_again: True if groups would be sampled again, or rounds ahead of training.
    """
    if not objective.valid_off_policy and not recomputes:
        raise ConfigError(
            f"data.episodes were sampled by another policy, which {type(objective).__name__} cannot correct for. Use "
            "ClippedSurrogate or ImportanceSampling, or set model.importance_weights"
        )
    if samples_again:
        raise ConfigError("data.episodes are already sampled; leave out model.resample_groups and model.max_staleness")
    if objective.aggregation == "constant" and objective.length is None:
        raise ConfigError(
            "the aggregation 'constant' needs objective.length, because the token budget of data.episodes is unknown"
        )
    if any(row.advantage is not None for row in rows) and (critic is not None or advantage.whiten):
        raise ConfigError(
            "data.episodes has rows with a recorded advantage, but a critic would learn nothing from them, and "
            "whitening would change them. Record reward and group instead, or use an advantage without a critic and "
            "whitening"
        )
    first: dict[str, Recorded] = {}
    for row in rows:
        if row.advantage is None and row.prompt_ids != first.setdefault(row.group, row).prompt_ids:
            raise DataError(
                f"{row.where}: the group {row.group!r} is also that of {first[row.group].where}, which has another "
                "prompt. Give only the episodes of one prompt the same group"
            )
    groups = Counter(row.group for row in rows if row.advantage is None)
    if advantage.needs_group and groups and max(groups.values()) == 1:
        raise ConfigError(
            f"no two rows of data.episodes share a group, but {type(advantage).__name__} compares the episodes of a "
            "group, so every advantage would be 0. Give rows of one prompt the same group, or use GlobalWhitened."
        )
    if kl is not None and not recomputes and (kl.place == "reward" or kl.target is not None):
        raise ConfigError(
            "data.episodes contain the log-probabilities of another policy, so a KL penalty in the reward, or an "
            "adaptive one, would measure the KL of that policy. Set kl.place to loss without kl.target, or set "
            "model.importance_weights."
        )


def check_groups(group_size: int, advantage: Advantage, resample_groups: int) -> None:
    """Raise `ConfigError` if groups of one episode are to be compared or sampled again."""
    if group_size == 1 and advantage.needs_group:
        raise ConfigError(
            f"data.group_size is 1, but {type(advantage).__name__} compares the episodes of a group, so "
            "every advantage would be 0. Set data.group_size to 2 or more."
        )
    if group_size == 1 and resample_groups:
        raise ConfigError(
            "model.resample_groups is set, but data.group_size is 1, and a group of one episode cannot have different "
            "rewards. Set data.group_size to 2 or more."
        )


def check_sampling(sampler: Sampler, prompts: Sequence[Prompt], context: int | None) -> None:
    """Raise `ConfigError` if all sampled responses would be equal, or exceed the model's context.

    Args:
        sampler: The sampler's settings.
        prompts: The prompts.
        context: Number of positions of the model; None for no limit.
    """
    sampler.warn_of_bias()
    if sampler.temperature == 0:
        raise ConfigError("sampler.temperature is 0, so all episodes of a group would be equal; set it above 0")
    longest = max(prompt.tokens for prompt in prompts)
    if context and longest + sampler.max_tokens > context:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) plus sampler.max_tokens ({sampler.max_tokens}) exceeds "
            f"the model's {context} positions; lower sampler.max_tokens or data.max_prompt_tokens"
        )
