"""Stand-ins for the objects in a pickle, and what is known of those that make tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STORAGES = {
    f"torch.{name}Storage": size
    for name, size in (
        ("Double", 8),
        ("Float", 4),
        ("Half", 2),
        ("BFloat16", 2),
        ("Long", 8),
        ("Int", 4),
        ("Short", 2),
        ("Char", 1),
        ("Byte", 1),
        ("Bool", 1),
        ("ComplexFloat", 8),
        ("ComplexDouble", 16),
    )
} | {"torch.storage.UntypedStorage": 1}
"""Class of a storage -> bytes of an element."""

DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
        *("double", "float", "half", "long", "int", "short"),
    )
)
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"
TYPED = "torch._tensor._rebuild_from_type_v2"
"""A tensor that has further attributes: (how to rebuild it, with what, its class, attributes)."""
CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
DICT = "collections.OrderedDict"
SET = "builtins.set"
ENCODE = "_codecs.encode"
PLAIN = ("torch.Size", "torch.device")
NAMES = frozenset(
    (*STORAGES, *DTYPES, *TENSORS, PARAMETER, TYPED, *CLASSES, DICT, SET, ENCODE, *PLAIN)
)


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Tuple:
    """A tuple; only short ones keep their items."""

    items: tuple[Any, ...] | None
    cost: int
    depth: int


@dataclass(slots=True)
class Object:
    """Any other object: a list, a dict, a tensor, an instance of a stub."""

    kind: str
    has_tuples: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of a tensor, which the file has."""

    num_elements: int


def is_kind(value: Any, kind: str) -> bool:
    """Whether it stands for an object of that kind."""
    return isinstance(value, Object) and value.kind == kind


def fault_of_tensor(name: str, items: tuple[Any, ...] | None) -> str | None:
    """What is wrong with the call `name(*items)` that rebuilds a tensor; None: nothing."""
    if name in TENSORS:
        return _fault_of_sizes(items)
    if name == PARAMETER:
        if items and is_kind(items[0], "tensor"):
            return None
        return "a parameter is made of what is no tensor"
    function, kind, inner = items[:3] if items and len(items) == 4 else (None, None, None)
    if (
        not isinstance(function, Name)
        or function.name not in (*TENSORS, PARAMETER)
        or not isinstance(kind, Name)
        or kind.name not in CLASSES
        or not isinstance(inner, Tuple)
    ):
        return "a tensor is rebuilt in a way that no checkpoint does"
    return fault_of_tensor(function.name, inner.items)


def _fault_of_sizes(items: tuple[Any, ...] | None) -> str | None:
    if items is None or len(items) < 4 or not isinstance(items[0], Storage):
        return "a tensor has no storage"
    storage, offset, shape, strides = items[:4]
    sizes = shape.items if isinstance(shape, Tuple) else None
    steps = strides.items if isinstance(strides, Tuple) else None
    if sizes is None or steps is None:
        return "a tensor has no shape or no strides"
    if any(type(n) is not int or not 0 <= n < 2**62 for n in (offset, *sizes, *steps)):
        return "a tensor has an offset, a shape or strides that are no sizes"
    if len(sizes) != len(steps) or math.prod(sizes) >= 2**48:
        return "a tensor has a shape that cannot be"
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and last >= storage.num_elements:
        return (
            f"a tensor of shape {list(sizes)!s:.80} ends at element {last} of a storage of "
            f"{storage.num_elements}"
        )
    return None
