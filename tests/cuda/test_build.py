"""The CUDA kernels compile to what they are meant to be, and their library loads without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import cuda_registers
from tests.cuda.device import ROOT

TORCH_WITH_CUDA = "2.14.1"

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


@pytest.fixture(scope="module")
def python_with_cuda(tmp_path_factory):
    """A Python whose torch was built with CUDA: this one, or one in an environment of its own."""
    if torch.version.cuda is not None:
        return sys.executable
    folder = tmp_path_factory.mktemp("torch_with_cuda")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin/python")
    packages = [f"torch=={TORCH_WITH_CUDA}", "setuptools", "wheel", "ninja", "numpy"]
    command = [python, "-m", "pip", "install", "-q", "--no-cache-dir", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"torch with CUDA cannot be installed: {done.stderr.strip()[-300:]}")
    ask = "import torch; print(torch.version.cuda)"
    if subprocess.check_output([python, "-c", ask], text=True).strip() == "None":
        pytest.skip(f"torch {TORCH_WITH_CUDA} as installed here has no CUDA")
    yield python
    shutil.rmtree(folder)  # several GB


@pytest.mark.slow
@needs_nvcc
def test_the_library_builds_and_loads(tmp_path, python_with_cuda):
    """Against a torch with CUDA; no GPU is needed until an op is called."""
    environment = {**os.environ, "TPCORE_BUILD_CUDA": "1", "TPCORE_BUILD_CPU": "0"}
    environment["TORCH_CUDA_ARCH_LIST"] = "8.0 9.0"
    folders = [f"--build-lib={tmp_path}", f"--build-temp={tmp_path}/objects"]
    command = [python_with_cuda, "setup.py", "-q", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    library = tmp_path / "tpcore/_C_cuda.abi3.so"
    assert json.loads((tmp_path / "tpcore/_build.json").read_text())["cuda"]["built"]
    check = (
        "import json, pathlib, sys, torch; from tpcore import _native;"
        "torch.ops.load_library(sys.argv[1]);"
        "served = [n for n in _native.RAW_OPS if"
        " torch._C._dispatch_has_kernel_for_dispatch_key(f'tpcore::{n}', 'CUDA')];"
        "print(json.dumps([served, _native._read_info(pathlib.Path(sys.argv[1]))['ops']]))"
    )
    command = [python_with_cuda, "-c", check, str(library)]
    served, listed = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    assert set(served) == set(listed)
    assert {"layer_norm_forward", "cross_entropy_backward", "dropout_keep_mask"} <= set(served)
