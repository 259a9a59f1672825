"""Compare a tensor-parallel module with an unsharded twin written in plain PyTorch.

The twin is a function of the full parameters. It runs in float64 (the exact result) and in the
dtype under test (what PyTorch gets); ours may be at most twice as far from the exact result.
Outputs, the input's gradient and every rank's shard of every parameter's gradient are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.helpers.device import DEVICE
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharding, shard, sharding_table

Parameters = dict[str, Tensor]


def assert_as_accurate_as_torch(
    ours: Tensor,
    torch_same_dtype: Tensor,
    exact: Tensor,
    what: str,
    *,
    factor: float = 2.0,
    keep: Callable[[Tensor], Tensor] = lambda full: full,
) -> None:
    """max |ours - exact| <= factor * max |torch - exact| + one rounding of the largest value.

    ``ours`` may be a shard, which ``keep`` takes from a full tensor; what is allowed follows from
    the full tensors, because the largest error of a few elements is a matter of luck.
    """
    own_exact = keep(exact)
    assert ours.shape == own_exact.shape, f"{what}: shape {ours.shape}, not {own_exact.shape}"
    assert ours.dtype == torch_same_dtype.dtype, f"{what}: {ours.dtype}"
    if exact.numel() == 0:
        return
    error = (ours.double() - own_exact).abs()
    allowed = factor * (torch_same_dtype.double() - exact).abs().max().item()
    allowed += torch.finfo(ours.dtype).eps * exact.abs().max().item()
    worst = error.max().item()
    assert worst <= allowed, f"{what}: error {worst:.3g} at {int(error.argmax())} > {allowed:.3g}"


def build_sharded_and_full(
    build: Callable[[TensorParallelGroup], nn.Module], tp: TensorParallelGroup
) -> tuple[nn.Module, Parameters]:
    """The module on this rank, and the full parameters that it holds shards of.

    Asserts that both were drawn alike, bit by bit. Then adds noise to all parameters, so that
    biases of zero and norm weights of one hide nothing.
    """
    torch.manual_seed(3)
    module = build(tp)
    torch.manual_seed(3)
    full = dict(build(TensorParallelGroup.single()).named_parameters())
    table = sharding_table(module)
    generator = torch.Generator(DEVICE).manual_seed(4)
    with torch.no_grad():
        for name, own in module.named_parameters():
            piece = shard(full[name], table[name], tp.rank, tp.size, name=name)
            assert torch.equal(own, piece), f"{name} was not initialised whole, then sharded"
            full[name] += 0.1 * torch.randn(full[name].shape, generator=generator)
            own.copy_(shard(full[name], table[name], tp.rank, tp.size))
    return module, {name: parameter.detach() for name, parameter in full.items()}


def check_against_twin(
    tp: TensorParallelGroup,
    build: Callable[[TensorParallelGroup], nn.Module],
    twin: Callable[[Parameters, Tensor], Tensor],
    x: Tensor,
    *,
    run: Callable[[nn.Module, Tensor], Tensor] | None = None,
    input_sharding: Sharding = Replicated(),  # noqa: B008 - immutable
    output_sharding: Sharding = Replicated(),  # noqa: B008 - immutable
) -> None:
    """Compare ``run(build(tp), shard of x)`` with ``twin(full parameters, x)``, in x's dtype."""
    module, full = build_sharded_and_full(build, tp)
    table = sharding_table(module)

    def own(tensor: Tensor, sharding: Sharding) -> Tensor:
        return shard(tensor, sharding, tp.rank, tp.size)

    own_x = own(x, input_sharding).clone().requires_grad_()
    y = module(own_x) if run is None else run(module, own_x)
    results = []
    for dtype in (x.dtype, torch.float64):
        leaves = {n: p.to(dtype, copy=True).requires_grad_() for n, p in full.items()}
        twin_x = x.to(dtype, copy=True).requires_grad_()
        twin_y = twin(leaves, twin_x)
        if not results:
            grad_y = torch.randn(
                twin_y.shape, generator=torch.Generator(DEVICE).manual_seed(5), dtype=torch.float64
            ).to(x.dtype)
        twin_y.backward(grad_y.to(dtype))
        results.append((twin_y.detach(), twin_x.grad, {n: p.grad for n, p in leaves.items()}))
    y.backward(own(grad_y, output_sharding))
    (same_y, same_dx, same_grads), (exact_y, exact_dx, exact_grads) = results

    def compare(ours: Tensor, same: Tensor, exact: Tensor, sharding: Sharding, what: str) -> None:
        assert_as_accurate_as_torch(
            ours,
            same,
            exact,
            f"{what} on rank {tp.rank} of {tp.size}",
            keep=lambda full: own(full, sharding),
        )

    compare(y.detach(), same_y, exact_y, output_sharding, "output")
    compare(own_x.grad, same_dx, exact_dx, input_sharding, "gradient of the input")
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        compare(
            parameter.grad, same_grads[name], exact_grads[name], table[name], f"gradient of {name}"
        )
