"""Fused softmax, layer norms, bias-dropout-add and bias-gelu, by Megatron's and apex's names."""

from enum import Enum

import pytest
import torch
import torch.nn.functional as F

from tests.interop.ranks import run_megatron
from tpcore.interop import megatron
from tpcore.interop.megatron import (
    AttnMaskType,
    FusedLayerNorm,
    FusedScaleMaskSoftmax,
    GenericFusedScaleMaskSoftmax,
    MixedFusedLayerNorm,
    ModelParallelConfig,
)
from tpcore.interop.megatron.fusions.fused_softmax import attention_mask_func
from tpcore.parallel.collectives import all_gather

# --- softmax


def _scores(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 3


def _softmax(kind, **keywords):
    arguments = {
        "input_in_fp16": False,
        "input_in_bf16": False,
        "scaled_masked_softmax_fusion": True,
        "mask_func": attention_mask_func,
        "softmax_in_fp32": True,
        "scale": 0.25,
    }
    return FusedScaleMaskSoftmax(attn_mask_type=kind, **{**arguments, **keywords})


@pytest.mark.parametrize("sizes", [(2, 3, 7, 7), (1, 2, 3, 5), (2, 4, 64, 64)])
def test_padding_masks(sizes):
    scores = _scores(*sizes)
    mask = torch.zeros(sizes[0], 1, sizes[2], sizes[3], dtype=torch.bool)
    mask[..., -2:] = True
    expected = torch.softmax((scores * 0.25).masked_fill(mask, -10000.0), -1)
    softmax = _softmax(AttnMaskType.padding)
    for given in (mask, mask.byte(), mask.float()):
        if given.dtype == torch.float32:
            softmax = _softmax(AttnMaskType.padding, mask_func=lambda s, m: s - 10000 * m)
        torch.testing.assert_close(softmax(scores, given), expected)
    torch.testing.assert_close(softmax(scores, None), torch.softmax(scores * 0.25, -1))
    generic = GenericFusedScaleMaskSoftmax(False, False, attention_mask_func, True, 0.25)
    torch.testing.assert_close(generic(scores, mask), expected)
    assert softmax.is_kernel_available(mask, *sizes)


class Foreign(Enum):
    causal = 17


@pytest.mark.parametrize("kind", [AttnMaskType.causal, Foreign.causal])
def test_causal_masks(kind):
    scores = _scores(2, 3, 6, 6).requires_grad_()
    future = torch.ones(6, 6).triu(1).bool()
    twin = scores.detach().clone().requires_grad_()
    expected = torch.softmax((twin * 0.25).masked_fill(future, -10000.0), -1)
    got = _softmax(kind)(scores, None)
    torch.testing.assert_close(got, expected)
    grad = _scores(2, 3, 6, 6).flip(-1)
    torch.testing.assert_close(
        torch.autograd.grad(got, scores, grad), torch.autograd.grad(expected, twin, grad)
    )


def test_half_precision_keeps_its_dtype_and_no_key_gives_zeros():
    softmax = _softmax(AttnMaskType.padding, input_in_bf16=True)
    scores = _scores(1, 1, 2, 4).bfloat16()
    mask = torch.tensor([[False, True, True, True], [True] * 4]).view(1, 1, 2, 4)
    probabilities = softmax(scores, mask)
    assert probabilities.dtype == torch.bfloat16
    assert probabilities.tolist() == [[[[1, 0, 0, 0], [0, 0, 0, 0]]]]


def test_softmax_refusals():
    with pytest.raises(ValueError, match="exclude each other"):
        _softmax(AttnMaskType.padding, input_in_fp16=True, input_in_bf16=True)
    with pytest.raises(ValueError, match="softmax_in_fp32=True"):
        _softmax(AttnMaskType.padding, softmax_in_fp32=False)
    with pytest.raises(ValueError, match="no mask_func"):
        _softmax(AttnMaskType.padding, mask_func=None)(_scores(1, 1, 2, 2), torch.zeros(2, 2))


# --- layer norms


def _norm(cls=FusedLayerNorm, size=16, **keywords):
    norm = cls(size, **keywords)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return norm


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("shape", [(16,), (4, 4), (1,)])
def test_fused_layer_norm(shape, memory_efficient):
    norm = _norm(size=shape, memory_efficient=memory_efficient).double()
    x = _scores(3, 5, *shape).double().requires_grad_()
    leaves = (x, norm.weight, norm.bias)
    expected = F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    grad = _scores(3, 5, *shape).flip(0).double()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(norm(x), leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_memory_efficient_keeps_the_output_in_place_of_the_input():
    norm = _norm(memory_efficient=True)
    x = _scores(64, 16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    addresses = {tensor.data_ptr() for tensor in kept}
    assert y.data_ptr() in addresses
    assert x.data_ptr() not in addresses
    assert sum(t.numel() for t in kept if t.data_ptr() != y.data_ptr()) <= 64 + 2 * 16
    without = FusedLayerNorm(16, elementwise_affine=False, memory_efficient=True)
    twin = x.detach().clone().requires_grad_()
    for module, leaf in ((without, x), (lambda t: F.layer_norm(t, (16,)), twin)):
        module(leaf).square().sum().mul(3).add(module(leaf)[:, 0].sum()).backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "parameter_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_mixed_layer_norm_has_the_dtype_of_its_parameters(
    x_dtype, parameter_dtype, memory_efficient
):
    norm = _norm(MixedFusedLayerNorm, memory_efficient=memory_efficient).to(parameter_dtype)
    x = _scores(5, 16).to(x_dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == parameter_dtype
    exact = F.layer_norm(x.float(), (16,), norm.weight.float(), norm.bias.float(), norm.eps).to(
        parameter_dtype
    )
    torch.testing.assert_close(y, exact)
    y.float().square().sum().backward()
    assert x.grad.dtype == x_dtype
    assert norm.weight.grad.dtype == parameter_dtype


def test_the_spellings_of_three_libraries():
    apex = FusedLayerNorm(16, 1e-3, False)
    assert (apex.eps, apex.weight) == (1e-3, None)
    assert FusedLayerNorm(16, 1e-5, True, True).memory_efficient
    named = FusedLayerNorm(config=ModelParallelConfig(), hidden_size=16, eps=1e-4)
    assert (named.eps, named.normalized_shape) == (1e-4, (16,))
    assert FusedLayerNorm(ModelParallelConfig(), 16, 1e-4, True, True).zero_centered_gamma
    with pytest.raises(TypeError, match="needs normalized_shape, or config, hidden_size"):
        FusedLayerNorm()
    core = FusedLayerNorm(ModelParallelConfig(), 16, 1e-4, zero_centered_gamma=True)
    assert core.eps == 1e-4
    assert core.weight.tolist() == [0.0] * 16
    legacy = MixedFusedLayerNorm(16, no_persist_layer_norm=True, apply_layernorm_1p=True)
    x = _scores(3, 16)
    for norm in (core, legacy):
        torch.testing.assert_close(norm(x), F.layer_norm(x, (16,), eps=norm.eps))
    with pytest.raises(TypeError, match="no argument 'epsilon'"):
        FusedLayerNorm(16, epsilon=1e-3)
    with pytest.raises(ValueError, match="this is a layer norm"):
        FusedLayerNorm(ModelParallelConfig(), 16, normalization="RMSNorm")


def _check_sequence_parallel_norm(tp):
    norm = _norm(sequence_parallel_enabled=True).double()
    x = _scores(8, 16).double()
    own = x.chunk(tp.size)[tp.rank].clone().requires_grad_()
    norm(own).square().sum().backward()
    twin = _norm().double()
    twin(x).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, twin.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.bias.grad, twin.bias.grad, rtol=1e-12, atol=1e-12)
    assert not norm.weight.sequence_parallel


def test_sequence_parallel_norms_have_whole_gradients():
    run_megatron(_check_sequence_parallel_norm, 4)


# --- bias, dropout, residual


def _bias_dropout_inputs():
    x, residual = _scores(5, 2, 16), _scores(5, 2, 16).flip(0)
    return x, torch.linspace(-1, 1, 16), residual


def test_bias_dropout_add_without_dropout():
    x, bias, residual = _bias_dropout_inputs()
    expected = x + bias + residual
    for given in (bias, bias.expand_as(residual), bias.expand_as(residual).contiguous()):
        got = megatron.bias_dropout_add(x, given, residual, 0.3, False)
        torch.testing.assert_close(got, expected)
    for function in (
        megatron.get_bias_dropout_add(False, True),
        megatron.bias_dropout_add_fused_inference,
    ):
        torch.testing.assert_close(function((x, bias), residual, 0.3), expected)
        torch.testing.assert_close(function(x, bias, residual, 0.3), expected)
    torch.testing.assert_close(
        megatron.bias_dropout_add(x, None, residual, 0.0, True), x + residual
    )


def test_bias_dropout_add_drops_what_it_should():
    x, bias, residual = torch.zeros(400, 16), torch.ones(16), torch.zeros(400, 16)
    torch.manual_seed(3)
    got = megatron.bias_dropout_add_fused_train((x, bias), residual, 0.25)
    assert set(got.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((got == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 6400) ** 0.5
    again = megatron.bias_dropout_add_fused_train((x, bias), residual, 0.25)
    assert not torch.equal(got, again)
    torch.manual_seed(3)
    assert torch.equal(megatron.bias_dropout_add(x, bias, residual, 0.25, True), got)


def test_the_gradient_of_an_expanded_bias():
    x, bias, residual = _bias_dropout_inputs()
    bias.requires_grad_()
    torch.manual_seed(3)
    y = megatron.get_bias_dropout_add(True)(x, bias.expand_as(residual), residual, 0.25)
    (grad,) = torch.autograd.grad(y.sum(), bias)
    torch.manual_seed(3)
    kept = megatron.bias_dropout_add(torch.ones_like(x), None, torch.zeros_like(x), 0.25, True)
    torch.testing.assert_close(grad, kept.sum((0, 1)))


def _check_equal_dropout(tp):
    megatron.model_parallel_cuda_manual_seed(31)
    x, residual = torch.ones(6, 16), torch.zeros(6, 16)
    same = megatron.bias_dropout_add(x, None, residual, 0.5, True)
    with megatron.get_cuda_rng_tracker().fork():
        other = megatron.bias_dropout_add(x, None, residual, 0.5, True)
    everyone = all_gather(same[None], tp)
    assert all(torch.equal(mask, same) for mask in everyone)
    everyone = all_gather(other[None], tp)
    assert not torch.equal(everyone[0], everyone[1])


def test_ranks_drop_the_same_elements_unless_forked():
    run_megatron(_check_equal_dropout, 2)


def test_bias_gelu_is_the_tanh_one():
    x, bias, _ = _bias_dropout_inputs()
    torch.testing.assert_close(
        megatron.bias_gelu_impl(x, bias), F.gelu(x + bias, approximate="tanh")
    )
