"""Each kernel once, forward and backward, against the reference: short enough for sanitizers.

Every variant of a kernel has a case: rows in registers and rows that are read again, one warp and
several, whole vectors and tails, aligned and not, with and without what is optional.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.helpers.device import DEVICE
from tpcore import _native, _philox, kernels
from tpcore.kernels.backend import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = torch.tensor([-(2**62) + 5])
P = 0.25

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def _check(function, inputs, dtype):
    """Outputs and gradients on the compiled kernels against float64 on the reference."""
    if not _native.status(DEVICE).loaded:
        pytest.skip(_native.status(DEVICE).reason)
    grads, found = None, []
    for backend, kind in ((DEVICE, dtype), ("reference", torch.float64)):
        own = [x.detach().to(kind).requires_grad_() for x in inputs]
        with kernels.use_backend(backend):
            outputs = function(*own)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        grads = grads or [torch.randn_like(o) for o in outputs]
        grads_of = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        found.append([*outputs, *torch.autograd.grad(outputs, own, grads_of)])
    eps = torch.finfo(dtype).eps
    for ours, exact in zip(*found, strict=True):
        scale = exact.abs().max().clamp(min=1)
        error = (ours.double() - exact).abs().max() / scale
        assert error <= 16 * eps, f"{error:.2e} of the largest value, {exact.shape}"


def _inputs(dtype, *shapes):
    """Of values that the dtype holds; the first one in rows that are not aligned."""
    first, *others = (torch.randn(shape).to(dtype) for shape in shapes)
    wide = torch.zeros(*first.shape[:-1], first.shape[-1] + 3, dtype=dtype)
    wide[..., 1:-2] = first
    return [wide[..., 1:-2], *others]


@by_dtype
@pytest.mark.parametrize("shape", [(70, 33), (9, 1024), (3, 9000), (2, 40000)], ids=str)
def test_layer_norm(dtype, shape):
    columns = shape[-1]
    inputs = _inputs(dtype, shape, (columns,), (columns,))
    _check(lambda x, w, b: kernels.layer_norm(x, w, b), inputs, dtype)
    with_residual = _inputs(dtype, shape, shape, (columns,), (columns,))
    _check(lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b)[0], with_residual, dtype)


@by_dtype
@pytest.mark.parametrize("approximate", ["none", "tanh", "erf_1.41421"])
def test_bias_gelu(dtype, approximate):
    for shape in ((300, 37), (5, 3072)):
        inputs = _inputs(dtype, shape, shape[-1:])
        _check(lambda x, b: kernels.bias_gelu(x, b, approximate), inputs, dtype)


@by_dtype
@pytest.mark.parametrize("p", [0.0, P])
def test_bias_dropout_residual(dtype, p):
    for rows, columns in ((300, 37), (5, 3072)):
        key = {"p": p, "seed": SEED, "row_ids": torch.arange(rows) << 20, "column_offset": 3}
        inputs = _inputs(dtype, (rows, columns), (columns,), (rows, columns))
        _check(partial(kernels.bias_dropout_residual, **key), inputs, dtype)


@by_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [5, 129, 1000, 17000])
def test_masked_softmax(dtype, causal, keys):
    shape = (2, 3, 4, keys)
    mask = torch.rand(2, 1, 1 if keys % 2 else 4, keys) < 0.3
    for p in (0.0, P):
        key = {"dropout_p": p, "seed": SEED, "row_ids": torch.arange(8).view(2, 4)}
        call = partial(kernels.masked_softmax, mask=mask, scale=0.5, causal=causal, **key)
        _check(call, _inputs(dtype, shape), dtype)


@by_dtype
@pytest.mark.parametrize("classes", [11, 1023, 30592])
def test_cross_entropy(dtype, classes):
    target = torch.randint(classes, (6,))
    target[2] = -100
    call = partial(kernels.cross_entropy, target=target, label_smoothing=0.1)
    _check(call, _inputs(dtype, (6, classes)), dtype)


def test_dropout_bits_are_those_of_plain_pytorch():
    row_ids = torch.arange(-3, 4) << 33
    for columns, offset in ((1, 0), (37, 6), (4096, 1)):
        ours = _native.dropout_keep_mask(P, SEED, 9, row_ids, columns, column_offset=offset)
        arguments = (SEED, row_ids[None], P, 9, columns, offset, 0, 1)
        assert torch.equal(ours, _philox.philox_keep_mask(*arguments).view(7, columns))


def test_compiled_kernels_serve_every_op_that_a_gpu_needs():
    """Attention on a GPU goes by matrix products and masked_softmax."""
    if not _native.status(DEVICE).loaded:
        pytest.skip(_native.status(DEVICE).reason)
    served = {row.op for row in kernels.explain() if (row.device, row.serves) == (DEVICE, DEVICE)}
    assert served >= set(OPS) - {"packed_attention"}
