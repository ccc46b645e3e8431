"""TRL's names of losses and their counterparts here, for the parity runs and the tests of single functions."""

from typing import Any

from rlhf_lightning.objectives import policy, preference

BETA, SMOOTHING, TEMPERATURE, TAIL = 0.3, 0.1, 0.05, 0.4

# For each `loss_type` of TRL: our class, and the arguments of `ImplicitReward`.
DPO: dict[str, tuple[Any, dict[str, Any]]] = {
    "sigmoid": (preference.BradleyTerry(), {}),
    "hinge": (preference.Hinge(), {}),
    "ipo": (preference.IPO(), {"length_normalized": True}),
    "exo_pair": (preference.EXO(SMOOTHING), {}),
    "nca_pair": (preference.NCA(), {}),
    "robust": (preference.Robust(SMOOTHING), {}),
    "bco_pair": (preference.BCO().eval(), {}),
    "sppo_hard": (preference.SPPO(), {}),
    "aot": (preference.AOT(SMOOTHING), {}),
    "aot_unpaired": (preference.AOTUnpaired(SMOOTHING), {}),
    "apo_zero": (preference.APOZero(), {}),
    "apo_down": (preference.APODown(), {}),
    "discopop": (preference.DiscoPOP(TEMPERATURE), {}),
    "sft": (preference.SFT(), {}),
    "sigmoid_norm": (preference.BradleyTerry(), {"length_normalized": True}),
    "length_desensitized": (preference.BradleyTerry(), {"tail_weight": TAIL}),
}


def rl(length: int) -> dict[str, tuple[policy.PolicyObjective, dict[str, Any]]]:
    """For each policy loss: our class and TRL's settings; `length` is TRL's `max_completion_length`."""
    grpo = {"loss_type": "grpo", "beta": 0.0}
    return {
        "grpo": (policy.ClippedSurrogate(aggregation="sequence_mean"), grpo),
        "grpo, dual clip": (
            policy.ClippedSurrogate(dual_clip=1.5, aggregation="sequence_mean"),
            {**grpo, "delta": 1.5},
        ),
        "grpo, two bounds": (
            policy.ClippedSurrogate(clip_low=0.1, clip_high=0.3, aggregation="sequence_mean"),
            {**grpo, "epsilon": 0.1, "epsilon_high": 0.3},
        ),
        "grpo, kl": (
            policy.ClippedSurrogate(aggregation="sequence_mean"),
            {**grpo, "beta": 0.3, "use_bias_correction_kl": False},
        ),
        "grpo, weighted kl": (
            policy.ClippedSurrogate(aggregation="sequence_mean"),
            {**grpo, "beta": 0.3, "use_bias_correction_kl": True},
        ),
        "gspo": (
            policy.SequenceClippedSurrogate(),
            {**grpo, "epsilon": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"},
        ),
        "dr_grpo": (policy.ClippedSurrogate(aggregation="constant", length=length), {**grpo, "loss_type": "dr_grpo"}),
        "dapo": (policy.ClippedSurrogate(clip_high=0.28), {**grpo, "loss_type": "dapo", "epsilon_high": 0.28}),
        "bnpo": (policy.ClippedSurrogate(), {**grpo, "loss_type": "bnpo"}),
        "cispo": (policy.CISPO(ratio_max=1.3), {**grpo, "loss_type": "cispo", "epsilon_high": 1.3}),
        # TRL keeps the temperatures in float32, where 1.05 is not 1.05.
        "sapo": (
            policy.SAPO(temperature_negative=1.0625),
            {**grpo, "loss_type": "sapo", "sapo_temperature_neg": 1.0625},
        ),
        "rloo": (policy.SequenceClippedSurrogate(normalized=False), {"beta": 0.0}),
    }
