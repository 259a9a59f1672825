"""The forward and backward pass of a 345m encoder against transformers, in one run.

    python -m benchmarks.encoder [--dtypes bf16 fp32] [--seconds 150]
    python -m benchmarks.encoder --device cpu --layers 2 --hidden 64 --heads 2 --batch 2 --length 16

Two batches of one number of sequences: "full", all of them as long as the encoder takes, and
"mixed", with lengths spread evenly from a sixteenth of that, which tpcore packs and transformers
pads; only real tokens count. Dropout is on. dtype: "fp32", "bf16" (weights too), or "autocast"
(float32 weights, bfloat16 products, as the trainer does it). Percent of peak: the matrix products
that the real tokens need (forward, and twice that backward) over what one large product reaches in
the same dtype and run. Peers that do not work here are named under the table with their reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import measure
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup

COLUMNS = (
    "batch",
    "dtype",
    "provider",
    "median_ms",
    "min_ms",
    "tokens_per_s",
    "percent_of_matrix_peak",
    "peak_memory_gb",
    "tpcore_is_faster_by",
)
DTYPES = ("bf16", "autocast", "fp32")
Step = Callable[[], object]


class Batch:
    """Token ids of some lengths, packed and padded."""

    def __init__(self, lengths: list[int], vocabulary: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randint, 5, vocabulary, generator=generator, device="cpu")
        ids = [draw((length,)).tolist() for length in lengths]
        self.lengths, self.device = lengths, device
        self.packed = pack_sequences(ids, device=torch.device(device))
        padded = [torch.tensor(i, device="cpu") for i in ids]
        self.ids = nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device)
        mask = (
            torch.arange(max(lengths), device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
        )
        self.mask = mask.to(device, torch.int64)

    def flops(self, hidden: int, layers: int) -> float:
        """Of the matrix products of a step."""
        products = sum(24 * hidden**2 * n + 4 * hidden * n**2 for n in self.lengths)
        return 3.0 * layers * products


def _numbers(options: argparse.Namespace) -> dict[str, int]:
    return {
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.hidden,
        "max_position_embeddings": options.length,
    }


def tpcore_step(options: argparse.Namespace, batch: Batch, dtype: str) -> Step:
    """tpcore's step: the packed batch, a fresh seed each time."""
    config = BertConfig(num_layers=options.layers, add_pooler=False, **_numbers(options))
    model = BertModel(
        config, tp=TensorParallelGroup.single(), device=batch.device, dtype=weights_dtype(dtype)
    ).train()
    seed = torch.zeros(1, dtype=torch.int64, device=batch.device)

    def forward() -> Tensor:
        seed.add_(1)
        return model.forward_packed(batch.packed, seed=seed).last_hidden_state

    return step_of(model, forward, dtype, batch.device)


def transformers_step(
    name: str,
    attention: str,
    compile_layers: bool,
    options: argparse.Namespace,
    batch: Batch,
    dtype: str,
) -> Step:
    """The step of a model of transformers; with `compile_layers` each layer is one graph."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=options.layers, **_numbers(options)
    )
    config._attn_implementation = attention
    kind = getattr(transformers, f"{name}Model")
    if attention == "sdpa" and not getattr(kind, "_supports_sdpa", False):
        raise ValueError(f"{name}Model has no attention by SDPA")
    model = kind(config, add_pooling_layer=False)
    model = model.to(batch.device, weights_dtype(dtype)).train()
    if compile_layers:
        torch.compiler.reset()
        for layer in model.encoder.layer:
            layer.compile()
    whole = bool(batch.mask.all())
    mask = None if whole else batch.mask

    def forward() -> Tensor:
        return model(batch.ids, attention_mask=mask).last_hidden_state

    return step_of(model, forward, dtype, batch.device)


PROVIDERS: dict[str, Callable[[argparse.Namespace, Batch, str], Step]] = {
    "tpcore": tpcore_step,
    "MegatronBert eager": functools.partial(transformers_step, "MegatronBert", "eager", False),
    "MegatronBert compile": functools.partial(transformers_step, "MegatronBert", "eager", True),
    "MegatronBert sdpa": functools.partial(transformers_step, "MegatronBert", "sdpa", False),
    "Bert sdpa": functools.partial(transformers_step, "Bert", "sdpa", False),
    "Bert sdpa compile": functools.partial(transformers_step, "Bert", "sdpa", True),
}


def weights_dtype(dtype: str) -> torch.dtype:
    """Of the parameters."""
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def step_of(model: nn.Module, forward: Callable[[], Tensor], dtype: str, device: str) -> Step:
    """Forward, backward and no optimizer; gradients are made anew each time."""
    autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    context = autocast if dtype == "autocast" else contextlib.nullcontext

    def step() -> None:
        with context():
            hidden = forward()
        hidden.backward(torch.ones_like(hidden))
        model.zero_grad(set_to_none=True)

    return step


def measure_step(step: Step, device: str, rounds: int) -> tuple[list[float], float | None]:
    """Times in ms, and the peak of memory in GB where the device says it."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = measure.times_ms([step], device, rounds=rounds)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return times, peak


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batches", nargs="+", default=["full", "mixed"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after so long")
    parser.add_argument("--rounds", type=int, default=8)
    for name, default in {
        "layers": 24,
        "hidden": 1024,
        "heads": 16,
        "length": 512,
        "batch": 32,
        "vocabulary": 30592,
        "matrix": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    deadline = measure.Deadline(options.seconds)
    table = measure.Table(measure.results_folder(), "gpu_encoder", COLUMNS, options.device)
    notes = [
        f"{options.layers} layers of {options.hidden}, {options.heads} heads; {options.batch} "
        f"sequences of up to {options.length} tokens; forward and backward, no optimizer"
    ]
    late: list[str] = []
    for dtype in options.dtypes:
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        peak = measure.matrix_tflops(options.matrix, kind, options.device)
        notes.append(f"{dtype}: a product of {options.matrix}^3 runs at {peak:.4g} TFLOP/s")
        for name in options.batches:
            lengths = [options.length] * options.batch
            if name == "mixed":
                least, n = max(1, options.length // 16), options.batch
                lengths = [least + (options.length - least) * i // max(1, n - 1) for i in range(n)]
            batch = Batch(lengths, options.vocabulary, options.device)
            rows: list[dict] = []
            for provider in options.providers:
                what = f"{provider}, {name}, {dtype}"
                if deadline.passed():
                    late.append(what)
                    continue
                try:
                    step = PROVIDERS[provider](options, batch, dtype)
                    times, memory = measure_step(step, options.device, options.rounds)
                except Exception as error:  # one provider's failure is a result, not the end
                    reason = measure.in_a_line(error)
                    notes.append(f"fails: {what}: {reason}")
                    continue
                finally:
                    step = None
                row = row_of(options, batch, times, peak, memory)
                rows.append({"batch": name, "dtype": dtype, "provider": provider, **row})
                if rows[0]["provider"] == "tpcore":
                    rows[-1]["tpcore_is_faster_by"] = row["median_ms"] / rows[0]["median_ms"]
                table.add(rows[-1:])
                print(", ".join(f"{c}={rows[-1].get(c)}" for c in COLUMNS), flush=True)
    if late:
        notes.append(f"no time for: {'; '.join(late)}")
    table.finish(notes)
    print("\n".join(notes))
    return 1 if any(note.startswith("fails: tpcore") for note in notes) else 0


def row_of(
    options: argparse.Namespace,
    batch: Batch,
    times: list[float],
    peak_tflops: float,
    memory_gb: float | None,
) -> dict:
    """The figures of one row."""
    median = statistics.median(times)
    tflops = batch.flops(options.hidden, options.layers) / median / 1e9
    return {
        "median_ms": median,
        "min_ms": min(times),
        "tokens_per_s": sum(batch.lengths) / median * 1e3,
        "percent_of_matrix_peak": 100 * tflops / peak_tflops,
        "peak_memory_gb": memory_gb,
    }


if __name__ == "__main__":
    sys.exit(main())
