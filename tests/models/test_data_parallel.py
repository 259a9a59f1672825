"""Two data-parallel ranks, each of them two tensor-parallel ones: the same as one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.device import on_the_cpu
from tests.helpers.ranks import run_mesh
from tests.models.test_sequence_parallel import CONFIG
from tpcore.models.bert import BertModel
from tpcore.models.heads import build_head
from tpcore.models.packing import pack_sequences
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.random import step_seed
from tpcore.parallel.sharding import shard, sharding_table

# DistributedDataParallel and FSDP want NCCL for CUDA tensors, and NCCL a GPU for each rank.
pytestmark = on_the_cpu

LENGTHS = (9, 4, 11, 7)  # the two halves have 13 and 18 tokens
LABELS = torch.tensor([1, 0, 2, 1])
STEPS = 2


def _build(tp, **options):
    torch.manual_seed(3)
    head = build_head("sequence_classification", CONFIG, tp=tp, num_labels=3)
    return BertModel(CONFIG, tp=tp, head=head, **options).train()


def _train(module, model, dp):
    """Losses of two steps on this rank's part of the samples; the weights change in place."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(1, 250, (n,), generator=generator).tolist() for n in LENGTHS]
    share = len(LENGTHS) // dp.size
    own = slice(dp.rank * share, (dp.rank + 1) * share)
    packed = pack_sequences(ids[own], sample_ids=range(own.start, own.stop))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(packed, LABELS[own], step_seed(5, step)).loss
        loss.backward()
        losses.append(all_reduce(loss.detach() / dp.size, dp).item())
        gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    return losses, gradients


class _Packed(torch.nn.Module):
    """What DistributedDataParallel calls forward of."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, packed, labels, seed):
        return self.model.forward_packed(packed, labels, seed)


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check(tp, dp, wrapper, options):
    single = TensorParallelGroup.single()
    reference = _build(single)
    table = sharding_table(reference)
    expected, expected_grads = _train(_Packed(reference), reference, DataParallelGroup.single())
    model = _build(tp, **options)
    module = _Packed(model)
    if wrapper == "ddp":
        module = DistributedDataParallel(module, process_group=dp.process_group)
    else:
        mesh = dp.device_mesh("cpu")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    losses, gradients = _train(module, model, dp)
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=0)
    full = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if wrapper == "fsdp2":
            assert isinstance(parameter, DTensor), name
            assert parameter.to_local().numel() < parameter.numel()
        for what, ours, theirs in (
            ("weight", parameter, full[name]),
            ("gradient", gradients[name], expected_grads[name]),
        ):
            part = shard(theirs.detach(), table[name], tp.rank, tp.size)
            error = (_whole(ours.detach()) - part).abs().max().item()
            scale = theirs.detach().abs().max().item()
            assert error <= 2e-5 * scale + 1e-7, f"{what} of {name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True, "activation_checkpointing": "full"}],
    ids=["plain", "sequence-checkpointing"],
)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_steps_are_those_of_one_process(wrapper, options):
    run_mesh(_check, 2, 2, wrapper, options)


def _check_mixed_precision(tp, dp):
    """FSDP2 hands bfloat16 copies of the weights to the layers, and sums gradients in float32."""
    model = _build(tp)
    module = _Packed(model)
    fully_shard(
        module,
        mesh=dp.device_mesh("cpu"),
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32),
    )
    losses, gradients = _train(module, model, dp)
    reference = _build(TensorParallelGroup.single())
    expected, _ = _train(_Packed(reference), reference, DataParallelGroup.single())
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert losses != expected, "nothing ran in bfloat16"
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_fsdp2_with_bfloat16_weights():
    run_mesh(_check_mixed_precision, 2, 2)


def test_a_process_alone_has_no_mesh():
    with pytest.raises(ValueError, match="this process alone has no device mesh; start"):
        DataParallelGroup.single().device_mesh("cpu")
