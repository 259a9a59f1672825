"""Loads the compiled CPU library under whatever torch runs this, and checks numbers.

    python tests/abi_smoke.py [path to the package]

One build must serve every torch from 2.11 on. Needs torch and nothing else: no test framework, no
installation. Ends with status 1 and a traceback if something is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent.parent))

from tpcore import _native, _philox, kernels


def _close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 32 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=tolerance, atol=tolerance)


def check_layer_norm(dtype: torch.dtype) -> None:
    """Forward and backward against torch in float64."""
    exact = [torch.randn(s, dtype=torch.float64) for s in ((33, 193), (193,), (193,))]
    exact = [t.to(dtype).double().requires_grad_() for t in exact]
    ours = [t.detach().to(dtype).requires_grad_() for t in exact]
    with kernels.use_backend("cpu"):
        y = kernels.layer_norm(*ours)
    expected = F.layer_norm(exact[0], (193,), *exact[1:])
    _close(y, expected)
    grad = torch.randn(33, 193).to(dtype)
    found = torch.autograd.grad(y, ours, grad)
    for a, b in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        _close(a, b)


def check_mask() -> None:
    """The compiled generator against the one in plain PyTorch."""
    arguments = (torch.tensor([-5]), torch.arange(8).reshape(2, 4) << 30, 0.25, 9, 101, 3, 1, 2)
    native = torch.ops.tpcore.dropout_keep_mask(*arguments)
    assert torch.equal(native, _philox.philox_keep_mask(*arguments))


def check_errors() -> None:
    """An exception thrown in the library arrives as a RuntimeError."""
    message = ""
    try:
        torch.ops.tpcore.layer_norm_forward(torch.randn(2, 3), torch.randn(4), None, 1e-5)
    except RuntimeError as error:
        message = str(error)
    assert "weight has shape [4]; expected [3]" in message, message


if __name__ == "__main__":
    status = _native.status("cpu")
    assert status.loaded, status.reason
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_layer_norm(dtype)
    check_mask()
    check_errors()
    arguments = (torch.randn(3, 5), torch.randn(5), torch.randn(5), 1e-5)
    torch.library.opcheck(torch.ops.tpcore.layer_norm_forward, arguments)
    built = _native.build_record().get("cpu", {}).get("torch", "an unknown torch")
    print(f"ok: built with {built}, runs in {torch.__version__} ({status.info['isa']})")
