"""Losses of preference learning: pure functions of scores, and classes for configs.

A class declares the tensors that it needs besides the scores as keyword-only arguments of `__call__`.
`PreferenceModule` passes them by name, `[B]` each:

- `margin`, `ties`: columns of the data.
- `chosen_lengths`, `rejected_lengths`: tokens of the responses.
- `chosen_logps`, `rejected_logps`: Σ log π of the responses in nats, from scorers that compute it.
- `chosen_reference_scores`, `rejected_reference_scores`: beta·Σ log π_ref, the reference's part of the score, from
  `ImplicitReward`.
- `chosen_kl`, `rejected_kl`: Σ_t ½·(log π − log π_ref)² of the responses, from `ImplicitReward`.
- `beta`: the scorer's, a number.

For labels and rankings the names have no prefix (`lengths`, `logps`, …).
"""

from rlhf_lightning.objectives.preference.base import (
    LabelLoss,
    PairLoss,
    PreferenceLoss,
    RankingLoss,
)
from rlhf_lightning.objectives.preference.combined import (
    BCO,
    KTO,
    SFT,
    APOUnpaired,
    BCOUnpaired,
    Centering,
    KLToStart,
    PlackettLuce,
    WeightedSum,
)
from rlhf_lightning.objectives.preference.label_losses import (
    apo_zero_unpaired,
    bco_unpaired,
    kto,
    plackett_luce,
)
from rlhf_lightning.objectives.preference.pair_losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco,
    bradley_terry,
    centering,
    davidson,
    discopop,
    exo,
    hinge,
    ipo,
    log_odds,
    nca,
    odds_ratio,
    orpo,
    rao_kupper,
    robust,
    sft,
    simpo,
    sppo,
)
from rlhf_lightning.objectives.preference.pairs import (
    AOT,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BradleyTerry,
    Davidson,
    DiscoPOP,
    Hinge,
    RaoKupper,
    Robust,
    SimPO,
)

__all__ = [
    "AOT",
    "BCO",
    "EXO",
    "IPO",
    "KTO",
    "NCA",
    "ORPO",
    "SFT",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOUnpaired",
    "APOZero",
    "BCOUnpaired",
    "BradleyTerry",
    "Centering",
    "Davidson",
    "DiscoPOP",
    "Hinge",
    "KLToStart",
    "LabelLoss",
    "PairLoss",
    "PlackettLuce",
    "PreferenceLoss",
    "RankingLoss",
    "RaoKupper",
    "Robust",
    "SimPO",
    "WeightedSum",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_unpaired",
    "bradley_terry",
    "centering",
    "davidson",
    "discopop",
    "exo",
    "hinge",
    "ipo",
    "kto",
    "log_odds",
    "nca",
    "odds_ratio",
    "orpo",
    "plackett_luce",
    "rao_kupper",
    "robust",
    "sft",
    "simpo",
    "sppo",
]
