"""Errors of float32 functions in units in the last place, against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def _by_erf(scale: float):
    return lambda z: z * 0.5 * torch.erfc(-z * scale * 0.5**0.5)


def _by_tanh(z: Tensor) -> Tensor:
    twice_u = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    return z / (1 + torch.exp(-twice_u))


EXACT_GELU = {"none": _by_erf(1.0), "tanh": _by_tanh, "erf_1.41421": _by_erf(2.0**0.5 / 1.41421)}


def every_magnitude(stride: int) -> Tensor:
    """Every stride-th float32 below 100, of either sign."""
    z = torch.arange(0x7F80_0000 // stride, dtype=torch.int32).mul(stride).view(torch.float32)
    z = z[z < 100]
    return torch.cat([z, -z])


def units_in_the_last_place(y: Tensor, exact: Tensor) -> float:
    """The largest error where the result is a normal number; NaN if one is missing."""
    smallest = torch.finfo(torch.float32).tiny
    normal = exact.abs() >= smallest
    assert ((y - exact).abs()[~normal] <= smallest).all()
    y, exact = y.double()[normal], exact[normal]
    exponent = torch.frexp(exact)[1]
    return ((y - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)).max().item()
