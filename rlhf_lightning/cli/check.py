"""Checks of a pipeline before its first stage runs."""

import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from rlhf_lightning.cli.messages import check_sections, check_trained
from rlhf_lightning.cli.parser import StageParser, tidy
from rlhf_lightning.cli.stage import Finished, StageCLI
from rlhf_lightning.cli.user_code import allow_user_code
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.pipeline.plan import Plan
from rlhf_lightning.pipeline.run import check_data, stage_settings


class Parser(StageParser):
    """A parser that raises errors, so that the caller can add context.

    Example:
        >>> parser = Parser()
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a `ConfigError`."""
        raise ConfigError(tidy(message)) from ex


class ParsedStage(StageCLI):
    """Parses and checks the settings of a stage, without running it.

    Args:
        kind: Kind of the stage.
        args: Arguments of its command.

    Example:
        >>> ParsedStage("sft", ["fit", "-c", "sft.yaml"])  # doctest: +SKIP
    """

    def __init__(self, kind: str, args: list[str]) -> None:
        with suppress(Finished):
            super().__init__(kind, args, Parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse and check the settings, then stop."""
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        check_sections(config)
        check_trained(config)
        raise Finished


def check_plan(plan: Plan) -> None:
    """Parse the settings of every stage, and check that its data exist.

    Args:
        plan: The plan.

    Raises:
        ConfigError: If a stage is invalid. Without this check, the error might appear only after hours.
    """
    with tempfile.TemporaryDirectory() as folder:
        for stage in plan.stages:
            file = Path(folder) / f"{stage.name}.yaml"
            file.write_text(settings := yaml.safe_dump(stage_settings(plan, stage), allow_unicode=True))
            allow_user_code([settings])
            try:
                ParsedStage(stage.kind, ["fit", "-c", str(file)])
                check_data(plan, stage)
            except UserError as error:
                # Remove the name of the temporary file, which the user does not know.
                message = re.sub(rf"^{re.escape(str(file))}(:\d+)?: ", "", str(error))
                raise ConfigError(f"pipeline: stage {stage.name}: {message}") from error
