"""Starts the tests of the Triton kernels where these can run: in Triton's interpreter, on a GPU.

The interpreter has to be chosen before triton is imported, and any test of torch.compile imports
it: hence a process of its own. It runs what test_<op>.py says of every backend, and what
test_triton_kernels.py says of this one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.kernels.harness import DEVICE
from tpcore.kernels import explain, layer_norm, use_backend
from tpcore.kernels.backend import OPS
from tpcore.kernels.triton import RAW_OPS as TRITON_OPS

HERE = Path(__file__).parent
SERVED = [op for op, raw_ops in OPS.items() if TRITON_OPS.issuperset(raw_ops)]
FILES = [*(HERE / f"test_{op}.py" for op in SERVED if op != "add_layer_norm")]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# These compute in float32; and the interpreter cuts float32 to bfloat16 off instead of rounding it.
SELECTED = "triton and not gradcheck and not fp64 and not float64"
# The interpreter is slow, and half precision is covered by the other tests of each op.
SELECTED_THERE = f"({SELECTED}) and not fp16-fp32 and not (any_mask and torch.float16)"
CUT_OFF = "tests/kernels/test_layer_norm.py::test_one_column[bf16-fp32-triton]"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _triton_version() -> tuple[int, ...]:
    return tuple(int(number) for number in version("triton").split(".")[:2])


def _pytest(*options: str, **environment: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *FILES, HERE / "test_triton_kernels.py"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="is the process that this test starts")
def test_in_the_interpreter():
    if _triton_version() < (3, 7):
        pytest.skip("the interpreter of triton before 3.7 does not understand numpy 2.4")
    options = "-k", SELECTED_THERE, "--deselect", CUT_OFF, "-W", "ignore::RuntimeWarning"
    _pytest(*options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    _pytest("-m", "", "-k", SELECTED, TPCORE_TEST_DEVICE="cuda")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
def test_cpu_tensors_are_refused_with_the_way_out():
    x = torch.randn(2, 8, device="cpu")
    with use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        layer_norm(x)
    rows = [row for row in explain() if row.device == "cpu" and row.op in SERVED]
    assert len(rows) == len(SERVED) > 1
    assert all("serves cuda tensors only" in row.refusals["triton"] for row in rows)


@pytest.mark.skipif(INTERPRETED, reason="imports triton")
def test_choosing_a_backend_for_the_cpu_does_not_import_triton():
    code = "import sys, tpcore.kernels as k; k.explain(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
