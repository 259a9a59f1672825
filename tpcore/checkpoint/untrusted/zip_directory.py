"""The directory of a torch zip file, read strictly: what every reader of zip files agrees on.

torch writes records uncompressed, one after the other, with nothing before them, between them and
the directory, or after it. A file that is otherwise is damaged, or made to look different to
different readers, or to unpack to more than it holds.
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple, Protocol

from tpcore.checkpoint.errors import CheckpointError

MAGIC = b"PK\x03\x04"
MAX_RECORDS = 100_000

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_UNSET16, _UNSET32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED_OR_PATCHED = 0x0001 | 0x0020 | 0x0040 | 0x2000


class Readable(Protocol):
    """The bytes of a whole zip file: of a mapped file, of a part of one, or in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class Record(NamedTuple):
    """Where the bytes of a record are, and their checksum (0: none was written)."""

    offset: int
    size: int
    crc: int


def read_directory(data: Readable, where: str) -> dict[str, Record]:
    """Name -> record of a whole zip file.

    Raises:
        CheckpointError: it is truncated, damaged, or not as torch writes it; names the record.
    """
    count, start, end = _locate(data, where)
    records: dict[str, Record] = {}
    spans: list[tuple[int, int, str]] = []
    lowered: set[str] = set()
    at = start
    for _ in range(count):
        if at + _ENTRY.size > end:
            raise _damaged(where, "its directory has fewer entries than it claims")
        name, record, header_offset, at = _entry(data, at, end, start, where)
        # torch looks records up without regard to case.
        if name.lower() in lowered:
            raise _damaged(where, f"the record {name!r:.100} occurs twice")
        lowered.add(name.lower())
        records[name] = record
        spans.append((header_offset, record.offset + record.size, name))
    if at != end:
        raise _damaged(where, "its directory has more entries than it claims")
    spans.sort()
    for (_, first_end, _), (second_start, _, name) in itertools.pairwise(spans):
        if second_start < first_end:
            raise _damaged(where, f"the record {name!r:.100} overlaps another")
    roots = {name.partition("/")[0] for name in records}
    if len(roots) > 1:
        raise _damaged(where, "its records lie in more than one folder")
    return records


def _locate(data: Readable, where: str) -> tuple[int, int, int]:
    """(number of entries, begin and end of the directory)."""
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != b"PK\x05\x06":
        raise CheckpointError(f"{where}: the file is truncated; copy or download it again")
    fields = _END.unpack(data[end:])
    disk, first_disk, here, count, size, start, comment = fields[1:]
    if comment or disk not in (0, _UNSET16) or first_disk not in (0, _UNSET16) or here != count:
        raise _damaged(where, "its end is not as torch writes it")
    locator = end - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, disk64, end64, disks = _LOCATOR.unpack(data[locator:end])
        if disk64 or disks != 1 or end64 + _END64.size != locator:
            raise _damaged(where, "its end is not as torch writes it")
        sign, length, _, _, disk, first_disk, here, count64, size64, start64 = _END64.unpack(
            data[end64:locator]
        )
        same = (
            count in (count64, _UNSET16)
            and size in (size64, _UNSET32)
            and start in (start64, _UNSET32)
        )
        if sign != b"PK\x06\x06" or length != 44 or disk or first_disk or not same:
            raise _damaged(where, "its end is not as torch writes it")
        if here != count64:
            raise _damaged(where, "its end is not as torch writes it")
        count, size, start, end = count64, size64, start64, end64
    if start + size != end:
        raise _damaged(where, "its directory is not where it claims to be")
    if count > MAX_RECORDS:
        raise CheckpointError(
            f"{where}: has {count} records; at most {MAX_RECORDS} are read, and none has so many"
        )
    return count, start, end


def _entry(
    data: Readable, at: int, end: int, limit: int, where: str
) -> tuple[str, Record, int, int]:
    """(name, record, offset of its own header, where the next entry begins)."""
    sign, _, _, flags, method, _, _, crc, packed, size, name_length, *rest = _ENTRY.unpack(
        data[at : at + _ENTRY.size]
    )
    extra_length, comment_length, disk, _, _, header = rest
    at += _ENTRY.size
    raw_name = data[at : at + name_length]
    extra = data[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment_length
    if sign != b"PK\x01\x02" or at > end:
        raise _damaged(where, "its directory has an entry that is none")
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise _damaged(where, f"a record has the name {raw_name!r:.100}") from None
    if not name.isprintable() or not name:
        raise _damaged(where, f"a record has the name {name!r:.100}")
    size, packed, header = _wide(extra, (size, packed, header), where, name)
    if method or packed != size or flags & _ENCRYPTED_OR_PATCHED or disk:
        raise _damaged(
            where,
            f"the record {name!r:.100} is compressed or encrypted, {packed} bytes for {size}; "
            "torch writes neither",
        )
    if header + _LOCAL.size > limit:
        raise _damaged(where, f"the record {name!r:.100} begins outside of the file")
    local = _LOCAL.unpack(data[header : header + _LOCAL.size])
    name_start = header + _LOCAL.size
    offset = name_start + local[9] + local[10]
    if local[0] != MAGIC or data[name_start : name_start + local[9]] != raw_name:
        raise _damaged(where, f"the record {name!r:.100} is not where the directory says")
    if offset + size > limit:
        raise _damaged(where, f"the record {name!r:.100} claims {size} bytes, more than there are")
    return name, Record(offset, size, crc), header, at


def _wide(extra: bytes, values: tuple[int, int, int], where: str, name: str) -> tuple[int, ...]:
    """Sizes and offset, each from the 64-bit field where its own 32 bits say so."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            found = []
            for value in values:
                if value != _UNSET32:
                    found.append(value)
                    continue
                if len(field) < 8:
                    raise _damaged(where, f"the record {name!r:.100} has no size")
                found.append(int.from_bytes(field[:8], "little"))
                field = field[8:]
            return tuple(found)
        at += 4 + length
    return values


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: truncated or damaged: {what}; copy or download it again")
