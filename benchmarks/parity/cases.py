"""The cases: runs of one or two optimizer steps on both sides, with the same rows and settings."""

from pathlib import Path
from typing import Any

from benchmarks.parity import losses, our_side, setup, trl_side
from benchmarks.parity.setup import Folders, Step
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives import preference
from rlhf_lightning.rollout.advantages import GroupCentered, LeaveOneOut
from rlhf_lightning.rollout.kl import KLPenalty

ROWS, PROMPTS, GROUP = 6, 3, 4
# Learning rate between the two steps on one round, small enough that some ratios are within their bounds.
RATES = {"rloo": 1e-3, "gspo": 1e-5}


class StillBCO(preference.BCO):
    """BCO with δ = 0 as in TRL: its running mean does not change in training."""

    def train(self, mode: bool = True) -> "StillBCO":
        super().train(False)
        return self


def names() -> list[str]:
    """Names of all cases."""
    dpo = [f"dpo: {name}" for name in losses.DPO]
    rl = [f"rl: {name}" for name in losses.rl(trl_side.LENGTH)]
    return ["sft", "sft, 3 micro-batches", "reward", "reward, margins", *dpo, "kto", "kto: apo_zero_unpaired", *rl]


def run(name: str, folders: Folders, root: Path) -> tuple[list[Step], list[Step]]:
    """Our steps and TRL's, for a case."""
    kind, _, loss = name.partition(": ")
    if kind == "rl":
        return _rl(loss, folders, root)
    if kind == "dpo":
        return _dpo(loss, folders, root)
    if kind == "kto":
        return _kto(loss or "kto", folders, root)
    task, _, option = name.partition(", ")
    rows: list[Any] = setup.conversations(ROWS) if task == "sft" else setup.pairs(ROWS)
    if option == "margins":
        rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(rows)]
    micro = {"micro": 2} if option == "3 micro-batches" else {}
    return tuple(side.supervised(task, folders, rows, root, **micro) for side in (our_side, trl_side))


def _dpo(name: str, folders: Folders, root: Path) -> tuple[list[Step], list[Step]]:
    loss, scores = losses.DPO[name]
    rows = setup.pairs(ROWS)
    if name == "sft":  # equal if lengths are equal, see `differences`
        rows = [{**row, "chosen": rows[0]["chosen"]} for row in rows]
    loss = StillBCO() if name == "bco_pair" else loss
    ours = our_side.supervised(
        "dpo", folders, rows, root, scorer=ImplicitReward(losses.BETA, folders.reference, **scores), loss=loss
    )
    return ours, trl_side.supervised("dpo", folders, rows, root, **trl_dpo(name))


def trl_dpo(name: str) -> dict[str, Any]:
    """TRL's settings for a loss in `losses.DPO`."""
    desensitized = {"ld_alpha": losses.TAIL} if name == "length_desensitized" else {}
    return {
        "beta": losses.BETA,
        "loss_type": ["sigmoid" if desensitized else name],
        "label_smoothing": losses.SMOOTHING if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0,
        "discopop_tau": losses.TEMPERATURE,
        "disable_dropout": True,
        **desensitized,
    }


def _kto(name: str, folders: Folders, root: Path) -> tuple[list[Step], list[Step]]:
    loss = preference.KTO() if name == "kto" else preference.APOUnpaired()
    rows = setup.labels(ROWS)
    # We pair a prompt with the next response in the file, TRL with the previous one.
    ours = our_side.supervised(
        "kto", folders, rows[::-1], root, scorer=ImplicitReward(losses.BETA, folders.reference), loss=loss
    )
    options = {"beta": losses.BETA, "loss_type": name, "disable_dropout": True}
    return ours, trl_side.supervised("kto", folders, rows, root, **options)


def prompts() -> list[dict[str, Any]]:
    """Prompts of the policy RL cases."""
    return [{"prompt": row["prompt"]} for row in setup.pairs(PROMPTS)]


def _rl(name: str, folders: Folders, root: Path) -> tuple[list[Step], list[Step]]:
    """Two steps on one round that TRL sampled; our side gets it as recorded episodes with rewards."""
    objective, options = losses.rl(trl_side.LENGTH)[name]
    rate = RATES.get(name, 1e-2)
    kind = "rloo" if name == "rloo" else "grpo"
    theirs = trl_side.Rollouts(folders, prompts(), GROUP, root, kind=kind, learning_rate=rate, **options)
    beta = options["beta"]
    estimator = "weighted_k3" if options.get("use_bias_correction_kl") else "k3"
    ours = our_side.recorded(
        folders,
        theirs.episodes,
        root,
        rate=rate,
        objective=objective,
        advantage=LeaveOneOut() if name == "rloo" else GroupCentered("std"),
        kl=KLPenalty(beta, estimator=estimator) if beta else None,
    )
    return ours, theirs.steps
