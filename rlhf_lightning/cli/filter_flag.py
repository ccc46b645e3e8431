"""The flag `--filter` of the commands that show a model's answers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_lightning.filtering import Filter


def add_filter_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--filter`."""
    parser.add_argument(
        "--filter",
        type=Path,
        metavar="RULES",
        help="file of rules (docs/safety-filter.md): answers are marked, or withheld, as they say",
    )


def filter_of(rules: Path | None) -> "Filter | None":
    """The filter of a file of rules, with its models; None without a file."""
    if rules is None:
        return None
    from rlhf_lightning.filtering import read_rules

    return read_rules(rules).build()
