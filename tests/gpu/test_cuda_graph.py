"""A training step captured in a CUDA graph: replayed, it drops other elements for another seed."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.device import DEVICE
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs TPCORE_TEST_DEVICE=cuda"),
]
LENGTHS = (17, 5, 32, 9, 32, 1)


class _Training:
    """A small encoder with a head, a batch, and a seed that lives on the device."""

    def __init__(self) -> None:
        tp = TensorParallelGroup.single()
        config = BertConfig(vocab_size=96, hidden_size=64, num_layers=2, num_attention_heads=4)
        torch.manual_seed(3)
        head = build_head("sequence_classification", config, tp=tp, num_labels=3)
        self.model = BertModel(config, tp=tp, head=head).train()
        ids = [[(7 * i + n) % 96 for i in range(n)] for n in LENGTHS]
        self.batch = pack_sequences(ids, device=torch.device("cuda"))
        self.labels = torch.arange(len(LENGTHS)) % 3
        self.seed = torch.zeros(1, dtype=torch.int64)

    def step(self) -> torch.Tensor:
        loss = self.model.forward_packed(self.batch, self.labels, seed=self.seed).loss
        loss.backward()
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        parameters = self.model.named_parameters()
        return {n: p.grad.clone() for n, p in parameters if p.grad is not None}

    def eager(self, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
        self.model.zero_grad(set_to_none=True)
        self.seed.fill_(seed)
        return self.step().item(), self.gradients()


def test_a_captured_step_equals_the_eager_one_for_every_seed():
    seeds = (5, 6, -(2**60))
    training = _Training()
    expected = {seed: training.eager(seed) for seed in seeds}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries make their workspaces before they are captured
            training.model.zero_grad(set_to_none=True)
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    training.model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step()

    for seed in (*seeds, seeds[0]):
        training.seed.fill_(seed)
        graph.replay()
        torch.cuda.synchronize()
        loss_expected, gradients = expected[seed]
        assert loss.item() == pytest.approx(loss_expected, rel=1e-5)
        replayed = training.gradients()
        assert replayed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(replayed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    losses = {loss for loss, _ in expected.values()}
    assert len(losses) == len(seeds), "the seed changes nothing"
