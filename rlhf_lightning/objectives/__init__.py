"""Losses, advantages and estimators as pure tensor functions, with the classes that hold their options.

Losses can be imported from here (`rlhf_lightning.objectives.ClippedSurrogate`), estimators from the submodules.

Of the rest of the project, this package imports only `settings`, so every function can be used on its own.
"""

from rlhf_lightning.objectives import policy, preference
from rlhf_lightning.objectives.policy import *  # noqa: F403 - the names are listed once, in the two packages
from rlhf_lightning.objectives.preference import *  # noqa: F403

__all__ = [*policy.__all__, *preference.__all__]
