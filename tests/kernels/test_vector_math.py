"""The elementary functions of csrc/cpu, measured over float32 on every instruction set at hand."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.harness import require
from tpcore import _native
from tpcore.kernels import bias_gelu, use_backend

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/vector_math/worst_errors.cpp"
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mbmi2", *AVX2]

# Instruction set -> compilers, flags, what runs the program, and the errors of the functions in
# units in the last place, as the dense test finds them. In 32 pieces the tail of the normal
# distribution is more accurate than as one polynomial, which the others have registers for.
ONE_POLYNOMIAL = {"exponential": 1.01, "normal_cdf": 6.3, "logistic": 2.4}
IN_PIECES = {"exponential": 1.01, "normal_cdf": 1.9, "logistic": 2.4}
ISAS = {
    "scalar": (("c++", "g++", "clang++"), [], [], ONE_POLYNOMIAL),
    "avx2": (("c++", "g++", "clang++"), AVX2, [], ONE_POLYNOMIAL),
    "avx512": (("c++", "g++", "clang++"), AVX512, [], IN_PIECES),
    "neon": (("aarch64-linux-gnu-g++",), ["-static"], ["qemu-aarch64-static"], ONE_POLYNOMIAL),
}


def _worst_errors(isa: str, stride: int, folder: Path) -> dict[str, float]:
    compilers, flags, runner, _ = ISAS[isa]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None or not all(map(shutil.which, runner)):
        pytest.skip(
            f"needs {' or '.join(compilers)}, and {runner or 'nothing'} to run what it makes"
        )
    if not runner:
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip(f"{isa} is x86-64")
        known = Path("/proc/cpuinfo").read_text().split()
        if any(flag[2:] not in known for flag in flags):
            pytest.skip(f"this machine has no {isa}")
    define = [f"-DTPCORE_ISA={isa}", f"-DTPCORE_ISA_{isa.upper()}"]
    include = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cpu'}"]
    program = folder / isa
    command = [compiler, *FLAGS, *define, *flags, *include, "-w", str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    run = [*runner, str(program), str(stride)]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(error) for name, error, _ in map(str.split, lines)}


@pytest.mark.parametrize("isa", ISAS)
def test_errors_of_elementary_functions(isa, tmp_path):
    errors = _worst_errors(isa, 9973 if isa == "neon" else 1499, tmp_path)
    bounds = ISAS[isa][3]
    assert errors.keys() == bounds.keys()
    assert all(errors[name] <= bound for name, bound in bounds.items()), errors


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_errors_of_elementary_functions_densely(isa, tmp_path):
    errors = _worst_errors(isa, 31, tmp_path)
    assert all(errors[name] <= bound for name, bound in ISAS[isa][3].items()), errors


def _units_in_the_last_place(z: torch.Tensor, exact: torch.Tensor, approximate: str) -> float:
    with use_backend("cpu"):
        y = bias_gelu(z, None, approximate).double()
    exponent = torch.frexp(exact)[1].clamp(min=-125)
    return ((y - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)).max().item()


def test_errors_of_gelu():
    """By the docstring of `bias_gelu`; torch's own reach half of the result below -5."""
    require("cpu")
    piecewise = _native.status("cpu").info["isa"] == "avx512"
    z = torch.arange(0x7F80_0000 // 499, dtype=torch.int32).mul(499).view(torch.float32)
    z = torch.cat([z[z < 100], -z[z < 12]])
    wide = z.double()
    for approximate, scale in (("none", 1.0), ("erf_1.41421", 2.0**0.5 / 1.41421)):
        exact = wide * 0.5 * torch.erfc(-wide * scale * 0.5**0.5)
        error = _units_in_the_last_place(z, exact, approximate)
        assert error <= (3.0 if piecewise else 7.0), (approximate, error)
    z, wide = z[z > -8], wide[z > -8]
    twice_u = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide / (1 + torch.exp(-twice_u))
    near = z > -1
    assert _units_in_the_last_place(z[near], exact[near], "tanh") <= 4.5
    assert _units_in_the_last_place(z, exact, "tanh") <= 110
