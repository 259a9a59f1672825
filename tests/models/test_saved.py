"""What is kept: nothing twice for the backward, and nothing at all without one."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch

from tests.helpers.device import on_the_cpu
from tests.helpers.ranks import run_ranks
from tests.train.tiny import config, write_inputs
from tpcore._native import status
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.tasks.sections import DataConfig
from tpcore.train.evaluation import evaluate
from tpcore.train.prepare import build_model, prepare

pytestmark = [
    on_the_cpu,
    pytest.mark.skipif(not status("cpu").loaded, reason="about what the native kernels keep"),
]

CONFIG = BertConfig(vocab_size=100, hidden_size=64, num_layers=2, num_attention_heads=4)
LENGTHS = (17, 30, 9, 40)


def _saved_storages(model, autocast=False):
    """A saved tensor of each storage that autograd keeps, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters and tensor.numel():
            kept.setdefault(pointer, tensor.detach())
        return tensor

    packed = pack_sequences([[(3 * i + n) % 100 for i in range(n)] for n in LENGTHS])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = model.forward_packed(packed, seed=1).last_hidden_state
    return list(kept.values()), output


def _repeated(tp, precision, **kwargs):
    """Shapes of saved tensors of the batch's size whose contents are saved elsewhere, too."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = BertModel(CONFIG, tp=tp, dtype=dtype, **kwargs).train()
    # Biases and norms that are not trivial: no coincidence of equal values.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    saved, _output = _saved_storages(model, precision == "bf16-mixed")
    # Ids and masks of so few values may be equal by chance.
    large = [x for x in saved if x.is_floating_point() and x.numel() >= sum(LENGTHS)]
    assert len(large) > 10
    pairs = itertools.combinations(large, 2)
    return [
        (tuple(a.shape), str(a.dtype))
        for a, b in pairs
        if a.numel() == b.numel() and torch.equal(a.reshape(-1).double(), b.reshape(-1).double())
    ]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_saved_twice(size, precision):
    for sequence_parallel in (False, True) if size > 1 else (False,):
        found = run_ranks(_repeated_with, size, precision, sequence_parallel)
        assert found == [[]] * size


def _repeated_with(tp, precision, sequence_parallel):
    return _repeated(tp, precision, sequence_parallel=sequence_parallel)


def test_a_copy_would_be_found():
    class Copying(torch.nn.Module):
        def forward(self, x):
            return x.exp() * x.clone().exp()

    model = BertModel(CONFIG, tp=TensorParallelGroup.single()).train()
    model.blocks[0].register_forward_hook(lambda block, args, y: Copying()(y))
    saved, _output = _saved_storages(model)
    assert any(
        a.shape == b.shape and torch.equal(a, b) for a, b in itertools.combinations(saved, 2)
    )


def test_evaluation_keeps_nothing(tmp_path):
    job = prepare(config(write_inputs(tmp_path)))
    tp, dp, cpu = TensorParallelGroup.single(), DataParallelGroup.single(), torch.device("cpu")
    model = build_model(job, tp, cpu)
    saved, outputs, alive = [], [], []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, y: outputs.append(weakref.ref(y)))

    def count_alive(*_):
        gc.collect()
        alive.append([reference() is not None for reference in outputs[-len(model.blocks) :]])

    model.final_norm.register_forward_pre_hook(count_alive)

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()
        model.forward_packed(job.task.collate(job.train.examples[:2], cpu).packed)
        assert saved
        saved.clear()
        data = DataConfig(batch_size=4)
        evaluation = evaluate(model, job.task, job.validation, data=data, dp=dp, device=cpu)
    assert len(evaluation.predictions) == len(job.validation.examples)
    assert not saved
    # The training call came first; when the final norm begins, only its input is still there.
    assert len(alive) > 2
    assert alive[1:] == [[False] * (len(model.blocks) - 1) + [True]] * (len(alive) - 1)
