"""AdamW in one pass: torch's fused one bit for bit, whatever the formats of gradient and copy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.harness import require

OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
OPTIONS |= {"step": 1.0, "grad_factor": 1.0}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="which products torch's compiler fuses is known for x86-64",
)
@pytest.mark.parametrize(
    ("isa", "capability"), [("scalar", "default"), ("avx2", "avx2"), ("avx512", "avx512")]
)
def test_every_bit_is_that_of_torch(isa: str, capability: str) -> None:
    require("cpu")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.adamw_worker", capability.upper()],
        env=os.environ | {"TPCORE_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if "names an instruction set that this machine" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{isa}\n"


def _step(**others: object) -> None:
    tensors = {name: torch.zeros(4, 6) for name in ("weight", "grad", "exp_avg", "exp_avg_sq")}
    arguments = {**tensors, "copy": None, **OPTIONS, **others}
    torch.ops.tpcore.adamw_(*arguments.values())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"grad": torch.zeros(6, 4)},
            r"grad has shape \[6, 4\]; expected that of weight, \[4, 6\]",
        ),
        ({"exp_avg": torch.zeros(24)}, r"exp_avg has shape \[24\]"),
        ({"exp_avg_sq": torch.zeros(6, 4).t()}, "exp_avg_sq is not contiguous"),
        ({"exp_avg": torch.zeros(4, 6).double()}, "exp_avg differs from weight in dtype"),
        ({"weight": torch.zeros(4, 6).bfloat16()}, "weight has an unsupported dtype"),
        ({"grad": torch.zeros(4, 6).int()}, "grad has an unsupported dtype"),
        (
            {"grad": torch.zeros(4, 6).half(), "copy": torch.zeros(4, 6).bfloat16()},
            "grad and copy differ in dtype",
        ),
        ({"grad": torch.zeros(4, 6).double()}, "float64 if weight is, and only then"),
        ({"step": 0.0}, "step is 0; expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_named(others: dict[str, object], message: str) -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match=message):
        _step(**others)


def test_the_op_is_what_it_says() -> None:
    require("cpu")
    tensors = [torch.rand(4, 6) for _ in range(4)]
    for copy in (None, torch.zeros(4, 6).bfloat16()):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.tpcore.adamw_, (*tensors, copy, *OPTIONS.values()), test_utils=tests
        )


def test_bits_do_not_depend_on_threads() -> None:
    require("cpu")
    torch.manual_seed(0)
    start = [torch.rand(100_003) for _ in range(4)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = [tensor.clone() for tensor in start]
            copy = torch.zeros(100_003, dtype=torch.bfloat16)
            torch.ops.tpcore.adamw_(*tensors, copy, *OPTIONS.values())
            results.append([*tensors, copy])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
