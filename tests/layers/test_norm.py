from __future__ import annotations

import pytest
import torch
from torch import nn

from tpcore.layers.norm import LayerNorm

CASES = {
    "plain": ({}, (6,)),
    "no-bias": ({"bias": False}, (6,)),
    "no-affine": ({"elementwise_affine": False}, (6,)),
    "two-dimensions": ({}, (3, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_is_a_drop_in_for_nn_layer_norm(case):
    options, shape = CASES[case]
    ours, plain = LayerNorm(shape, 1e-6, **options), nn.LayerNorm(shape, 1e-6, **options)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape))
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, 6)
    results = []
    for module in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


def test_shape_may_be_an_integer_and_parameters_may_be_wider_than_x():
    norm = LayerNorm(6)
    assert norm.weight.shape == (6,)
    assert norm(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
