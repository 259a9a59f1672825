"""The allocator policy, in processes of their own: it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpcore import memory

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not memory._allocator().startswith("glibc"), reason="the policy is for glibc's malloc"
)


def _run(code: str, **variables: str) -> list[str]:
    unset = ("GLIBC_TUNABLES", "TPCORE_MEMORY_POLICY", "TPCORE_RESTARTED")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code, "an argument"],
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


POLICY = "print(memory.memory_policy().keeps_freed_memory)\n"
# What the policy is for: blocks of one size, aligned as torch aligns them, with small ones in
# between; prints the page faults of the later rounds.
FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = libc.malloc.restype = ctypes.c_void_p
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks, small = [], []
    for megabytes in (16, 64, 16):
        blocks.append(libc.aligned_alloc(64, megabytes << 20))
        ctypes.memset(blocks[-1], 1, megabytes << 20)
        small.append(libc.malloc(40))
    for block in blocks + small:
        libc.free(block)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_restart_sets_the_policy_once_and_keeps_arguments_and_tunables() -> None:
    code = (
        "import os, sys\nfrom tpcore import memory\nprint(os.getpid(), flush=True)\n"
        "memory.restart_process()\nprint(sys.argv[1])\n" + POLICY
    )
    first, second, argument, policy = _run(code, GLIBC_TUNABLES="glibc.malloc.mxfast=32")
    assert first == second
    assert argument == "an argument"
    assert policy == "fully"
    code = "import os\nfrom tpcore import memory\nmemory.restart_process()\n"
    (tunables,) = _run(
        code + "print(os.environ['GLIBC_TUNABLES'])", GLIBC_TUNABLES="glibc.malloc.mxfast=32"
    )
    assert "glibc.malloc.mxfast=32" in tunables.split(":")
    assert "glibc.malloc.tcache_count=0" in tunables.split(":")


def test_restarted_process_reuses_freed_memory_without_page_faults() -> None:
    restart = "from tpcore import memory\nmemory.restart_process()\n"
    (with_policy,) = _run(restart + FAULTS)
    (without,) = _run(restart + FAULTS, TPCORE_MEMORY_POLICY="system")
    assert int(with_policy) < 100
    assert int(without) > 10_000


def test_running_process_gets_all_but_the_tcache_setting() -> None:
    code = "import tpcore\nfrom tpcore import memory\n" + POLICY
    assert _run(code + "tpcore.keep_freed_memory()\n" + POLICY) == ["no", "partly"]


def test_user_can_keep_the_system_policy() -> None:
    code = "from tpcore import memory\nmemory.restart_process()\nmemory.keep_freed_memory()\n"
    assert _run(code + POLICY, TPCORE_MEMORY_POLICY="system") == ["no"]


def test_another_allocator_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 0 00:00 0 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n")
    monkeypatch.setattr(memory, "_MAPS", maps)
    monkeypatch.setattr(memory.os, "execve", lambda *_: pytest.fail("restarted"))
    memory.restart_process()
    policy = memory.keep_freed_memory()
    assert (policy.allocator, policy.keeps_freed_memory) == ("jemalloc", "no")


def test_unknown_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCORE_MEMORY_POLICY", "fast")
    with pytest.raises(ValueError, match=r"TPCORE_MEMORY_POLICY='fast'.*keep or system"):
        memory.memory_policy()
