"""The process in which the emulated kernels run: it has a sanitizer loaded, and no torch.

    python -m tests.cuda.device_process <library>

Reads pickled requests from standard input, answers on standard output. A request is (launcher,
values of its struct, settings); the answer is (status, path -> bytes of every output buffer). Every
buffer is an allocation of its own of the exact size, so that the sanitizer sees a step beyond it;
the bytes before an offset are compared instead.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from typing import Any

from tests.cuda.arguments import STRUCTS, Buffer, struct_of

_GUARD = b"\xa5"


class _Memory:
    """The buffers of one launch."""

    def __init__(self) -> None:
        # The process's own malloc, which the sanitizer has replaced.
        self.libc = ctypes.CDLL(None)
        self.libc.malloc.restype = ctypes.c_void_p
        self.libc.malloc.argtypes = [ctypes.c_size_t]
        self.libc.free.argtypes = [ctypes.c_void_p]
        self.buffers: dict[str, tuple[int, Buffer]] = {}
        self.keep: list[Any] = []

    def place(self, path: str, buffer: Buffer) -> int:
        content = _GUARD * buffer.offset + buffer.content
        address = self.libc.malloc(len(content))
        ctypes.memmove(address, content, len(content))
        self.buffers[path] = (address, buffer)
        return address + buffer.offset

    def fill(self, struct: ctypes.Structure, values: dict[str, Any], path: str = "") -> None:
        for name, value in values.items():
            here = f"{path}{name}"
            if isinstance(value, Buffer):
                setattr(struct, name, self.place(here, value))
            elif isinstance(value, dict):
                inner = getattr(struct, name)
                if not isinstance(inner, ctypes.Structure):  # a pointer, null so far
                    inner = STRUCTS["DropoutKey"]()
                    self.keep.append(inner)
                    setattr(struct, name, ctypes.addressof(inner))
                self.fill(inner, value, f"{here}.")
            elif isinstance(value, tuple):
                getattr(struct, name)[:] = value
            else:
                setattr(struct, name, value)

    def collect(self) -> dict[str, bytes]:
        results = {}
        for path, (address, buffer) in self.buffers.items():
            content = ctypes.string_at(address, buffer.offset + len(buffer.content))
            before, after = content[: buffer.offset], content[buffer.offset :]
            if before != _GUARD * buffer.offset:
                raise RuntimeError(f"{path}: something was written before its first element")
            if buffer.output:
                results[path] = after
            elif after != buffer.content:
                raise RuntimeError(f"{path}: an input was written to")
            self.libc.free(address)
        return results


def _answer(library: ctypes.CDLL, request: tuple[str, dict, dict]) -> Any:
    launcher, values, settings = request
    if launcher == "self_test":
        library.self_test.restype = ctypes.c_char_p
        return library.self_test().decode()
    if launcher == "misuse":
        return library.misuse(values["kind"])
    if launcher == "partial_sums":
        library.emulation_set_multiprocessors(settings["multiprocessors"])
        return library.partial_sums(ctypes.c_long(values["rows"])), {}
    kind = struct_of(launcher)
    size = getattr(library, f"{launcher}_size")()
    if size != ctypes.sizeof(kind):
        raise RuntimeError(f"{kind.__name__} has {size} bytes, not {ctypes.sizeof(kind)}")
    for name, value in settings.items():
        getattr(library, f"emulation_{name}")(value)
    memory, struct = _Memory(), kind()
    memory.fill(struct, values)
    status = getattr(library, launcher)(ctypes.byref(struct))
    return status, memory.collect()


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: Any = _answer(library, request)
        except RuntimeError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
