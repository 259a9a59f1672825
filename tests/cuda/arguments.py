"""The argument structs of csrc/include/tpcore/kernels.h for ctypes, read from that header.

Nothing is written twice: a field that is added there is here too, and `check_size` compares what
the compiler made of a struct with what ctypes did.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

HEADER = Path(__file__).parents[2] / "csrc/include/tpcore/kernels.h"

_SCALARS: dict[str, type] = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
}


def _declarations(body: str) -> list[tuple[str, str]]:
    """(type, declarator) of every field: pointers keep their star, arrays their brackets."""
    found = []
    for statement in filter(None, (" ".join(s.split()) for s in body.split(";"))):
        base, declarators = re.fullmatch(r"(?:const )?(\w+)\s*(.*)", statement).groups()
        for declarator in declarators.split(","):
            found.append((base, declarator.split("=")[0].strip()))
    return found


def read_structs() -> dict[str, type[ctypes.Structure]]:
    """Name -> structure, of every struct in the header that is nothing but plain fields."""
    structs: dict[str, type[ctypes.Structure]] = {}
    header = re.sub(r"//[^\n]*", "", HEADER.read_text())
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header, re.MULTILINE | re.DOTALL):
        if re.search(r"[({]", body):
            continue  # a table of functions, or an enumeration inside: no launcher takes it
        fields = []
        for base, declarator in _declarations(body):
            # What is no scalar and no struct is an enumeration of 32 bits.
            kind: type = structs.get(base) or _SCALARS.get(base, ctypes.c_int32)
            if "*" in declarator:
                kind = ctypes.c_void_p
            elif "[" in declarator:
                kind = kind * int(declarator.split("[")[1].rstrip("]"))
            fields.append((re.search(r"\w+", declarator).group(), kind))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


STRUCTS = read_structs()


class Buffer(NamedTuple):
    """Device memory of exactly these bytes, `offset` bytes behind an aligned address."""

    content: bytes
    offset: int = 0
    output: bool = False


def struct_of(launcher: str) -> type[ctypes.Structure]:
    """layer_norm_forward -> LayerNormForward."""
    return STRUCTS["".join(word.capitalize() for word in launcher.split("_"))]
