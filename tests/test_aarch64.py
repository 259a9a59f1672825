"""The CPU kernels for aarch64: every file compiles without a warning, and the kernels are right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Werror", "-Wno-psabi", f"-I{ROOT / 'csrc/include'}"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER}")
def test_kernels(tmp_path):
    objects = []
    for source in [
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
        ROOT / "tests/cpu_self_check/self_check.cpp",
    ]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        define = ["-DTPCORE_ISA=neon", "-DTPCORE_ISA_NEON"]
        subprocess.run(
            [COMPILER, *FLAGS, *define, "-c", str(source), "-o", objects[-1]], check=True
        )
    if not shutil.which(EMULATOR):
        pytest.skip(f"compiled; to run what was compiled needs {EMULATOR}")
    program = str(tmp_path / "self_check")
    subprocess.run([COMPILER, "-static", *objects, "-o", program, "-lpthread"], check=True)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "neon: 0 failures\n")
