from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.harness import DEVICE, require
from tpcore import _native, kernels
from tpcore.kernels import (
    bias_gelu,
    explain,
    layer_norm,
    record_backends,
    use_backend,
)
from tpcore.kernels.autocast import OUTPUT_DTYPE
from tpcore.kernels.backend import BACKENDS, OPS


def test_the_compiled_library_is_preferred_on_the_cpu():
    require("cpu")
    with record_backends() as calls:
        layer_norm(torch.randn(2, 8))
    assert calls == [("layer_norm", "cpu")]


def test_recording_ends_with_the_block_and_nests():
    with record_backends() as outer:
        bias_gelu(torch.randn(2, 8))
        with record_backends() as inner:
            layer_norm(torch.randn(2, 8))
        assert [op for op, _ in inner] == ["layer_norm"]
        bias_gelu(torch.randn(2, 8))
    layer_norm(torch.randn(2, 8))
    assert [op for op, _ in outer] == ["bias_gelu", "bias_gelu"]


def test_use_backend_nests_and_survives_errors():
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            raise ZeroDivisionError
        with record_backends() as calls:
            layer_norm(torch.randn(2, 8))
    assert calls == [("layer_norm", "reference")]


def test_impossible_choices_say_why():
    x = torch.randn(2, 8, device="cpu")
    for backend, reason in (
        ("cuda", "serves cuda tensors only"),
        ("triton", "serves cuda tensors only, or with TRITON_INTERPRET=1"),
    ):
        with use_backend(backend), pytest.raises(ValueError, match=f"cannot serve.*{reason}"):
            layer_norm(x)
    with pytest.raises(ValueError, match="'gpu'; expected one of cuda, triton, cpu, reference"):
        use_backend("gpu").__enter__()


def test_dtypes_no_kernel_takes_fall_to_the_reference_or_are_refused():
    require("cpu")
    x, weight, bias = torch.randn(2, 8, dtype=torch.float64), torch.randn(8), torch.randn(8)
    with record_backends() as calls:
        layer_norm(x, weight, bias)
    assert calls == [("layer_norm", "reference")]
    for arguments, reason in (
        ((x, weight, bias), "takes parameters in the dtype of x"),
        ((x, weight.double(), bias), "weight and bias of one dtype"),
    ):
        with use_backend("cpu"), pytest.raises(ValueError, match=reason):
            layer_norm(*arguments)


def test_explain_covers_every_op_and_backend():
    rows = explain()
    assert {row.op for row in rows} == set(OPS) == set(OUTPUT_DTYPE)
    for row in rows:
        assert {row.serves, *row.refusals} == set(BACKENDS)
        assert all(row.refusals.values())
    with use_backend("reference"):
        assert {row.serves for row in explain()} == {"reference"}


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_variable():
    code = (
        "import torch; from tpcore.kernels import *\n"
        "with record_backends() as calls: layer_norm(torch.randn(2, 8))\n"
        "print(calls)"
    )
    assert _python(code, TPCORE_BACKEND="reference").stdout == "[('layer_norm', 'reference')]\n"
    failed = _python(code, TPCORE_BACKEND="fast")
    assert failed.returncode == 1
    assert "the environment variable TPCORE_BACKEND is 'fast'; expected one of" in failed.stderr


def test_compiled_graphs_follow_the_choice():
    require("cpu")
    torch._dynamo.reset()
    graph = torch.compile(layer_norm, fullgraph=True, backend="eager")
    x = torch.randn(2, 8)
    with record_backends() as calls:
        graph(x)
        with use_backend("reference"):
            graph(x)
    assert {backend for _, backend in calls} == {"cpu", "reference"}


def test_native_ops_are_those_the_library_names():
    require("cpu")
    info = _native.status("cpu").info
    declared = {*_native.RAW_OPS, *_native.SHARED_MEMORY_OPS, *_native.OPTIMIZER_OPS}
    assert set(info["ops"]) == _native.NATIVE_OPS["cpu"] <= declared
    for op in info["ops"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tpcore::{op}", "CPU")


def _calls(x, other, seed):
    """Every public op with one foreign operand; what the message must name."""
    rows = torch.arange(x.shape[0])
    scores = x.view(1, 1, *x.shape)
    row = other[0] if isinstance(other, torch.Tensor) else other
    key = {"row_ids": rows, "seed": seed}
    return {
        "weight": lambda: kernels.layer_norm(x, row),
        "residual": lambda: kernels.add_layer_norm(x, other),
        "bias": lambda: kernels.bias_gelu(x, row),
        "mask": lambda: kernels.masked_softmax(scores, other),
        "seed": lambda: kernels.bias_dropout_residual(x, p=0.5, **key),
        "target": lambda: kernels.cross_entropy(x, row),
    }


def test_operands_on_another_device_are_refused():
    x = torch.randn(4, 8)
    calls = _calls(x, torch.empty(4, 8, device="meta"), torch.empty(1, device="meta"))
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} is on meta and .* on {DEVICE}"):
            call()


def test_operands_that_are_no_tensors_are_refused():
    for name, call in _calls(torch.randn(4, 8), 3, 3).items():
        with pytest.raises(TypeError, match=f"{name} is 3; expected a tensor"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_dtypes_without_a_meaning_are_refused(dtype):
    x = torch.ones(4, 8).to(dtype)
    for op in (kernels.layer_norm, kernels.bias_gelu, kernels.bias_dropout_residual):
        with pytest.raises(ValueError, match=f"x is {dtype}; expected float32"):
            op(x)
    with pytest.raises(ValueError, match="x has no dimension"):
        kernels.bias_gelu(torch.tensor(1.0))


def test_numbers_out_of_range_are_named():
    x, seed, rows = torch.randn(2, 8), torch.tensor([1]), torch.arange(2)
    key = {"p": 0.5, "seed": seed, "row_ids": rows}
    with pytest.raises(ValueError, match="column_offset=-1"):
        kernels.bias_dropout_residual(x, column_offset=-1, **key)
    with pytest.raises(ValueError, match="head_offset=-1"):
        kernels.masked_softmax(x[None, None], head_offset=-1)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps="):
            kernels.layer_norm(x, eps=eps)
    with pytest.raises(ValueError, match="logits has no column"):
        kernels.cross_entropy(x[:, :0], rows)


def test_explain_does_not_claim_what_a_forced_backend_cannot_do():
    with kernels.use_backend("cuda"):
        entry = next(e for e in kernels.explain() if (e.op, e.device) == ("bias_gelu", "cpu"))
    assert entry.serves == "none"
    assert "cuda tensors only" in entry.refusals["cuda"]
    assert set(entry.refusals) == {"cuda", "triton", "cpu", "reference"}
