"""tpcore plan: step time and memory of a model over many ranks, from sizes and measured speeds."""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import TYPE_CHECKING

from tpcore.cli.options import Commands, positive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tpcore.models.config import BertConfig
    from tpcore.models.cost import Device, Layout

_PRECISIONS = ("32", "bf16-mixed", "bf16")


def add_commands(commands: Commands) -> None:
    """Add `plan` to the command line."""
    plan = commands.add_parser(
        "plan",
        help="estimate step time and memory for numbers of ranks",
        description="Estimate a training step for every split of some ranks into tensor- and "
        "data-parallel groups. Each term is work over a measured speed (docs/plan.md); speeds that "
        "are not given are measured here. Nothing is taken to overlap.",
    )
    plan.add_argument("model", help="checkpoint of any format, or the name of a released model")
    plan.add_argument(
        "--ranks",
        type=_positives,
        default=[1, 2, 4, 8],
        metavar="N,N,...",
        help="numbers of ranks; 1,2,4,8",
    )
    plan.add_argument(
        "--tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens of one step on one replica; 4096",
    )
    plan.add_argument(
        "--length",
        type=positive,
        default=128,
        metavar="N",
        help="tokens that a token attends to on average; 128",
    )
    plan.add_argument(
        "--predicted-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a step that go through the vocabulary (masked language model); 0",
    )
    plan.add_argument("--precision", choices=_PRECISIONS, default="bf16-mixed")
    plan.add_argument(
        "--sequence-parallel",
        choices=("both", "on", "off"),
        default="both",
        help="which of the two to list for splits over several ranks; both",
    )
    plan.add_argument("--activation-checkpointing", choices=("full", "selective"))
    device = plan.add_argument_group("the device of one rank, as measured")
    device.add_argument(
        "--accelerator",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where to measure what is not given; cpu",
    )
    device.add_argument("--matrix-tflops", type=_speed, metavar="X", help="of matrix products")
    device.add_argument("--copy-gb-per-s", type=_speed, metavar="X", help="bytes read and written")
    device.add_argument("--memory-gib", type=_speed, metavar="X", help="of one rank")
    device.add_argument(
        "--link-gb-per-s", type=_speed, metavar="X", help="what a rank sends within its host"
    )
    device.add_argument("--link-latency-us", type=_speed, default=10.0, metavar="X")
    device.add_argument("--ranks-per-host", type=positive, default=8, metavar="N")
    device.add_argument(
        "--network-gb-per-s", type=_speed, metavar="X", help="what a rank sends to another host"
    )
    device.add_argument("--network-latency-us", type=_speed, default=30.0, metavar="X")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    config = _config(arguments.model)
    most = max(arguments.ranks)
    if most > 1 and arguments.link_gb_per_s is None:
        raise ValueError(
            f"--ranks {most} needs --link-gb-per-s, what a rank sends to another one of its host; "
            "benchmarks/collectives.py measures it for CPU ranks"
        )
    if most > arguments.ranks_per_host and arguments.network_gb_per_s is None:
        raise ValueError(
            f"--ranks {most} with --ranks-per-host {arguments.ranks_per_host} needs "
            "--network-gb-per-s, what a rank sends to another host"
        )
    device = _device(arguments)
    print(
        f"{arguments.model}: {config.num_layers} layers, hidden size {config.hidden_size}; "
        f"{arguments.tokens} tokens a step and replica, {arguments.length} keys a token, "
        f"{arguments.precision}"
    )
    print(
        f"one rank: {device.matrix_flops_per_s / 1e12:.3g} TFLOP/s, "
        f"copy {device.copy_bytes_per_s / 1e9:.3g} GB/s, {device.memory_bytes / 2**30:.3g} GiB"
    )
    header = ("ranks", "tp", "dp", "sp", "step ms", "tokens/s", "MFU", "sent", "memory GiB", "")
    layouts = list(_layouts(config, arguments))
    rows = [_row(config, layout, device) for layout in layouts]
    if not rows:
        raise ValueError(
            f"--ranks {','.join(map(str, arguments.ranks))}: no split suits "
            f"num_attention_heads={config.num_attention_heads}"
        )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
    for ranks, group in groupby(layouts, key=lambda layout: layout.ranks):
        print(f"{ranks} rank{'s' if ranks > 1 else ''}: {_best(config, list(group), device)}")
    return 0


def _best(config: BertConfig, layouts: list[Layout], device: Device) -> str:
    """The split with the most tokens per second among those that fit, in words."""
    from tpcore.models import cost

    def memory(layout: Layout) -> int:
        return cost.memory_of_rank(config, layout).total

    def seconds_per_token(layout: Layout) -> float:
        step_s = cost.step_time(config, layout, device).total_s
        return step_s / (layout.tokens * layout.data_parallel_size)

    fitting = [layout for layout in layouts if memory(layout) <= device.memory_bytes]
    if not fitting:
        least = min(map(memory, layouts)) / 2**30
        return f"nothing fits; a rank needs {least:.2f} GiB at least"
    best = min(fitting, key=seconds_per_token)
    parallel = ", sequence-parallel" if best.sequence_parallel else ""
    return (
        f"tp {best.tensor_parallel_size}, dp {best.data_parallel_size}{parallel} is the fastest "
        f"that fits, {1 / seconds_per_token(best):.0f} tokens/s"
    )


def _layouts(config: BertConfig, arguments: argparse.Namespace) -> Iterator[Layout]:
    from tpcore.models.cost import Layout

    for ranks in arguments.ranks:
        for tp in range(1, min(ranks, config.num_attention_heads) + 1):
            sizes = (config.num_attention_heads, config.feed_forward_size, ranks)
            if any(size % tp for size in sizes):
                continue
            listed = {"both": (False, True), "on": (True,), "off": (False,)}
            for sequence_parallel in listed[arguments.sequence_parallel] if tp > 1 else (False,):
                yield Layout(
                    tokens=arguments.tokens,
                    mean_keys=arguments.length,
                    tensor_parallel_size=tp,
                    data_parallel_size=ranks // tp,
                    sequence_parallel=sequence_parallel,
                    activation_checkpointing=arguments.activation_checkpointing,
                    precision=arguments.precision,
                    predicted_tokens=arguments.predicted_tokens,
                )


def _row(config: BertConfig, layout: Layout, device: Device) -> tuple[str, ...]:
    from tpcore.models import cost

    time = cost.step_time(config, layout, device)
    memory = cost.memory_of_rank(config, layout).total
    sent = (time.collectives_s + time.data_parallel_s) / time.total_s
    return (
        str(layout.ranks),
        str(layout.tensor_parallel_size),
        str(layout.data_parallel_size),
        "yes" if layout.sequence_parallel else "no",
        f"{1e3 * time.total_s:.1f}",
        f"{layout.tokens * layout.data_parallel_size / time.total_s:.0f}",
        f"{cost.efficiency(config, layout, device):.0%}",
        f"{sent:.0%}",
        f"{memory / 2**30:.2f}",
        "" if memory <= device.memory_bytes else "does not fit",
    )


def _config(model: str) -> BertConfig:
    from pathlib import Path

    from tpcore import checkpoint
    from tpcore.models.config import PRESETS

    # A local file wins over a name.
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model]
    return checkpoint.inspect(model).config


def _device(arguments: argparse.Namespace) -> Device:
    from tpcore.models.cost import Device

    matrix, copied, memory = (
        None if value is None else value * unit
        for value, unit in (
            (arguments.matrix_tflops, 1e12),
            (arguments.copy_gb_per_s, 1e9),
            (arguments.memory_gib, 2.0**30),
        )
    )
    if matrix is None or copied is None or memory is None:
        import torch

        from tpcore.train import measure

        name = "cuda" if arguments.accelerator == "gpu" else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--accelerator gpu: torch sees no CUDA device; give the speeds instead"
            )
        dtype = torch.float32 if arguments.precision == "32" else torch.bfloat16
        matrix = matrix or measure.matrix_flops_per_s(name, dtype)
        copied = copied or measure.copy_bytes_per_s(name)
        memory = memory or measure.memory_bytes(name)
    # Without ranks that need them these two are never read.
    link = arguments.link_gb_per_s or 1.0
    return Device(
        matrix_flops_per_s=matrix,
        copy_bytes_per_s=copied,
        memory_bytes=memory,
        link_bytes_per_s=link * 1e9,
        link_latency_s=arguments.link_latency_us * 1e-6,
        ranks_per_host=arguments.ranks_per_host,
        network_bytes_per_s=(arguments.network_gb_per_s or link) * 1e9,
        network_latency_s=arguments.network_latency_us * 1e-6,
    )


def _positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _speed(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
