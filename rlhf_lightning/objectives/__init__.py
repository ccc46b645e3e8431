"""Losses, advantages and estimators as pure tensor functions, with the classes that hold their options.

The losses are here by name (`rlhf_lightning.objectives.ClippedSurrogate`); the estimators are in the modules.

This package imports nothing else from the project, so every function can be used on its own.
"""

from rlhf_lightning.objectives import policy, preference
from rlhf_lightning.objectives.policy import *  # noqa: F403 - the names are listed once, in the two packages
from rlhf_lightning.objectives.preference import *  # noqa: F403

__all__ = [*policy.__all__, *preference.__all__]
