"""The file of a judge, which `--judge` names."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_lightning.rewards import JudgeReward, PairwiseJudgeReward

_FIXED = {"weight", "name", "normalize", "clip"}
"""Arguments of a judge that its file does not have, because an evaluation reports its grades as they are."""


def read_judge(path: Path) -> "JudgeReward | PairwiseJudgeReward":
    """Read a file with the arguments of `JudgeReward`, or with `pairwise: true` those of `PairwiseJudgeReward`.

    Raises:
        ConfigError: If the file cannot be read, or an argument is unknown or unsuitable.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from rlhf_lightning.errors import ConfigError, first_line
    from rlhf_lightning.rewards import JudgeReward, PairwiseJudgeReward
    from rlhf_lightning.yaml_files import read_mapping

    settings = read_mapping(path, "--judge: ")
    pairwise = settings.pop("pairwise", False)
    if not isinstance(pairwise, bool):
        raise ConfigError(f"--judge: {path}: pairwise is {pairwise!r}; it must be true or false")
    parser = ArgumentParser(exit_on_error=False)
    kind = PairwiseJudgeReward if pairwise else JudgeReward
    # An evaluation has one judge, and its grades are reported as they are.
    parser.add_class_arguments(kind, "judge", skip=_FIXED & inspect.signature(kind).parameters.keys())
    try:
        made: JudgeReward | PairwiseJudgeReward = parser.instantiate_classes(
            parser.parse_object({"judge": settings})
        ).judge
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(f"--judge: {path}: {first_line(error)}") from None
    return made
