"""What a pickle would do, found out without doing it.

Every instruction of the pickle is followed with stand-ins for the objects: names that may be looked
up, calls that may be made, tensors that lie inside their storages, storages that lie inside the
file, and nothing that grows without bound when it is hashed. Only then is the file given to
`torch.load(weights_only=True)`, which guards the names once more.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.untrusted.pickle_values import (
    DICT,
    ENCODE,
    NAMES,
    PARAMETER,
    PLAIN,
    SET,
    STORAGES,
    TENSORS,
    TYPED,
    Name,
    Object,
    Storage,
    Tuple,
    fault_of_tensor,
    is_kind,
)

MAX_BYTES = 32 * 2**20
MAX_INSTRUCTIONS = 500_000
MAX_DEPTH = 500
MAX_TUPLE_COST = 100_000
MAX_KEY_COST = 100_000
MAX_LARGE_INTEGERS = 1_000

_MARK = object()


class PickleScan:
    """Follows one pickle after the other in a file.

    Args:
        data: the bytes that hold the pickles.
        where: the file, for errors.
        names: further names that may be looked up, called and given a state.
        record_size: size in bytes of the storage with this key, None if there is none.
    """

    def __init__(
        self,
        data: mmap.mmap | bytes,
        where: str,
        names: Collection[str],
        record_size: Callable[[str], int | None],
    ) -> None:
        self.data, self.where, self.names = data, where, names
        self.record_size = record_size
        self.storages: dict[str, tuple[str, int]] = {}
        self._instructions = self._key_cost = self._large_integers = 0

    @property
    def storage_bytes(self) -> int:
        """Of all storages together."""
        return sum(STORAGES[kind] * count for kind, count in self.storages.values())

    def follow(self, at: int = 0, end: int | None = None) -> tuple[Any, int]:
        """The stand-in of the object pickled at `at`, and where the pickle ends.

        Raises:
            CheckpointError: the pickle is damaged, or asks for something that is not allowed.
        """
        end = len(self.data) if end is None else end
        self._at, self._end = at, min(end, at + MAX_BYTES)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._protocol = 0
        try:
            while True:
                if self._at >= self._end:
                    self._fail("its pickle is cut off")
                code = self.data[self._at]
                self._at += 1
                self._instructions += 1
                if self._instructions > MAX_INSTRUCTIONS:
                    self._fail("it has too many instructions for a checkpoint")
                if code == 0x2E:  # STOP
                    return self._stack.pop(), self._at
                step = _STEPS.get(code)
                if step is None:
                    self._refuse_instruction(code)
                step(self)
        except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
            self._fail(f"its pickle makes no sense ({type(error).__name__})", error)

    # --- errors and bytes ---

    def _fail(self, what: str, error: Exception | None = None) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: not a readable torch checkpoint, truncated, damaged or unsafe: {what}"
        ) from error

    def _refuse_instruction(self, code: int) -> NoReturn:
        name = _INSTRUCTIONS.get(code, hex(code))
        if name == "INST":
            self._name(self._line(), self._line())
        if name == "OBJ":
            items = self._items()
            if items and isinstance(items[0], Name):
                self._refuse(items[0].name)
        self._fail(f"the instruction {name} is not for checkpoints")

    def _refuse(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: refused to load the pickled object {name:.150}, which is not on the "
            "list of harmless names; if you trust the file, save its tensors again without that "
            "object"
        )

    def _take(self, size: int) -> bytes:
        start = self._at
        if size > self._end - start:
            self._fail("its pickle is cut off")
        self._at = start + size
        return self.data[start : self._at]

    def _number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self._at, min(self._end, self._at + 512))
        if end < 0:
            self._fail("its pickle is cut off")
        line = self._take(end + 1 - self._at)[:-1].decode()
        if not line.isprintable():
            self._fail(f"it looks up the name {line!r:.100}")
        return line

    # --- the stack ---

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            self._fail("its pickle makes no sense (a mark is used as a value)")
        return value

    def _top(self) -> Any:
        return self._stack[-1]

    def _items(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        self._fail("its pickle makes no sense (no mark)")

    def _push_integer(self, value: int) -> None:
        if not -(2**60) < value < 2**60:
            # Such numbers can be chosen to have one hash, which makes a dict of them quadratic.
            self._large_integers += 1
            if self._large_integers > MAX_LARGE_INTEGERS:
                self._fail("it holds too many large integers for a checkpoint")
        self._push(value)

    def _push_tuple(self, items: list[Any]) -> None:
        cost = depth = 1
        for item in items:
            if isinstance(item, Tuple):
                cost += item.cost
                depth = max(depth, item.depth + 1)
            else:
                cost += 1
        if cost > MAX_TUPLE_COST or depth > MAX_DEPTH:
            self._fail("it holds tuples that are nested too often")
        self._push(Tuple(tuple(items) if len(items) <= 64 else None, cost, depth))

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, Object):
            self._fail("it appends to what is no list")
        target.has_tuples |= any(
            isinstance(item, Tuple) or (isinstance(item, Object) and item.has_tuples)
            for item in items
        )

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, Object) or len(items) % 2:
            self._fail("it sets an item of what is no dict")
        for key in items[::2]:
            if isinstance(key, Tuple):
                self._key_cost += key.cost
                if self._key_cost > MAX_KEY_COST:
                    self._fail("it has too many tuples as keys for a checkpoint")
        self._extend(items)

    # --- names and calls ---

    def _name(self, module: str, name: str) -> None:
        if self._protocol < 3:
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
        full = f"{module}.{name}"
        if full not in NAMES and full not in self.names:
            self._refuse(full.removeprefix("builtins."))
        self._push(Name(full))

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or not isinstance(arguments, Tuple):
            self._fail("it calls what is no function")
        name, items = function.name, arguments.items
        if name in self.names:
            self._push(Object(name))
        elif name in (*TENSORS, PARAMETER, TYPED):
            fault = fault_of_tensor(name, items)
            if fault:
                self._fail(fault)
            self._push(Object("tensor"))
        elif name == DICT and items == ():
            self._push(Object(DICT))
        elif name == SET and items and is_kind(items[0], "list") and not items[0].has_tuples:
            self._push(Object("set"))
        elif name == ENCODE and items and items[1:] in (("latin1",), ("latin-1",), ("ascii",)):
            self._push(Object("bytes"))
        elif name in PLAIN:
            self._push(Object(name))
        else:
            self._fail(f"it calls {name:.150} in a way that no checkpoint does")

    def _new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Name) or not isinstance(arguments, Tuple):
            self._fail("it makes an instance of what is no class")
        if kind.name not in self.names:
            self._fail(f"it makes an instance of {kind.name:.150}, which no checkpoint does")
        self._push(Object(kind.name))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Object) or target.kind not in (*self.names, DICT):
            self._fail("it gives a state to an object that has none")
        if target.kind in (DICT, "argparse.Namespace") and not is_kind(state, "dict"):
            self._fail(f"it gives {target.kind} a state that is no dict")

    # --- tensors ---

    def _load_storage(self) -> None:
        identity = self._pop()
        items = identity.items if isinstance(identity, Tuple) else None
        if (
            not items
            or len(items) not in (5, 6)
            or items[0] != "storage"
            or items[5:]
            not in (
                (),
                (None,),
            )
        ):
            self._fail("it refers to something outside that is no storage")
        kind, key, _, count = items[1:5]
        if not isinstance(kind, Name) or kind.name not in STORAGES or not isinstance(key, str):
            self._fail("a storage has no type or no key")
        if type(count) is not int or count < 0:
            self._fail(f"the storage {key!r:.60} has no number of elements")
        size, available = count * STORAGES[kind.name], self.record_size(key)
        if available is None:
            self._fail(f"the storage {key!r:.60} is missing")
        if size > available:
            self._fail(
                f"the storage {key!r:.60} claims {size} bytes, but there are {available} for it"
            )
        if self.storages.setdefault(key, (kind.name, count)) != (kind.name, count):
            self._fail(f"the storage {key!r:.60} has two sizes or two types")
        self._push(Storage(count))


def _text(code: str) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        scan._push(scan._take(scan._number(code)).decode("utf-8", "surrogatepass"))

    return step


def _bytes(code: str) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        scan._take(scan._number(code))
        scan._push(Object("bytes"))

    return step


def _short_string(scan: PickleScan) -> None:
    # Of Python 2; in a storage's identity it is text.
    scan._push(scan._take(scan._number("B")).decode("latin-1"))


def _integer(code: str) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(scan._number(code))


def _long(scan: PickleScan) -> None:
    scan._push_integer(int.from_bytes(scan._take(scan._number("B")), "little", signed=True))


def _float(scan: PickleScan) -> None:
    scan._push(struct.unpack(">d", scan._take(8))[0])


def _get(code: str) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(scan._memo[scan._number(code)])


def _put(code: str) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        index = scan._number(code)
        if index > MAX_INSTRUCTIONS:
            # Python's own unpickler makes a table of that size.
            scan._fail(f"it remembers an object under the number {index}")
        scan._memo[index] = scan._top()

    return step


def _memoize(scan: PickleScan) -> None:
    scan._memo[len(scan._memo)] = scan._top()


def _protocol(scan: PickleScan) -> None:
    scan._protocol = scan._number("B")


def _frame(scan: PickleScan) -> None:
    scan._number("Q")


def _stack_global(scan: PickleScan) -> None:
    name, module = scan._pop(), scan._pop()
    if not isinstance(name, str) or not isinstance(module, str):
        scan._fail("it looks up what is no name")
    scan._name(module, name)


def _constant(value: Any) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(value)


def _tuple_of(count: int) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        items = [scan._pop() for _ in range(count)]
        scan._push_tuple(items[::-1])

    return step


_BY_NAME: Mapping[str, Callable[[PickleScan], None]] = {
    "PROTO": _protocol,
    "FRAME": _frame,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "BININT": _integer("i"),
    "BININT1": _integer("B"),
    "BININT2": _integer("H"),
    "LONG1": _long,
    "BINFLOAT": _float,
    "BINUNICODE": _text("I"),
    "SHORT_BINUNICODE": _text("B"),
    "SHORT_BINSTRING": _short_string,
    "BINBYTES": _bytes("I"),
    "SHORT_BINBYTES": _bytes("B"),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda scan: scan._push_tuple(scan._items()),
    "EMPTY_LIST": lambda scan: scan._push(Object("list")),
    "EMPTY_DICT": lambda scan: scan._push(Object("dict")),
    "EMPTY_SET": lambda scan: scan._push(Object("set")),
    "MARK": lambda scan: scan._push(_MARK),
    "APPEND": lambda scan: scan._extend([scan._pop()]),
    "APPENDS": lambda scan: scan._extend(scan._items()),
    "SETITEM": lambda scan: scan._set_items([scan._pop(), scan._pop()][::-1]),
    "SETITEMS": lambda scan: scan._set_items(scan._items()),
    "BINGET": _get("B"),
    "LONG_BINGET": _get("I"),
    "BINPUT": _put("B"),
    "LONG_BINPUT": _put("I"),
    "MEMOIZE": _memoize,
    "GLOBAL": lambda scan: scan._name(scan._line(), scan._line()),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": PickleScan._call,
    "NEWOBJ": PickleScan._new,
    "BUILD": PickleScan._build,
    "BINPERSID": PickleScan._load_storage,
}
_INSTRUCTIONS = {ord(op.code): op.name for op in pickletools.opcodes}
_STEPS = {code: _BY_NAME[name] for code, name in _INSTRUCTIONS.items() if name in _BY_NAME}
