"""An emulated CUDA device for tests: builds the kernels with a sanitizer, and launches them.

`build` compiles csrc/cuda with the C++ compiler against tests/cuda_emulation, object by object, and
keeps every object under the hash of all that went into it. `Device` runs launchers in a process of
its own (see device_process.py), since a sanitizer ends the process it finds something in.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cuda.arguments import Buffer
from tpcore import _native, _philox

ROOT = Path(__file__).parents[2]
KERNELS, EMULATION = ROOT / "csrc/cuda", ROOT / "tests/cuda_emulation"
CACHE = ROOT / "build/cuda_emulation"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

# -O0: with instrumentation, optimising costs far more time than it saves.
_FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra"]
_FLAGS += ["-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Mutation(NamedTuple):
    """A planted mistake: the one place in a file where `old` stands, and what is put there.

    Attributes:
        file: under csrc/cuda.
        old: what stands there.
        new: what is put in its place.
        kernels: the .cu file that is compiled anew.
    """

    file: str
    old: str
    new: str
    kernels: str

    @property
    def op(self) -> str:
        """Whose kernels they are."""
        return self.kernels.removesuffix(".cu")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def compile_object(source: Path, flags: list[str], headers: str) -> Path:
    """The object file of a source; compiled unless it was before, from the same text and flags."""
    target = CACHE / f"{source.stem}_{_hash(source.read_text(), headers, *flags)}.o"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=CACHE, suffix=".o") as file:
            _run([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", file.name])
            os.link(file.name, f"{file.name}.done")
        os.replace(f"{file.name}.done", target)  # whole or not at all, whoever else builds
    return target


def headers_of(*folders: Path) -> str:
    """All that the headers in these folders say."""
    files = sorted(f for folder in folders for f in folder.rglob("*.*h"))
    return "\0".join(f"{f.name}\0{f.read_text()}" for f in files)


def build(sanitizer: str, mutation: Mutation | None = None) -> Path:
    """The emulated kernels as a shared library.

    Args:
        sanitizer: "address" (with undefined behaviour) or "thread".
        mutation: a mistake to plant.

    Returns:
        Where it is; it is built unless it was built before.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    include = [f"-I{EMULATION}", f"-I{ROOT / 'csrc/include'}"]
    checked = [*_FLAGS, *include, *SANITIZERS[sanitizer]]
    unchecked = [*_FLAGS, "-O1", *include, f"-DEMULATION_{sanitizer.upper()}"]
    compiler = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    headers = headers_of(KERNELS, EMULATION, ROOT / "csrc/include") + compiler
    jobs = [(source, checked, headers) for source in sorted(KERNELS.glob("*.cu"))]
    jobs += [(EMULATION / name, checked, headers) for name in ("launchers.cpp", "self_test.cpp")]
    jobs += [(EMULATION / "emulation.cpp", unchecked, headers)]
    with tempfile.TemporaryDirectory() as folder:
        if mutation is not None:
            jobs = [_mutant(mutation, Path(folder), checked), *jobs]
            jobs = [job for job in jobs if job[0] != KERNELS / jobs[0][0].name]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(o) for o in pool.map(lambda job: compile_object(*job), jobs)]
    library = CACHE / f"lib_{_hash(*objects)}.so"
    if not library.exists():
        temporary = f"{library}.{os.getpid()}"
        _run([COMPILER, "-shared", *SANITIZERS[sanitizer], *objects, "-o", temporary])
        os.replace(temporary, library)
    return library


def _mutant(mutation: Mutation, folder: Path, flags: list[str]) -> tuple[Path, list[str], str]:
    """A copy of the kernels with the mistake, and the job to compile the file it shows in."""
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
    path = folder / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, (
        f"{mutation.old!r} stands {text.count(mutation.old)} times"
    )
    path.write_text(text.replace(mutation.old, mutation.new))
    # One dtype will do, and compiles in a fraction of the time.
    common = folder / "common.cuh"
    others = r"return [^;]*Types<(double|BFloat16|Float16),[^;]*;"
    common.write_text(re.sub(others, "break;", common.read_text()))
    return folder / mutation.kernels, [*flags, "-Wno-error"], headers_of(folder)


class SanitizerError(AssertionError):
    """The process of the device ended: what its sanitizer had to say."""


class Output(NamedTuple):
    """Room for a result; filled with NaNs before the launch."""

    shape: Sequence[int]
    dtype: torch.dtype
    offset: int = 0


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def vector(tensor: Tensor | None, offset: int = 0) -> Buffer | None:
    """A contiguous tensor in device memory."""
    return None if tensor is None else Buffer(_bytes(tensor), offset)


def matrix(tensor: Tensor | None, padding: int = 0, offset: int = 0) -> dict[str, Any]:
    """A Matrix whose rows are `padding` elements apart; NaNs fill the gaps, and none follows."""
    if tensor is None:
        return {}
    rows, columns = tensor.shape
    wide = tensor.new_full((rows, columns + padding), float("nan"))
    wide[:, :columns] = tensor
    flat = wide.flatten()[: max(0, wide.numel() - padding)]
    return {"data": Buffer(_bytes(flat), offset), "row_stride": columns + padding}


def dropout_key(
    p: float,
    seed: int,
    stream: int,
    row_ids: Tensor,
    column_offset: int = 0,
    head_offset: int = 0,
) -> dict[str, Any] | None:
    """A DropoutKey; none for p = 0."""
    if p == 0:
        return None
    return {
        "threshold": _philox.dropout_threshold(p),
        "stream": stream,
        "row_ids": vector(row_ids),
        "column_offset": column_offset,
        "head_offset": head_offset,
        "device_seed": vector(torch.tensor([seed])),
    }


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which statistics and parameter gradients come."""
    return _native.accumulation_dtype(dtype)


class Device:
    """A process with the emulated kernels in it.

    Args:
        sanitizer: see `build`.
        mutation: see `build`.
    """

    def __init__(self, sanitizer: str = "address", mutation: Mutation | None = None) -> None:
        self._library = build(sanitizer, mutation)
        runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
        found = subprocess.run(
            [COMPILER, f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
        )
        self._environment = {
            **os.environ,
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1",
            "PYTHONMALLOC": "malloc",
        }
        self._process: subprocess.Popen | None = None
        self._report = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the device

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def self_test(self) -> str:
        """What fails first in self_test.cpp; empty if nothing does."""
        return self._ask(("self_test", {}, {}))

    def misuse(self, kind: int) -> None:
        """Makes one of the mistakes of self_test.cpp."""
        self._ask(("misuse", {"kind": kind}, {}))

    def partial_sums(self, rows: int, multiprocessors: int = 1) -> int:
        """What cuda::partial_sums says."""
        settings = {"multiprocessors": multiprocessors}
        return self._ask(("partial_sums", {"rows": rows}, settings))[0]

    def launch(
        self,
        launcher: str,
        *,
        order: int = 0,
        multiprocessors: int = 1,
        refuse: int = 0,
        **values: Any,
    ) -> tuple[int, dict[str, Tensor]]:
        """Calls a launcher.

        Args:
            launcher: its name in kernels.h.
            order: of the turns of threads and blocks: 0 ascending, 1 descending, else shuffled.
            multiprocessors: of the device.
            refuse: the error with which the next launch fails.
            **values: the fields of its struct; `Output` where a result goes.

        Returns:
            Its status, and field -> result.
        """
        outputs = {name: v for name, v in values.items() if isinstance(v, Output)}
        for name, v in outputs.items():
            size = torch.Size(v.shape).numel() * v.dtype.itemsize
            values[name] = Buffer(b"\xff" * size, v.offset, output=True)
        values = {
            name: DTYPES[v] if isinstance(v, torch.dtype) else v
            for name, v in values.items()
            if v is not None
        }
        settings = {"set_order": order, "set_multiprocessors": multiprocessors}
        status, found = self._ask((launcher, values, settings | {"refuse_next_launch": refuse}))
        return status, {
            name: torch.frombuffer(bytearray(found[name]), dtype=v.dtype).view(v.shape)
            if found[name]
            else torch.empty(v.shape, dtype=v.dtype)
            for name, v in outputs.items()
        }

    def run(self, launcher: str, **values: Any) -> dict[str, Tensor]:
        """`launch`, which has to succeed."""
        status, results = self.launch(launcher, **values)
        assert status == 0, f"{launcher} returned {status}"
        return results

    def _ask(self, request: tuple[str, dict, dict]) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cuda.device_process", str(self._library)],
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._report,
            )
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self._process.wait()
            self._process = None
            self._report.seek(0)
            report = self._report.read().decode(errors="replace")
            self._report.truncate(0)
            self._report.seek(0)
            raise SanitizerError(f"{request[0]}: {report[:6000]}") from None
        if isinstance(answer, Exception):
            raise SanitizerError(f"{request[0]}: {answer}")
        return answer
