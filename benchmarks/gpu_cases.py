"""The ops and sizes of gpu_kernels.py: who computes them, and the bytes that nobody can avoid."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore import kernels

P, EPS, SCALE = 0.1, 1e-5, 0.125


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: its name in tpcore.kernels, with "+dropout" where that makes two cases of it.
        size: in words.
        shapes: of the inputs that have gradients; the first is the largest.
        functions: provider -> the op on these inputs; "ours" is tpcore's, "eager" is compiled too.
        moved: how many elements forward and backward have to read or write.
    """

    op: str
    size: str
    shapes: list[tuple[int, ...]]
    functions: dict[str, Callable[..., Tensor]]
    moved: tuple[int, int]


def _peers(**found: tuple[str, str, Callable[[Callable], Callable[..., Tensor]]]) -> dict:
    """Provider -> its function, of those (module, name, adapter) that can be imported."""
    functions = {}
    for provider, (module, name, adapt) in found.items():
        try:
            functions[provider] = adapt(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return functions


def layer_norm(rows: int, hidden: int, device: str) -> Case:
    size = rows * hidden
    peers = _peers(
        liger=(
            "liger_kernel.transformers.functional",
            "liger_layer_norm",
            lambda f: lambda x, w, b: f(x, w, b, EPS),
        ),
        apex=(
            "apex.normalization.fused_layer_norm",
            "fused_layer_norm_affine",
            lambda f: lambda x, w, b: f(x, w, b, (hidden,), EPS),
        ),
    )
    ours = lambda x, w, b: kernels.layer_norm(x, w, b, EPS)  # noqa: E731
    eager = lambda x, w, b: F.layer_norm(x, (hidden,), w, b, EPS)  # noqa: E731
    functions = {"ours": ours, "eager": eager, **peers}
    shapes = [(rows, hidden), (hidden,), (hidden,)]
    return Case("layer_norm", f"{rows} x {hidden}", shapes, functions, (2 * size, 3 * size))


def add_layer_norm(rows: int, hidden: int, device: str) -> Case:
    size = rows * hidden

    def ours(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.add_layer_norm(x, r, w, b, EPS)

    def eager(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return F.layer_norm(total, (hidden,), w, b, EPS), total

    shapes = [(rows, hidden), (rows, hidden), (hidden,), (hidden,)]
    functions = {"ours": ours, "eager": eager}
    return Case("add_layer_norm", f"{rows} x {hidden}", shapes, functions, (4 * size, 4 * size))


def bias_gelu(rows: int, columns: int, device: str) -> Case:
    size = rows * columns
    functions = {
        "ours": lambda x, b: kernels.bias_gelu(x, b),
        "eager": lambda x, b: F.gelu(x + b),
    }
    shapes = [(rows, columns), (columns,)]
    return Case("bias_gelu", f"{rows} x {columns}", shapes, functions, (2 * size, 3 * size))


def bias_dropout_residual(rows: int, hidden: int, device: str) -> Case:
    size, seed = rows * hidden, torch.tensor([1234], device=device)
    key = {"p": P, "seed": seed, "row_ids": torch.arange(rows, device=device)}
    functions = {
        "ours": lambda x, b, r: kernels.bias_dropout_residual(x, b, r, **key),
        "eager": lambda x, b, r: r + F.dropout(x + b, P),
    }
    shapes = [(rows, hidden), (hidden,), (rows, hidden)]
    size_name = f"{rows} x {hidden}"
    return Case("bias_dropout_residual", size_name, shapes, functions, (3 * size, 2 * size))


def masked_softmax(shape: tuple[int, ...], p: float, device: str) -> Case:
    batch, heads, queries, keys = shape
    mask = torch.zeros(batch, 1, 1, keys, dtype=torch.bool, device=device)
    mask[..., keys - keys // 16 :] = True
    size, key = batch * heads * queries * keys, {}
    if p > 0:
        row_ids = torch.arange(batch * queries, device=device).view(batch, queries)
        key = {"dropout_p": p, "seed": torch.tensor([1234], device=device), "row_ids": row_ids}

    def eager(x: Tensor) -> Tensor:
        probs = torch.softmax((x.float() * SCALE).masked_fill(mask, -torch.inf), -1).to(x.dtype)
        return F.dropout(probs, p) if p > 0 else probs

    ours = lambda x: kernels.masked_softmax(x, mask, SCALE, **key)  # noqa: E731
    moved = (3 * size if p > 0 else 2 * size, 3 * size)  # with dropout p is kept for backward
    name = "masked_softmax" + ("+dropout" if p > 0 else "")
    return Case(name, "x".join(map(str, shape)), [shape], {"ours": ours, "eager": eager}, moved)


def cross_entropy(tokens: int, vocabulary: int, device: str) -> Case:
    target = torch.arange(tokens, device=device) % vocabulary
    size = tokens * vocabulary
    peers = _peers(
        liger=(
            "liger_kernel.transformers.functional",
            "liger_cross_entropy",
            lambda f: lambda x: f(x, target, reduction="none"),
        ),
        apex=(
            "apex.contrib.xentropy",
            "SoftmaxCrossEntropyLoss",
            lambda f: lambda x: f.apply(x, target, 0.0, -100, True),
        ),
    )
    ours = lambda x: kernels.cross_entropy(x, target)  # noqa: E731
    eager = lambda x: F.cross_entropy(x.float(), target, reduction="none")  # noqa: E731
    functions = {"ours": ours, "eager": eager, **peers}
    shape = (tokens, vocabulary)
    return Case("cross_entropy", f"{tokens} x {vocabulary}", [shape], functions, (size, 2 * size))


def cases(tiny: bool, device: str) -> Iterator[Callable[[], Case]]:
    """All cases, those first that say most: of BERT-large, then wider and longer."""
    elements = 1 << (12 if tiny else 25)
    hiddens = (32, 64) if tiny else (1024, 4096, 2048, 8192)
    lengths = (16, 32) if tiny else (512, 2048, 128, 8192)
    vocabularies = ((16, 300),) if tiny else ((8192, 30592), (4096, 131072))
    partial = functools.partial
    for number, hidden in enumerate(hiddens):
        rows = elements // hidden
        for op in (layer_norm, add_layer_norm, bias_dropout_residual):
            yield partial(op, rows, hidden, device)
        if number < 2:
            yield partial(bias_gelu, rows // 4, 4 * hidden, device)
        length, heads = lengths[number], 2 if tiny else 16
        queries = min(length, elements // heads // length)
        shape = (max(1, elements // heads // length // queries), heads, queries, length)
        for p in (0.0, P):
            yield partial(masked_softmax, shape, p, device)
        if number < len(vocabularies):
            yield partial(cross_entropy, *vocabularies[number], device)
