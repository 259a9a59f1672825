"""The elementary functions of csrc/cpu, measured over float32 on every instruction set at hand."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.units import EXACT_GELU, every_magnitude, units_in_the_last_place
from tests.kernels.harness import require
from tpcore.kernels import bias_gelu, use_backend

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/vector_math/worst_errors.cpp"
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mbmi2", *AVX2]

# Bounds: units in the last place for values that are normal numbers, absolute for the slopes.
# docs/kernels.md has what was measured.
BOUNDS = {"exponential": 1.01, "gelu": 2.0, "old_gelu": 2.0, "tanh_gelu": 2.0}
BOUNDS |= {f"{name}_slope": 2e-7 for name in ("gelu", "old_gelu", "tanh_gelu")}

# Instruction set -> compilers, flags, what runs the program.
ISAS = {
    "scalar": (("c++", "g++", "clang++"), [], []),
    "avx2": (("c++", "g++", "clang++"), AVX2, []),
    "avx512": (("c++", "g++", "clang++"), AVX512, []),
    "neon": (("aarch64-linux-gnu-g++",), ["-static"], ["qemu-aarch64-static"]),
}


def _worst_errors(isa: str, stride: int, folder: Path) -> dict[str, float]:
    compilers, flags, runner = ISAS[isa]
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


def _check(isa: str, stride: int, folder: Path) -> None:
    errors = _worst_errors(isa, stride, folder)
    assert errors.keys() == BOUNDS.keys()
    assert all(errors[name] <= bound for name, bound in BOUNDS.items()), errors


@pytest.mark.parametrize("isa", ISAS)
def test_errors_of_elementary_functions(isa, tmp_path):
    """Every power of two is met thousands of times."""
    _check(isa, 9973 if isa == "neon" else 1499, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_errors_of_elementary_functions_densely(isa, tmp_path):
    _check(isa, 101, tmp_path)


@pytest.mark.parametrize("approximate", EXACT_GELU)
def test_errors_of_gelu(approximate):
    """By the docstring of `bias_gelu`; torch's own reach half of the result below -5."""
    require("cpu")
    z = every_magnitude(499)
    with use_backend("cpu"):
        y = bias_gelu(z, None, approximate)
    assert units_in_the_last_place(y, EXACT_GELU[approximate](z.double())) <= 2.0
