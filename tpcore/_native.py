"""The ground floor: op schemas, the compiled libraries, and the counter-based dropout generator.

Every raw op of tpcore is declared here, forward and backward, with its fake implementation and an
Autograd kernel that refuses to be called where a gradient would silently be lost. The compiled
libraries next to this file (`_C_cpu.abi3.so`, `_C_cuda.abi3.so`) register implementations for these
schemas; what a library serves is read from the library itself, so Python and C++ cannot disagree
about it.

Raw ops know nothing of autograd, of shapes beyond two (four for scores) dimensions, or of defaults:
the functions in `tpcore.kernels` are the public face. Conventions shared by all of them:

* rows are tokens; the last dimension is contiguous, the row stride is free;
* "accumulation dtype" is float64 for float64 input and float32 otherwise; statistics, and gradients
  of weights and biases, are returned in it;
* a gradient that is not needed comes back as an empty tensor, so that the number of outputs is
  fixed;
* a dropout key is (seed, stream, row_ids, columns): see `dropout_keep_mask`.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tpcore._philox import philox_keep_mask

LibraryName = Literal["cpu", "cuda"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor, needed: bool = True) -> Tensor:
    return x.new_empty(x.shape if needed else (0,))


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=accumulation_dtype(x.dtype))


def _columns(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape[-1:] if needed else (0,), dtype=accumulation_dtype(x.dtype))


def _transposed(x: Tensor) -> Tensor:
    rows, columns = x.shape
    lines = rows // 32 + 1
    return x.new_empty((columns, (lines + (lines + 1) % 2) * 32)).narrow(1, 0, rows)


# Raw op -> (schema, fake): the fake says shapes, dtypes and strides of what the op returns.
RAW_OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    # x [r, c] -> y [r, c] in the dtype of x; mean, rstd [r]
    "layer_norm_forward": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
        lambda x, weight, bias, eps: (_like(x), _rows(x), _rows(x)),
    ),
    # total = x + residual, y = layer_norm(total)
    "add_layer_norm_forward": (
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
        lambda x, residual, weight, bias, eps: (_like(x), _like(x), _rows(x), _rows(x)),
    ),
    # grad_total (if given) is added to grad_x: the gradient that reaches the sum from elsewhere
    "layer_norm_backward": (
        "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? grad_total,"
        " bool need_grad_x, bool need_grad_weight, bool need_grad_bias)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        lambda grad_y, x, mean, rstd, weight, grad_total, need_x, need_weight, need_bias: (
            _like(x, need_x),
            _columns(x, need_weight),
            _columns(x, need_bias),
        ),
    ),
    # x [r, c], bias [c]
    "bias_gelu_forward": (
        "(Tensor x, Tensor? bias, str approximate) -> Tensor",
        lambda x, bias, approximate: _like(x),
    ),
    "bias_gelu_backward": (
        "(Tensor grad_y, Tensor x, Tensor? bias, str approximate, bool need_grad_x,"
        " bool need_grad_bias) -> (Tensor grad_x, Tensor grad_bias)",
        lambda grad_y, x, bias, approximate, need_x, need_bias: (
            _like(x, need_x),
            _columns(x, need_bias),
        ),
    ),
    # scores [b, n, sq, sk]; mask bool, broadcastable to scores; row_ids [b, sq].
    # probs is what backward of the same backend needs, on the CPU with the sign set where dropped;
    # with dropout_p == 0 it equals y and comes back empty.
    "masked_softmax_forward": (
        "(Tensor scores, Tensor? mask, float scale, bool causal, float dropout_p, Tensor? seed,"
        " int stream, Tensor? row_ids, int head_offset) -> (Tensor y, Tensor probs)",
        lambda scores, mask, scale, causal, dropout_p, *key: (
            _like(scores),
            _like(scores, dropout_p > 0),
        ),
    ),
    "masked_softmax_backward": (
        "(Tensor grad_y, Tensor probs, float scale, float dropout_p, Tensor? seed, int stream,"
        " Tensor? row_ids, int head_offset) -> Tensor",
        lambda grad_y, probs, scale, dropout_p, *key: _like(probs),
    ),
    # x, residual [t, h] of one dtype; bias [h]; backward generates the bits of the dropout again
    "bias_dropout_residual_forward": (
        "(Tensor x, Tensor? bias, Tensor? residual, float p, Tensor? seed, int stream,"
        " Tensor? row_ids, int column_offset) -> Tensor",
        lambda x, bias, residual, p, *key: _like(x),
    ),
    "bias_dropout_residual_backward": (
        "(Tensor grad_y, float p, Tensor? seed, int stream, Tensor? row_ids, int column_offset,"
        " bool need_grad_x, bool need_grad_bias) -> (Tensor grad_x, Tensor grad_bias)",
        lambda grad_y, p, seed, stream, row_ids, column_offset, need_x, need_bias: (
            _like(grad_y, need_x),
            _columns(grad_y, need_bias),
        ),
    ),
    # The same on the CPU, where to read the bits is cheaper: keep is uint8 [t, ceil(h / 8)], bit
    # c % 8 of byte c // 8 set where column c is kept; without dropout it has no rows
    "bias_dropout_residual_cpu_forward": (
        "(Tensor x, Tensor? bias, Tensor? residual, float p, Tensor? seed, int stream,"
        " Tensor? row_ids, int column_offset) -> (Tensor y, Tensor keep)",
        lambda x, bias, residual, p, *key: (
            _like(x),
            x.new_empty((x.shape[0] if p > 0 else 0, (x.shape[1] + 7) // 8), dtype=torch.uint8),
        ),
    ),
    "bias_dropout_residual_cpu_backward": (
        "(Tensor grad_y, Tensor keep, float p, bool need_grad_x, bool need_grad_bias)"
        " -> (Tensor grad_x, Tensor grad_bias)",
        lambda grad_y, keep, p, need_x, need_bias: (
            _like(grad_y, need_x),
            _columns(grad_y, need_bias),
        ),
    ),
    # qkv [t, n * 3 * d], a head being [q | k | v]; cu_seqlens int32 [sequences + 1]; row_ids [t] ->
    # context [t, n * d]; of the scores of each query the maximum and the sum of exp(score - max)
    "packed_attention_forward": (
        "(Tensor qkv, Tensor cu_seqlens, int num_heads, float scale, bool causal, float dropout_p,"
        " Tensor? seed, int stream, Tensor? row_ids, int head_offset)"
        " -> (Tensor context, Tensor max, Tensor sum_exp)",
        lambda qkv, cu_seqlens, num_heads, *rest: (
            qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3)),
            qkv.new_empty((num_heads, qkv.shape[0]), dtype=accumulation_dtype(qkv.dtype)),
            qkv.new_empty((num_heads, qkv.shape[0]), dtype=accumulation_dtype(qkv.dtype)),
        ),
    ),
    "packed_attention_backward": (
        "(Tensor grad_context, Tensor qkv, Tensor max, Tensor sum_exp, Tensor cu_seqlens,"
        " float scale, bool causal, float dropout_p, Tensor? seed, int stream, Tensor? row_ids,"
        " int head_offset) -> Tensor",
        lambda grad_context, qkv, *rest: _like(qkv),
    ),
    # logits [t, v/tp], target int64 [t] of global ids; four vectors [t]
    "cross_entropy_statistics": (
        "(Tensor logits, Tensor target, int vocab_start, int num_classes, int ignore_index)"
        " -> (Tensor max, Tensor sum_exp, Tensor target_logit, Tensor sum_logits)",
        lambda logits, *rest: tuple(_rows(logits) for _ in range(4)),
    ),
    "cross_entropy_backward": (
        "(Tensor grad_loss, Tensor logits, Tensor target, Tensor max, Tensor sum_exp,"
        " int vocab_start, int num_classes, int ignore_index, float label_smoothing) -> Tensor",
        lambda grad_loss, logits, *rest: _like(logits),
    ),
    # x [r, c], half precision -> its transpose [c, r], with zeros between its rows
    "transpose16": ("(Tensor x) -> Tensor", _transposed),
    # row_ids [b, sq] -> bool [b, num_heads, sq, num_columns]
    "dropout_keep_mask": (
        "(Tensor seed, Tensor row_ids, float p, int stream, int num_columns, int column_offset,"
        " int head_offset, int num_heads) -> Tensor",
        lambda seed, row_ids, p, stream, num_columns, column_offset, head_offset, num_heads: (
            row_ids.new_empty(
                (row_ids.shape[0], num_heads, row_ids.shape[1], num_columns), dtype=torch.bool
            )
        ),
    ),
}

# The collectives in shared memory: what a rank does before it goes on, what it does when it needs
# the result, and both. x and out are contiguous; the rest as in csrc/include/tpcore/kernels.h. They
# are not differentiable; tpcore.parallel.shared_memory, the only caller, detaches what it passes.
_SHM_ARGUMENTS = (
    "(Tensor x, Tensor(a!) out, Tensor(b!) segment, int collective, int source, int rank, int size,"
    " int lock, int timeout_ms) -> ()"
)
SHARED_MEMORY_OPS = ("shm_publish", "shm_complete", "shm_exchange")

# A step of an optimizer in one pass, likewise; tpcore.train.optimizer calls it. weight and moments
# are float32 (or float64), grad is float32 or half precision, copy half precision; all contiguous.
OPTIMIZER_OPS = {
    "adamw_": "(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? copy, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " float step, float grad_factor) -> ()"
}


def _refuse_autograd(packet: Any) -> Callable[..., Any]:
    """The Autograd kernel of a raw op: passes through, unless a gradient would be lost."""
    op = packet.default

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"torch.ops.{packet} is a raw kernel without a gradient, and an input requires "
                "grad; call the function of tpcore.kernels instead, or torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def define_ops(namespace: str, names: Iterable[str]) -> torch.library.Library:
    """Declares raw ops as a family of its own: schemas, fakes, refusal of autograd; no kernels."""
    library = torch.library.Library(namespace, "DEF")
    for name in names:
        schema, fake = RAW_OPS[name]
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        packet = getattr(getattr(torch.ops, namespace), name)
        library.impl(name, _refuse_autograd(packet), "Autograd")
    return library


_LIBRARY = define_ops("tpcore", RAW_OPS)
for _name, _schema in (dict.fromkeys(SHARED_MEMORY_OPS, _SHM_ARGUMENTS) | OPTIMIZER_OPS).items():
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"tpcore::{_name}", lambda *args: None, lib=_LIBRARY)


# --- The compiled libraries -----------------------------------------------------------------------


@dataclass(frozen=True)
class NativeStatus:
    """What became of one compiled library.

    Attributes:
        name: "cpu" or "cuda".
        loaded: whether its ops can be called.
        path: where it is, or would be.
        reason: why it is not loaded; empty if it is.
        info: what the library says of itself: "isa" (the instruction set in use) and "ops" (the raw
            ops it serves).
    """

    name: LibraryName
    loaded: bool
    path: Path
    reason: str = ""
    info: dict[str, Any] = field(default_factory=dict)


def build_record() -> dict[str, Any]:
    """What setup.py recorded: what was built, with what, and what was not and why. May be empty."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_info(path: Path) -> dict[str, Any]:
    """Asks a library, by its one C function, for its instruction set and the ops it serves."""
    info = ctypes.CDLL(str(path)).tpcore_library_info
    info.restype = ctypes.c_char_p
    parsed = json.loads(info())
    if "error" in parsed:
        # Someone pinned an instruction set; to go on without it would hide that it does not run.
        raise ValueError(parsed["error"])
    return parsed


def _load(name: LibraryName) -> NativeStatus:
    # Another folder holds a library built for a purpose, such as with sanitizers.
    folder = os.environ.get("TPCORE_LIBRARY_DIR") or Path(__file__).parent
    path = Path(folder, f"_C_{name}.abi3.so")
    if not path.exists():
        record = build_record().get(name, {})
        reason = (
            record.get("reason")
            or f"{path.name} was not built; install tpcore with `pip install .`"
        )
        return NativeStatus(name, False, path, reason)
    if name == "cuda" and not torch.cuda.is_available():
        return NativeStatus(name, False, path, "torch.cuda.is_available() is False")
    try:
        info = _read_info(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        return NativeStatus(name, False, path, str(error))
    return NativeStatus(name, True, path, "", info)


_STATUS: dict[str, NativeStatus] = {"cpu": _load("cpu"), "cuda": _load("cuda")}


def status(name: LibraryName) -> NativeStatus:
    """Whether the compiled library for `name` is loaded, and if not, why."""
    return _STATUS[name]


def has_amx() -> bool:
    """Whether this process's kernels, and torch's products of bfloat16, run on AMX tiles."""
    return status("cpu").info.get("isa") == "amx"


def _served_ops() -> dict[str, frozenset[str]]:
    return {name: frozenset(s.info.get("ops", ())) for name, s in _STATUS.items() if s.loaded}


# Device type -> raw ops that compiled code serves there.
NATIVE_OPS: dict[str, frozenset[str]] = _served_ops()


# --- The identity of every dropout bit ------------------------------------------------------------


def check_dropout_key(
    p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    *,
    column_offset: int = 0,
    head_offset: int = 0,
    num_heads: int = 1,
) -> None:
    """Checks what every dropout has in common.

    Raises:
        ValueError: p is outside [0, 1), the stream or a head does not fit 16 bits, columns begin
            before 0, or p > 0 comes without an int64 seed of one element and int64 row_ids.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"the dropout probability is {p}; expected 0 <= p < 1")
    if not 0 <= stream < 1 << 16:
        raise ValueError(f"stream={stream} is outside 0..65535")
    if head_offset < 0 or head_offset + num_heads > 1 << 16:
        raise ValueError(
            f"head_offset={head_offset}; expected the number of a head: the heads {head_offset}.."
            f"{head_offset + num_heads - 1} are outside 0..65535"
        )
    if column_offset < 0:
        raise ValueError(f"column_offset={column_offset} is negative; expected a column's number")
    if p == 0.0:
        return
    if seed is None or row_ids is None:
        missing = "seed" if seed is None else "row_ids"
        raise ValueError(
            f"dropout with p={p} needs a key, but {missing} is None; pass seed (an int64 tensor of "
            "one element) and row_ids (int64, one per row), or p=0 to switch dropout off"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)}; expected int64 of one element"
        )
    if row_ids.dtype != torch.int64:
        raise ValueError(f"row_ids is {row_ids.dtype}; expected int64")


def _keep_mask(
    p: float,
    seed: Tensor,
    stream: int,
    row_ids: Tensor,
    num_columns: int,
    column_offset: int,
    head_offset: int,
    num_heads: int,
) -> Tensor:
    offsets = {"column_offset": column_offset, "head_offset": head_offset, "num_heads": num_heads}
    check_dropout_key(p, seed, stream, row_ids, **offsets)
    native = "dropout_keep_mask" in NATIVE_OPS.get(row_ids.device.type, ())
    function = torch.ops.tpcore.dropout_keep_mask if native else philox_keep_mask
    return function(seed, row_ids, p, stream, num_columns, column_offset, head_offset, num_heads)


def dropout_keep_mask(
    p: float,
    seed: Tensor,
    stream: int,
    row_ids: Tensor,
    num_columns: int,
    *,
    column_offset: int = 0,
    head: int = 0,
) -> Tensor:
    """Which elements of a [t, num_columns] matrix a dropout keeps; the same bits on every device.

    The random word of an element is word `column % 4` of Philox4x32-10 with the key (low and high
    half of the seed) and the counter (column // 4, low half of row_id, high half of row_id, head <<
    16 | stream), where column counts from `column_offset`. It is kept if that word is at least
    round(p * 2^32), which is true with probability 1 - p.

    Args:
        p: probability of dropping, 0 <= p < 1.
        seed: int64 tensor of one element, on the device of row_ids.
        stream: number of the place in the model, 0..65535.
        row_ids: int64 [t], the identity of each row.
        num_columns: how many columns.
        column_offset: global number of the first column.
        head: number of the attention head, 0..65535; 0 outside attention.

    Returns:
        bool [t, num_columns], True = kept.

    Raises:
        ValueError: if an argument is out of range or of the wrong dtype.
    """
    mask = _keep_mask(p, seed, stream, row_ids[None], num_columns, column_offset, head, 1)
    return mask.view(row_ids.shape[0], num_columns)


def attention_dropout_keep_mask(
    p: float,
    seed: Tensor,
    stream: int,
    row_ids: Tensor,
    num_heads: int,
    num_columns: int,
    *,
    head_offset: int = 0,
) -> Tensor:
    """`dropout_keep_mask` for scores, with the keys as columns.

    Args:
        p: as there.
        seed: as there.
        stream: as there.
        row_ids: int64 [b, sq], the identities of the queries.
        num_heads: how many heads.
        num_columns: number of keys, sk.
        head_offset: global number of the first head.

    Returns:
        bool [b, num_heads, sq, num_columns], True = kept.

    Raises:
        ValueError: if an argument is out of range or of the wrong dtype.
    """
    return _keep_mask(p, seed, stream, row_ids, num_columns, 0, head_offset, num_heads)
