"""AdamW on one instruction set, beside torch's on the same one; argument: torch's name of it.

A process of its own, because an instruction set is chosen once per process.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from tpcore import _native

# Whole vectors, all but one lane of one, one lane, many pieces and what is left of them.
SIZES = (0, 1, 3, 7, 8, 15, 16, 33, 1000, 4099, 20_003)
STEPS = 3


def _draw(generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
    """Gradients of all magnitudes, zeros among them."""
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    values *= torch.exp(-20 * torch.rand(count, generator=generator, dtype=torch.float64))
    values[::7] = 0
    return values.to(dtype)


def check(
    count: int, grad_dtype: torch.dtype, copy_dtype: torch.dtype | None, options: dict[str, float]
) -> None:
    """Weights, moments and copies are torch's, in every bit.

    With AVX-512, of which torch's own step uses half, the last lanes may round otherwise.
    """
    exact = torch.backends.cpu.get_cpu_capability() != "AVX512"
    bound = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-6, "atol": 1e-9}
    generator = torch.Generator().manual_seed(count)
    dtype = torch.float64 if grad_dtype == torch.float64 else torch.float32
    weight = torch.randn(count, generator=generator, dtype=dtype) * 0.02
    ours = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
    theirs = [tensor.clone() for tensor in ours]
    copy = None if copy_dtype is None else torch.empty(count, dtype=copy_dtype)
    factor, shared = options["grad_factor"], dict(options)
    del shared["grad_factor"]
    number = torch.zeros(())
    for step in range(1, STEPS + 1):
        grad = _draw(generator, count, grad_dtype)
        before = grad.clone()
        torch.ops.tpcore.adamw_(
            ours[0], grad, ours[1], ours[2], copy, step=step, grad_factor=factor, **shared
        )
        assert torch.equal(grad, before)
        number += 1
        wide = grad.to(dtype) * torch.tensor(factor, dtype=dtype)
        torch._fused_adamw_(
            *([tensor] for tensor in (theirs[0], wide, theirs[1], theirs[2])),
            [],
            [number],
            amsgrad=False,
            maximize=False,
            **shared,
        )
        for name, mine, other in zip(("weight", "m", "v"), ours, theirs, strict=True):
            where = (name, count, step, grad_dtype, options)
            torch.testing.assert_close(mine, other, **bound, msg=str(where))
        if copy is not None:
            assert torch.equal(copy, ours[0].to(copy_dtype)), (count, step, copy_dtype)


def main() -> None:
    """Every format beside every option."""
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability == sys.argv[1], capability
    half = (torch.bfloat16, torch.float16)
    formats = [(torch.float32, None), (torch.float64, None), *((d, None) for d in half)]
    formats += [pair for d in half for pair in ((d, d), (torch.float32, d))]
    rates = {"lr": 1e-3, "beta2": 0.999, "eps": 1e-8}
    for beta1, weight_decay, factor in itertools.product((0.9, 0.3), (0.0, 0.01), (1.0, 0.3)):
        options = rates | {"beta1": beta1, "weight_decay": weight_decay, "grad_factor": factor}
        for count, (grad, copy) in itertools.product(SIZES, formats):
            check(count, grad, copy, options)
    print(_native.status("cpu").info["isa"])


if __name__ == "__main__":
    main()
