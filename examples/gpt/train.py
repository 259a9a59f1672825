"""Train a small byte-level GPT on a piece of The Adventures of Sherlock Holmes.

python examples/gpt/train.py                                    one process
torchrun --nproc-per-node 2 examples/gpt/train.py               the same losses on two ranks
torchrun --nproc-per-node 2 examples/gpt/train.py --api megatron
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the two models lie beside this file

from gpt_config import Config  # noqa: E402 - after the path

from tpcore.checkpoint import save_sharded  # noqa: E402
from tpcore.parallel import TensorParallelGroup, destroy_parallel, init_parallel  # noqa: E402
from tpcore.parallel.random import step_seed  # noqa: E402

# One step: tokens [b, s], targets [b, s], sample_ids [b], number of the step -> loss.
Step = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def build_tpcore(config: Config, seed: int, tp: TensorParallelGroup) -> tuple[nn.Module, Step]:
    """The model of tpcore's layers, and how it makes one step."""
    from gpt_tpcore import GPT

    torch.manual_seed(seed)
    model = GPT(config, tp)
    return model, lambda tokens, targets, ids, n: model(tokens, targets, ids, step_seed(seed, n))


def build_megatron(config: Config, seed: int) -> tuple[nn.Module, Step]:
    """The model by Megatron's names, whose groups exist already, and how it makes one step."""
    from gpt_megatron import GPT

    from tpcore.interop.megatron.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    model = GPT(config)
    return model, lambda tokens, targets, ids, n: model(tokens, targets)


def batches(config: Config, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, the bytes that follow them, and sample numbers; the same on every rank, for ever."""
    text = torch.frombuffer(bytearray((HERE / "text.txt").read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    first = 0
    while True:
        starts = torch.randint(len(text) - config.max_length, (batch_size, 1), generator=generator)
        pieces = text[starts + torch.arange(config.max_length + 1)]
        yield pieces[:, :-1], pieces[:, 1:], torch.arange(first, first + batch_size)
        first += batch_size


def train(
    model: nn.Module,
    step: Step,
    config: Config,
    *,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, float], object] = lambda number, loss: None,
) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    device = next(model.parameters()).device
    losses = []
    for number, batch in zip(range(steps), batches(config, batch_size, seed), strict=False):
        optimizer.zero_grad()
        loss = step(*(tensor.to(device) for tensor in batch), number)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        report(number, losses[-1])
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--api", choices=["tpcore", "megatron"], default="tpcore")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=None, help="default: --dropout")
    parser.add_argument("--save", type=Path, help="folder for the trained model, at any size")
    options = parser.parse_args(arguments)
    attention_dropout = options.attention_dropout
    config = Config(
        dropout=options.dropout,
        attention_dropout=options.dropout if attention_dropout is None else attention_dropout,
    )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.api == "tpcore":
        tp, _ = init_parallel(size)
        model, step = build_tpcore(config, options.seed, tp)
    else:
        from tpcore.interop.megatron import parallel_state

        parallel_state.initialize_model_parallel(size)
        tp = parallel_state.tensor_parallel_group()
        model, step = build_megatron(config, options.seed)

    if torch.cuda.is_available():
        model.cuda()

    def report(number: int, loss: float) -> None:
        if tp.rank == 0 and (number % 20 == 0 or number == options.steps - 1):
            print(f"step {number:4d} | loss {loss:.6f}", flush=True)

    train(model, step, config, steps=options.steps, seed=options.seed, report=report)
    if options.save is not None:
        save_sharded(model, options.save, tp=tp, overwrite=True)
    destroy_parallel()


if __name__ == "__main__":
    main()
