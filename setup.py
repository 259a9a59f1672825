"""Builds the compiled libraries; everything else about the package stands in pyproject.toml.

`tpcore/_C_cpu.abi3.so` and `tpcore/_C_cuda.abi3.so` use nothing but the stable ABI of libtorch
(target version 2.11) and no Python API, so one build serves every later torch and every Python. The
kernels are compiled once per instruction set, without torch on the include path; only csrc/torch/
sees a torch header.

Environment variables:
    TPCORE_BUILD_CPU, TPCORE_BUILD_CUDA   auto (default): build if possible, else go on without; 1:
    or fail; 0: do not CXX, NVCC, MAX_JOBS, DEBUG, TORCH_CUDA_ARCH_LIST   as everywhere

What was built, with what, and what was not and why is written to tpcore/_build.json, which `tpcore
doctor` prints.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that the libraries must load in

# Sanitizers of g++ for a library to test with (`make sanitize`): "address,undefined". Checks of
# every single pointer for null and alignment would make the vector code too large to compile; null
# is address's to find, and unaligned memory is what the kernels are made for.
SANITIZE = [
    flag
    for kinds in [os.environ.get("TPCORE_SANITIZE")]
    if kinds
    for flag in (
        f"-fsanitize={kinds}",
        "-fno-sanitize=null,alignment,object-size,vptr",
        "-fno-sanitize-recover=all",
    )
]

# Instruction set -> the flags of its translation units. Never -march=native: the choice is made at
# run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mbmi2", *AVX2]
X86_ISAS = {
    "scalar": [],
    "avx2": AVX2,
    # Warnings about the compiler's own headers: GCC 12 finds its undefined registers undefined.
    "avx512": [*AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}
# Of csrc/cpu: what is compiled once, for the baseline.
ISA_INDEPENDENT = ("dispatch.cpp", "shm_channel.cpp")
# Attention alone is compiled for these as well, where the compiler knows them: GCC 10 and 11 do.
AVX512_BF16 = [*X86_ISAS["avx512"], "-DTPCORE_ISA_AVX512", "-mavx512bf16"]
BF16_ISAS = {
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
BF16_SOURCE = "attention_bf16.cpp"
ISAS = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": {"neon": []}, "arm64": {"neon": []}}
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # and PTX for later ones


class UnavailableError(Exception):
    """A library cannot be built here; the message says why."""


def find_torch():
    """The torch to build against."""
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            f"torch cannot be imported in the build environment: {error}"
        ) from error
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        raise UnavailableError(f"torch {torch.__version__} is older than 2.11")
    return torch


def find_tool(*candidates: str | None) -> str:
    """The path of the first of these programs that is installed."""
    for candidate in filter(None, candidates):
        found = shutil.which(candidate)
        if found:
            return found
    names = ", ".join(filter(None, candidates))
    raise UnavailableError(f"none of these programs is installed: {names}")


def find_ninja() -> str:
    """Ninja from the build requirements, or from the system."""
    try:
        import ninja
    except ImportError:
        return find_tool("ninja")
    return find_tool(str(Path(ninja.BIN_DIR, "ninja")), "ninja")


def understands(compiler: str, flags: list[str]) -> bool:
    """Whether a compiler knows these flags."""
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def version_of(tool: str) -> str:
    """What a program prints about its version."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout


class NinjaFile:
    """Collects compile and link edges; every object names its own flags."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.objects: list[Path] = []
        self.lines: list[str] = [f"builddir = {escape(build_dir)}\n"]

    def compile(self, compiler: str, source: Path, flags: list[str], suffix: str = "") -> None:
        obj = self.build_dir / f"{source.parent.name}_{source.stem}{suffix}.o"
        command = [compiler, *flags, "-MMD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]
        self._edge(obj, [source], command, depfile=f"{obj}.d")
        self.objects.append(obj)

    def link(self, linker: str, output: Path, flags: list[str]) -> None:
        objects = [str(o) for o in self.objects]
        command = [linker, "-shared", *objects, "-o", str(output), *flags]
        self._edge(output, self.objects, command)

    def _edge(
        self, output: Path, inputs: list[Path], command: list[str], depfile: str | None = None
    ) -> None:
        rule = f"rule_{len(self.lines)}"
        text = " ".join(command).replace("$", "$$")
        dependencies = f"  depfile = {escape(depfile)}\n  deps = gcc\n" if depfile else ""
        files = " ".join(escape(i) for i in inputs)
        self.lines.append(
            f"rule {rule}\n  command = {text}\n  description = {output.name}\n{dependencies}"
            f"build {escape(output)}: {rule} {files}\n"
        )

    def run(self) -> None:
        path = self.build_dir / "build.ninja"
        path.write_text("\n".join(self.lines), encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS")
        command = [find_ninja(), "-f", str(path), *(["-j", jobs] if jobs else [])]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(result.stdout, flush=True)
        if result.returncode != 0:
            lines = result.stdout.strip().splitlines()
            first = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise UnavailableError(f"compilation failed: {first.strip()}")


def escape(path: object) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def common_flags() -> list[str]:
    """The flags of every C++ file."""
    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-DNDEBUG"]
    if SANITIZE:
        optimise = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZE]
    # No -ffast-math: NaN, infinities and denormals must survive. The first two only drop errno and
    # trap bookkeeping; the third leaves it to the source where a multiply-add is fused.
    safe = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    include = f"-I{ROOT / 'csrc' / 'include'}"
    return [
        "-std=c++17",
        *optimise,
        *safe,
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        include,
    ]


def torch_flags(torch) -> tuple[list[str], list[str]]:
    """The flags of csrc/torch/*.cpp and of the link step."""
    root = Path(torch.__file__).parent
    return (
        [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(root / "include")],
        [f"-L{root / 'lib'}", "-ltorch_cpu", *SANITIZE],
    )


def build_cpu(output: Path, build_dir: Path) -> dict:
    """Compiles the CPU kernels once per instruction set, and their bindings."""
    torch = find_torch()
    compiler = find_tool(os.environ.get("CXX"), "c++", "g++", "clang++")
    isas = ISAS.get(platform.machine(), {"scalar": []})
    bf16_isas = {}
    if isas is X86_ISAS:
        bf16_isas = {i: f for i, f in BF16_ISAS.items() if understands(compiler, f)}
    has = [f"-DTPCORE_HAS_{isa.upper()}" for isa in bf16_isas]
    ninja = NinjaFile(build_dir)
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in ISA_INDEPENDENT:
            ninja.compile(compiler, source, [*common_flags(), *has])
            continue
        for isa, flags in (bf16_isas if source.name == BF16_SOURCE else isas).items():
            define = [f"-DTPCORE_ISA={isa}", f"-DTPCORE_ISA_{isa.upper()}"]
            ninja.compile(compiler, source, [*common_flags(), *define, *flags], f"_{isa}")
    compile_flags, link_flags = torch_flags(torch)
    for source in sorted((ROOT / "csrc" / "torch").glob("*.cpp")):
        if source.name != "cuda_ops.cpp":
            ninja.compile(compiler, source, [*common_flags(), *compile_flags])
    ninja.link(compiler, output, link_flags)
    ninja.run()
    return {
        "isas": [*isas, *bf16_isas],
        "compiler": version_of(compiler).splitlines()[0],
        "torch": torch.__version__,
    }


def cuda_targets(nvcc: str) -> list[str]:
    """Architectures to compile for, such as 9.0 and 12.0+PTX, from the environment or the usual.

    Of the usual ones, those that this nvcc knows.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given.replace(" ", ";").strip(";").split(";")
    listing = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    usual = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return [*usual[:-1], f"{usual[-1]}+PTX"]


def generate_code(architecture: str) -> str:
    """The flag of nvcc for one architecture."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}", *([f"compute_{number}"] if architecture.endswith("+PTX") else [])]
    return f"'-gencode=arch=compute_{number},code=[{','.join(codes)}]'"


def build_cuda(output: Path, build_dir: Path) -> dict:
    """Compiles the CUDA kernels and their bindings."""
    torch = find_torch()
    if torch.version.cuda is None:
        raise UnavailableError(f"torch {torch.__version__} was built without CUDA")
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = find_tool(os.environ.get("NVCC"), CUDA_HOME and f"{CUDA_HOME}/bin/nvcc", "nvcc")
    version = version_of(nvcc).rsplit("release ", 1)[-1].split(",")[0]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise UnavailableError(
            f"nvcc is version {version}, but torch was built with CUDA {torch.version.cuda}"
        )
    compiler = find_tool(os.environ.get("CXX"), "c++", "g++", "clang++")
    architectures = cuda_targets(nvcc)
    include = f"-I{ROOT / 'csrc' / 'include'}"
    device_flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", include]
    device_flags += [f"--threads={len(architectures)}", *map(generate_code, architectures)]
    ninja = NinjaFile(build_dir)
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        ninja.compile(nvcc, source, device_flags)
    compile_flags, link_flags = torch_flags(torch)
    flags = [*common_flags(), *compile_flags, "-DUSE_CUDA"]
    ninja.compile(compiler, ROOT / "csrc" / "torch" / "cuda_ops.cpp", flags)
    # By nvcc, which knows where its runtime library is; torch has loaded the same one by then.
    ninja.link(nvcc, output, [*link_flags, "-ltorch_cuda", "-cudart", "shared"])
    ninja.run()
    return {"architectures": architectures, "nvcc": version, "torch": torch.__version__}


BUILDERS = {"cpu": build_cpu, "cuda": build_cuda}


class BuildNative(build_ext):
    """Builds each library by ninja, or records why not."""

    def run(self) -> None:
        self.record: dict[str, dict] = {}
        # setuptools builds elsewhere first, even where the libraries end up beside the sources.
        self.packages = [Path(self.build_lib, "tpcore")]
        if self.inplace or self.editable_mode:
            self.packages.append(ROOT / "tpcore")
        super().run()
        for package in self.packages:
            package.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.record, indent=2) + "\n"
            (package / "_build.json").write_text(text, encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rsplit("_C_", 1)[1]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp, name).resolve()
        for directory in (output.parent, build_dir):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            if knob(name) == "0":
                raise UnavailableError(f"switched off by TPCORE_BUILD_{name.upper()}=0")
            facts = BUILDERS[name](output, build_dir)
        except UnavailableError as reason:
            # A library of an earlier build must not stay behind and be taken for this one's.
            for package in self.packages:
                (package / output.name).unlink(missing_ok=True)
            self.record[name] = {"built": False, "reason": str(reason)}
            if knob(name) == "1":
                raise SystemExit(f"tpcore: cannot build the {name} library: {reason}") from reason
            print(
                f"tpcore: warning: going on without the {name} library: {reason}", file=sys.stderr
            )
        else:
            sources = sources_hash()
            self.record[name] = {"built": True, "torch_target": "2.11", "sources": sources, **facts}


def sources_hash() -> str:
    """Of all that goes into the libraries: whoever carries one elsewhere can tell whose it is."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def knob(name: str) -> str:
    """The value of TPCORE_BUILD_CPU or TPCORE_BUILD_CUDA."""
    variable = f"TPCORE_BUILD_{name.upper()}"
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"tpcore: {variable} is {value!r}; expected auto, 1 or 0")
    return value


def extensions() -> list[Extension]:
    """Both libraries; one that cannot be built is left out, unless it was insisted on."""
    return [
        Extension(f"tpcore._C_{name}", sources=[], py_limited_api=True, optional=knob(name) != "1")
        for name in BUILDERS
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
