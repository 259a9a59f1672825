"""The programs that measure a GPU, every line of them, on small tensors of the CPU."""

from __future__ import annotations

import csv
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import encoder, gpu_kernels, measure
from tests.helpers.device import on_the_cpu
from tests.kernels.harness import require

pytestmark = on_the_cpu


def _rows(folder, name):
    (path,) = folder.glob(f"{name}_*.csv")
    with path.open() as file:
        return list(csv.DictReader(file)), path.with_suffix(".md").read_text()


@pytest.fixture
def peers(monkeypatch):
    """Liger and apex under the names by which they are looked up, in plain torch."""

    class CrossEntropy:
        @staticmethod
        def apply(logits, target, smoothing, padding, to_float):
            assert (smoothing, padding, to_float) == (0.0, -100, True)
            return F.cross_entropy(logits.float(), target, reduction="none")

    def breaks(x, weight, bias, shape, eps):
        raise RuntimeError("made for\nanother GPU")

    modules = {
        "liger_kernel.transformers.functional": {
            "liger_layer_norm": lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
            "liger_cross_entropy": lambda x, t, reduction: F.cross_entropy(
                x.float(), t, reduction=reduction
            ),
        },
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": breaks},
        "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": CrossEntropy},
    }
    for name, members in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_kernels(tmp_path, monkeypatch, peers):
    require("cpu")
    monkeypatch.setenv("OUT", str(tmp_path))
    chosen = ["tpcore-native", "tpcore-triton", "eager", "liger", "apex"]
    assert gpu_kernels.main(["--device", "cpu", "--tiny", "--providers", *chosen]) == 0
    rows, text = _rows(tmp_path, "gpu_kernels")
    by = {(r["op"], r["dtype"], r["direction"], r["provider"]): r for r in rows}
    ops = {r["op"] for r in rows}
    assert ops == {
        *("layer_norm", "add_layer_norm", "bias_gelu", "bias_dropout_residual"),
        *("masked_softmax", "masked_softmax+dropout", "cross_entropy"),
    }
    for op in ops:
        for dtype in ("fp32", "bf16"):
            for direction in ("forward", "backward", "full"):
                row = by[op, dtype, direction, "tpcore-native"]
                assert float(row["percent_of_copy"]) > 0
                assert row["best_peer"] in ("eager", "liger", "apex")
    assert ("cross_entropy", "bf16", "full", "apex") in by
    assert ("layer_norm", "bf16", "full", "liger") in by
    assert ("layer_norm", "bf16", "full", "apex") not in by
    assert "- apex fails in layer_norm 128 x 32 bf16: RuntimeError: made for another GPU" in text
    assert "a copy of 0 MiB moves" in text
    full, parts = by["bias_gelu", "fp32", "full", "eager"], ("forward", "backward")
    sum_ms = sum(float(by["bias_gelu", "fp32", d, "eager"]["median_ms"]) for d in parts)
    last = [r for r in rows if (r["op"], r["dtype"]) == ("bias_gelu", "fp32")][-len(chosen) :]
    assert float(full["median_ms"]) == pytest.approx(sum_ms, rel=1e-9), last


def test_kernels_out_of_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_kernels.main(["--device", "cpu", "--tiny", "--seconds", "0", "--quick"]) == 0
    rows, text = _rows(tmp_path, "gpu_kernels")
    assert rows == []
    assert "no time for: layer_norm(128, 32) bf16; add_layer_norm(128, 32) bf16" in text


def test_a_failure_of_our_own_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))

    def fails(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_kernels.kernels, "bias_gelu", fails)
    options = ["--device", "cpu", "--tiny", "--quick", "--ops", "bias_gelu"]
    assert gpu_kernels.main([*options, "--providers", "tpcore-native", "eager"]) == 1
    rows, text = _rows(tmp_path, "gpu_kernels")
    assert {row["provider"] for row in rows} == {"eager"}
    assert "- tpcore-native fails in bias_gelu 32 x 128 bf16: RuntimeError: an illegal" in text


SMALL = "--device cpu --layers 1 --hidden 32 --heads 2 --batch 3 --length 16 --vocabulary 99"
SMALL += " --matrix 64 --rounds 2"


def test_encoder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("OUT", str(tmp_path))
    providers = ["tpcore", "MegatronBert eager", "MegatronBert sdpa", "Bert sdpa"]
    assert encoder.main([*SMALL.split(), "--providers", *providers]) == 0
    rows, text = _rows(tmp_path, "gpu_encoder")
    found = {(r["batch"], r["dtype"], r["provider"]) for r in rows}
    works = ("tpcore", "MegatronBert eager", "Bert sdpa")
    assert found == {
        (b, d, p) for b in ("full", "mixed") for d in ("bf16", "autocast", "fp32") for p in works
    }
    for row in rows:
        tokens = 48 if row["batch"] == "full" else 1 + 8 + 16
        rate = float(row["tokens_per_s"]) * float(row["median_ms"]) / 1e3
        assert rate == pytest.approx(tokens)
        assert float(row["tpcore_is_faster_by"]) > 0
    assert "- fails: MegatronBert sdpa, full, bf16: ValueError" in text


@pytest.mark.slow
def test_compiled_providers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("OUT", str(tmp_path))
    options = [*SMALL.split(), "--dtypes", "fp32", "--batches", "full"]
    assert encoder.main([*options, "--providers", "MegatronBert compile", "Bert sdpa compile"]) == 0
    rows, _ = _rows(tmp_path, "gpu_encoder")
    assert len(rows) == 2
    options = ["--device", "cpu", "--tiny", "--quick", "--ops", "bias_gelu"]
    assert gpu_kernels.main([*options, "--providers", "compile"]) == 0
    rows, _ = _rows(tmp_path, "gpu_kernels")
    assert {row["provider"] for row in rows} == {"compile"}


def test_the_encoder_counts_the_products_of_the_real_tokens():
    batch = encoder.Batch([3, 5], 99, "cpu")
    linear = 2 * (3 * 8 * 8 + 8 * 8 + 2 * 4 * 8 * 8) * (3 + 5)
    attention = 2 * 2 * 8 * (3**2 + 5**2)
    assert batch.flops(8, 7) == 3 * 7 * (linear + attention)
    assert batch.mask.sum(1).tolist() == [3, 5]
    assert batch.packed.sequences.lengths == (3, 5)


def test_buffers_take_turns_until_the_cache_has_forgotten_them(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert measure.sets_for(10, "cuda") == 400
    assert measure.sets_for(10**9, "cuda") == 2
    used = []
    turns = [lambda n=n: used.append(n) for n in range(3)]
    assert len(measure.times_ms(turns, "cpu", rounds=4)) == 4
    assert used == [0, 1, 2, 0, 1, 2, 0]
