"""The sides of benchmarks/finetune.py: each is a process (or one a rank) that waits its turn.

A side builds its model and its batches, and then answers messages: a pass over the batches of a
way of padding, or its peak of memory. Processes of their own keep the peaks apart.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.packing import PackedBatch, pack_sequences
from tpcore.parallel.group import TensorParallelGroup
from tpcore.train.config import OptimConfig
from tpcore.train.optimizer import build_optimizer, step_weights
from tpcore.train.precision import PRECISIONS, Weights

VOCABULARY = 30522
MODELS: dict[str, dict[str, Any]] = {
    "MiniLM-L6": {"layers": 6, "hidden": 384, "heads": 12, "post": True, "eps": 1e-12},
    "345m": {"layers": 24, "hidden": 1024, "heads": 16, "post": False, "eps": 1e-12},
    "tiny": {"layers": 2, "hidden": 32, "heads": 2, "post": False, "eps": 1e-12},
}
now = time.perf_counter  # the clock of this process
NUM_LABELS = {"sequence_classification": 2, "token_classification": 13, "question_answering": 2}
Example = tuple[list[int], Any]  # ids and label: a class, a class for each token, or a span


@dataclass(frozen=True)
class Case:
    """What every side computes.

    Attributes:
        batches: by the way of padding ("packed", "max", "dynamic", "grouped"), lists of examples.
        max_length: what "max" pads to.
    """

    model: str
    task: str
    dtype: str
    train: bool
    max_length: int
    batches: dict[str, list[list[Example]]]

    def tokens(self, way: str) -> int:
        return sum(len(ids) for batch in self.batches[way] for ids, _ in batch)

    def examples(self, way: str) -> int:
        return sum(map(len, self.batches[way]))


@dataclass(frozen=True)
class Side:
    """tpcore at a size, the products alone, or a model of transformers."""

    kind: str  # "tpcore", "floor", "MegatronBert", "Bert"
    size: int = 1
    attention: str = "eager"  # of transformers
    compiled: bool = False
    autocast: bool = False  # else the weights are in the dtype

    @property
    def name(self) -> str:
        if self.kind == "floor":
            return "products only"
        if self.kind == "tpcore":
            return f"tpcore, tp {self.size}"
        parts = [self.kind, self.attention, "compile" if self.compiled else ""]
        return " ".join(filter(None, parts)) + (", autocast" if self.autocast else "")


class Ranks:
    """The processes of a side."""

    def __init__(self, side: Side, case: Case, threads: int, clock: str, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(side.size):
            ours, theirs = context.Pipe()
            args = (theirs, store, rank, side, case, max(1, threads // side.size), clock)
            process = context.Process(target=_serve, args=args)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def ask(self, *message: Any) -> list[Any]:
        for connection in self.connections:
            connection.send(message)
        return self.answers()

    def answers(self) -> list[Any]:
        return [connection.recv() for connection in self.connections]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(("stop",))
        for process in self.processes:
            process.join()


def _serve(
    connection: Connection,
    store: str,
    rank: int,
    side: Side,
    case: Case,
    threads: int,
    clock: str,
) -> None:
    global now
    if clock == "cpu":
        now = time.process_time
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tp = TensorParallelGroup.single()
    if side.size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=side.size
        )
        tp = TensorParallelGroup.from_process_group(dist.group.WORLD, shared_memory=True)
    if side.kind == "floor":
        run = _floor(case)
    else:
        run = _tpcore(case, tp) if side.kind == "tpcore" else _transformers(case, side)
    connection.send("ready")
    while (message := connection.recv())[0] != "stop":
        connection.send(_peak_mib() if message[0] == "memory" else run(*message[1:]))
    if side.size > 1:
        dist.destroy_process_group()


def _peak_mib() -> float:
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) / 1024


def _timed(
    case: Case, steps: list[Callable[[], Any]], optimize: Callable[[], None]
) -> tuple[float, float]:
    """Seconds of all steps, and of their optimizer."""
    total = of_optimizer = 0.0
    for step in steps:
        start = now()
        if case.train:
            step().backward()
            middle = now()
            optimize()
            of_optimizer += now() - middle
        else:
            with torch.inference_mode():
                step()
        total += now() - start
    return total, of_optimizer


def _tpcore(case: Case, tp: TensorParallelGroup) -> Callable[..., Any]:
    sizes = MODELS[case.model]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        post_layernorm=sizes["post"],
        embedding_dropout_after_norm=sizes["post"],
        layernorm_eps=sizes["eps"],
        add_pooler=case.task == "sequence_classification",
    )
    kwargs = {} if case.task == "question_answering" else {"num_labels": NUM_LABELS[case.task]}
    head = build_head(case.task, config, tp=tp, **kwargs)
    model = BertModel(config, tp=tp, head=head)
    model.train(case.train)
    weights = None
    if case.train:
        weights = Weights(model, PRECISIONS["bf16" if case.dtype == "bf16" else "32"])
        optimizer = build_optimizer(weights.main, OptimConfig(lr=1e-6), weights.copies)
    elif case.dtype == "bf16":
        model.to(torch.bfloat16)
    packed: dict[str, list[tuple[PackedBatch, Tensor]]] = {}
    for way, batches in case.batches.items():
        if way == "packed":
            packed[way] = [(_packed(b), _packed_labels(b, case.task)) for b in batches]
    number = 0

    def step(batch: PackedBatch, labels: Tensor) -> Any:
        nonlocal number
        number += 1
        return model.forward_packed(
            batch, labels if case.train else None, seed=number, hidden_states=False
        ).loss

    def optimize() -> None:
        assert weights is not None
        weights.collect_gradients()
        step_weights(optimizer, weights)
        weights.zero_gradients()

    def run(way: str, first: int, last: int) -> tuple[float, float]:
        chosen = packed[way][first:last]
        return _timed(case, [lambda b=b: step(*b) for b in chosen], optimize)

    return run


def _packed(batch: list[Example]) -> PackedBatch:
    return pack_sequences([ids for ids, _ in batch])


def _packed_labels(batch: list[Example], task: str) -> Tensor:
    if task == "token_classification":
        return torch.tensor([label for _, labels in batch for label in labels])
    return torch.tensor([label for _, label in batch])


def _transformers(case: Case, side: Side) -> Callable[..., Any]:
    import transformers

    sizes = MODELS[case.model]
    config = getattr(transformers, f"{side.kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["hidden"],
        layer_norm_eps=sizes["eps"],
        num_labels=NUM_LABELS[case.task],
    )
    config._attn_implementation = side.attention
    kind = "".join(word.capitalize() for word in case.task.split("_"))
    model = getattr(
        transformers,
        f"{side.kind}For{kind.replace('Classification', '')}"
        f"{'Classification' if 'classification' in case.task else ''}",
    )(config)
    dtype = torch.bfloat16 if case.dtype == "bf16" and not side.autocast else torch.float32
    model = model.to(dtype).train(case.train)
    if side.compiled:
        for layer in next(m for m in model.modules() if hasattr(m, "layer")).layer:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if case.train else None
    padded = {
        way: [_padded(b, case, case.max_length if way == "max" else None) for b in batches]
        for way, batches in case.batches.items()
        if way != "packed"
    }

    def step(batch: dict[str, Tensor]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=side.autocast):
            output = model(**batch)
        return output.loss if case.train else output

    def optimize() -> None:
        assert optimizer is not None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(way: str, first: int, last: int) -> tuple[float, float]:
        return _timed(case, [lambda b=b: step(b) for b in padded[way][first:last]], optimize)

    return run


def _padded(batch: list[Example], case: Case, length: int | None) -> dict[str, Tensor]:
    length = length or max(len(ids) for ids, _ in batch)

    def rectangle(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    result = {"input_ids": rectangle([ids for ids, _ in batch], 0)}
    if any(len(ids) < length for ids, _ in batch):
        result["attention_mask"] = rectangle([[1] * len(ids) for ids, _ in batch], 0)
    if not case.train:
        return result
    labels = [label for _, label in batch]
    if case.task == "token_classification":
        result["labels"] = rectangle(labels, -100)
    elif case.task == "question_answering":
        result["start_positions"], result["end_positions"] = torch.tensor(labels).unbind(1)
    else:
        result["labels"] = torch.tensor(labels)
    return result


def _floor(case: Case) -> Callable[..., Any]:
    """The products that tpcore needs, on tensors that are there already.

    Four layers with weights of their own stand for all. Products of attention are counted at the
    rate of the best product, and those of embeddings, pooler and heads left out.
    """
    hidden, layers = MODELS[case.model]["hidden"], MODELS[case.model]["layers"]
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    shapes = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
    copies = min(4, layers)
    weights = [[torch.randn(s, dtype=dtype) for s in shapes] for _ in range(copies)]
    square = [torch.randn(2048, 2048, dtype=dtype) for _ in range(2)]
    inputs = {}
    counts = {len(ids) for way in case.batches for b in case.batches[way] for ids in [_joined(b)]}
    counts |= {len(b) for b in case.batches["packed"]}
    for count in counts:
        inputs[count] = [torch.randn(count, n * hidden, dtype=dtype) for n in (1, 3, 4)]

    def layer(number: int, kinds: list[int], count: int) -> float:
        wide = {hidden * n: x for n, x in zip((1, 3, 4), inputs[count], strict=True)}
        start = now()
        for i in kinds:
            weight = weights[number][i]
            x, y = wide[weight.shape[1]], wide[weight.shape[0]]
            torch.nn.functional.linear(x, weight)
            if case.train:
                y @ weight
                y.t() @ x
        return now() - start

    def products(batch: list[Example]) -> float:
        count = len(_joined(batch))
        times = [layer(i % copies, [0, 1, 2, 3], count) for i in range(copies)]
        seconds = statistics.mean(times) * layers
        if case.task == "sequence_classification":
            # Of the last layer, one token of each sequence is needed after its attention.
            seconds += layer(0, [1, 2, 3], len(batch)) - layer(0, [1, 2, 3], count)
        return seconds

    def run(way: str, first: int, last: int) -> tuple[float, float]:
        if way == "best":
            start = now()
            square[0] @ square[1]
            return 2 * 2048**3 / (now() - start), 0.0
        return sum(products(batch) for batch in case.batches[way][first:last]), 0.0

    with torch.inference_mode():
        for _ in range(2):
            run("best", 0, 0)
    return torch.inference_mode()(run)


def _joined(batch: list[Example]) -> list[int]:
    return [i for ids, _ in batch for i in ids]


def flops(case: Case, way: str) -> tuple[float, float]:
    """Of a pass of tpcore: all matrix products of the layers, and those of attention alone."""
    hidden, layers = MODELS[case.model]["hidden"], MODELS[case.model]["layers"]
    factor = 3 if case.train else 1
    dense = attention = 0.0
    for batch in case.batches[way]:
        lengths = [len(ids) for ids, _ in batch]
        dense += 24 * hidden**2 * sum(lengths) * layers
        if case.task == "sequence_classification":
            dense -= 18 * hidden**2 * (sum(lengths) - len(lengths))
        attention += 4 * hidden * sum(n * n for n in lengths) * layers
    return factor * (dense + attention), factor * attention
