"""The cost model counts what is there: parameters, saved activations, floating-point operations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.device import on_the_cpu
from tests.helpers.ranks import run_ranks
from tpcore._native import status
from tpcore.models import cost
from tpcore.models.bert import BertModel
from tpcore.models.config import PRESETS, BertConfig
from tpcore.models.cost import Device, Layout
from tpcore.models.packing import pack_sequences

LENGTHS = (17, 30, 9, 40)
CONFIG = BertConfig(vocab_size=100, hidden_size=64, num_layers=2, num_attention_heads=4)
DEVICE = Device(
    matrix_flops_per_s=1e12, copy_bytes_per_s=1e11, memory_bytes=8e9, link_bytes_per_s=1e10
)


def _step(config, tp, *, dtype=torch.float32, autocast=False, **model_kwargs):
    """Run forward and backward; bytes that autograd kept beside the parameters, and operations."""
    torch.manual_seed(0)
    model = BertModel(config, tp=tp, dtype=dtype, **model_kwargs).train()
    batch = pack_sequences([list(range(length)) for length in LENGTHS])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with FlopCounterMode(display=False) as flops:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            output = model.forward_packed(batch, seed=1).last_hidden_state
        output.sum().backward()
    return sum(size for size, _ in kept.values()), flops.get_total_flops()


def _layer_bytes(tp, precision, sequence_parallel, checkpointing):
    """What one more layer makes autograd keep."""
    kwargs = {
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "autocast": precision == "bf16-mixed",
        "sequence_parallel": sequence_parallel,
        "activation_checkpointing": checkpointing,
    }
    few, _ = _step(CONFIG.replace(num_layers=1), tp, **kwargs)
    many, _ = _step(CONFIG.replace(num_layers=3), tp, **kwargs)
    return (many - few) / 2


@on_the_cpu
@pytest.mark.skipif(not status("cpu").loaded, reason="counts what the native kernels keep")
@pytest.mark.parametrize("precision", cost.PRECISIONS)
@pytest.mark.parametrize("checkpointing", [None, "selective", "full"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_activation_bytes(size, checkpointing, precision):
    for sequence_parallel in (False, True) if size > 1 else (False,):
        layout = Layout(
            tokens=sum(LENGTHS),
            mean_keys=1,
            tensor_parallel_size=size,
            sequence_parallel=sequence_parallel,
            activation_checkpointing=checkpointing,
            precision=precision,
        )
        kept = run_ranks(_layer_bytes, size, precision, sequence_parallel, checkpointing)
        assert kept == [cost.activation_bytes(CONFIG, layout)] * size


def test_the_documented_table():
    """docs/plan.md: KiB a token and layer, the paper's from its formulas and ours as counted."""
    config = PRESETS["megatron-bert-345m-uncased"]
    h, n = config.hidden_size, config.num_attention_heads
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text()
    rows = re.findall(r"^\| (128|512) \| (\d) \| (no|yes) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 10
    for row in rows:
        s, tp, sequence_parallel = int(row[0]), int(row[1]), row[2] == "yes"

        def ours(precision, checkpointing, tp=tp, s=s, sequence_parallel=sequence_parallel):
            layout = Layout(
                tokens=4096,
                mean_keys=s,
                tensor_parallel_size=tp,
                sequence_parallel=sequence_parallel,
                activation_checkpointing=checkpointing,
                precision=precision,
            )
            return cost.activation_bytes(config, layout) / 4096

        # arXiv 2205.05198, equations 2 and 4, table 2.
        whole, split = (0, 34) if sequence_parallel else (10, 24)
        counts = [whole * h + (split * h + 5 * n * s) / tp, whole * h + split * h / tp]
        counts += [ours(p, c) for p in ("bf16", "32") for c in (None, "full")]
        assert row[3].split(" | ") == [f"{count / 1024:.1f}" for count in counts]


def _count_parameters(tp, config):
    return sum(p.numel() for p in BertModel(config, tp=tp).parameters())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"add_pooler": False, "num_token_types": 0}])
def test_parameters(size, changes):
    config = CONFIG.replace(**changes)
    counts = run_ranks(_count_parameters, size, config)
    assert counts == [cost.parameters_of_rank(config, size)] * size


@on_the_cpu
def test_operations_of_the_linear_layers():
    layers = CONFIG.num_layers
    counted = _step(CONFIG, None)[1] - _step(CONFIG.replace(num_layers=1), None)[1]
    layout = Layout(tokens=sum(LENGTHS), mean_keys=30)
    attention = 3.5 * 4 * layout.tokens * layout.mean_keys * CONFIG.hidden_size
    assert counted == cost.step_flops(CONFIG, layout) / layers - attention


def test_one_rank_sends_nothing():
    time = cost.step_time(CONFIG, Layout(tokens=96, mean_keys=30), DEVICE)
    assert time.collectives_s == time.data_parallel_s == 0
    assert time.total_s == time.products_s + time.kernels_s + time.optimizer_s


def test_collectives_by_hand():
    # A gather or scatter of 1000 x 64 bfloat16 numbers over 4 ranks: three messages of a quarter.
    one = 3 * (1000 * 64 * 2 / 4 / 1e10 + 10e-6)
    layout = Layout(tokens=1000, mean_keys=30, tensor_parallel_size=4)
    # Four all-reduces a layer, each a scatter and a gather.
    assert cost.step_time(CONFIG, layout, DEVICE).collectives_s == pytest.approx(2 * 8 * one)
    sequence = Layout(**{**vars(layout), "sequence_parallel": True})
    assert cost.step_time(CONFIG, sequence, DEVICE).collectives_s == pytest.approx(2 * 10 * one)


def test_network_beyond_a_host():
    def data_parallel_s(ranks):
        layout = Layout(tokens=1000, mean_keys=30, data_parallel_size=ranks)
        return cost.step_time(CONFIG, layout, DEVICE).data_parallel_s

    gradients = 4 * cost.parameters_of_rank(CONFIG)
    # In a tree of 8 a message goes 3 steps up and 3 down.
    assert data_parallel_s(8) == pytest.approx(2 * 7 / 8 * gradients / 1e10 + 2 * 3 * 10e-6)
    slow = Device(**{**vars(DEVICE), "network_bytes_per_s": 1e9, "network_latency_s": 1e-3})
    layout = Layout(tokens=1000, mean_keys=30, data_parallel_size=16)
    time = cost.step_time(CONFIG, layout, slow).data_parallel_s
    assert time == pytest.approx(2 * 15 / 16 * gradients / 1e9 + 2 * 4 * 1e-3)


def test_efficiency_is_products_over_all():
    layout = Layout(tokens=96, mean_keys=30)
    time = cost.step_time(CONFIG, layout, DEVICE)
    assert cost.efficiency(CONFIG, layout, DEVICE) == time.products_s / time.total_s
    # What is computed twice does not count as useful.
    again = Layout(tokens=96, mean_keys=30, activation_checkpointing="full")
    assert cost.efficiency(CONFIG, again, DEVICE) < cost.efficiency(CONFIG, layout, DEVICE)


def test_full_checkpointing_keeps_one_layer_more():
    layout = Layout(tokens=96, mean_keys=30, activation_checkpointing="full", precision="32")
    layers = CONFIG.num_layers * 96 * 64 * 4
    one = cost.activation_bytes(CONFIG, Layout(tokens=96, mean_keys=30, precision="32"))
    assert cost.memory_of_rank(CONFIG, layout).activations == layers + one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(tokens=0, mean_keys=1), "tokens=0 is below 1"),
        (lambda: Layout(tokens=1, mean_keys=1, precision="fp8"), "precision='fp8' is unknown"),
        (lambda: Device(**{**vars(DEVICE), "link_latency_s": 0}), "link_latency_s=0 is not"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
