"""Reads files that attack their reader, each in a process of its own, within limits.

`python -m tests.checkpoint.hostile_process` takes one path a line on standard input and answers
each with one line of JSON. It imports everything once; for each path it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30
EXTRA_BYTES = 2**30
"""Of address space, beyond what the process had before it read the file."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    inspected: str
    """Class of the exception that `inspect` raised, "" for none; "killed" for no answer at all."""
    loaded: str
    message: str
    """Of `load`'s exception."""
    peak_mib: float
    """Of resident memory, beyond what the process had before."""


@contextlib.contextmanager
def hostile_reader() -> Iterator[HostileReader]:
    command = [sys.executable, "-m", "tests.checkpoint.hostile_process"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield HostileReader(process)
        finally:
            process.kill()


class HostileReader:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, path: Path) -> Outcome:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def refuses(self, path: Path, *said: str) -> Outcome:
        """Assert that `load` ends in one line that names the file, and nothing worse happens."""
        outcome = self(path)
        assert outcome.loaded == "CheckpointError", outcome
        assert outcome.inspected in ("CheckpointError", ""), outcome
        assert outcome.message.isprintable(), outcome
        assert len(outcome.message) < 2100, outcome
        for text in (path.name, *said):
            assert text in outcome.message, outcome
        assert outcome.peak_mib < 512, outcome
        return outcome


def _attempt(path: str) -> dict[str, object]:
    from tpcore import checkpoint

    def status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + EXTRA_BYTES,) * 2)
    raised = {}
    message = ""
    for verb in (checkpoint.inspect, checkpoint.load):
        try:
            verb(path)
            raised[verb.__name__] = ""
        except BaseException as error:
            raised[verb.__name__] = type(error).__name__
            message = str(error)
    return {
        "inspected": raised["inspect"],
        "loaded": raised["load"],
        "message": message,
        "peak_mib": (status("VmHWM") - before) / 2**20,
    }


def _in_child(path: str) -> dict[str, object]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = json.dumps(_attempt(path))
        except BaseException as error:
            answer = json.dumps({"error": repr(error)})
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    answer = b""
    while select.select([reading], [], [], SECONDS)[0]:
        chunk = os.read(reading, 2**16)
        if not chunk:
            break
        answer += chunk
    os.close(reading)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        return json.loads(answer)
    except ValueError:
        said = f"no answer within {SECONDS} s, status {status}"
        return {"inspected": "killed", "loaded": "killed", "message": said, "peak_mib": 0.0}


def main() -> None:
    from tpcore import checkpoint

    # Import what the first call would, so that each child starts with it.
    with contextlib.suppress(ValueError):
        checkpoint.load("/dev/null")
    for line in sys.stdin:
        print(json.dumps(_in_child(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    main()
