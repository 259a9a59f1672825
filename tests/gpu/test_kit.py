"""The kit itself: time limits, failures, what is left out, and that nothing is lost."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from benchmarks import gpu_kit
from benchmarks.gpu_kit import Group, Log, Stage
from tests.helpers.device import on_the_cpu
from tpcore import _native

pytestmark = on_the_cpu


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_stages_run_side_by_side_and_each_ends_its_own_way(tmp_path):
    log = Log(tmp_path / "log.txt")
    slow = "import subprocess, sys, time; print('begins', flush=True); time.sleep(600)"
    stages = [
        Stage("good", _python("import os; print('said', os.environ['X'])"), variables={"X": "y"}),
        Stage("bad", _python("print('half'); raise SystemExit(3)")),
        Stage("slow", _python(slow)),
        Stage("absent", why_not="no such program"),
    ]
    begin = time.monotonic()
    gpu_kit.run(Group(stages, 1, 1), 4, log)
    assert time.monotonic() - begin < 60
    assert [s.outcome for s in stages] == ["passed", "failed", "out of time", "left out"]
    assert [s.last_line for s in stages] == ["said y", "half", "begins", ""]
    text = log.path.read_text()
    assert "[good] said y\n" in text
    assert "[slow] begins\n" in text
    assert "[absent] left out: no such program\n" in text
    table = gpu_kit.summary([Group(stages, 1, 1)], "a GPU")
    assert "| bad | failed | " in table
    assert "| absent | left out | 0 | no such program |" in table


def test_what_a_stage_leaves_running_is_ended(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    stage = Stage("parent", _python(code))
    gpu_kit.run(Group([stage], 1, 1), 30, Log(tmp_path / "log.txt"))
    assert stage.outcome == "passed"
    time.sleep(4)
    assert not mark.exists()


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_kit.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def _fake_gpu(monkeypatch, tmp_path, plan):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kit.importlib.import_module("benchmarks.measure"), "device_facts", str)
    monkeypatch.setattr(gpu_kit, "groups", lambda size, device: plan)
    monkeypatch.setenv("OUT", str(tmp_path))


def test_later_stages_run_after_a_failure_and_keep_their_time(monkeypatch, tmp_path, capsys):
    first, second = Stage("first", _python("raise SystemExit(1)")), Stage("second", _python("0"))
    hungry = Stage("hungry", _python("import time; time.sleep(600)"))
    third = Stage("kernel benchmarks", _python("import sys; print(sys.argv[1:])"))
    plan = [Group([first], 0, 100), Group([second, hungry], 0, 100), Group([third], 8, 100)]
    _fake_gpu(monkeypatch, tmp_path, plan)
    monkeypatch.setitem(gpu_kit.TOTAL_S, "quick", 14)
    assert gpu_kit.main(["--quick"]) == 1
    assert [s.outcome for g in plan for s in g.stages] == [
        *("failed", "passed", "out of time", "passed")
    ]
    assert third.last_line == "['--seconds', '5']"
    assert "| hungry | out of time |" in (tmp_path / "gpu_summary.md").read_text()
    assert "[second]" in (tmp_path / "gpu_log.txt").read_text()


def test_the_exit_status_is_0_if_nothing_failed(monkeypatch, tmp_path):
    _fake_gpu(monkeypatch, tmp_path, [Group([Stage("one", _python("0"))], 0, 100)])
    assert gpu_kit.main([]) == 0


@pytest.mark.parametrize("size", ["full", "quick", "tiny"])
def test_the_plan_fits_its_time(monkeypatch, size):
    monkeypatch.setattr(gpu_kit, "build_stage", lambda: Stage("build"))
    plan = gpu_kit.groups(size, "cuda")
    total = gpu_kit.TOTAL_S.get(size, gpu_kit.TOTAL_S["full"])
    assert total <= (180 if size == "quick" else 540)
    assert sum(group.least_s for group in plan) <= total
    names = [stage.name for group in plan for stage in group.stages]
    assert len(set(names)) == len(names)
    for group in plan:
        assert 0 < group.least_s <= group.most_s
        for stage in group.stages:
            paths = [part for part in stage.command if part.startswith("tests/")]
            assert all((gpu_kit.ROOT / path).exists() for path in paths), stage
    if size == "full":
        assert {"kernels", "triton", "layers", "memcheck", "racecheck", "trainer"} <= set(names)


def test_libraries_of_these_sources_are_taken_and_others_built(monkeypatch):
    if not _native.status("cpu").loaded:
        pytest.skip("no compiled CPU library")
    from setup import sources_hash

    monkeypatch.delenv("TPCORE_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_kit.Path, "exists", lambda path: True)
    entry = {"built": True, "sources": sources_hash()}
    monkeypatch.setattr(_native, "build_record", lambda: {"cpu": entry, "cuda": entry})
    stage = gpu_kit.build_stage()
    assert not stage.command
    assert "both libraries are there, built of these sources" in stage.why_not
    stale = {**entry, "sources": "0" * 16}
    monkeypatch.setattr(_native, "build_record", lambda: {"cpu": entry, "cuda": stale})
    stage = gpu_kit.build_stage()
    assert stage.command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert stage.variables["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_sanitizers_are_left_out_where_there_are_none(monkeypatch):
    monkeypatch.setattr(gpu_kit.shutil, "which", lambda name: None)
    stage = gpu_kit._sanitizer("memcheck", "x")
    assert (stage.command, stage.why_not) == ((), "compute-sanitizer is not on the path")
    monkeypatch.setattr(gpu_kit.shutil, "which", lambda name: f"/opt/{name}")
    stage = gpu_kit._sanitizer("racecheck", "x")
    assert stage.command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert stage.command[-1] == "x"
