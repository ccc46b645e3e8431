"""The estimates of benchmarks/scale against what can be counted here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale import activations, paper, tables
from benchmarks.steps.flops import Shape, forward
from rlhf_lightning.models.memory import cache_bytes, optimizer_bytes, tensor_bytes

SHAPE = Shape(48, 80, 2, 6, 3, 8, 96)


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_flops_equal_a_counted_forward_pass(family: str) -> None:
    """The counter treats attention as a full square; causal attention has half of the pairs."""
    model, tokens = activations.small_model(SHAPE, family).eval(), 40
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    rotary = 2 * tokens * SHAPE.head_dim // 2  # angles, which older transformers compute as a matrix product
    assert counter.get_total_flops() - forward(SHAPE, tokens, tokens**2, tokens) in (0, rotary)


def test_backward_flops_are_twice_the_forward() -> None:
    model, tokens = activations.small_model(SHAPE, "Llama"), 40
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    once = forward(SHAPE, tokens, tokens**2, tokens)
    assert counter.get_total_flops() == pytest.approx(3 * once, rel=1e-3)


def test_training_state_is_exact() -> None:
    """Weights, gradients and optimizer state after a step, against the estimate without memory."""
    real = activations.small_model(SHAPE, "Qwen3")
    optimizer = AdamW(real.parameters(), fused=False)
    real(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    with torch.device("meta"):
        empty = activations.small_model(SHAPE, "Qwen3")
    weights = list(empty.parameters())
    assert tensor_bytes(weights) == sum(p.numel() * p.element_size() for p in real.parameters())
    assert tensor_bytes(weights) == sum(p.grad.numel() * 4 for p in real.parameters() if p.grad is not None)
    state = [value for row in optimizer.state.values() for value in row.values()]
    found = optimizer_bytes(lambda p: AdamW(p, fused=False), weights)
    assert found == sum(value.numel() * value.element_size() for value in state)


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activation_formula_holds_for_other_shapes(family: str, precision: str) -> None:
    assert not set(activations.HELD_OUT) & set(activations.FITTED)
    assert max(abs(error) for error in activations.errors(family, precision)) < 0.01


def test_autocast_keeps_a_copy_of_the_layers_weights() -> None:
    from rlhf_lightning.models.backbone import Backbone
    from rlhf_lightning.models.memory import activation_bytes
    from rlhf_lightning.models.packed_forward import PackedForward

    model = activations.small_model(SHAPE, "Qwen3")
    runner = PackedForward(model, Backbone(model).decoder)
    each = activations.measured(SHAPE, "Qwen3", "bf16-mixed")
    once = activation_bytes(runner, 1024, activations._context("bf16-mixed")) - 1024 * each
    assert once == pytest.approx(paper.COMPUTE * SHAPE.layers * SHAPE.layer_weights, rel=0.05)


def test_models_have_their_published_sizes() -> None:
    """Parameters as in the model cards, in billions."""
    for name, published in (("0.6B", 0.6), ("8B", 8.2), ("70B", 70.6)):
        model = paper.build(name, "bf16-mixed")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(published, abs=0.06)
        assert all(p.device.type == "meta" for p in model.parameters())


def test_tables_add_up() -> None:
    load, hardware = paper.Load(), paper.Hardware()
    found = tables.rows(load, hardware)
    assert len(found) == 3 * 2 * 5
    for row in found:
        assert row["total"] == pytest.approx(sum(row[part] for part in tables.PARTS))
        assert row["total"] < row["total_without_checkpointing"]
    by: Any = {(row["model"], row["precision"], row["gpus"], row["strategy"]): row for row in found}
    one, many = by["8B", "bf16-true", 1, "one"], by["8B", "bf16-true", 8, "FSDP2"]
    assert many["weights"] == pytest.approx(one["weights"] / 8)
    assert one["optimizer"] == pytest.approx(2 * one["weights"], rel=1e-3)
    assert one["cache"] == cache_bytes(paper.build("8B", "bf16-true"), 64, 1024, 2)
    assert one["communication"] == 0
    slow = tables.rows(load, paper.Hardware(flops=hardware.flops / 2))
    assert slow[0]["compute"] == pytest.approx(2 * found[0]["compute"])
    assert len(tables.table(found).splitlines()) == 2 * (len(found) + 2) + 1


def test_growth_is_measured_at_a_point(tmp_path: Any) -> None:
    """At the smallest size, in this process."""
    from benchmarks.scale import growth, worker

    tiny = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 16, "vocab": 600, "batch": 2}
    tiny |= {"prompt_tokens": 4, "response_tokens": 4}
    found = worker.measure({"task": "sft", "steps": 2, "ranks": 1, "work": tiny}, tmp_path)
    assert len(found["seconds"]) == 2
    assert found["peak_gib"] > 0
    assert 0 < found["limit_seconds"] < min(found["seconds"])
    rows = [{"x": x, "seconds": 3.0 * x**2, "peak_gib": 1.0} for x in (1, 2, 4)]
    assert growth.exponent(rows, "seconds") == pytest.approx(2.0)
    assert growth.exponent(rows, "peak_gib") == pytest.approx(0.0)
    assert SimpleNamespace(**growth.AXES["tokens"][0]).x
