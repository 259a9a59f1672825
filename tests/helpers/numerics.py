"""A tolerance that needs no tuning: as accurate as PyTorch in the same dtype, up to a factor."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0


def assert_as_accurate_as_torch(
    ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, name: str = "result"
) -> None:
    """Asserts that our error is at most twice that of PyTorch's own op, plus a tiny floor.

    Errors are the largest and the root mean square of |result - exact|. The floor is one unit in
    the last place of the largest exact value: where torch happens to be exact, rounding may not be.
    Nothing here is more exact than float64, so results in float64 may differ by 64 such units.

    Args:
        ours: the result under test.
        torch_same_dtype: what PyTorch computes from the same inputs in the same dtype.
        exact: the result in float64, from the same (rounded) inputs.
        name: what to call the result in the message.
    """
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    assert ours.dtype == torch_same_dtype.dtype, (
        f"{name}: {ours.dtype}, not {torch_same_dtype.dtype}"
    )
    if ours.numel() == 0:
        return
    exact = exact.double()
    finite = exact.isfinite()
    torch.testing.assert_close(
        ours.double().masked_fill(finite, 0), exact.masked_fill(finite, 0), equal_nan=True, msg=name
    )
    error = (ours.double() - exact).masked_fill(~finite, 0).abs()
    torch_error = (torch_same_dtype.double() - exact).masked_fill(~finite, 0).abs()
    scale = exact.masked_fill(~finite, 0).abs().max()
    floor = torch.finfo(ours.dtype).eps * scale * (64 if ours.dtype == torch.float64 else 1)
    for kind, measure in (("largest", Tensor.max), ("root mean square", _root_mean_square)):
        got, allowed = measure(error), FACTOR * measure(torch_error) + floor
        if not got <= allowed:
            worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{name}: {kind} error {got:.3e} exceeds {allowed:.3e} (torch:"
                f" {measure(torch_error):.3e}); worst at {worst}: {ours[worst].item()!r},"
                f" exact {exact[worst].item()!r}"
            )


def _root_mean_square(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
