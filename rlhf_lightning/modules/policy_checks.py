"""Checks of contradictory policy RL settings, before anything is loaded or before the first round."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_lightning.data.prompts import Prompt, PromptDataModule
from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.rewards import Reward, check_finite

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule
    from rlhf_lightning.rollout.recorded import Recorded

MOST_TIMES = 1000
"""Largest `resample_groups`. A reward that is equal for all responses would be resampled that many times."""


def check_rewards(rewards: list[Reward] | None) -> None:
    """Raise `ConfigError` unless `rewards` is a list of rewards, or None."""
    if rewards is None:
        return
    if not isinstance(rewards, list | tuple):
        raise ConfigError(f"model.rewards is {_named(rewards)}; it must be a list of rewards: [{_wrapped(rewards)}]")
    for part in rewards:
        if not isinstance(part, Reward):
            raise ConfigError(f"model.rewards contains {_named(part)}; each must be a Reward: {_wrapped(part)}")


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value)[:80] if isinstance(value, str) else f"a {type(value).__name__}"


def _wrapped(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__name__}(…)"
    return f"{type(value).__name__}(…)" if isinstance(value, nn.Module) else "FunctionReward(my_function)"


def check_settings(module: "PolicyRLModule") -> None:
    """Raise `ConfigError` if the settings of a `PolicyRLModule` contradict each other."""
    names = [part.name for part in module.rewards if isinstance(part, Reward)]
    if len(set(names)) < len(names):
        raise ConfigError(f"model.rewards: two rewards have the same name ({', '.join(names)}); set name of one")
    advantage, critic = type(module.advantage).__name__, module.critic
    if module.advantage.needs_values and critic is None:
        raise ConfigError(f"model.advantage {advantage} needs the values of a critic: set model.critic")
    if critic is not None and not module.advantage.needs_values:
        raise ConfigError(f"model.critic is set, but {advantage} does not use values: set model.advantage to GAE")
    if critic is not None and critic.shared and critic.warmup_rounds:
        raise ConfigError(
            "critic.warmup_rounds must be 0 with critic.shared: training the critic would change the policy"
        )
    check_finite("model.truncated_reward", module.truncated_reward)
    check_finite("model.entropy_coefficient", module.entropy_coefficient)
    objective = type(module.objective).__name__
    if module.objective.sequence_level and module.advantage.needs_values:
        raise ConfigError(
            f"{objective} treats a response as one action, but GAE gives each token its own advantage: use "
            "ClippedSurrogate"
        )
    of_response = module.objective.sequence_level and not getattr(module.objective, "normalized", True)
    if of_response and module.kl is not None and module.kl.place == "loss" and module.kl.coefficient:
        raise ConfigError(f"{objective}(normalized=False) treats a response as one action: set kl.place to reward")
    if module.staleness not in (0, 1):
        raise ConfigError(f"model.staleness is {module.staleness}; it must be 0 or 1 (rounds)")
    check_whole("model.resample_groups", module.resample_groups, 0, MOST_TIMES)


def check_data(module: "PolicyRLModule", data: PromptDataModule) -> None:
    """Check that the module and its data fit together, before the first round.

    Args:
        module: The module.
        data: The data module, after its setup.

    Raises:
        ConfigError: If they do not.
    """
    loss, rows = type(module.objective).__name__, data.prepared["train"].rows
    steps = data.update_epochs * data.minibatches // module.trainer.accumulate_grad_batches
    if steps > 1 and not module.objective.corrects:
        raise ConfigError(
            f"a round has {steps} optimizer steps (data.update_epochs, data.minibatches), but {loss} has neither clip "
            "nor importance ratio: after the first step the policy is no longer the one that sampled. Use "
            "ClippedSurrogate or ImportanceSampling, or one step per round (trainer.accumulate_grad_batches)."
        )
    if data.recorded and not module.objective.corrects and module.importance_weights is None:
        raise ConfigError(f"data.episodes were sampled by another sampler, which {loss} cannot correct for")
    if data.recorded and (module.resample_groups or module.staleness):
        raise ConfigError("data.episodes are already sampled: leave out model.resample_groups and model.staleness")
    if data.recorded and module.objective.aggregation == "constant" and module.objective.length is None:
        raise ConfigError(
            "the aggregation 'constant' needs objective.length, because the token budget of data.episodes is unknown"
        )
    if data.recorded:
        _check_recorded(module, rows)
    episodes = len(rows) if data.recorded else data.prompts_per_round * data.group_size
    if data.minibatches > episodes:
        raise ConfigError(f"data.minibatches is {data.minibatches}, but a round has only {episodes} episodes")
    if not data.recorded:
        _check_prompts(module, rows, data.group_size)


def _check_recorded(module: "PolicyRLModule", rows: "list[Recorded]") -> None:
    if any(row.advantage is not None for row in rows) and (module.critic is not None or module.advantage.whiten):
        raise ConfigError(
            "data.episodes has rows with their own advantage: a critic would learn nothing from them, and whitening "
            "would change them"
        )
    groups = Counter(row.group for row in rows if row.advantage is None)
    if module.advantage.needs_group and groups and max(groups.values()) == 1:
        raise ConfigError(
            f"no two rows of data.episodes share a group, but {type(module.advantage).__name__} compares the responses "
            "of a group: every advantage would be 0. Give rows of one prompt the same group, or use GlobalWhitened."
        )
    kl = module.kl
    if kl is not None and module.importance_weights is None and (kl.place == "reward" or kl.target is not None):
        raise ConfigError(
            "data.episodes hold the log-probabilities of another policy: a KL penalty in the reward, or an adaptive "
            "one, would measure the KL of that policy. Set kl.place to loss without kl.target, or "
            "model.importance_weights."
        )


def _check_prompts(module: "PolicyRLModule", prompts: list[Prompt], group_size: int) -> None:
    sampler = module.sampler
    if group_size == 1 and module.advantage.needs_group:
        raise ConfigError(
            f"data.group_size is 1, but {type(module.advantage).__name__} compares the responses of a group: "
            "every advantage would be 0. Set data.group_size to 2 or more."
        )
    if group_size == 1 and module.resample_groups:
        raise ConfigError(
            "model.resample_groups: a group of one response cannot have different rewards; set data.group_size above 1"
        )
    sampler.warn_of_bias()
    if sampler.temperature == 0:
        raise ConfigError("sampler.temperature is 0, so all responses of a group would be the same")
    check_rewarded(module)
    for part in module.rewards:
        assert isinstance(part, Reward)
        part.check(prompts)
    longest = max(prompt.tokens for prompt in prompts)
    if sampler.context and longest + sampler.max_tokens > sampler.context:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) and sampler.max_tokens ({sampler.max_tokens}) exceed "
            f"the model's {sampler.context} positions; lower max_tokens or data.max_prompt_tokens"
        )


def check_rewarded(module: "PolicyRLModule") -> None:
    """Raise `ConfigError` if there is neither a reward nor an environment."""
    if not len(module.rewards) and module.environment is None:
        raise ConfigError("there is no reward: set model.rewards, or model.environment")
