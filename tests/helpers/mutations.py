"""Unsuitable values for every setting and flag, both taken from the parsers themselves."""

import argparse
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.stage import Finished, StageCLI
from rlhf_lightning.pipeline.plan import PLAN_KEYS, STAGE_KEYS

VALUES: dict[str, Any] = {
    "text": "qqqqq",
    "empty": "",
    "control": "a\x1b[31mb\u202ec",
    "nul": "a\x00b",
    "long": "q" * 5000,
    "folder": "a_folder",
    "list": [1, "x"],
    "mapping": {"a": 1},
    "boolean": True,
    "null": None,
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "tiny": 1e-300,
    "huge": 10**30,
    "nan": math.nan,
    "inf": math.inf,
}
"""What each setting is set to, one at a time."""


# -- settings of a stage ----------------------------------------------------------------------------------------------


class _Parser(StageCLI):
    """Stops after the parser was made."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.fit = parser._subcommands_action._name_parser_map["fit"]
        raise Finished


def stage_parser(kind: str) -> Any:
    """The parser of `rlhf KIND fit`."""
    made = _Parser.__new__(_Parser)
    try:
        made.__init__(kind, ["fit"])  # type: ignore[misc]
    except Finished:
        return made.fit
    raise AssertionError("the parser was not made")


def setting_keys(parser: Any, settings: dict[str, Any]) -> list[str]:
    """Every key of `--print_config` with the given `settings`, including those of nested classes."""
    whole = parser.parse_object(deepcopy(settings)).as_dict()  # the parser changes what it is given
    for name in ("config", "print_config"):
        whole.pop(name, None)
    return list(_keys(whole, ""))


def _keys(value: Any, at: str) -> Iterator[str]:
    if at and not at.endswith("init_args"):
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, list) and not isinstance(inner, dict):
            continue
        yield from _keys(inner, f"{at}.{key}" if at else str(key))


def laid(settings: Any, path: list[str], value: Any) -> Any:
    """A copy of the settings with one value replaced."""
    if not path:
        return value
    if isinstance(settings, list):
        return [laid(item, path[1:], value) if str(i) == path[0] else item for i, item in enumerate(settings)]
    inner = settings.get(path[0]) if isinstance(settings, dict) else None
    return {**(settings or {}), path[0]: laid(inner if inner is not None else {}, path[1:], value)}


# -- flags of the commands --------------------------------------------------------------------------------------------


class _Caught(Exception):
    """The parser of a command, when it is about to be used."""


def command_parser(*command: str) -> argparse.ArgumentParser:
    """The parser of a command that is not a stage."""

    def caught(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Caught(parser)

    names = ("parse_args", "parse_known_args", "parse_intermixed_args")
    patches = [mock.patch.object(argparse.ArgumentParser, name, caught) for name in names]
    try:
        for patch in patches:
            patch.start()
        main(list(command))
    except _Caught as found:
        parser: argparse.ArgumentParser = found.args[0]
        for name in command[1:]:
            inner = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = inner.choices[name]
        return parser
    finally:
        for patch in patches:
            patch.stop()
    raise AssertionError(f"{command} made no parser")


def value_flags(parser: argparse.ArgumentParser) -> list[str]:
    """The arguments of a command that take a value: flags by their first name, others by their own."""
    taking = [a for a in parser._actions if a.nargs != 0 and not isinstance(a, argparse._SubParsersAction)]
    return [action.option_strings[0] if action.option_strings else action.dest for action in taking]


def plan_keys() -> list[str]:
    """Every key of a pipeline file."""
    return [*sorted(PLAN_KEYS), *(f"stages.0.{key}" for key in sorted(STAGE_KEYS))]


# -- what values mean something ---------------------------------------------------------------------------------------

ANY_TEXT = tuple(name for name in VALUES if name not in ("empty", "nul"))
"""On a command line all are text."""
NAMES = tuple(name for name in ANY_TEXT if name not in ("folder", "long"))
"""What a new file may be called."""
MEANT_FLAGS: dict[str, tuple[str, ...]] = {
    "allowed_host": ANY_TEXT,
    "annotators": ANY_TEXT,
    "best_of": ("zero",),
    "dir": (*NAMES, "folder"),
    "model": (
        "text",
        "folder",
        "boolean",
        "null",
        "zero",
        "fraction",
        "tiny",
        "huge",
        "nan",
        "inf",
    ),  # of `init` and `quickstart`: Hub ids
    "host": ("zero",),  # 0.0.0.0
    "output": NAMES,
    "overlap": ("zero", "fraction", "tiny"),
    "revise": ("zero",),
    "port": ("zero",),
    "prompt": ANY_TEXT,
    "root": (*NAMES, "folder"),
    "data check --samples": ("zero", "huge"),  # none are shown, or all
    "seed": ("zero",),
    "data check --limit": ("huge",),
    "filter apply --output": (*NAMES, "folder"),
    "serve --max_waiting": ("zero",),
    "serve --name": ANY_TEXT,
    "tinker --name": ANY_TEXT,
    "tinker --folder": (*NAMES, "folder"),
    "stop": (*ANY_TEXT, "empty"),
    "summary": NAMES,
    "system": (*ANY_TEXT, "empty"),
    "temperature": ("zero", "fraction", "huge"),
    "template_kwargs": ("mapping",),
    "top_k": ("zero",),
    "top_p": ("fraction", "tiny"),
}
"""Values of flags that mean something; every other is refused."""
_NULL, _SWITCH = ("null",), ("boolean",)
_PART = ("zero", "fraction", "tiny")  # of one
_AMOUNT = (*_PART, "huge")
_BATCHES = ("null", "fraction", "huge")
_NUMBER = (*_AMOUNT, "negative")
_GROUPS: dict[tuple[str, ...], str] = {
    _NULL: """rank_timeout trainer.gradient_clip_val
        columns eval_batch_size format kind predict test tokenizer tools validation episodes chat_template lora
        environment environment_args importance_weights kl critic limits loss lr_scheduler max_empty_steps
        max_tokens_per_batch memory_limit model_options objective optimizer sampler scorer advantage rewards reference
        length max_tokens trainer.callbacks trainer.check_val_every_n_epoch trainer.gradient_clip_algorithm
        trainer.max_time trainer.min_epochs trainer.min_steps trainer.plugins trainer.precision trainer.profiler
        trainer.num_sanity_val_steps trainer.log_every_n_steps trainer.max_epochs trainer.logger
        trainer.limit_val_batches
        trainer.limit_test_batches trainer.limit_predict_batches
        trainer.enable_checkpointing trainer.enable_progress_bar trainer.enable_model_summary trainer.benchmark
        trainer.deterministic trainer.default_root_dir trainer.model_registry ckpt_path weights_only log_file monitor
        checkpoint_minutes data.seed model.truncated_reward refresh_every target device engine stop gather quantize
        recipe resample_groups use_liger_kernel
        total_steps foreach fused normalize clip learning_rate retries dual_clip step_timeout data.template_kwargs
        data.system data.train rewards.0.name model.critic.init_args.model decay distillation
        nll_coefficient curriculum data.cache data.filter""",
    _SWITCH: """show_example fresh activation_offload compile freeze_backbone gradient_checkpointing mask_truncated
        data.streaming importance_weights
        length_normalized store skip_special_tokens whiten amsgrad maximize foreach fused centered offload shared
        cuda_graphs gather lines seed_everything trainer.barebones trainer.benchmark trainer.detect_anomaly
        trainer.deterministic trainer.enable_autolog_hparams trainer.enable_checkpointing trainer.logger
        trainer.enable_model_summary trainer.enable_progress_bar trainer.fast_dev_run trainer.inference_mode
        trainer.sync_batchnorm trainer.use_distributed_sampler weights_only""",
    ("zero",): """checkpoint_every seed_everything data.seed max_staleness resample_groups min_words trainer.min_epochs
        trainer.min_steps trainer.num_sanity_val_steps trainer.log_every_n_steps trainer.fast_dev_run warmup_rounds
        trainer.reload_dataloaders_every_n_epochs top_k min_tokens""",
    ("negative",): "trainer.max_epochs trainer.max_steps trainer.num_sanity_val_steps",
    _PART: """gamma lam tail_weight clip_low model.importance_weights.init_args.low validation_split label_smoothing
        discount floor dropout min_p""",
    ("fraction", "tiny"): "top_p",
    _AMOUNT: """clip_high eps weight_decay centering coefficient trainer.gradient_clip_val trainer.limit_val_batches
        trainer.limit_test_batches trainer.limit_predict_batches warmup_steps""",
    _BATCHES: "trainer.limit_train_batches",
    ("fraction", "tiny", "huge"): "rank_timeout checkpoint_minutes step_timeout lr beta alpha learning_rate clip",
    ("fraction", "huge"): "temperature",
    _NUMBER: "entropy_coefficient hit miss rewards.0.weight model.truncated_reward",
    ("null", "fraction", "tiny"): "trainer.val_check_interval",
    ("zero", "fraction", "huge"): "trainer.overfit_batches",
    ("huge",): "memory_limit total_steps trainer.fast_dev_run dual_clip model.importance_weights.init_args.high",
    ("inf",): "clip_high dual_clip high",
    ("list",): "data.test data.predict",  # rows in memory; fit does not read them
    ("text", "control", "folder"): "data.cache log_file trainer.default_root_dir",
    ("text", "control", "folder", "long"): "data.system monitor model.rewards.0.init_args.name",
    ("empty",): "data.system",
    ("mapping",): "data.template_kwargs",
}


def _meant() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for values, keys in _GROUPS.items():
        for key in keys.split():
            found[key] = (*found.get(key, ()), *values)
    return found


MEANT_SETTINGS = {
    **_meant(),
    "plan.name": ("text", "control", "folder", "null"),
    "plan.root": ("text", "control", "folder", "long", "null"),
    "plan.seed": ("zero",),
    "plan.stages.0.critic": ("null",),
    "plan.stages.0.name": ("text", "control", "folder", "null"),
    "plan.stages.0.on_failure": ("null",),
    "plan.stages.0.overrides": ("null",),
    "plan.stages.0.reward": ("null",),
    "plan.stages.0.start": ("null", "folder"),  # the stage itself looks into it
}
"""Likewise of settings, by their whole name or the last part, and of a pipeline file (`plan.`)."""
NAMED_OTHERWISE: dict[str, tuple[str, ...]] = {
    "stages": ("stage 1",),
    "files": ("FILE",),
    "stages.0.config": ("stage sft", "stage 1"),
    "stages.0.overrides": ("stage sft",),
    "system": ("longest prompt", "conversation"),
    "data.system": ("max_length", "longest prompt", "max_prompt_tokens"),
    "checkpoint_minutes": ("minutes",),
    "data.train": ("list[0]",),
    "data.validation": ("list[0]",),
    "data.episodes": ("list[0]",),
    "model.importance_weights.init_args.high": ("the ratio",),
    "model.importance_weights.init_args.low": ("the ratio",),
    "model.rewards.0.init_args.hit": ("the loss is inf",),
    "model.rewards.0.init_args.miss": ("the loss is inf",),
    "model.rewards.0.init_args.weight": ("the loss is inf",),
    "model.truncated_reward": ("the loss is inf",),
    "trainer.max_time": ("duration",),
    "trainer.overfit_batches": ("limit_train_batches",),
}
"""What a message says in the place of a name."""
