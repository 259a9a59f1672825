"""What each CUDA kernel takes of a multiprocessor: registers, shared memory, and what it spills.

    python benchmarks/cuda_registers.py

Compiles csrc/cuda for sm_80 and sm_90 with nvcc (from NVCC, or the path) and writes the table to
benchmarks/results/cuda_registers.md. Needs no GPU and no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks/results/cuda_registers.md"
ARCHITECTURES = ("80", "90")
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))


class Usage(NamedTuple):
    """One kernel on one architecture.

    Attributes:
        source: the .cu file.
        kernel: its name and template arguments.
        architecture: "80" or "90".
        registers: per thread.
        shared_bytes: per block.
        local_bytes: stack per thread: what lives in memory and not in registers.
        spilled_bytes: stores and loads of registers that did not suffice.
    """

    source: str
    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    local_bytes: int
    spilled_bytes: int


def readable(mangled: str) -> str:
    """forward<bf16, float, RegisterRow> for what the assembler calls the kernel."""
    filtered = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = filtered.stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|tpcore::(cuda::)?", "", name)
    name = re.sub(r"__nv_bfloat16", "bf16", name.removeprefix("void ").split("(")[0])
    name = re.sub(r"__half", "fp16", name)
    return re.sub(r"(RegisterRow|MemoryRow)<.*", r"\1>", name)


def compile_one(source: Path, architecture: str) -> list[Usage]:
    """Compiles a file and reads what ptxas says of its kernels.

    Raises:
        RuntimeError: if it does not compile.
    """
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc/include'}", code, "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, *flags, "-c", str(source), "-o", f"{folder}/kernels.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers(.*?)$"
    )
    found = []
    for match in re.finditer(pattern, result.stderr, re.DOTALL | re.MULTILINE):
        name, stack, stores, loads, registers, rest = match.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(
            Usage(
                source.name,
                readable(name),
                architecture,
                int(registers),
                int(shared.group(1)) if shared else 0,
                int(stack),
                int(stores) + int(loads),
            )
        )
    return found


def measure() -> list[Usage]:
    """All kernels on all architectures."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(u for found in pool.map(lambda job: compile_one(*job), jobs) for u in found)


def nvcc_release() -> str:
    """13.0, for example."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def as_markdown(usages: list[Usage]) -> str:
    """The table: a row per kernel, the architectures side by side."""
    rows: dict[tuple[str, str], dict[str, Usage]] = {}
    for usage in usages:
        rows.setdefault((usage.source, usage.kernel), {})[usage.architecture] = usage
    lines = [
        "# Registers of the CUDA kernels",
        "",
        f"By nvcc {nvcc_release()} for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}; written by"
        " `python benchmarks/cuda_registers.py`. Spills are bytes of stores and loads.",
        "",
        "| file | kernel | "
        + " | ".join(f"registers sm_{a} | spills sm_{a}" for a in ARCHITECTURES)
        + " | shared bytes |",
        "|---|---|" + "---|" * (2 * len(ARCHITECTURES) + 1),
    ]
    for (source, kernel), by in rows.items():
        cells = [f"{by[a].registers} | {by[a].spilled_bytes}" for a in ARCHITECTURES]
        shared = by[ARCHITECTURES[-1]].shared_bytes
        lines.append(f"| {source} | `{kernel}` | {' | '.join(cells)} | {shared} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if NVCC is None:
        sys.exit("nvcc is not on the path; NVCC may name it")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(as_markdown(measure()), encoding="utf-8")
    print(TABLE)
