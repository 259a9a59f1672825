"""The compiled libraries: loading, what they say of themselves, and every instruction set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.harness import require
from tpcore import _native

ROOT = Path(__file__).parent.parent
ISAS = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512_bf16", "amx"),
    "aarch64": ("neon",),
}.get(platform.machine(), ())


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif("TPCORE_LIBRARY_DIR" in os.environ, reason="the record is not of that folder")
def test_status_and_record_agree():
    for name in ("cpu", "cuda"):
        status = _native.status(name)
        assert status.name == name
        assert status.loaded == (not status.reason)
        assert status.path.name == f"_C_{name}.abi3.so"
        record = _native.build_record().get(name, {})
        if record and not record["built"]:
            assert not status.loaded
            assert record["reason"]
    assert _native.build_record().get("cuda", {}).get("built") or not torch.cuda.is_available()


def test_a_library_that_was_built_is_loaded():
    if not _native.build_record().get("cpu", {}).get("built"):
        pytest.skip("no compiled CPU library here")
    status = _native.status("cpu")
    assert status.loaded, status.reason
    assert status.info["isa"] in ISAS


def test_a_missing_library_is_a_reason_not_an_error(tmp_path):
    """A copy of the package without its libraries works, and says what is missing."""
    package = tmp_path / "tpcore"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("_native.py", "_philox.py"):
        (package / name).write_text(Path(_native.__file__).with_name(name).read_text())
    code = (
        "from tpcore import _native; import torch\n"
        "status = _native.status('cpu'); print(status.loaded, status.reason)\n"
        "print(_native.dropout_keep_mask(0.5, torch.tensor([1]), 0, torch.arange(2), 3).shape)"
    )
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "TPCORE_LIBRARY_DIR"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False _C_cpu.abi3.so was not built")
    (package / "_C_cpu.abi3.so").write_bytes(b"not a library")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "invalid ELF header" in done.stdout or "file too short" in done.stdout


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory) -> dict[str, dict]:
    """What every instruction set of this machine makes of the same inputs."""
    require("cpu")
    results = {}
    for isa in ISAS:
        path = tmp_path_factory.mktemp("isa") / f"{isa}.pt"
        done = _python("-m", "tests.kernels.isa_worker", str(path), TPCORE_CPU_ISA=isa)
        if "names an instruction set that this machine" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        results[isa] = torch.load(path)
        assert results[isa].pop("isa") == isa
    return results


def test_instruction_sets_agree(by_isa):
    assert by_isa
    first = next(iter(by_isa.values()))
    for isa, other in by_isa.items():
        assert other.keys() == first.keys()
        for name, value in first.items():
            if value.dtype == torch.bool:
                assert torch.equal(value, other[name]), name
            else:
                # Sums are taken in another order; half precision may then round the other way.
                eps, scale = torch.finfo(value.dtype).eps, value.abs().max().item()
                torch.testing.assert_close(
                    value, other[name], rtol=4 * eps, atol=32 * eps * scale, msg=f"{isa}: {name}"
                )


def test_rounding_to_half_precision_is_bit_equal_to_torch(by_isa, tmp_path):
    """Adding zero is exact, so what is left is the conversion: every 16-bit value, and ties."""
    code = (
        "import sys, torch\n"
        "from tpcore import kernels\n"
        "bits = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16)\n"
        "for dtype in (torch.bfloat16, torch.float16):\n"
        "    a = bits.view(dtype).reshape(-1, 64)\n"
        "    b = a.flip(0)\n"
        "    with kernels.use_backend('cpu'): total = kernels.add_layer_norm(a, b)[1]\n"
        "    expected = (a.float() + b.float()).to(dtype)\n"
        "    nan = expected.isnan()\n"
        "    assert torch.equal(total.isnan(), nan)\n"
        "    same = total.view(torch.int16) == expected.view(torch.int16)\n"
        "    assert (same | nan).all(), dtype\n"
    )
    for isa in by_isa:
        done = _python("-c", code, TPCORE_CPU_ISA=isa)
        assert done.returncode == 0, f"{isa}: {done.stderr}"


def test_a_pin_that_cannot_be_honoured_is_an_error():
    require("cpu")
    done = _python("-c", "import tpcore._native", TPCORE_CPU_ISA="avx1024")
    assert done.returncode == 1
    assert "ValueError: the environment variable TPCORE_CPU_ISA names" in done.stderr


@pytest.mark.parametrize("name", sorted(_native.RAW_OPS))
def test_raw_ops_refuse_to_lose_a_gradient(name):
    schema = getattr(torch.ops.tpcore, name).default._schema
    values = {"Tensor": torch.ones(2, 2, requires_grad=True), "float": 0.5, "int": 0, "bool": True}
    arguments = [
        None if "Optional" in (kind := str(a.type)) else values.get(kind, "none")
        for a in schema.arguments
    ]
    with pytest.raises(RuntimeError, match=f"tpcore.{name} is a raw kernel without a gradient"):
        getattr(torch.ops.tpcore, name)(*arguments)


@pytest.mark.parametrize("name", sorted(_native.RAW_OPS))
def test_every_raw_op_has_a_fake(name):
    with torch.device("meta"):
        x, vector, ids = torch.empty(4, 6), torch.empty(4), torch.empty(2, 3, dtype=torch.int64)
    scores = torch.empty(2, 5, 3, 7, device="meta")
    key, op = (None, 0, None, 0), getattr(torch.ops.tpcore, name)
    calls = {
        "layer_norm_forward": lambda: op(x, None, None, 1e-5),
        "add_layer_norm_forward": lambda: op(x, x, None, None, 1e-5),
        "layer_norm_backward": lambda: op(x, x, vector, vector, None, None, True, True, False),
        "bias_gelu_forward": lambda: op(x, None, "none"),
        "bias_gelu_backward": lambda: op(x, x, None, "none", True, True),
        "masked_softmax_forward": lambda: op(scores, None, 1.0, False, 0.1, *key),
        "masked_softmax_backward": lambda: op(scores, scores, 1.0, 0.1, *key),
        "bias_dropout_residual_forward": lambda: op(x, None, None, 0.1, *key),
        "bias_dropout_residual_backward": lambda: op(x, 0.1, *key, True, True),
        "bias_dropout_residual_cpu_forward": lambda: op(x, None, None, 0.1, *key),
        "bias_dropout_residual_cpu_backward": lambda: op(x, x, 0.1, True, True),
        "packed_attention_forward": lambda: op(x, vector, 2, 1.0, False, 0.1, *key),
        "packed_attention_backward": lambda: op(x[:, :2], x, x, x, vector, 1.0, False, 0.1, *key),
        "cross_entropy_statistics": lambda: op(x, vector, 0, 6, -100),
        "cross_entropy_backward": lambda: op(vector, x, vector, vector, vector, 0, 6, -100, 0.0),
        "transpose16": lambda: op(x),
        "dropout_keep_mask": lambda: op(vector, ids, 0.1, 0, 7, 0, 0, 5),
    }
    shapes = {
        "layer_norm_forward": [(4, 6), (4,), (4,)],
        "add_layer_norm_forward": [(4, 6), (4, 6), (4,), (4,)],
        "layer_norm_backward": [(4, 6), (6,), (0,)],
        "bias_gelu_forward": [(4, 6)],
        "bias_gelu_backward": [(4, 6), (6,)],
        "masked_softmax_forward": [(2, 5, 3, 7), (2, 5, 3, 7)],
        "masked_softmax_backward": [(2, 5, 3, 7)],
        "bias_dropout_residual_forward": [(4, 6)],
        "bias_dropout_residual_backward": [(4, 6), (6,)],
        "bias_dropout_residual_cpu_forward": [(4, 6), (4, 1)],
        "bias_dropout_residual_cpu_backward": [(4, 6), (6,)],
        "packed_attention_forward": [(4, 2), (2, 4), (2, 4)],
        "packed_attention_backward": [(4, 6)],
        "cross_entropy_statistics": [(4,)] * 4,
        "cross_entropy_backward": [(4, 6)],
        "transpose16": [(6, 4)],
        "dropout_keep_mask": [(2, 5, 3, 7)],
    }
    with torch.no_grad():
        result = calls[name]()
    result = [result] if isinstance(result, torch.Tensor) else list(result)
    assert [tuple(r.shape) for r in result] == shapes[name]
