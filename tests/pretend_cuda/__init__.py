"""A CUDA device for machines without one: what runs on a GPU can be run before there is a GPU.

`environment()` makes the variables under which a Python process, and all that it starts, sees one
CUDA device (`cuda:0`) in a torch that was built without CUDA. Its tensors live in host memory, but
an op of tensors on different devices fails as it does on a GPU (see backend.cpp), and tpcore's ops
run through csrc/torch/cuda_ops.cpp and csrc/cuda, the kernels executed by tests/cuda_emulation.

Nothing about speed, memory, streams or the hardware's own rules can be learned here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from tests.cuda.device import CACHE, COMPILER, EMULATION, KERNELS, ROOT, compile_object, headers_of
from tpcore import _native

HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_INCLUDE = ["-isystem", str(_TORCH / "include")]
# The emulator runs threads one after the other anyway: what it needs is a fast kernel.
_EMULATED = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-w", f"-I{EMULATION}"]


def refusal() -> str:
    """Why there can be no such device here; empty if there can."""
    if torch.version.cuda is not None:
        return f"torch {torch.__version__} was built with CUDA: it has no room for a pretended one"
    return "" if COMPILER else "no C++ compiler"


def build() -> Path:
    """The folder with the device and a `_C_cuda.abi3.so` for it; built unless it was before."""
    from setup import TORCH_TARGET

    CACHE.mkdir(parents=True, exist_ok=True)
    include = f"-I{ROOT / 'csrc/include'}"
    headers = headers_of(KERNELS, EMULATION, ROOT / "csrc/include", ROOT / "csrc/torch")
    headers += torch.__version__
    bindings = ["-std=c++17", "-O0", "-fPIC", "-Wall", include, "-DUSE_CUDA", *_INCLUDE]
    bindings += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    device = ["-std=c++20", "-O0", "-fPIC", "-w", *_INCLUDE]
    kernels = [*sorted(KERNELS.glob("*.cu")), EMULATION / "emulation.cpp"]
    objects = [compile_object(source, [*_EMULATED, include], headers) for source in kernels]
    objects += [compile_object(ROOT / "csrc/torch/cuda_ops.cpp", bindings, headers)]
    backend = compile_object(HERE / "backend.cpp", device, headers)
    folder = CACHE / f"pretend_{'_'.join([*(o.stem[-6:] for o in objects), backend.stem[-6:]])}"
    if not folder.exists():
        temporary = folder.with_suffix(f".{os.getpid()}")
        temporary.mkdir()
        if _native.status("cpu").loaded:
            (temporary / "_C_cpu.abi3.so").symlink_to(_native.status("cpu").path)
        libraries = [f"-L{_TORCH / 'lib'}", f"-Wl,-rpath,{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        for name, parts in (("backend.so", [backend]), ("_C_cuda.abi3.so", objects)):
            command = [COMPILER, "-shared", *map(str, parts), "-o", str(temporary / name)]
            subprocess.run([*command, *libraries], check=True)
        os.replace(temporary, folder)
    return folder


def environment() -> dict[str, str]:
    """The variables of a process that has the device."""
    folder = build()
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "backend.so"),
        "TPCORE_LIBRARY_DIR": str(folder),
        "TPCORE_TEST_DEVICE": "cuda",
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
