"""Everything that a GPU is needed for, in one command: `make gpu`, or `make gpu-quick`.

    python -m benchmarks.gpu_kit [--quick]

Builds the compiled kernels, or takes those that are there if they are of these sources; runs the
tests with every tensor on the GPU; looks for memory errors and races with compute-sanitizer; then
measures. Test stages run side by side, measurements alone. A stage that fails or runs out of time
does not stop the others, but the exit status says so. docs/gpu.md has the details.

Results go to `$OUT`, or to benchmarks/results; the log is there as well, or in build/gpu_kit. Both
are written as they come, so that nothing is lost if the machine goes away.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = {"full": 540, "quick": 175}
PYTEST = [sys.executable, "-m", "pytest", "--tb=short", "-rfE", "--maxfail=25", "--durations=5"]
SHORT_LIST = "tests/gpu/test_every_kernel.py"
# The Triton kernels compute in float32; and what test_triton.py starts elsewhere runs here anyway.
TRITON = "triton and not gradcheck and not fp64 and not float64"
TRITON += " and not on_the_gpu and not triton_compile"


@dataclasses.dataclass
class Stage:
    """One program and what became of it.

    Attributes:
        name: in the log and the summary.
        command: what is run, in the root of the checkout; without one `why_not` says why.
        why_not: why it is left out.
        variables: added to its environment.
        outcome: "passed", "failed", "out of time" or "left out".
        seconds: how long it took.
        last_line: the last thing it said.
    """

    name: str
    command: Sequence[str] = ()
    why_not: str = ""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    outcome: str = "left out"
    seconds: float = 0.0
    last_line: str = ""


@dataclasses.dataclass
class Group:
    """Stages that run side by side.

    Attributes:
        stages: those.
        least_s: seconds that earlier groups leave to this one.
        most_s: after which its stages are ended.
    """

    stages: list[Stage]
    least_s: float
    most_s: float


class Log:
    """One file for all stages, a line at a time, each under the name of its stage."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        with self._lock:
            self._file.write(f"[{name}] {line}\n")
            print(f"[{name}] {line}", flush=True)


def run(group: Group, limit_s: float, log: Log) -> None:
    """Runs the stages of a group at once and waits for them, at most `limit_s`."""
    threads = [threading.Thread(target=_run_stage, args=(s, limit_s, log)) for s in group.stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_stage(stage: Stage, limit_s: float, log: Log) -> None:
    if not stage.command:
        log.write(stage.name, f"left out: {stage.why_not}")
        return
    log.write(stage.name, f"{' '.join(stage.command)} (at most {limit_s:.0f} s)")
    begin = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_copy, args=(process.stdout, stage, log))
    reader.start()
    try:
        status = process.wait(timeout=max(1.0, limit_s))
        stage.outcome = "passed" if status == 0 else "failed"
    except subprocess.TimeoutExpired:
        stage.outcome = "out of time"
    _end(process)
    reader.join(timeout=10)
    stage.seconds = time.monotonic() - begin
    log.write(stage.name, f"{stage.outcome} after {stage.seconds:.0f} s")


def _end(process: subprocess.Popen) -> None:
    """Ends a stage's process and what it has left running: they are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _copy(stream: TextIO, stage: Stage, log: Log) -> None:
    for line in stream:
        if line.strip():
            stage.last_line = line.rstrip()
            log.write(stage.name, line.rstrip())


# --- The stages ---------------------------------------------------------------------------------


def build_stage() -> Stage:
    """Nothing to do if both libraries are of these sources, else a build for this GPU alone."""
    from setup import sources_hash
    from tpcore import _native

    if os.environ.get("TPCORE_LIBRARY_DIR"):
        return Stage("build", why_not=f"TPCORE_LIBRARY_DIR is {os.environ['TPCORE_LIBRARY_DIR']}")
    record, expected = _native.build_record(), sources_hash()
    fresh = all(
        (ROOT / f"tpcore/_C_{name}.abi3.so").exists()
        and record.get(name, {}).get("sources") == expected
        for name in ("cpu", "cuda")
    )
    if fresh:
        return Stage("build", why_not=f"both libraries are there, built of these sources: {record}")
    import torch

    major, minor = torch.cuda.get_device_capability()
    variables = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "TPCORE_BUILD_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Stage("build", command, variables=variables)


def _pytest(*arguments: str, workers: int = 0) -> list[str]:
    parallel = importlib.util.find_spec("xdist") is not None and workers > 1
    return [*PYTEST, *(["-n", str(workers)] if parallel else []), *arguments]


def _sanitizer(tool: str, *arguments: str) -> Stage:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Stage(tool, why_not="compute-sanitizer is not on the path")
    command = [program, "--tool", tool, "--error-exitcode", "9", *_pytest("-m", "", *arguments)]
    # Every tensor its own allocation: a step beyond its end is seen.
    return Stage(tool, command, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def test_stages(size: str) -> list[Stage]:
    """All tests on the GPU; "tiny": of each kind a few."""
    workers = min(6, (os.cpu_count() or 1) // 2) if size == "full" else 0
    short = _pytest("-m", "", SHORT_LIST)
    if size == "tiny":
        few = "test_opcheck and 0 and bfloat16"
        return [
            Stage("every kernel", [*short, "-k", "layer_norm and bfloat16"]),
            Stage("kernels", _pytest("-k", few, "tests/kernels/test_bias_gelu.py")),
            Stage("graph", _pytest("-m", "gpu", "tests/gpu", "-k", "graph")),
            _sanitizer("memcheck", SHORT_LIST),
        ]
    if size == "quick":
        accuracy = "(test_accuracy or strides or dropout) and not fp16 and not fp64"
        return [
            Stage("every kernel", short),
            Stage("kernels", _pytest("-k", accuracy, "tests/kernels", workers=6)),
            Stage("graph and NCCL", _pytest("-m", "gpu", "tests/gpu")),
        ]
    models = ["tests/models", "tests/checkpoint/test_golden.py"]
    found = [
        Stage("every kernel", short),
        Stage("kernels", _pytest("-m", "", "-k", "not triton", "tests/kernels", workers=workers)),
        Stage("triton", _pytest("-m", "", "-k", TRITON, "tests/kernels", workers=workers)),
        # Ranks share the GPU: gloo moves what NCCL would.
        Stage("layers", _pytest("tests/layers", "tests/parallel/test_collectives.py")),
        Stage("models", _pytest(*models)),
        Stage("graph and NCCL", _pytest("-m", "gpu", "tests/gpu")),
        _sanitizer("memcheck", SHORT_LIST, "-k", "not float16 or bfloat16"),
        # But for loads and stores all dtypes have one kernel, and these tools are slower still.
        _sanitizer("racecheck", SHORT_LIST, "-k", "bfloat16"),
        _sanitizer("synccheck", SHORT_LIST, "-k", "bfloat16"),
    ]
    missing = [m for m in ("omegaconf", "rich", "sklearn") if not importlib.util.find_spec(m)]
    trainer = Stage("trainer", _pytest("tests/train/test_trainer.py"))
    if missing:
        trainer = Stage("trainer", why_not=f"needs {', '.join(missing)}")
    return [*found, trainer]


def benchmark_stages(size: str, device: str) -> tuple[Stage, Stage]:
    """The kernels' and the encoder's; how long they may take is added when they start."""
    kernels = [sys.executable, "-m", "benchmarks.gpu_kernels", "--device", device]
    encoder = [sys.executable, "-m", "benchmarks.encoder", "--device", device]
    if size == "quick":
        kernels += ["--quick"]
        encoder += ["--dtypes", "bf16", "--batches", "full"]
        encoder += ["--providers", "tpcore", "MegatronBert eager", "Bert sdpa"]
    if size == "tiny":
        kernels += ["--quick", "--tiny", "--ops", "bias_gelu"]
        small = "layers=1 hidden=32 heads=2 batch=2 length=16 vocabulary=99 matrix=64 rounds=2"
        encoder += [f"--{number}" for number in small.split()]
        encoder += ["--dtypes", "fp32", "--batches", "mixed"]
        encoder += ["--providers", "tpcore"]
    return Stage("kernel benchmarks", kernels), Stage("encoder benchmark", encoder)


def groups(size: str, device: str) -> list[Group]:
    """What is done, in this order."""
    kernels, encoder = benchmark_stages(size, device)
    tests = test_stages(size)
    for stage in tests:
        stage.variables.update(TPCORE_TEST_DEVICE=device, OMP_NUM_THREADS="1")
    if size == "quick":
        times = ((20, 90), (45, 80), (40, 60), (25, 60))
    else:
        times = ((60, 240), (120, 200), (150, 220), (100, 160))
    stages = ([build_stage()], tests, [kernels], [encoder])
    return [Group(list(s), *t) for s, t in zip(stages, times, strict=True)]


def summary(all_groups: Sequence[Group], facts: str) -> str:
    """Markdown: what ran, how it ended, how long it took."""
    lines = ["# GPU kit", "", facts, "", "| stage | outcome | s | last line |", "|---|---|---|---|"]
    for stage in (stage for group in all_groups for stage in group.stages):
        said = (stage.last_line or stage.why_not).replace("|", "/")[:160]
        lines.append(f"| {stage.name} | {stage.outcome} | {stage.seconds:.0f} | {said} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="a short selection, in three minutes")
    sizes.add_argument("--tiny", action="store_true", help="a test of this program")
    options = parser.parse_args(arguments)
    import torch

    from benchmarks import measure

    if not torch.cuda.is_available():
        print("torch sees no CUDA device: this needs a GPU and a torch with CUDA", file=sys.stderr)
        return 2
    size = "quick" if options.quick else "tiny" if options.tiny else "full"
    end = time.monotonic() + TOTAL_S.get(size, TOTAL_S["full"])
    folder, facts = measure.results_folder(), measure.device_facts("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    log = Log((folder if os.environ.get("OUT") else ROOT / "build/gpu_kit") / "gpu_log.txt")
    log.write("kit", facts)
    plan = groups(size, "cuda")
    for number, group in enumerate(plan):
        later = sum(g.least_s for g in plan[number + 1 :])
        limit = min(group.most_s, end - time.monotonic() - later)
        for stage in group.stages:
            if "benchmark" in stage.name:
                stage.command = [*stage.command, "--seconds", f"{max(5, limit - 25):.0f}"]
        run(group, limit, log)
        (folder / "gpu_summary.md").write_text(summary(plan, facts))
    print(summary(plan, facts))
    ended_badly = ("failed", "out of time")
    return int(any(s.outcome in ended_badly for g in plan for s in g.stages))


if __name__ == "__main__":
    sys.exit(main())
