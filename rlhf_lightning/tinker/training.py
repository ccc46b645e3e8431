"""A training run: an adapter with its gradients and its optimizer."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.adapters import AdaptedModel, Weights
from rlhf_lightning.tinker.losses import Loss
from rlhf_lightning.tinker.requests import AdamParams, Datum

STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each weight."""


class TrainingRun:
    """A LoRA adapter that is trained by the calls of a client.

    Gradients of `forward_backward` add up until `optim_step`.

    Args:
        adapted: Computes for the adapter.
        weights: Its initial weights.

    Attributes:
        weights: The weights by name, float32.
        gradients: Their accumulated gradients; empty after an optimizer step.

    Example:
        >>> run = TrainingRun(adapted, adapted.fresh(seed=0))  # doctest: +SKIP
        >>> logprobs, total = run.forward_backward(data, loss_of("cross_entropy", {}))  # doctest: +SKIP
        >>> run.optim_step(AdamParams(learning_rate=1e-4))  # doctest: +SKIP
    """

    def __init__(self, adapted: AdaptedModel, weights: Weights) -> None:
        self.adapted = adapted
        self.weights = {name: nn.Parameter(value.to(adapted.device, copy=True)) for name, value in weights.items()}
        self.gradients: Weights = {}
        self._optimizer = torch.optim.AdamW(self.weights.values())

    def forward_backward(self, data: Sequence[Datum], loss: Loss, backward: bool = True) -> tuple[list[Tensor], float]:
        """Compute a loss, and add its gradient to those of the run.

        Args:
            data: The datums.
            loss: The loss.
            backward: False for no gradient.

        Returns:
            Log-probabilities of the targets of each datum, in nats, `[N]` each, 0 at positions that the loss skips; and
            the loss, summed over all tokens.

        Raises:
            RequestError: If the loss or a gradient is not finite; the run's gradients are unchanged then.
        """
        self.adapted.load(self.weights)
        found, total = dict(self.gradients), 0.0
        logprobs: list[Tensor] = []
        for rows in self._groups(data, loss):
            with torch.set_grad_enabled(backward):
                part, computed = self._loss(rows, loss)
            total += float(part.detach())
            logprobs += [row[: len(datum.tokens)].detach().cpu() for row, datum in zip(computed, rows, strict=True)]
            if backward:
                gradients = torch.autograd.grad(part, list(self.adapted.parameters.values()), allow_unused=True)
                for name, gradient in zip(self.weights, gradients, strict=True):
                    if gradient is not None:
                        found[name] = found[name] + gradient if name in found else gradient
        if not torch.tensor(total).isfinite() or not all(gradient.isfinite().all() for gradient in found.values()):
            raise RequestError(
                f"the loss is {total} or its gradient is not finite; the gradients of this call were dropped. Check "
                "logprobs and advantages, or load an earlier state and lower the learning rate"
            )
        self.gradients = found
        return logprobs, total

    def _groups(self, data: Sequence[Datum], loss: Loss) -> Iterator[list[Datum]]:
        """Datums that are computed together: in order, up to the tokens that the decoder computes at once.

        Tokens of a prompt that several datums share count once, because they are computed once.
        """
        budget = self.adapted.token_logprobs.packed_forward.budget(self.adapted.device)
        group: list[Datum] = []
        prompts: set[tuple[int, ...]] = set()
        tokens = 0
        for datum in data:
            prompt = tuple(datum.tokens[: int(loss.scored(datum.inputs).int().argmax()) + 1].tolist())
            own = len(datum.tokens) - len(prompt)
            if group and tokens + own + len(prompt) * (prompt not in prompts) > budget:
                yield group
                group, prompts, tokens = [], set(), 0
            tokens += own + len(prompt) * (prompt not in prompts)
            prompts.add(prompt)
            group.append(datum)
        yield group

    def _loss(self, data: Sequence[Datum], loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss of some datums, a scalar, and log-probabilities of their targets, `[B, T]`."""
        device = self.adapted.device
        # A row has one token more than its datum, because log-probabilities belong to the token that is predicted.
        ids = _padded([_shifted(datum.tokens, -1) for datum in data], device)
        targets = _padded([_shifted(datum.targets, 1) for datum in data], device)
        loss_mask = _padded([_shifted(loss.scored(datum.inputs), 1) for datum in data], device)
        logprobs = self.adapted.token_logprobs(ids, loss_mask, targets=targets).logprobs[:, 1:]
        names = data[0].inputs.keys()
        inputs = {name: _padded([datum.inputs[name] for datum in data], device) for name in names}
        return loss(logprobs, {name: values.to(logprobs.dtype) for name, values in inputs.items()}), logprobs

    def optim_step(self, params: AdamParams) -> float:
        """Update the weights with the accumulated gradients, which are empty afterwards.

        Args:
            params: Settings of the step.

        Returns:
            The norm of the gradients before clipping.

        Raises:
            RequestError: If there are no gradients.
        """
        if not self.gradients:
            raise RequestError("there are no gradients to step with; call forward_backward before optim_step")
        for name, parameter in self.weights.items():
            parameter.grad = self.gradients.get(name)
        norm = nn.utils.clip_grad_norm_(self.weights.values(), params.grad_clip_norm or torch.inf)
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.gradients = {}
        return float(norm)

    def snapshot(self) -> Weights:
        """A copy of the weights."""
        return {name: value.detach().clone() for name, value in self.weights.items()}

    def optimizer_state(self) -> Weights:
        """The optimizer's tensors, by `STATE` and the weight's name; empty before the first step."""
        state = self._optimizer.state
        return {
            f"{key}.{name}": state[weight][key]
            for name, weight in self.weights.items()
            if weight in state
            for key in STATE
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor] | None = None) -> None:
        """Go on with other weights. Accumulated gradients are dropped.

        Args:
            weights: The weights.
            optimizer: The optimizer's state as `optimizer_state` returned it; None for a new optimizer.
        """
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name])
        self.gradients = {}
        self._optimizer = torch.optim.AdamW(self.weights.values())
        for name, parameter in self.weights.items():
            if optimizer and f"step.{name}" in optimizer:
                # AdamW keeps its step on the CPU, whatever the device of the weights.
                state = {key: optimizer[f"{key}.{name}"].to(parameter.device, copy=True) for key in STATE}
                self._optimizer.state[parameter] = {**state, "step": state["step"].cpu()}


def _shifted(values: Tensor, by: int) -> Tensor:
    """Values with one 0 before them (1) or after them (-1)."""
    zero = values.new_zeros(1)
    return torch.cat([zero, values] if by > 0 else [values, zero])


def _padded(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, `[B, T]`, with zeros on the right."""
    return pad_sequence(list(rows), batch_first=True).to(device)
