"""Runs every compiled op on fixed inputs and saves what comes out; argument: the output file.

A process of its own, because an instruction set is chosen once per process (TPCORE_CPU_ISA).
"""

from __future__ import annotations

import sys

import torch

from tpcore import _native, kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, COLUMNS = 37, 83


def _results() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, residual, weight, bias, grad = (
        draw(ROWS, COLUMNS),
        draw(ROWS, COLUMNS),
        draw(COLUMNS),
        draw(COLUMNS),
        draw(ROWS, COLUMNS),
    )
    seed, row_ids = torch.tensor([1234567890123]), torch.arange(ROWS) << 20
    results = {"mask": _native.dropout_keep_mask(0.3, seed, 5, row_ids, COLUMNS, column_offset=3)}
    key = {"p": 0.2, "seed": seed, "stream": 9, "row_ids": row_ids}
    calls = {
        "layer_norm": lambda x, r, w, b: kernels.layer_norm(x, w, b),
        "add_layer_norm": lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b)[0],
        "bias_dropout_residual": lambda x, r, w, b: kernels.bias_dropout_residual(x, b, r, **key),
    }
    for approximate in ("none", "tanh", "erf_1.41421"):
        calls[f"bias_gelu {approximate}"] = lambda x, r, w, b, a=approximate: kernels.bias_gelu(
            x * 2, b, a
        )
    mask = (draw(COLUMNS) > 0.5)[None]

    def masked_softmax(x, r, w, b):
        return kernels.masked_softmax(
            x[None, None] + r[None, None],
            mask,
            2.0,
            dropout_p=0.2,
            seed=seed,
            row_ids=row_ids[None],
        )[0, 0]

    target = torch.arange(ROWS) % COLUMNS
    calls["masked_softmax"] = masked_softmax
    calls["cross_entropy"] = lambda x, r, w, b: (
        kernels.cross_entropy(x * w + r, target, label_smoothing=0.1)[:, None] * b
    )

    def packed_attention(x, r, w, b):
        qkv = (x + w * r)[:, :72].reshape(ROWS, 2, 3, 12)
        cu_seqlens = torch.tensor([0, 1, 14, ROWS]).int()
        y = kernels.packed_attention(qkv, cu_seqlens, **attention_key)
        return y.new_zeros(ROWS, COLUMNS).index_copy(1, torch.arange(24), y.view(ROWS, 24))

    attention_key = {"dropout_p": 0.2, "seed": seed, "row_ids": row_ids}
    calls["packed_attention"] = packed_attention
    for op, call in calls.items():
        for dtype in DTYPES:
            arguments = [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
            with kernels.use_backend("cpu"):
                y = call(*arguments)
            results[f"{op} {dtype} y"] = y.detach()
            grads = torch.autograd.grad(y, arguments, grad.to(y.dtype), allow_unused=True)
            for number, g in enumerate(grads):
                if g is not None:
                    results[f"{op} {dtype} gradient {number}"] = g
    for dtype in (torch.bfloat16, torch.float16):
        results[f"transpose16 {dtype}"] = torch.ops.tpcore.transpose16(x.detach().to(dtype))
    return results


if __name__ == "__main__":
    torch.save({"isa": _native.status("cpu").info["isa"], **_results()}, sys.argv[1])
