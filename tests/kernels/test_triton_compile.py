"""What the interpreter cannot see: the Triton kernels compile for GPUs, to code as it should be.

No GPU takes part: a driver that only knows its target makes triton compile to PTX, and the
assembler that comes with triton says how many registers it takes. The tensors are meta tensors.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from dataclasses import dataclass, field

import pytest
import torch

from tpcore.kernels.triton import _MODULES

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton interprets in this process", allow_module_level=True)
triton = pytest.importorskip("triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
JITFunction = triton.runtime.jit.JITFunction


@dataclass(frozen=True)
class Compiled:
    name: str
    warps: int
    registers: int
    spilled_bytes: int
    ptx: str = field(repr=False)

    def widths(self, access: str) -> set[int]:
        """By how many bytes at a time global memory is accessed: "ld" or "st"."""
        found = re.findall(access + r"\.global(?:\.[a-z]\w*)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return {int(count or 1) * int(bits) // 8 for count, bits in found}


class _Target:
    """A driver that has nothing but a target."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return f"compute capability {self.capability}"  # the key of its own kernel cache

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes launches compile instead, for a compute capability; returns what was compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run, compiled = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, options["num_warps"], kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def start(capability: int):
        monkeypatch.setattr(triton.runtime.driver, "_active", _Target(capability))
        compiled.clear()
        return compiled

    return start


def _assemble(name: str, warps: int, kernel, folder) -> Compiled:
    """Registers and spills, as ptxas tells them."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
    ptxas = triton.knobs.nvidia.ptxas_blackwell if "sm_1" in target else triton.knobs.nvidia.ptxas
    said = subprocess.run(
        [ptxas.path, "-v", f"--gpu-name={target}", source, "-o", folder / "kernel.cubin"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return Compiled(name, warps, registers, spills, kernel.asm["ptx"])


def _op(name: str):
    return getattr(importlib.import_module(f"tpcore.kernels.triton.{_MODULES[name]}"), name)


def _calls(dtype: torch.dtype, columns: int, rows: int = 512):
    """Op -> arguments that use everything optional, on matrices of a number of columns."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, per_row = (
        empty(rows, columns),
        empty(columns, dtype=torch.float32),
        empty(rows).float(),
    )
    seed, ids = empty(1, dtype=torch.int64), empty(rows, dtype=torch.int64)
    scores, heads_ids = empty(2, 16, rows, columns), empty(2, rows, dtype=torch.int64)
    mask, key = empty(2, 1, 1, columns, dtype=torch.bool), (0.1, seed, 3)
    yes = (True, True, True)
    return {
        "layer_norm_forward": (x, weight, weight, 1e-5),
        "add_layer_norm_forward": (x, x, weight, weight, 1e-5),
        "layer_norm_backward": (x, x, per_row, per_row, weight, x, *yes),
        "bias_gelu_forward": (x, weight, "tanh"),
        "bias_gelu_backward": (x, x, weight, "none", *yes[:2]),
        "masked_softmax_forward": (scores, mask, 0.1, True, *key, heads_ids, 0),
        "masked_softmax_backward": (scores, scores, 0.1, *key, heads_ids, 0),
        "bias_dropout_residual_forward": (x, weight, x, *key, ids, 0),
        "bias_dropout_residual_backward": (x, *key, ids, 0, *yes[:2]),
        # Padding: the classes end where nothing is aligned.
        "cross_entropy_statistics": (x, ids, 0, columns - 5, -100),
        "cross_entropy_backward": (per_row, x, ids, per_row, per_row, 0, columns - 5, -100, 0.1),
    }


def _check(compiler, folder, op, capability, dtype, columns):
    compiled = compiler(capability)
    _op(op)(*_calls(dtype, columns)[op])
    assert compiled
    for entry in compiled:
        kernel = _assemble(*entry, folder)
        # Some architectures lack a few registers for the widest rows.
        assert kernel.spilled_bytes <= (0 if columns < 8192 else 128), kernel
        assert kernel.registers * 32 * kernel.warps <= 65536, kernel
        # Matrices are read and written by 16 bytes at a time; partial sums may take 8.
        if op != "cross_entropy_statistics":
            assert 16 in kernel.widths("st")
        assert 16 in kernel.widths("ld")
        assert 2 not in kernel.widths("st")


@pytest.mark.parametrize("op", _MODULES)
def test_compiles_without_spills_to_wide_accesses(compiler, tmp_path, op):
    _check(compiler, tmp_path, op, 90, torch.bfloat16, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("op", _MODULES)
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiles_for_every_architecture(compiler, tmp_path, op, capability, dtype):
    for columns in (128, 1024, 8192, 30592):
        _check(compiler, tmp_path, op, capability, dtype, columns)


@pytest.mark.parametrize("op", _MODULES)
def test_another_number_of_rows_is_not_another_kernel(compiler, op):
    compiled = compiler(90)
    for rows in (512, 513, 1000):
        _op(op)(*_calls(torch.bfloat16, 128, rows)[op])
    assert len({id(kernel) for _, _, kernel in compiled}) == 1
