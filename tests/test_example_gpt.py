"""The GPT of examples/: the same losses at every size, by both APIs; the script from end to end."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.interop.ranks import run_megatron
from tpcore.checkpoint import load_sharded
from tpcore.parallel import TensorParallelGroup

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "gpt" / "train.py"
STEPS = 8
# Sums over ranks are taken in another order; Adam's first steps carry that on.
TOLERANCE = 2e-5


def _script():
    name = "tpcore_example_gpt"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _config(**changes):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_length": 48}
    return _script().Config(**{**sizes, **changes})


def _losses(built, config):
    return _script().train(*built, config, steps=STEPS, batch_size=4)


def _check_tpcore(tp, **changes):
    config = _config(**changes)
    return _losses(_script().build_tpcore(config, 0, tp), config)


def _check_tpcore_without_dropout(tp):
    return _check_tpcore(tp, dropout=0.0, attention_dropout=0.0)


def _check_megatron(tp, changes):
    config = _config(**changes)
    return _losses(_script().build_megatron(config, 0), config)


def _assert_close(curve, expected, tolerance=TOLERANCE):
    assert len(curve) == len(expected) == STEPS
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) < tolerance


def test_tpcore_with_all_dropout_at_every_size():
    alone = _check_tpcore(TensorParallelGroup.single())
    assert alone[-1] < alone[0] - 0.1
    assert all(abs(a - b) > 100 * TOLERANCE for a, b in pairwise(alone))
    for size in (2, 4):
        for curve in run_ranks(_check_tpcore, size):
            _assert_close(curve, alone)


def test_megatron_at_every_size():
    # Attention dropout draws from another stream on each rank: that alone depends on the size.
    changes = {"attention_dropout": 0.0}
    alone, *_ = run_megatron(_check_megatron, 1, changes)
    assert alone[-1] < alone[0] - 0.1
    for size in (2, 4):
        for curve in run_megatron(_check_megatron, size, changes):
            _assert_close(curve, alone)


def test_both_apis_are_one_model():
    ours = run_ranks(_check_tpcore_without_dropout, 2)[0]
    megatron = run_megatron(_check_megatron, 2, {"dropout": 0.0, "attention_dropout": 0.0})[0]
    _assert_close(megatron, ours)


def _run(*command):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("api", ["tpcore", "megatron"])
def test_the_script_from_end_to_end(tmp_path, api):
    dropout = ("--attention-dropout", "0") if api == "megatron" else ()
    arguments = (str(SCRIPT), "--api", api, "--steps", "21", *dropout)
    alone = _run(sys.executable, *arguments)
    assert len(alone) == 2
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    two = _run(*torchrun, "2", *arguments, "--save", str(tmp_path / "model"))
    assert two == pytest.approx(alone, abs=2e-4)
    if api == "tpcore":
        tp = TensorParallelGroup.single()
        model, step = _script().build_tpcore(_script().Config(), 1, tp)
        load_sharded(model, tmp_path / "model")
        batch = next(_script().batches(_script().Config(), 8, 5))
        model.eval()
        with torch.no_grad():
            assert step(*batch, 0).item() < 3.5
