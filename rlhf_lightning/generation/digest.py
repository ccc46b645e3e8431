"""Digests of weights, with which an engine confirms that it holds the policy's weights bit for bit."""

import torch
from torch import Tensor

_CHUNK = 2**20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd constants of splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as signed numbers.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def digest(tensor: Tensor) -> int:
    """A number that depends on the bits of all elements and on their order; computed on the tensor's device.

    The hash of each element with its position (splitmix64, a bijection of 64 bits) is added modulo 2^64, so a change of
    one element always changes the result, and other changes leave it equal with a probability of about 2^-64. It guards
    against mistakes, not against an adversary. 0.0 and -0.0 are equal; the shape does not matter.

    Args:
        tensor: Floating-point numbers.

    Returns:
        A signed number of 64 bits.

    Example:
        >>> digest(torch.tensor([1.0, 2.0])) == digest(torch.tensor([2.0, 1.0]))
        False
    """
    flat = (tensor.detach() + 0.0).flatten()  # -0.0 becomes 0.0
    words = flat.view(_WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        state = part + torch.arange(start, start + len(part), device=part.device) * _STEP
        state = _folded(state, 30) * _FIRST
        state = _folded(state, 27) * _SECOND
        total += _folded(state, 31).sum()
    return int(total)


def _folded(state: Tensor, bits: int) -> Tensor:
    """`state ^ (state >> bits)`, with a shift that does not repeat the sign bit, so that it can be inverted."""
    return state ^ ((state >> bits) & (2 ** (64 - bits) - 1))
