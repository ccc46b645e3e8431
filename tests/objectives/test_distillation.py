"""Divergences of distillation: numbers by hand, their gradients, a teacher's tail, and TRL's functions."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.logits import DivergenceFunction
from rlhf_lightning.models.token_logprobs import Comparison, TokenLogprobs
from rlhf_lightning.objectives.distillation import (
    divergence,
    forward_kl,
    generalized_jsd,
    merge_tail,
    reverse_kl,
)
from tests.helpers.models import build_model

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(seed: int, rows: int = 5, vocabulary: int = 11, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def test_divergences_by_hand() -> None:
    student, teacher = [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]
    p, q = torch.tensor(student).double().log(), torch.tensor(teacher).double().log()
    forward = 0.125 * math.log(0.25) + 0.75 * math.log(3) + 0.125 * math.log(0.5)
    reverse = 0.5 * math.log(4) + 0.25 * math.log(1 / 3) + 0.25 * math.log(2)
    assert float(forward_kl(p, q)) == pytest.approx(forward, rel=1e-12)
    assert float(reverse_kl(p, q)) == pytest.approx(reverse, rel=1e-12)
    mixture = [0.3 * b + 0.7 * a for a, b in zip(student, teacher, strict=True)]
    to_teacher = sum(b * math.log(b / m) for b, m in zip(teacher, mixture, strict=True))
    to_student = sum(a * math.log(a / m) for a, m in zip(student, mixture, strict=True))
    assert float(generalized_jsd(p, q, 0.3)) == pytest.approx(0.3 * to_teacher + 0.7 * to_student, rel=1e-12)
    # The tail after the likeliest token of the teacher: 0.75 and 0.25 of it, 0.25 and 0.75 of the student.
    merged = reverse_kl(*merge_tail(p, q, 1))
    assert float(merged) == pytest.approx(0.25 * math.log(1 / 3) + 0.75 * math.log(3), rel=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradient_of_the_logits_is_correct(beta: float, top_k: int | None) -> None:
    teacher = logits(1)

    def found(student: Tensor) -> Tensor:
        return divergence(student, teacher, beta, temperature=1.7, top_k=top_k)

    assert torch.autograd.gradcheck(found, logits(0).requires_grad_())
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    plain, ours = logits(0).requires_grad_(), logits(0).requires_grad_()
    values = found(plain)
    (values * weights).sum().backward()
    in_place = DivergenceFunction.apply(
        ours * 1, teacher, lambda s, t: divergence(s, t, beta, temperature=1.7, top_k=top_k)
    )
    (in_place * weights).sum().backward()
    torch.testing.assert_close(in_place, values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_all_tokens_as_top_k_equal_the_whole_vocabulary_and_fewer_bound_it(beta: float) -> None:
    student, teacher = logits(0), logits(1)
    full = divergence(student, teacher, beta)
    assert torch.equal(divergence(student, teacher, beta, top_k=11), full)
    assert torch.equal(divergence(student, teacher, beta, top_k=12), full)
    # With one token in the tail nothing is merged but its name.
    torch.testing.assert_close(divergence(student, teacher, beta, top_k=10), full, rtol=1e-10, atol=1e-12)
    coarse = [divergence(student, teacher, beta, top_k=k) for k in range(1, 11)]
    for less, more in pairwise(coarse):
        assert bool((less <= more + 1e-12).all())
    assert bool((coarse[0] > 0).all())


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_and_extreme_logits(beta: float) -> None:
    same = logits(0).requires_grad_()
    none = divergence(same, same.detach().clone(), beta)
    none.sum().backward()
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-12)
    torch.testing.assert_close(same.grad, torch.zeros_like(same), rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
        found = divergence(student, torch.tensor([[-300.0, 300.0, -torch.inf]], dtype=dtype), beta, top_k=2)
        found.sum().backward()
        assert found.dtype == torch.float32
        assert student.grad is not None
        assert bool(student.grad.isfinite().all())
        # The student says what the teacher never does: ln 2 at most for a JSD, hundreds of nats for a KL.
        value = float(found.detach())
        assert 0.3 < value < 0.7 or (beta in (0.0, 1.0) and 500 < value < 700)


def test_padded_columns_are_not_compared() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    wide = torch.cat([teacher, torch.full((5, 3), 99.0, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(divergence(student, wide), divergence(student, teacher))
    other = torch.cat([logits(0), torch.full((5, 2), 99.0, dtype=torch.float64)], dim=1).requires_grad_()
    value = divergence(other, teacher)
    value.sum().backward()
    torch.testing.assert_close(value, divergence(student, teacher))
    assert other.grad is not None
    assert not other.grad[:, 11:].any()


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_divergence_of_models_in_chunks_equals_whole_logits(architecture: str, tokenizer: Any) -> None:
    """A student and a wider teacher, rows with a common prompt, with logits in one piece and one row at a time."""
    student, teacher = (build_model(tokenizer, seed, architecture).double() for seed in (0, 1))
    ids = torch.randint(0, len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
    ids[1, :4] = ids[0, :4]
    loss_mask = torch.zeros(3, 9, dtype=torch.float64)
    loss_mask[0, 4:9] = loss_mask[1, 4:6] = loss_mask[2, 7] = 1
    wanted = divergence(student(ids).logits, teacher(ids).logits, beta=0.3, temperature=1.3).detach()[:, :-1]
    gradients = []
    for logit_bytes in (2**20, 1):
        scorer = TokenLogprobs(student, logit_bytes=logit_bytes)
        states, head = TokenLogprobs(teacher).position_states(ids, loss_mask)
        compared = Comparison(states.detach(), head, lambda s, t: divergence(s, t, beta=0.3, temperature=1.3))
        found = scorer(ids, loss_mask, teacher=compared)
        assert found.divergence is not None
        torch.testing.assert_close(found.divergence[:, 1:], wanted * loss_mask[:, 1:], rtol=1e-6, atol=1e-9)
        student.zero_grad()
        (found.divergence.sum() + found.logprobs.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    plain = divergence(student(ids).logits, teacher(ids).logits.detach(), beta=0.3, temperature=1.3)[:, :-1]
    scored = student(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ((plain + scored) * loss_mask[:, 1:]).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    for gradient in gradients:
        assert float((gradient - expected).norm() / expected.norm()) < 1e-6


def test_models_whose_heads_cannot_be_run_separately(tokenizer: Any) -> None:
    """Their logits are computed at every position; student, teacher, or both."""
    ids, loss_mask = batch_of_two(tokenizer)
    for wrapped in ((True, False), (False, True), (True, True)):
        student, teacher = (build_model(tokenizer, seed).double() for seed in (0, 1))
        for model, custom in zip((student, teacher), wrapped, strict=True):
            if custom:
                model.forward = scaled(model.forward)
            assert TokenLogprobs(model).backbone.separable != custom
        plain = divergence(student(ids).logits, teacher(ids).logits, 0.5, 0.8)[:, :-1] * loss_mask[:, 1:]
        expected = plain.sum() / loss_mask.sum()
        torch.testing.assert_close(loss_of(student, teacher, ids, loss_mask, 0.5), expected, rtol=1e-6, atol=1e-9)


def scaled(forward: Any) -> Any:
    """A forward pass whose logits are not those of decoder and head."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    return run


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl(module: str) -> Any:
    pytest.importorskip("trl")
    return pytest.importorskip(module)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_loss_of_gkd(beta: float, temperature: float) -> None:
    """Mean over the trained tokens, and its gradient."""
    theirs = trl("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    teacher = logits(1, 8).view(2, 4, 11)
    labels = torch.tensor([[1, 2, -100, 3], [-100, 5, 6, -100]])
    mask = (labels != -100).double()
    ours, other = (logits(0, 8).view(2, 4, 11).requires_grad_() for _ in range(2))
    found = (divergence(ours, teacher, beta, temperature) * mask).sum() / mask.sum()
    expected = theirs(other, teacher, labels, beta, temperature)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-6, atol=1e-9)


def batch_of_two(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask of what is trained: 8 tokens."""
    ids = torch.randint(0, len(tokenizer), (2, 8), generator=torch.Generator().manual_seed(0))
    loss_mask = torch.zeros(2, 8, dtype=torch.float64)
    loss_mask[0, 3:8] = loss_mask[1, 3:6] = 1
    return ids, loss_mask


def loss_of(student: Any, teacher: Any, ids: Tensor, loss_mask: Tensor, beta: float) -> Tensor:
    """Our loss of a step, from the two models."""
    states, head = TokenLogprobs(teacher).position_states(ids, loss_mask)
    compared = Comparison(states.detach(), head, lambda s, t: divergence(s, t, beta, temperature=0.8))
    per_token = TokenLogprobs(student)(ids, loss_mask, teacher=compared).divergence
    assert per_token is not None
    return per_token.sum() / loss_mask.sum()


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_of_a_model_equal_gkd(beta: float, tokenizer: Any) -> None:
    """Loss and gradients of all weights of a student, with a wider teacher, in float64."""
    theirs = trl("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    student, teacher = build_model(tokenizer).double(), build_model(tokenizer, 1, hidden_size=48).double()
    ids, loss_mask = batch_of_two(tokenizer)
    ours = loss_of(student, teacher, ids, loss_mask, beta)
    labels = torch.where(loss_mask.bool(), ids, -100)[:, 1:]
    other = theirs(student(ids).logits[:, :-1], teacher(ids).logits[:, :-1].detach(), labels, beta, 0.8)
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-9)
    found, expected = gradient_of(student, ours), gradient_of(student, other)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_of_a_model_equal_distillation_trainer(beta: float, tokenizer: Any) -> None:
    """As above, against the function of `DistillationTrainer`, which computes in float32 whatever it is given."""
    theirs = trl("trl.trainer.distillation_trainer")._chunked_divergence_loss
    student, teacher = build_model(tokenizer), build_model(tokenizer, 1, hidden_size=48)
    ids, loss_mask = batch_of_two(tokenizer)
    ours = loss_of(student, teacher, ids, loss_mask.float(), beta)
    states = [Backbone(model).decoder(input_ids=ids)[0][:, 2:-1] for model in (student, teacher)]
    heads = [model.lm_head.weight for model in (student, teacher)]
    other, _, count = theirs(
        states[0], states[1].detach(), heads[0], heads[1].detach(), loss_mask[:, 3:], beta, temperature=0.8
    )
    assert int(count) == 8
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)
    found, expected = gradient_of(student, ours), gradient_of(student, other)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_the_tail_equals_trl(beta: float) -> None:
    """TRL's server distillation merges the tail in the same way."""
    module = trl("trl.experimental.server_distillation.server_distillation_trainer")
    student, teacher = (logits(seed).log_softmax(-1) for seed in (0, 1))
    kept = teacher.topk(4).indices
    mask = torch.ones(5, 4, dtype=torch.bool)
    (ours, support), (other, _) = (module._add_tail_bucket(x.gather(-1, kept), mask) for x in (student, teacher))
    expected = module._jsd_divergence(ours, other, beta, support).sum(-1)
    torch.testing.assert_close(divergence(student, teacher, beta, top_k=4), expected, rtol=1e-6, atol=1e-7)
