"""`rlhf sft|preference|policy fit|validate|test|predict`: LightningCLI commands with all flags of the Trainer."""

import logging
import sys
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import rlhf_lightning.checkpointing.deepspeed_strategy
import rlhf_lightning.checkpointing.strategies  # noqa: F401 - these two register `--trainer.strategy zero2` and `fsdp2`
from rlhf_lightning.checkpointing.forked_ranks import make_forked_ranks_stoppable
from rlhf_lightning.checkpointing.io import candidates, newest_whole, remove
from rlhf_lightning.cli.data_record import RECORD, check_data_record
from rlhf_lightning.cli.logs import LEVELS, setup_logging
from rlhf_lightning.cli.messages import (
    check_checkpoint,
    check_keys,
    check_sections,
    check_seed,
    check_trained,
    named_checkpoint,
    read_configs,
)
from rlhf_lightning.cli.parser import StageParser
from rlhf_lightning.cli.precision import accept_auto, choose_precision
from rlhf_lightning.cli.refusals import refusals, unfit_settings
from rlhf_lightning.cli.user_code import allow_user_code
from rlhf_lightning.cli.values import check_values
from rlhf_lightning.data.row_filter import row_filter_of
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file, is_url, read_record, real_path, visible
from rlhf_lightning.imports import imported
from rlhf_lightning.pipeline.stage_process import parent_is_watched, watch_parent
from rlhf_lightning.rank_watch import ranks_end_together, watch_ranks
from rlhf_lightning.report import report_after_stage
from rlhf_lightning.run_folder import STAGE_RESULTS, claim, claims, is_first_process, refuse_inputs_in
from rlhf_lightning.types import JSON
from rlhf_lightning.yaml_files import read_mapping

log = logging.getLogger(__name__)
CLASSES = {
    "sft": ("rlhf_lightning.modules.sft.SFTModule", "rlhf_lightning.data.sft.SFTDataModule"),
    "preference": (
        "rlhf_lightning.modules.preference.PreferenceModule",
        "rlhf_lightning.data.preference.PreferenceDataModule",
    ),
    "policy": ("rlhf_lightning.modules.policy_rl.PolicyRLModule", "rlhf_lightning.data.prompts.PromptDataModule"),
}
# Settings that may change on resume: a run may be extended, and may use other devices. With any other change, it would
# be another run.
LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
MAY_CHANGE = (
    *LENGTH,
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "ckpt_path",
    "log_level",
    "log_file",
    "fresh",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "on_nonfinite",
    "rank_timeout",
    "model.max_empty_steps",
)


HELP = {
    "sft": {
        "description": "Supervised fine-tuning of a chat model.",
        "epilog": "example: rlhf sft fit -c rlhf:sft --data.train chats.jsonl",
    },
    "preference": {
        "description": "Training on preferences (pairs, labels or rankings): reward models, DPO, KTO, …",
        "epilog": "example: rlhf preference fit -c rlhf:reward_model --data.train pairs.jsonl",
    },
    "policy": {
        "description": "Policy RL: importance sampling, GRPO, PPO, …",
        "epilog": "example: rlhf policy fit -c rlhf:policy --data.train prompts.jsonl",
    },
}


COMMANDS = {
    "fit": "train, and write the trained model to model/ in the stage's folder",
    "validate": "compute the metrics on data.validation",
    "test": "compute the metrics on data.test",
    "predict": "write predictions for the rows of data.predict",
}
RESUME = (
    "checkpoint to continue from: a path, or last or best for those in the stage's folder. The same command resumes an "
    "interrupted run without this flag."
)
WEIGHTS = (
    "checkpoint with the weights to use: a path, or last or best for those in the stage's folder (default: the weights "
    "of model.model)"
)


class SaveConfig(SaveConfigCallback):
    """Saves `config.yaml` in the stage's folder, regardless of the logger.

    Example:
        >>> LightningCLI(SFTModule, SFTDataModule, save_config_callback=SaveConfig)  # doctest: +SKIP
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file. Lightning calls this on rank 0 only."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        # It says that a run with the settings in config.yaml is finished, which a longer run is not yet.
        remove(path.with_name("stage.json"))
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class StageCLI(LightningCLI):
    """Runs a stage in its folder (`trainer.default_root_dir`): resumes an interrupted run, and skips a finished one.

    Args:
        kind: `sft`, `preference` or `policy`.
        args: The subcommand and its flags.
        parser: Class of the parser.

    Example:
        >>> StageCLI("sft", ["fit", "--model.model", "Qwen/Qwen3-0.6B", "--data.train", "a.jsonl"])  # doctest: +SKIP
    """

    def __init__(self, kind: str, args: list[str], parser: type[StageParser] = StageParser) -> None:
        self.kind = kind
        # What precedes the command may be a config file with a section for each command.
        self._called = args[0] if args and args[0] in COMMANDS else None
        module, data = (imported(name, kind) for name in CLASSES[kind])
        super().__init__(
            module,
            data,
            args=args,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,  # the module has model.optimizer, which --optimizer would not set
            trainer_defaults={"enable_progress_bar": sys.stdout.isatty(), "log_every_n_steps": 1},
            parser_class=parser,
            parser_kwargs={
                "prog": f"rlhf {kind}",
                "allow_abbrev": False,  # a misspelled flag is an error, not an abbreviation of another one
                **HELP[kind],
                "fit": {"epilog": HELP[kind]["epilog"]},
            },
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the commands, with help of our own: Lightning's is cut off, and describes features of its cloud."""
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for choice in parser._subcommands_action._choices_actions:
            choice.help = COMMANDS[choice.dest]
        for name, command in self._subcommand_parsers.items():
            command.description = f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
            if name in self._subcommand_method_arguments:
                command._option_string_actions["--ckpt_path"].help = RESUME if name == "fit" else WEIGHTS

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of a command; without flags if another one is called, as they take 0.1 s per command."""
        if self._called in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        accept_auto(parser)
        parser.add_argument("--log_level", default="info", choices=LEVELS, help="lowest level of logged messages")
        parser.add_argument(
            "--log_file", type=str | None, default=None, help="log file (default: logs/run.log in the stage's folder)"
        )
        every = 5 if self.kind == "policy" else 50
        parser.add_argument(
            "--checkpoint_every", type=int, default=every, help="number of optimizer steps between checkpoints"
        )
        parser.add_argument(
            "--checkpoint_minutes",
            type=float | None,
            default=None,
            help="minutes between checkpoints, in addition to --checkpoint_every",
        )
        parser.add_argument("--keep", type=int, default=2, help="number of latest checkpoints to keep")
        parser.add_argument(
            "--monitor",
            type=str | None,
            default=None,
            help="metric by which the best checkpoint is kept, in addition to the latest",
        )
        parser.add_argument(
            "--monitor_mode",
            default="min",
            choices=("min", "max"),
            help="whether lower or higher values of --monitor are better",
        )
        parser.add_argument(
            "--export", default="last", choices=("last", "best"), help="which weights fit exports to model/"
        )
        parser.add_argument(
            "--on_nonfinite",
            default="stop",
            choices=("stop", "skip"),
            help="what to do if a loss or gradient is NaN or infinite: stop the run, or skip the step",
        )
        parser.add_argument(
            "--rank_timeout",
            type=float | None,
            default=None,
            help="minutes that a rank waits for the other ranks (default: 30)",
        )
        parser.add_argument("--fresh", action="store_true", help="discard an earlier run in the stage's folder")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments. Lightning's method warns about `args=`, but sys.argv must not change because of DDP."""
        assert isinstance(parser, StageParser)
        assert isinstance(args, list)
        files, commands = read_configs(args), parser.commands()
        check_keys(files, parser.settings(), self.kind, commands, CLASSES)
        made = {name: commands[name] for name in self._subcommand_method_arguments}
        self.config = parser.parse_args(_with_recipe(args, files, made))
        config = self.config[self.config["subcommand"]]
        check_values(commands[self.config["subcommand"]], config)
        root = Path(config.trainer.default_root_dir or Path("runs") / self.kind)
        config.ckpt_path = named_checkpoint(config.ckpt_path, root)
        check_checkpoint(config.ckpt_path)
        if config.get("fresh") and config.ckpt_path and real_path(config.ckpt_path).is_relative_to(real_path(root)):
            raise ConfigError(
                f"--fresh discards the run in {root}, but --ckpt_path {config.ckpt_path} is part of it; leave out one"
            )
        check_seed(config)

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning would read settings from the checkpoint, and import the classes that they name."""

    @property
    def root(self) -> Path:
        """The stage's folder."""
        return Path(self.config[self.subcommand].trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_sections(config)
        config.trainer.default_root_dir = str(config.trainer.default_root_dir or Path("runs") / self.kind)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"trainer.default_root_dir {self.root}: cannot be created ({error.strerror})") from None
        if self.subcommand == "fit":
            check_trained(config)
            self._claim(config)
        choose_precision(config, lambda: {} if config.get("fresh") else self._before())
        if self.subcommand == "fit":
            self._continue_or_stop(config)
        setup_logging(config.log_level, Path(config.log_file or self.root / "logs" / "run.log"))
        if self.subcommand != "fit":
            # Metrics of other commands must not overwrite those of a fit in the same folder.
            self.save_config_callback = None
            config.trainer.logger = config.trainer.logger or False
        self.trainer_defaults["callbacks"] = self._callbacks(config)

    def _callbacks(self, config: Namespace) -> list[pl.Callback]:
        from lightning.pytorch.callbacks import ModelCheckpoint

        from rlhf_lightning.callbacks.export import ExportModel
        from rlhf_lightning.callbacks.heldout import HeldOutAnswers
        from rlhf_lightning.callbacks.memory import MemoryEstimate
        from rlhf_lightning.callbacks.predictions import PredictionsFile
        from rlhf_lightning.callbacks.progress import progress_callbacks
        from rlhf_lightning.callbacks.samples import SamplesLog
        from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
        from rlhf_lightning.checkpointing.nonfinite import NonFiniteGuard
        from rlhf_lightning.diagnostics.callback import Diagnostics
        from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
        from rlhf_lightning.diagnostics.preference import PreferenceWatch

        callbacks: list[pl.Callback] = [ExportModel(config.export), PredictionsFile(), MemoryEstimate()]
        own = _callback_classes(config.trainer.callbacks)
        # A callback in the user's config replaces the default one.
        policy = (SamplesLog, HeldOutAnswers, FirstStepInvariants, Diagnostics)
        kinds = {"policy": policy, "preference": (PreferenceWatch,)}
        callbacks += [kind() for kind in kinds.get(self.kind, ()) if not _has(own, kind)]
        callbacks += progress_callbacks(config.trainer.enable_progress_bar, own)
        if not _has(own, NonFiniteGuard):
            callbacks.append(NonFiniteGuard(config.on_nonfinite))
        if config.trainer.enable_checkpointing is False:
            return callbacks
        folder = self.root / "checkpoints"
        if config.monitor:
            best = {"monitor": config.monitor, "mode": config.monitor_mode, "filename": "best-{step}"}
            callbacks.append(ModelCheckpoint(folder, enable_version_counter=False, **best))
        if not _has(own, RunCheckpoints):
            every, minutes = config.checkpoint_every, config.checkpoint_minutes
            callbacks.append(RunCheckpoints(folder, every, minutes, config.keep))
        return callbacks

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer, which logs to `metrics.csv` in the folder unless another logger is configured."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit" and config.trainer.logger in (None, True):
            from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV

            kwargs["logger"] = MetricsCSV(self.root, resume=bool(config.ckpt_path))
        trainer = super().instantiate_trainer(**kwargs)
        _guard_checkpoints(trainer)
        make_forked_ranks_stoppable(trainer)
        watch_ranks(trainer, config.rank_timeout)
        return trainer

    # -- the folder -----------------------------------------------------------------------------------------------

    def _claim(self, config: Namespace) -> None:
        """Lock the folder for this run on rank 0, and refuse to replace the user's own files."""
        refuse_inputs_in(self.root, STAGE_RESULTS, {name: config[name].as_dict() for name in ("model", "data")})
        if is_first_process() and not config.trainer.fast_dev_run:
            claim(self.root, STAGE_RESULTS, patience=60 if parent_is_watched() else 0)

    def _continue_or_stop(self, config: Namespace) -> None:
        """Resume an interrupted run with equal settings, refuse one with other settings, and skip a finished run."""
        if config.fresh:
            if not is_first_process():
                return  # only rank 0 clears the folder
            for name in STAGE_RESULTS:
                remove(self.root / name)
            self._check_data(config)
            return
        done = is_file(self.root / "stage.json")
        saved = candidates(self.root / "checkpoints")
        if config.ckpt_path or config.trainer.fast_dev_run:
            return
        if not (done or saved):
            self._check_data(config, begins=True)
            return
        if done:
            read_record(self.root / "stage.json")  # raises if it has the format of another version
        before = self._before()
        if before and (kind := _kind(before)) != self.kind:
            raise ConfigError(
                f"{self.root} contains a run of rlhf {kind}. Choose another --trainer.default_root_dir, or discard "
                "that run with --fresh."
            )
        different = self._different(before)
        # `export` may change until the model is exported.
        free = MAY_CHANGE if done else (*MAY_CHANGE, "export")
        if changed := [key for key in different if key not in free]:
            state = "a finished" if done else "an interrupted"
            raise ConfigError(
                f"{self.root} contains {state} run with other settings ({', '.join(changed[:5])}). "
                "Choose another --trainer.default_root_dir, or start over with --fresh."
            )
        self._check_data(config)
        if done and not (saved and set(different) & set(LENGTH)):
            raise Finished(self.root)
        last, damaged = newest_whole(self.root / "checkpoints")
        for message in damaged:
            print(visible(f"WARNING: {message}; using the previous one"), file=sys.stderr)
        if last is None:
            print(visible(f"WARNING: no checkpoint in {self.root} is usable; starting over"), file=sys.stderr)
            return
        config.ckpt_path = str(last)
        print(visible(f"resuming {self.root} from {last}"), file=sys.stderr)

    def _check_data(self, config: Namespace, begins: bool = False) -> None:
        """In the first process, raise `ConfigError` if the data have changed since the run began."""
        if not is_first_process():
            return
        if begins:
            remove(self.root / RECORD)  # left over from a run that was stopped before its first checkpoint
        data = config.data.as_dict()
        with unfit_settings():
            row_filter = row_filter_of(data.get("filter"))
        check_data_record(self.root, data, row_filter)

    def _before(self) -> dict[str, JSON]:
        """Settings of the run in the folder; empty if they are unknown."""
        path = self.root / "config.yaml"
        return _flat(read_mapping(path)) if is_file(path) else {}

    def _different(self, before: dict[str, JSON]) -> list[str]:
        if not before:
            return []
        dump = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        now = _flat(dump[self.subcommand])
        if self.kind == "policy":  # earlier versions stored these settings
            before = {key: value for key, value in before.items() if key not in ("data.batch_size", "data.max_length")}
        return sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and not (_is_address(before.get(key)) and _is_address(now.get(key)))
        )

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            # After it has shut down the run, Lightning raises SystemExit for Ctrl-C and SIGTERM.
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise stop.__context__ from None
            raise
        monitor, logged = self.config[subcommand].get("monitor"), self.trainer.callback_metrics
        if subcommand == "fit" and monitor and monitor not in logged:
            there = ", ".join(sorted(logged)) or "none"
            log.warning(
                "--monitor %s was never logged, so no best checkpoint was kept; logged metrics: %s", monitor, there
            )

    def instantiate_classes(self) -> None:
        with unfit_settings():
            super().instantiate_classes()

    def report(self) -> None:
        """Write the report after training, on rank 0."""
        fast = self.config[self.subcommand].trainer.fast_dev_run
        from rlhf_lightning.callbacks.loggers import log_report

        if self.subcommand == "fit" and self.trainer.is_global_zero and not fast:
            report_after_stage(self.root, partial(log_report, self.trainer.loggers))


def _is_address(value: JSON) -> bool:
    """True for the address of a server, or a list of them. They may change on resume, since servers may move."""
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(one, str) and is_url(one) for one in listed)


def _with_recipe(
    args: list[str], files: Mapping[str, dict[str, JSON]], commands: Mapping[str, ArgumentParser]
) -> list[str]:
    """Replace `model.recipe` with its settings, as defaults.

    Any other given setting overrides the recipe, even if it is `null`. `--print_config` and `config.yaml` show the
    resulting settings.
    """
    sections = [settings.get("model") for settings in files.values()]
    names = [str(section["recipe"]) for section in sections if isinstance(section, dict) and section.get("recipe")]
    for flag, value in pairwise([part for arg in args for part in arg.split("=", 1)]):
        if flag == "--model.recipe":
            names.append("" if value in ("null", "None") else value)
    if not names or not names[-1]:
        return args
    from rlhf_lightning.modules.recipes import recipe_settings

    settings = recipe_settings(names[-1])
    for parser in commands.values():
        parser.set_defaults({f"model.{key}": value for key, value in settings.items()})
    return [*args, "--model.recipe", "null"]


def _callback_classes(callbacks: pl.Callback | Namespace | list[pl.Callback | Namespace] | None) -> list[type]:
    """Classes of the configured callbacks: one or a list, each an object or settings with a `class_path`."""
    from rlhf_lightning.imports import imported

    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = [getattr(one, "class_path", None) for one in listed]
    return [
        type(one) if path is None else imported(path, "trainer.callbacks")
        for one, path in zip(listed, paths, strict=True)
    ]


def _has(classes: list[type], kind: type) -> bool:
    """True if `kind` or a subclass of it is among the classes."""
    return any(isinstance(one, type) and issubclass(one, kind) for one in classes)


def _guard_checkpoints(trainer: pl.Trainer) -> None:
    """Make checkpoint writes atomic, and run RunCheckpoints last, because it saves the state of other callbacks."""
    from lightning.fabric.plugins.io import TorchCheckpointIO

    from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
    from rlhf_lightning.checkpointing.io import AtomicCheckpointIO
    from rlhf_lightning.modules.trainer_state import callbacks_of

    callbacks_of(trainer).sort(key=lambda callback: isinstance(callback, RunCheckpoints))
    # Not with `trainer.plugins`: that would replace the user's own plugins, and some strategies refuse it.
    if type(trainer.strategy._checkpoint_io) in (type(None), TorchCheckpointIO):
        trainer.strategy._checkpoint_io = AtomicCheckpointIO()


class Finished(Exception):
    """The folder contains a finished run with equal settings."""


def _kind(settings: Mapping[str, JSON]) -> str:
    """The kind of stage that has these settings."""
    marks = {"policy": "data.group_size", "preference": "data.kind"}
    return next((kind for kind, name in marks.items() if name in settings), "sft")


def _flat(value: JSON, prefix: str = "") -> dict[str, JSON]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def run(args: list[str]) -> int:
    """Run a stage command.

    Args:
        args: Kind of stage, subcommand, and flags.
    """
    allow_user_code(args)
    watch_parent()
    try:
        with refusals(), claims(), ranks_end_together():
            StageCLI(args[0], args[1:]).report()
    except Finished as done:
        print(visible(f"{done} is already finished; --fresh runs it again"), file=sys.stderr)
    return 0
