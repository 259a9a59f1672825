"""TensorParallelStrategy in real Trainers: the same training at every size, checkpoints, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the extra [lightning]")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def _run(folder, ranks, tp, **options):
    folder.mkdir(exist_ok=True)
    output = folder / "result.json"
    options |= {"tp": tp, "folder": str(folder), "output": str(output)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.interop.lightning_run", json.dumps(options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "fails" in options:
        assert done.returncode != 0
        return done.stderr
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def _same(one, other, rel):
    assert one["losses"] == pytest.approx(other["losses"], rel=rel)
    assert one["metrics"] == pytest.approx(other["metrics"], rel=rel)
    for name, sums in one["weights"].items():
        # The gradient of a key's bias is zero but for rounding.
        assert sums == pytest.approx(other["weights"][name], rel=rel, abs=1e-4), name


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return {
        precision: _run(folder / precision, 1, 1, precision=precision, clip=0.5)
        for precision in ("32-true", "bf16-mixed")
    }


@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), (4, 2)])
def test_same_training(single, tmp_path, ranks, tp):
    result = _run(tmp_path / "run", ranks, tp, clip=0.5)
    assert len(result["losses"]) == 6
    _same(result, single["32-true"], 1e-4)
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*.ckpt")}
    assert files == {f"mp_rank_{rank:02d}/step=6.ckpt" for rank in range(tp)}


def test_same_training_in_bf16(single, tmp_path):
    result = _run(tmp_path / "run", 4, 2, precision="bf16-mixed", clip=0.5)
    assert result["losses"] == pytest.approx(single["bf16-mixed"]["losses"], rel=0.02)


def test_clips_by_the_norm_of_the_whole(single, tmp_path):
    # The runs above clip; without clipping they come out otherwise.
    free = _run(tmp_path / "run", 2, 2)
    assert free["losses"][1:] != pytest.approx(single["32-true"]["losses"][1:], rel=1e-4)


def test_every_example_counts_once(single):
    assert single["32-true"]["metrics"]["val_count"] == 48


def test_resume_and_validate(tmp_path):
    whole = _run(tmp_path / "whole", 4, 2, epochs=2)
    first = _run(tmp_path / "first", 4, 2, epochs=1)
    saved = str(tmp_path / "first" / "step=6.ckpt")
    second = _run(tmp_path / "second", 4, 2, epochs=2, resume=saved)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["weights"] == whole["weights"]
    # The path of one rank's file does as well, and ranks keep their own shards in validation.
    own = str(tmp_path / "first" / "mp_rank_01" / "step=6.ckpt")
    checked = _run(tmp_path / "validate", 4, 2, validate=True, resume=own)
    assert checked["metrics"] == pytest.approx(first["metrics"], rel=1e-6)
    assert checked["weights"] == first["weights"]
    error = _run(tmp_path / "other", 1, 1, resume=saved, fails=True)
    assert "was saved by 2 tensor-parallel ranks" in error


def test_unequal_seeds_are_refused(tmp_path):
    error = _run(tmp_path / "run", 2, 2, seed_step=1, fails=True)
    assert "have the seeds [7, 8]" in error


def test_process_group_is_refused():
    from tpcore.interop.lightning import TensorParallelStrategy

    with pytest.raises(ValueError, match="process_group is the data-parallel group"):
        TensorParallelStrategy(2, process_group=None)
