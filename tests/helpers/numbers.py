"""Tensors of worked examples, and exact comparison with them."""

import torch


def t(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LOGP, OLD = t([-1.0, -2.0, -0.5]), t([-1.2, -1.5, -0.5])
MASK = t([1.0, 1.0, 0.0])


def close(actual: torch.Tensor, *expected: object) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
