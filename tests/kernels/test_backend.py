from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.harness import require
from tpcore import _native
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
    x = torch.randn(2, 8)
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
        ((x.to(torch.complex128),), "does not take torch.complex128"),
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
    assert set(info["ops"]) == _native.NATIVE_OPS["cpu"] <= set(_native.RAW_OPS)
    for op in info["ops"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tpcore::{op}", "CPU")
