"""Divergences between a student's and a teacher's distribution over the vocabulary, for distillation.

The functions take log-probabilities or logits of both models at the same positions, `[..., V]`, and return one number
per position, `[...]`, in nats. Gradients flow to the student only if the teacher's tensors have none.
"""

import math

import torch
from torch import Tensor


def forward_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_v q (log q − log p), with q of the teacher and p of the student.

    The student is pushed to cover everything that the teacher may say.

    Args:
        student_logprobs: Log-probabilities of all tokens under the student, in nats, `[..., V]`.
        teacher_logprobs: The same under the teacher, `[..., V]`.

    Returns:
        In nats, `[...]`.
    """
    student, teacher = _finite(student_logprobs), _finite(teacher_logprobs)
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(student ‖ teacher) = Σ_v p (log p − log q).

    The student is pushed away from what the teacher would not say, and may settle on one of several good answers.

    Args:
        student_logprobs: See `forward_kl`.
        teacher_logprobs: See `forward_kl`.

    Returns:
        In nats, `[...]`.
    """
    return forward_kl(teacher_logprobs, student_logprobs)


def generalized_jsd(student_logprobs: Tensor, teacher_logprobs: Tensor, beta: float) -> Tensor:
    """The generalized Jensen-Shannon divergence β KL(q ‖ m) + (1 − β) KL(p ‖ m), with m = β q + (1 − β) p.

    Source: GKD, arXiv 2306.13649 eq. 1, with the two ends that TRL gives it: beta 0 is the forward KL, and 1 the
    reverse KL. (The formula itself tends to 0 at both ends.)

    Args:
        student_logprobs: See `forward_kl`.
        teacher_logprobs: See `forward_kl`.
        beta: β, in [0, 1]; the weight of the teacher in the mixture.

    Returns:
        In nats, `[...]`.

    Example:
        >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
        >>> [round(float(generalized_jsd(student, teacher, beta)), 4) for beta in (0.0, 0.5, 1.0)]
        [0.1308, 0.0338, 0.1438]
    """
    if beta == 0:
        return forward_kl(student_logprobs, teacher_logprobs)
    if beta == 1:
        return reverse_kl(student_logprobs, teacher_logprobs)
    student, teacher = _finite(student_logprobs), _finite(teacher_logprobs)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def merge_tail(student_logprobs: Tensor, teacher_logprobs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Keep the teacher's `top_k` most likely tokens, and merge all others into one event.

    The results are distributions over `top_k + 1` events. By the data processing inequality, their KL and JSD are at
    most those of the full distributions. Without the last event, and with renormalization instead, a student that gives
    all these tokens little probability could have divergence 0.

    Args:
        student_logprobs: See `forward_kl`.
        teacher_logprobs: See `forward_kl`.
        top_k: Number of tokens to keep; from V on, nothing is merged.

    Returns:
        Log-probabilities of the student and of the teacher, `[..., top_k + 1]` each.

    Example:
        >>> student, teacher = torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([0.1, 0.6, 0.3]).log()
        >>> [part.exp() for part in merge_tail(student, teacher, 1)]
        [tensor([0.3000, 0.7000]), tensor([0.6000, 0.4000])]
    """
    if top_k >= teacher_logprobs.shape[-1]:
        return student_logprobs, teacher_logprobs
    kept = teacher_logprobs.topk(top_k, dim=-1).indices

    def merged(logprobs: Tensor) -> Tensor:
        logprobs = _finite(logprobs)
        tail = logprobs.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logprobs.gather(-1, kept), tail], dim=-1)

    return merged(student_logprobs), merged(teacher_logprobs)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Divergence of two models' next-token distributions, from their logits.

    Args:
        student_logits: Logits of the student, `[..., V]`.
        teacher_logits: Logits of the teacher. If one of the two has more columns (rows of an embedding that was padded
            to a round number), only the columns that both have are compared.
        beta: See `generalized_jsd`: 0 for the forward KL, 1 for the reverse KL.
        temperature: Temperature of both softmaxes.
        top_k: See `merge_tail`; None for the whole vocabulary.

    Returns:
        In nats, `[...]`, in float32 or wider.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
        >>> divergence(student, teacher, beta=0.0)
        tensor([0.1308])
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = (
        (logits[..., :shared].to(dtype) / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits)
    )
    if top_k is not None:
        student, teacher = merge_tail(student, teacher, top_k)
    return generalized_jsd(student, teacher, beta)


def _finite(logprobs: Tensor) -> Tensor:
    """Log-probabilities with -inf replaced by the smallest finite number, so that p · log p is 0 where p is 0."""
    return logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
