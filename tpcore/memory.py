"""The policy of the process's CPU allocator: freed memory stays mapped.

Large tensors are freed and allocated at every step. By default glibc hands such memory back to
the kernel and takes fresh pages each time, and the faults on fresh pages cost more than the
kernels' arithmetic: float32 layer norm runs several times slower (docs/memory.md has the
measurement). Four settings of glibc's malloc together avoid that:

    mmap_threshold, trim_threshold   freed blocks of any size stay in the heap
    tcache_count=0, mxfast=0         the slivers that aligned allocation leaves on both sides of
                                     a tensor join it again when it is freed; else the next tensor
                                     of the same size does not fit, and the heap grows

The price is resident memory: it stays at its peak. Sources: mallopt(3) and the chapters "Malloc
Tunable Parameters" and "Memory Allocation Tunables" of the glibc manual.

Tunables are read when a process starts, so the command line restarts itself once with them
(`restart_process`), and children inherit them. A running process can be given all but the tcache
setting (`keep_freed_memory`). Nothing is touched where the user preloaded another allocator, or
set TPCORE_MEMORY_POLICY=system.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TPCORE_MEMORY_POLICY"
POLICIES = ("keep", "system")
# A restart that did not help, for whatever reason, is not tried again.
_RESTARTED = "TPCORE_RESTARTED"

_TUNABLES = {
    "glibc.malloc.mmap_threshold": 1 << 30,
    "glibc.malloc.trim_threshold": 1 << 46,
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
}
# From malloc.h; mallopt takes an int.
_MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_MXFAST": (1, 0),
}
_OTHER_ALLOCATORS = re.compile(r"/(lib)?(jemalloc|tcmalloc|mimalloc|snmalloc|hoard)[^/]*\.so")
_MAPS = Path("/proc/self/maps")

_set_by_mallopt = False


@dataclass(frozen=True)
class MemoryPolicy:
    """What is in force in this process.

    Attributes:
        allocator: "glibc 2.36", "jemalloc", .. or "unknown".
        keeps_freed_memory: "fully", "partly" (without the tcache setting) or "no".
        reason: why, in a few words.
    """

    allocator: str
    keeps_freed_memory: str
    reason: str


def memory_policy() -> MemoryPolicy:
    """What is in force in this process.

    Raises:
        ValueError: TPCORE_MEMORY_POLICY has an unknown value.
    """
    wanted = _wanted()
    allocator = _allocator()
    if not allocator.startswith("glibc"):
        return MemoryPolicy(allocator, "no", "its own policy is respected")
    present = _tunables(os.environ.get("GLIBC_TUNABLES", ""))
    if all(name in present for name in _TUNABLES):
        return MemoryPolicy(allocator, "fully", "GLIBC_TUNABLES")
    if _set_by_mallopt:
        return MemoryPolicy(allocator, "partly", "mallopt; tcache_count is read at start only")
    if wanted == "system":
        return MemoryPolicy(allocator, "no", f"{VARIABLE}=system")
    return MemoryPolicy(
        allocator, "no", "commands that run a model restart with it; else keep_freed_memory()"
    )


def keep_freed_memory() -> MemoryPolicy:
    """Set in this process what can be set while it runs; call it before the first tensor.

    Returns:
        The policy in force. Nothing changes, and `reason` says why, on another allocator than
        glibc's or with TPCORE_MEMORY_POLICY=system.

    Raises:
        ValueError: TPCORE_MEMORY_POLICY has an unknown value.
        OSError: glibc refused a setting.
    """
    global _set_by_mallopt
    policy = memory_policy()
    if policy.keeps_freed_memory != "no" or not _may_change():
        return policy
    mallopt = ctypes.CDLL(None).mallopt
    for name, (number, value) in _MALLOPT.items():
        if mallopt(number, value) != 1:
            raise OSError(f"mallopt({name}, {value}) was refused by {policy.allocator}")
    _set_by_mallopt = True
    return memory_policy()


def restart_process() -> None:
    """Replace this process by itself with the policy in its environment, if it lacks it.

    Returns where there is nothing to do. The process keeps its number, files and arguments; what
    it has computed is lost, so this comes first.

    Raises:
        ValueError: TPCORE_MEMORY_POLICY has an unknown value.
    """
    if not _may_change() or memory_policy().keeps_freed_memory == "fully":
        return
    if not sys.executable or os.environ.get(_RESTARTED):
        keep_freed_memory()
        return
    environment = {**os.environ, "GLIBC_TUNABLES": _with_tunables(), _RESTARTED: "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _may_change() -> bool:
    return _wanted() == "keep" and _allocator().startswith("glibc")


def _wanted() -> str:
    value = os.environ.get(VARIABLE, "") or "keep"
    if value not in POLICIES:
        raise ValueError(f"{VARIABLE}={value!r} in the environment; use {' or '.join(POLICIES)}")
    return value


def _allocator() -> str:
    try:
        other = _OTHER_ALLOCATORS.search(_MAPS.read_text())
    except OSError:
        other = None
    if other:
        return other[2]
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _tunables(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(":") if "=" in part)


def _with_tunables() -> str:
    """The user's own tunables, and ours where they set none."""
    present = _tunables(os.environ.get("GLIBC_TUNABLES", ""))
    merged = {**{name: str(value) for name, value in _TUNABLES.items()}, **present}
    return ":".join(f"{name}={value}" for name, value in merged.items())
