"""Recipes: the `PolicyRLModule` settings of named algorithms, as plain data.

On the command line a recipe is one line, `model.recipe: grpo`; in Python it is a constructor,
`PolicyRLModule.grpo(model, rewards=[...])`, whose docstring documents the settings and their source.
"""

from copy import deepcopy
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.imports import imported

if TYPE_CHECKING:
    from rlhf_lightning.types import JSON

_OBJECTIVES, _ADVANTAGES = "rlhf_lightning.objectives.policy", "rlhf_lightning.rollout.advantages"
_KL, _CRITIC = "rlhf_lightning.rollout.kl.KLPenalty", "rlhf_lightning.models.critic.Critic"


class ClassSettings(TypedDict):
    """Settings of an object in YAML form."""

    class_path: str
    init_args: "dict[str, JSON]"


RecipeSettings = dict[str, ClassSettings | int]
"""Arguments of `PolicyRLModule`, in YAML form."""


def _object(class_path: str, **init_args: "JSON") -> ClassSettings:
    return {"class_path": class_path, "init_args": init_args}


def _clipped(**init_args: "JSON") -> ClassSettings:
    return _object(f"{_OBJECTIVES}.ClippedSurrogate", **init_args)


def _sequence_clipped(**init_args: "JSON") -> ClassSettings:
    return _object(f"{_OBJECTIVES}.SequenceClippedSurrogate", **init_args)


def _advantage(name: str, **init_args: "JSON") -> ClassSettings:
    return _object(f"{_ADVANTAGES}.{name}", **init_args)


RECIPES: dict[str, RecipeSettings] = {
    "dapo": {
        "objective": _clipped(clip_low=0.2, clip_high=0.28, aggregation="token_mean"),
        "advantage": _advantage("GroupCentered", scale="std"),
        "resample_groups": 3,
    },
    "distill": {
        "objective": _object(f"{_OBJECTIVES}.ImportanceSampling", aggregation="token_mean"),
        "advantage": _advantage("GroupCentered", scale="none"),
    },
    "distill_pg": {
        "objective": _object(f"{_OBJECTIVES}.ImportanceSampling", aggregation="token_mean"),
        "advantage": _advantage("GroupCentered", scale="none"),
        "kl": _object(_KL, coefficient=1.0, place="reward", discount=0.0, centered=False),
    },
    "dr_grpo": {
        "objective": _clipped(clip_low=0.2, clip_high=0.2, aggregation="constant"),
        "advantage": _advantage("GroupCentered", scale="none"),
    },
    "grpo": {
        "objective": _clipped(clip_low=0.2, clip_high=0.2, aggregation="sequence_mean"),
        "advantage": _advantage("GroupCentered", scale="std"),
        "kl": _object(_KL, coefficient=0.04, place="loss", estimator="k3"),
    },
    "gspo": {
        "objective": _sequence_clipped(normalized=True, clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
        "advantage": _advantage("GroupCentered", scale="std"),
    },
    "mint": {
        "objective": _object(f"{_OBJECTIVES}.ImportanceSampling", aggregation="token_sum"),
        "advantage": _advantage("GroupCentered", scale="none"),
        "kl": _object(_KL, coefficient=0.05, place="reward", discount=0.0),
    },
    "ppo": {
        "objective": _clipped(clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
        "advantage": _advantage("GAE", gamma=1.0, lam=0.95, whiten=True),
        "kl": _object(_KL, coefficient=0.05, place="reward"),
        "critic": _object(_CRITIC, clip=0.2, coefficient=0.1),
    },
    "reinforce_pp": {
        "objective": _clipped(clip_low=0.2, clip_high=0.2, aggregation="token_mean"),
        "advantage": _advantage("GlobalWhitened", baseline="none"),
        "kl": _object(_KL, coefficient=0.01, place="reward"),
    },
    "rloo": {
        "objective": _sequence_clipped(normalized=False, clip_low=0.2, clip_high=0.2, aggregation="sequence_mean"),
        "advantage": _advantage("LeaveOneOut"),
        "kl": _object(_KL, coefficient=0.05, place="reward"),
    },
}
"""Settings by recipe, in YAML form. Settings that a recipe omits keep their defaults."""


def recipe_settings(name: str) -> RecipeSettings:
    """The settings of a recipe, in YAML form.

    Args:
        name: Name of the recipe.

    Raises:
        ConfigError: If there is no recipe of that name.
    """
    if name not in RECIPES:
        close = get_close_matches(str(name).lower().replace("-", "_").replace("++", "_pp"), RECIPES, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Recipes are {', '.join(RECIPES)}"
        raise ConfigError(f"model.recipe is {name!r}, which is not a recipe. {hint}")
    return deepcopy(RECIPES[name])


def build_recipe(name: str) -> dict[str, Any]:
    """Build the arguments of `PolicyRLModule` that a recipe sets.

    Args:
        name: Name of the recipe.

    Raises:
        ConfigError: If there is no recipe of that name.
    """
    return {
        key: value if isinstance(value, int) else imported(value["class_path"], key)(**value["init_args"])
        for key, value in recipe_settings(name).items()
    }
