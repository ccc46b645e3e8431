"""Recipes: each equals its paper's loss, written in plain Python here, and is one YAML line that any key overrides."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lightning import PolicyRLModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.token_logprobs import TokenLogprobsOutput
from rlhf_lightning.modules.recipes import RECIPES
from rlhf_lightning.objectives.policy import ClippedSurrogate
from rlhf_lightning.rollout.advantages import compute_token_advantages
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.types import Episode, TrainingSample
from tests.helpers.cli import rlhf

BUDGET = 7
# Two prompts with three responses each: lengths differ, and so do rewards.
LENGTHS, REWARDS, GROUPS = [2, 3, 4, 1, 5, 2], [1.0, 0.2, -0.5, 0.0, 2.0, 0.7], [0, 0, 0, 1, 1, 1]
Rows = list[list[float]]


def numbers(seed: int, spread: float, around: Rows | None = None) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    noise = [(torch.randn(n, generator=generator, dtype=torch.float64) * spread).tolist() for n in LENGTHS]
    start = around or [[-2.0] * n for n in LENGTHS]
    return [[a + b for a, b in zip(row, more, strict=True)] for row, more in zip(start, noise, strict=True)]


OLD = numbers(0, 0.7)
NEW, REFERENCE, VALUES = numbers(1, 0.3, OLD), numbers(2, 0.3, OLD), numbers(3, 0.5, [[0.0] * n for n in LENGTHS])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def in_group(i: int) -> list[float]:
    return [reward for reward, group in zip(REWARDS, GROUPS, strict=True) if group == GROUPS[i]]


def group_relative(i: int) -> float:
    rewards = in_group(i)
    deviation = math.sqrt(sum((r - mean(rewards)) ** 2 for r in rewards) / (len(rewards) - 1))
    return (REWARDS[i] - mean(rewards)) / (deviation + 1e-4)


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def clipped(advantages: Rows, high: float = 0.2) -> Rows:
    return [
        [
            surrogate(math.exp(n - o), a, 0.2, high)
            for n, o, a in zip(new, old, own if len(own) > 1 else own * len(new), strict=True)
        ]
        for new, old, own in zip(NEW, OLD, advantages, strict=True)
    ]


def over_tokens(losses: Rows) -> float:
    return mean([loss for row in losses for loss in row])


def over_responses(losses: Rows) -> float:
    return mean([mean(row) for row in losses])


def k1() -> Rows:
    return [[o - r for o, r in zip(old, reference, strict=True)] for old, reference in zip(OLD, REFERENCE, strict=True)]


def whitened(rows: Rows) -> Rows:
    flat = [value for row in rows for value in row]
    scale = (sum((value - mean(flat)) ** 2 for value in flat) / len(flat) + 1e-8) ** -0.5
    return [[(value - mean(flat)) * scale for value in row] for row in rows]


def grpo() -> float:
    losses = clipped([[group_relative(i)] for i in range(6)])
    for i, (new, reference) in enumerate(zip(NEW, REFERENCE, strict=True)):
        for t, (n, r) in enumerate(zip(new, reference, strict=True)):
            losses[i][t] += 0.04 * (math.exp(r - n) - (r - n) - 1)
    return over_responses(losses)


def dr_grpo() -> float:
    losses = clipped([[REWARDS[i] - mean(in_group(i))] for i in range(6)])
    return mean([sum(row) / BUDGET for row in losses])


def dapo() -> float:
    return over_tokens(clipped([[group_relative(i)] for i in range(6)], high=0.28))


def gspo() -> float:
    found = []
    for i, (new, old) in enumerate(zip(NEW, OLD, strict=True)):
        ratio = math.exp(mean([n - o for n, o in zip(new, old, strict=True)]))
        found.append(surrogate(ratio, group_relative(i), 3e-4, 4e-4))
    return mean(found)


def rloo() -> float:
    found, penalties = [], [0.05 * sum(row) for row in k1()]
    for i, (new, old) in enumerate(zip(NEW, OLD, strict=True)):
        others = [REWARDS[j] for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]
        weights = [len(row) for row in OLD]
        # The mean penalty over the round's tokens is a baseline too.
        baseline = sum(w * p for w, p in zip(weights, penalties, strict=True)) / sum(weights)
        advantage = REWARDS[i] - mean(others) - (penalties[i] - baseline)
        found.append(surrogate(math.exp(sum(n - o for n, o in zip(new, old, strict=True))), advantage, 0.2, 0.2))
    return mean(found)


def reinforce_pp() -> float:
    advantages = [[REWARDS[i] - 0.01 * sum(row[t:]) for t in range(len(row))] for i, row in enumerate(k1())]
    return over_tokens(clipped(whitened(advantages)))


def ppo() -> float:
    advantages: Rows = []
    for i, row in enumerate(k1()):
        rewards = [-0.05 * k for k in row]
        rewards[-1] += REWARDS[i]
        values, after, own = [*VALUES[i], 0.0], 0.0, []
        for t in reversed(range(len(row))):
            after = rewards[t] + values[t + 1] - values[t] + 0.95 * after
            own.insert(0, after)
        advantages.append(own)
    return over_tokens(clipped(whitened(advantages)))


def mint() -> float:
    baseline = mean([k for row in k1() for k in row])
    loss = 0.0
    for i, row in enumerate(k1()):
        for k, n, o in zip(row, NEW[i], OLD[i], strict=True):
            loss -= math.exp(n - o) * (REWARDS[i] - mean(in_group(i)) - 0.05 * (k - baseline))
    return loss


def distill() -> float:
    """With rewards; the divergence is added to it, and is 0 here (tests/modules/test_distillation.py has it)."""
    losses = []
    for i, (new, old) in enumerate(zip(NEW, OLD, strict=True)):
        advantage = REWARDS[i] - mean(in_group(i))
        losses.append([-math.exp(n - o) * advantage for n, o in zip(new, old, strict=True)])
    return over_tokens(losses)


def distill_pg() -> float:
    losses = []
    for i, (new, old) in enumerate(zip(NEW, OLD, strict=True)):
        advantages = [REWARDS[i] - mean(in_group(i)) - k for k in k1()[i]]
        losses.append([-math.exp(n - o) * a for n, o, a in zip(new, old, advantages, strict=True)])
    return over_tokens(losses)


PAPERS = {
    "distill": distill,
    "distill_pg": distill_pg,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "gspo": gspo,
    "mint": mint,
}
PAPERS |= {"mint": mint, "ppo": ppo, "reinforce_pp": reinforce_pp, "rloo": rloo}


def padded(rows: Rows) -> torch.Tensor:
    table = torch.zeros(len(rows), 1 + max(LENGTHS), dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, 1 : 1 + len(row)] = torch.tensor(row, dtype=torch.float64)
    return table


def policy_loss(module: Any) -> float:
    """Loss of one mini-batch with all rows, by the module's own advantages, objective, KL and aggregation."""
    episodes = []
    for i, length in enumerate(LENGTHS):
        sample = TrainingSample([0] * (1 + length), [0] + [1] * length, [0.0, *OLD[i]])
        sample.reference_logprobs, sample.values = [0.0, *REFERENCE[i]], [0.0, *VALUES[i]]
        episodes.append(Episode([], {}, GROUPS[i], training_samples=[sample], reward=REWARDS[i]))
    compute_token_advantages(episodes, module.advantage, module.kl, module.objective.sequence_level)
    batch = {
        "loss_mask": (padded(OLD) != 0).double(),
        "old_logprobs": padded(OLD),
        "reference_logprobs": padded(REFERENCE),
        "advantages": padded([episode.training_samples[0].advantages[1:] for episode in episodes]),
    }
    equal = None if module.distillation is None else torch.zeros_like(padded(NEW))
    loss, _ = module._policy_loss(TokenLogprobsOutput(padded(NEW), divergence=equal), batch)
    return float(loss)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_the_losses_of_their_papers(name: str) -> None:
    teacher = {"teacher": "t"} if name.startswith("distill") else {}
    module = getattr(PolicyRLModule, name)("m", sampler=Sampler(BUDGET), **teacher)
    assert policy_loss(module) == pytest.approx(PAPERS[name](), rel=1e-6)
    named = PolicyRLModule("m", recipe=name, sampler=Sampler(BUDGET))
    assert policy_loss(named) == policy_loss(module)
    assert named.resample_groups == module.resample_groups == (3 if name == "dapo" else 0)
    assert (named.critic is None) == (name != "ppo")


def test_explicit_settings_override_a_recipe() -> None:
    own = ClippedSurrogate(0.1, 0.1)
    module = PolicyRLModule.grpo("m", objective=own, kl=None, resample_groups=2)
    assert (module.objective, module.kl, module.resample_groups) == (own, None, 2)
    other = PolicyRLModule("m", recipe="dapo", kl=KLPenalty(0.3), resample_groups=0)
    assert (other.kl.coefficient, other.resample_groups) == (0.3, 0)  # type: ignore[union-attr]
    assert type(PolicyRLModule.mint("m")) is PolicyRLModule
    mine = type("Mine", (PolicyRLModule,), {})
    assert type(mine.rloo("m")) is mine


@pytest.mark.parametrize(("name", "hint"), [("grop", "grpo"), ("reinforce++", "reinforce_pp"), ("DAPO", "dapo")])
def test_misspelled_recipe_gets_a_suggestion(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {hint}"):
        PolicyRLModule("m", recipe=name)
    said = rlhf("policy", "fit", "--model.recipe", name, "--model.model", "m", cwd=tmp_path, code=2)
    assert f"Did you mean {hint}" in said
    with pytest.raises(ConfigError, match="Recipes are dapo, distill, distill_pg, dr_grpo"):
        PolicyRLModule("m", recipe="xyz")


def shown(tmp_path: Path, settings: dict[str, Any], *args: str) -> dict[str, Any]:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model": {"model": "m", **settings}, "data": {"train": "p.jsonl"}}))
    text = rlhf("policy", "fit", "-c", str(config), *args, "--print_config", cwd=tmp_path)
    found: dict[str, Any] = yaml.safe_load(text)["model"]
    return found


def test_print_config_shows_the_settings_of_a_recipe(tmp_path: Path) -> None:
    plain = shown(tmp_path, {"recipe": "grpo"})
    assert plain["objective"]["class_path"].endswith(".ClippedSurrogate")
    assert plain["objective"]["init_args"]["aggregation"] == "sequence_mean"
    assert plain["kl"]["init_args"]["estimator"] == "k3"
    assert plain["advantage"]["init_args"] == {"scale": "std"}
    assert plain["recipe"] is None
    own = shown(
        tmp_path,
        {"recipe": "grpo", "objective": {"init_args": {"clip_high": 0.3}}, "kl": {"coefficient": 0.1}},
        "--model.advantage",
        "LeaveOneOut",
    )
    assert own["objective"]["init_args"] == {**plain["objective"]["init_args"], "clip_high": 0.3}
    assert own["kl"]["init_args"] == {**plain["kl"]["init_args"], "coefficient": 0.1}
    assert own["advantage"]["class_path"].endswith(".LeaveOneOut")
    assert shown(tmp_path, {"recipe": "grpo", "kl": None})["kl"] is None
    assert shown(tmp_path, {"recipe": "grpo"}, "--model.recipe=dapo")["resample_groups"] == 3
    assert shown(tmp_path, {"recipe": "grpo"}, "--model.recipe", "null")["objective"] is None
