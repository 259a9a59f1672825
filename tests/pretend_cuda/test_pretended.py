"""What is for a GPU runs on a pretended one: the bindings, the tests of the ops, the GPU kit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import pretend_cuda
from tests.helpers.device import DEVICE
from tests.pretend_cuda import ROOT

REFUSAL = pretend_cuda.refusal() or ("runs on a GPU" if DEVICE != "cpu" else "")
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


def _run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**pretend_cuda.environment(), **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def _pytest(*arguments: str) -> str:
    return _run("-m", "pytest", *arguments)


def test_it_is_a_device_of_its_own():
    """Tensors are on cuda:0, gradients flow, and no op takes tensors of two devices."""
    program = """
import torch
x = torch.randn(3, 8, device="cuda", requires_grad=True)
assert x.device == torch.device("cuda", 0) and x.is_cuda
(x.relu() @ x.t()).sum().backward()
assert x.grad.is_cuda and torch.equal(x.cpu(), x.detach().cpu())
generator = torch.Generator("cuda")
draws = [
    torch.randn(9, generator=generator.manual_seed(seed), device="cuda") for seed in (1, 1, 2)
]
assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
for call in (
    lambda: x @ torch.ones(8, 3),
    lambda: torch.embedding(x, torch.tensor([0, 1])),
    lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    lambda: torch.ops.tpcore.bias_gelu_forward(x.detach(), torch.ones(8), "none"),
):
    try:
        call()
    except RuntimeError as error:
        assert "device" in str(error), error
    else:
        raise AssertionError("tensors of two devices met")
print("ok")
"""
    assert _run("-c", f"from tpcore import _native\n{program}") == "ok\n"


def test_a_refused_launch_is_an_error_that_names_it():
    program = """
import ctypes, torch
from tpcore import _native, kernels
x = torch.ones(2, 4, device="cuda")
ctypes.CDLL(str(_native.status("cuda").path)).emulation_refuse_next_launch(719)
try:
    kernels.bias_gelu(x)
except RuntimeError as error:
    assert "launching bias_gelu_forward failed: emulated error" in str(error), error
else:
    raise AssertionError("nothing was said")
assert kernels.bias_gelu(x).sum() > 0, "the error stayed"
print("ok")
"""
    assert _run("-c", program) == "ok\n"


def test_every_kernel_through_the_bindings():
    """csrc/torch/cuda_ops.cpp itself: checks, allocation, launches, registration."""
    assert " passed" in _pytest("tests/gpu/test_every_kernel.py", "-k", "bfloat16 or not float")


def test_a_captured_step_and_one_rank():
    found = _pytest("-m", "gpu", "tests/gpu")
    assert "2 passed" in found, found


@pytest.mark.slow
def test_all_tests_of_the_ops():
    """But for what is particular to a torch without CUDA, or Triton's."""
    selected = "not triton and not in_the_interpreter"
    assert " passed" in _pytest("tests/kernels", "tests/test_native.py", "-k", selected)


@pytest.mark.slow
def test_layers_and_models():
    # Storages on a device that this torch was not built for cannot be pickled, and it has no
    # product of bfloat16 operands with a float32 result.
    missing = ("pickle", "rows_are_the_means", "(main_grad and (bfloat16 or autocast))")
    selected = " and ".join(f"not {name}" for name in (*missing, "needs_no_torch"))
    folders = ("tests/layers", "tests/models", "tests/checkpoint/test_golden.py")
    assert " passed" in _pytest("-k", selected, *folders)


@pytest.mark.slow
def test_the_kit(tmp_path):
    """Every stage of `make gpu`, tiny."""
    out = tmp_path / "out"
    printed = _run("-m", "benchmarks.gpu_kit", "--tiny", OUT=str(out), TRITON_INTERPRET="1")
    assert "| failed |" not in printed
    assert {path.suffix for path in out.iterdir()} == {".md", ".csv", ".txt"}
    assert len(list(out.iterdir())) == 6
    (kernels,) = out.glob("gpu_kernels_*.csv")
    rows = kernels.read_text().splitlines()
    for provider in ("tpcore-native", "tpcore-triton", "eager"):
        assert any(f"bf16,backward,{provider}," in row for row in rows), provider
    # Inductor knows that there is no GPU; a peer that fails is a note, not the end.
    assert "- compile fails in bias_gelu" in kernels.with_suffix(".md").read_text()
    (encoder,) = out.glob("gpu_encoder_*.csv")
    assert "mixed,fp32,tpcore," in encoder.read_text()
    log = (out / "gpu_log.txt").read_text()
    assert "[graph] 1 passed" in log
    assert os.path.getsize(out / "gpu_summary.md") > 0
