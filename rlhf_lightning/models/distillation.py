"""Distillation: the settings, and the frozen teacher that a student's distributions are compared with."""

import logging
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.data.tokenizers import conflicting_tokens, load_tokenizer
from rlhf_lightning.errors import ConfigError, check_whole, quoted
from rlhf_lightning.files import is_url
from rlhf_lightning.models.offload import check_place
from rlhf_lightning.models.reference import Reference, load_reference
from rlhf_lightning.models.token_logprobs import Comparison
from rlhf_lightning.objectives.distillation import divergence
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Distillation(Settings):
    """Settings of distillation: the teacher, and the divergence from it that is added to the loss.

    At each trained token, the student's distribution over the vocabulary is compared with the teacher's, given the same
    tokens before it. The loss gets `coefficient` times the mean divergence per token. In policy RL the tokens are
    sampled by the student (on-policy distillation: GKD, arXiv 2306.13649), in SFT they are those of the data.

    Args:
        teacher: Model folder, adapter folder or Hub id of the teacher, with the student's vocabulary.
        beta: Which divergence, as in GKD and TRL: 1 for the reverse KL, KL(student ‖ teacher); 0 for the forward KL,
            KL(teacher ‖ student); between them the generalized Jensen-Shannon divergence.
        top_k: Compare the probabilities of the teacher's `top_k` most likely tokens and that of all others together;
            None for the whole vocabulary.
        coefficient: Weight of the divergence in the loss.
        temperature: Temperature of both distributions; by default the sampler's in policy RL, and 1 in SFT.
        on_policy_fraction: In policy RL, the fraction of prompts that the student answers (λ of GKD). The others keep
            the answer of the data; the loss compares student and teacher on that instead.
        dtype: Data type of the teacher's weights, for example `bfloat16`; by default that of the student.
        device: Device of the teacher (`cpu`, `cuda:1`); None for the student's device.
        offload: True to keep the teacher in CPU memory, except while it runs.

    Raises:
        ConfigError: If a setting is out of range, or two settings conflict.

    Example:
        >>> distillation = Distillation("Qwen/Qwen3-8B", beta=1.0, dtype="bfloat16")
        >>> distillation.on_policy_fraction
        1.0
    """

    def __init__(
        self,
        teacher: str,
        beta: float = 1.0,
        top_k: int | None = None,
        coefficient: float = 1.0,
        temperature: float | None = None,
        on_policy_fraction: float = 1.0,
        dtype: str | None = None,
        device: str | None = None,
        offload: bool = False,
    ) -> None:
        if not isinstance(teacher, str) or not teacher:
            raise ConfigError(f"distillation.teacher is {teacher!r}; it must be a model folder or a Hub id")
        if is_url(teacher):
            raise ConfigError(
                f"distillation.teacher is {teacher!r}, but a server does not give the probabilities of all tokens. Set "
                "model.recipe: distill_pg with this address as model.kl.reference, which needs only those of the "
                "sampled tokens, or name a model folder or Hub id"
            )
        for name, value in (("beta", beta), ("on_policy_fraction", on_policy_fraction)):
            if not 0 <= value <= 1:
                raise ConfigError(f"distillation.{name} is {value}; it must be in [0, 1]")
        for name, number in (("coefficient", coefficient), ("temperature", temperature)):
            if number is not None and not 0 < number < math.inf:
                raise ConfigError(f"distillation.{name} is {number}; it must be above 0")
        if top_k is not None:
            check_whole("distillation.top_k", top_k)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"distillation.dtype is {dtype!r}; it must be a dtype, for example float32 or bfloat16")
        check_place("distillation", device, offload)
        self.teacher, self.beta, self.top_k, self.coefficient = teacher, beta, top_k, coefficient
        self.temperature, self.on_policy_fraction = temperature, on_policy_fraction
        self.dtype, self.device, self.offload = dtype, device, offload

    def build(
        self,
        tokenizer: "Tokenizer | PreTrainedTokenizerBase",
        max_tokens_per_batch: int | None,
        dtype: str,
        temperature: float,
    ) -> "Teacher":
        """Load the teacher.

        Args:
            tokenizer: The student's tokenizer.
            max_tokens_per_batch: See `PackedForward`.
            dtype: Data type of the student's weights.
            temperature: Temperature of both distributions, unless the settings have one.

        Raises:
            ConfigError: If the teacher cannot be loaded, or has another vocabulary.
        """
        check_tokenizer(self.teacher, tokenizer)
        reference = load_reference(
            self.teacher,
            tokenizer,
            self.dtype or dtype,
            max_tokens_per_batch,
            self.device,
            self.offload,
            name="the teacher",
            compared=True,
        )
        return Teacher(self, reference, self.temperature or temperature)


class Teacher:
    """A frozen model whose distributions the student is compared with; the result of `Distillation.build`.

    Args:
        settings: The settings.
        reference: The model.
        temperature: Temperature of both distributions.

    Attributes:
        settings: The settings.
        model: The model, to be registered in the module, so that it moves with it.

    Example:
        ```python
        teacher = Distillation("Qwen/Qwen3-8B").build(tokenizer, None, dtype="bfloat16", temperature=1.0)
        found = token_logprobs(input_ids, loss_mask, teacher=teacher(input_ids, loss_mask))
        loss = found.divergence.sum() / loss_mask.sum()
        ```
    """

    def __init__(self, settings: Distillation, reference: Reference, temperature: float) -> None:
        assert reference.copy is not None, "a separate model"
        self.settings, self.reference = settings, reference
        self.model: nn.Module = reference.copy
        self._divergence = partial(divergence, beta=settings.beta, temperature=temperature, top_k=settings.top_k)

    def __call__(self, input_ids: Tensor, loss_mask: Tensor) -> Comparison:
        """The teacher's distributions at the tokens with mask 1.

        Args:
            input_ids: Right-padded, `[B, T]`.
            loss_mask: 1 at the tokens to compare, `[B, T]`.
        """
        states, head = self.reference.position_states(input_ids, loss_mask)
        return Comparison(states, head, self._divergence)


def check_tokenizer(source: str, tokenizer: "Tokenizer | PreTrainedTokenizerBase") -> None:
    """Check that a token id means the same to the teacher as to the student.

    Tokens that only one of them has are allowed, and logged: an embedding may be padded, or resized for added tokens.

    Args:
        source: Model folder or Hub id of the teacher.
        tokenizer: The student's tokenizer.

    Raises:
        ConfigError: If the teacher has no tokenizer, or gives an id of the student's to another token.
    """
    other = load_tokenizer(source)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if wrong := conflicting_tokens(tokenizer, other):
        token = wrong[0]
        raise ConfigError(
            f"the teacher {source!r} has another vocabulary than the student: {len(wrong)} of the student's "
            f"{len(ours)} tokens have another id or meaning there (for example {token!r}, {ours[token]} here and "
            f"{theirs.get(token, 'absent')} there). Distillation compares probabilities of equal ids; use a teacher "
            "with the student's tokenizer"
        )
    if single := sorted(ours.keys() ^ theirs.keys()):
        log.warning(
            "%d tokens are only in the vocabulary of the student or of the teacher %s (%s); the other model has no "
            "trained probability for them",
            len(single),
            source,
            quoted(single[:3]),
        )
    if tokenizer.chat_template != other.chat_template:
        log.warning(
            "the chat template of the teacher %s differs from the student's; the teacher reads the student's, which it "
            "may not have been trained with",
            source,
        )
