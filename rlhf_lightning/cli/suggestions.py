"""Suggestions for misspelled flags, keys, classes and commands, and for names used by other libraries."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

OPTIMIZER, SAMPLER, SCORER = (f"model.{name}.init_args" for name in ("optimizer", "sampler", "scorer"))
NAMES = {
    "adam_epsilon": f"{OPTIMIZER}.eps",
    "base_model": "model.model",
    "batchsize": "data.batch_size",
    "beta": f"{SCORER}.beta",
    "bf16": "trainer.precision",
    "cutoff_len": "data.max_length",
    "data_file": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "deepspeed": "trainer.strategy",
    "epochs": "trainer.max_epochs",
    "eval_steps": "trainer.val_check_interval",
    "file": "data.train",
    "fp16": "trainer.precision",
    "fsdp": "trainer.strategy",
    "gpus": "trainer.devices",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "kl_coef": "model.kl.coefficient",
    "learning_rate": f"{OPTIMIZER}.lr",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_target_modules": "model.lora.target",
    "loss_type": "model.loss",
    "lr": f"{OPTIMIZER}.lr",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_new_tokens": f"{SAMPLER}.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_tokens": f"{SAMPLER}.max_tokens",
    "micro_batch_size": "data.batch_size",
    "model_name": "model.model",
    "model_name_or_path": "model.model",
    "num_epochs": "trainer.max_epochs",
    "num_generations": "data.group_size",
    "num_train_epochs": "trainer.max_epochs",
    "output_dir": "trainer.default_root_dir",
    "path": "data.train",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "reward": "model.rewards",
    "reward_funcs": "model.rewards",
    "reward_model": "model.rewards",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep",
    "seed": "seed_everything",
    "temperature": f"{SAMPLER}.temperature",
    "top_k": f"{SAMPLER}.top_k",
    "top_p": f"{SAMPLER}.top_p",
    "train_data": "data.train",
    "train_file": "data.train",
    "val_data": "data.validation",
    "weight_decay": f"{OPTIMIZER}.weight_decay",
}
"""Settings by their names in other trainers."""
OF_PROMPTS = {"data.batch_size": "data.prompts_per_round", "data.max_length": "data.max_prompt_tokens"}
"""Settings of a policy stage that correspond to those of other stages."""
INSIDE = {
    "alpha": "alpha",
    "clip": "clip_low",
    "coef": "coefficient",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "max_new_tokens": "max_tokens",
    "r": "rank",
    "target_modules": "target",
    "weight": "coefficient",
}
"""Arguments of classes by their names in other libraries."""
CLASSES = {
    "model.advantage": ("rlhf_lightning.rollout.advantages.Advantage",),
    "model.loss": ("rlhf_lightning.objectives.preference.PreferenceLoss",),
    "model.lr_scheduler": (
        "torch.optim.lr_scheduler.LRScheduler",
        "rlhf_lightning.modules.schedules.LRScheduler",
    ),
    "model.objective": ("rlhf_lightning.objectives.policy.PolicyObjective",),
    "model.optimizer": ("torch.optim.Optimizer",),
    "model.rewards": ("rlhf_lightning.rewards.Reward",),
    "model.scorer": ("rlhf_lightning.models.scorers.Scorer",),
    "trainer.callbacks": ("lightning.pytorch.callbacks.Callback",),
    "trainer.logger": ("lightning.pytorch.loggers.Logger",),
}
"""Base class for each setting, in the module with its subclasses."""
NO_CLASSES = {
    "dpo": "for DPO, set model.scorer to ImplicitReward and model.loss to BradleyTerry, see configs/dpo.yaml",
    "cosine": "use rlhf_lightning.modules.schedules.Warmup with shape cosine, linear or constant",
    "linear": "use rlhf_lightning.modules.schedules.Warmup with shape cosine, linear or constant",
    "adam8bit": "bitsandbytes.optim.AdamW8bit needs bitsandbytes",
}
"""Names that users may write instead of a class, and what to write instead."""
COMMANDS = {
    "compare": "evaluate",
    "dpo": "preference",
    "fit": "sft fit",
    "fine-tune": "sft",
    "finetune": "sft",
    "grpo": "policy",
    "inference": "generate",
    "merge": "export",
    "new": "init",
    "ppo": "policy",
    "reward": "preference",
    "reward-model": "preference",
    "rl": "policy",
    "run": "pipeline",
    "sample": "generate",
    "train": "sft",
}


def in_place_of_class(name: str) -> str | None:
    """Advice for a name that is not a class; None if the name is unknown."""
    from rlhf_lightning.modules.recipes import RECIPES  # imported late, because it imports torch

    return f"{name} is a recipe: set --model.recipe {name}" if name in RECIPES else NO_CLASSES.get(name)


def setting(name: str, known: Iterable[str]) -> str | None:
    """The setting that an unknown name was probably meant to be, or None.

    It has the same last part, or the name is another trainer's name for it, or the names are similar.

    Args:
        name: The unknown name.
        known: All settings, as dotted names.
    """
    known = set(known)
    name = name.strip("-").replace("-", "_")
    last = name.rpartition(".")[2].lower()
    if same := sorted(one for one in known if one.rpartition(".")[2] == last):
        return same[0]
    there = NAMES.get(last, f"data.{last}")
    there = there if there in known else OF_PROMPTS.get(there, there)
    if there and ".".join(there.split(".")[:2]) in known:
        return there
    close = get_close_matches(name, known, n=1, cutoff=0.75)
    return close[0] if close else _by_last(last, known)


def _by_last(last: str, known: set[str]) -> str | None:
    lasts = {one.rpartition(".")[2]: one for one in sorted(known, reverse=True)}
    close = get_close_matches(last, lasts, n=1, cutoff=0.8)
    return lasts[close[0]] if close else None


def argument(name: str, known: Iterable[str]) -> str | None:
    """The argument of a class that an unknown name was probably meant to be."""
    known = list(known)
    there = INSIDE.get(name.lower())
    close = [there] if there in known else get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None


def arguments(class_path: str) -> list[str]:
    """Names of a class's arguments, without `**kwargs`."""
    from rlhf_lightning.imports import imported  # imported late, because it imports torch

    parameters = inspect.signature(imported(class_path, "class_path")).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def classes(key: str, name: str) -> list[str]:
    """Classes with similar names; all classes of the setting if none is similar and there are only a few.

    Args:
        key: The setting.
        name: The unknown class.
    """
    found: dict[str, str] = {}
    for path in CLASSES.get(key, ()):
        module, _, base = path.rpartition(".")
        found |= _choices(import_module(module), base)
    word = name.rpartition(".")[2].lower()
    lower = {short.lower(): short for short in found}
    alike = [short for short in lower if word in short or short in word]
    close = [*alike, *get_close_matches(word, lower, n=2, cutoff=0.6)]
    chosen = [lower[short] for short in dict.fromkeys(close)][:3]
    return [found[short] for short in chosen or (sorted(found) if len(found) <= 12 else [])]


def _choices(module: ModuleType, base: str) -> dict[str, str]:
    """Concrete subclasses of a base class in a module: their names in a config, by class name."""
    root, found = getattr(module, base), {}
    own = module.__name__.startswith("rlhf_lightning")
    for name, value in vars(module).items():
        named = inspect.isclass(value) and issubclass(value, root) and value is not root and not name.startswith("_")
        if named and not inspect.isabstract(value):
            found[name] = name if own else f"{module.__name__}.{name}"
    return found


def command(name: str, known: Iterable[str]) -> str | None:
    """The command that was probably meant."""
    word = name.lower().replace("_", "-")
    close = get_close_matches(word, list(known), n=1)
    return COMMANDS.get(word) or (close[0] if close else None)


def like(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to a given one."""
    close = get_close_matches(name, sorted(known), n=1)
    return close[0] if close else None
