from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tests.layers.twins import check_against_twin
from tpcore.layers.mlp import MLP
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharded, sharding_table

H, INNER = 12, 32


def _gelu(x, kind):
    if kind == "erf_1.41421":
        return 0.5 * x * (1 + torch.erf(x / 1.41421))
    return F.gelu(x, approximate=kind)


def _check(tp, gelu, bias, dtype):
    def twin(p, x):
        inner = _gelu(F.linear(x, p["dense_in.weight"], p.get("dense_in.bias")), gelu)
        return F.linear(inner, p["dense_out.weight"], p.get("dense_out.bias"))

    def run(module, x):
        y, output_bias = module(x)
        return y if output_bias is None else y + output_bias

    def build(group):
        return MLP(H, INNER, tp=group, gelu=gelu, bias=bias, dtype=dtype)

    x = torch.randn(9, H, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    check_against_twin(tp, build, twin, x, run=run)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("gelu", ["none", "tanh", "erf_1.41421"])
def test_equals_its_twin(size, gelu):
    run_ranks(_check, size, gelu, True, torch.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_its_twin_in_bfloat16(size):
    run_ranks(_check, size, "none", True, torch.bfloat16)


def test_without_bias():
    run_ranks(_check, 2, "none", False, torch.float32)


def test_sharding_and_errors():
    single = TensorParallelGroup.single()
    assert sharding_table(MLP(H, INNER, tp=single)) == {
        "dense_in.weight": Sharded(0),
        "dense_in.bias": Sharded(0),
        "dense_out.weight": Sharded(1),
        "dense_out.bias": Replicated(),
    }
    with pytest.raises(ValueError, match="gelu='erf' is unknown; expected one of 'none', 'tanh'"):
        MLP(H, INNER, tp=single, gelu="erf")
