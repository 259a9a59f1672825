"""The CUDA kernels compile to what they are meant to be, and their library loads without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import cuda_registers
from tests.cuda.device import ROOT
from tpcore import _native

needs_nvcc = pytest.mark.skipif(cuda_registers.NVCC is None, reason="nvcc is not on the path")


@pytest.fixture(scope="module")
def usages():
    return cuda_registers.measure()


@pytest.mark.slow
@needs_nvcc
def test_nothing_spills(usages):
    """No kernel keeps anything in local memory, on no architecture, in no dtype."""
    assert not [u for u in usages if u.spilled_bytes or u.local_bytes]


@pytest.mark.slow
@needs_nvcc
def test_every_kernel_is_in_every_dtype(usages):
    kernels = {(u.source, u.kernel) for u in usages if u.architecture == "90"}
    assert kernels == {(u.source, u.kernel) for u in usages if u.architecture == "80"}
    for op in ("layer_norm", "bias_gelu", "masked_softmax", "bias_dropout_residual"):
        for direction in ("forward", "backward"):
            for dtype in ("float", "bf16", "fp16", "double"):
                names = [k for source, k in kernels if source == f"{op}.cu"]
                assert any(re.match(rf"{direction}<{dtype}\b", name) for name in names)


@pytest.mark.slow
@needs_nvcc
def test_the_committed_table_is_of_these_kernels(usages):
    table = cuda_registers.TABLE.read_text()
    if f"nvcc {cuda_registers.nvcc_release()} " not in table:
        pytest.skip("the table was made with another nvcc")
    assert table == cuda_registers.as_markdown(usages), "run python benchmarks/cuda_registers.py"


@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_and_loads(tmp_path):
    """Against a torch with CUDA; no GPU is needed until an op is called."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} was built without CUDA")
    environment = {**os.environ, "TPCORE_BUILD_CUDA": "1", "TPCORE_BUILD_CPU": "0"}
    environment["TORCH_CUDA_ARCH_LIST"] = "8.0 9.0"
    folders = [f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/objects"]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    library = tmp_path / "tpcore/_C_cuda.abi3.so"
    assert json.loads((tmp_path / "tpcore/_build.json").read_text())["cuda"]["built"]
    assert set(_native._read_info(library)["ops"]) <= set(_native.RAW_OPS)
    check = (
        "import sys, torch; from tpcore import _native;"
        "torch.ops.load_library(sys.argv[1]);"
        "served = [n for n in _native.RAW_OPS if"
        " torch._C._dispatch_has_kernel_for_dispatch_key(f'tpcore::{n}', 'CUDA')];"
        "print(*served)"
    )
    command = [sys.executable, "-c", check, str(library)]
    served = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(served.split()) == set(_native._read_info(library)["ops"])
