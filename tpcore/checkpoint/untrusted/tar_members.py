"""The members of a tar stream, plain or gzip, that nobody vouches for.

A small reader of its own, because it must refuse what general ones accept: members that lead out of
the folder, links, devices, sparse files, names that occur twice, and more data than a model can be.
A gzip stream is unpacked in pieces, and its bounds are checked while it flows, never after.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from tpcore.checkpoint.errors import CheckpointError

MAX_MEMBERS = 4096
MAX_MEMBER_BYTES = 32 * 2**30
MAX_TOTAL_BYTES = 128 * 2**30
"""The largest BERT known, 3.9 billion parameters in float32, has 16 GiB."""
MAX_RATIO = 100
"""Of unpacked to packed bytes: weights hardly compress, bombs do 1000 to 1."""
FREE_BYTES = 64 * 2**20
"""What any gzip may unpack to, whatever its ratio: padding, text, tiny models."""
BLOCK = 512
CHUNK = 2**20
_MAX_EXTENDED = 64 * 2**10
_MAX_TAIL = 2**20
_FORBIDDEN = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"K": "a link with a long name",
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
}


@dataclass(frozen=True)
class Member:
    """One file of an archive."""

    name: str
    """Its path with `/`, without a leading `./`."""
    size: int
    offset: int
    """Of its first byte in the unpacked archive."""


class Source:
    """The unpacked bytes of an archive, forwards; keeps the bounds on what a gzip may become."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        self.is_packed = self.file.read(2) == b"\x1f\x8b"
        self.file.seek(0)
        self.size = os.fstat(self.file.fileno()).st_size
        self._stream: BinaryIO = self.file
        if self.is_packed:
            self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=self.file))
        self.position = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        try:
            data = self._stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CheckpointError(
                f"{self.path}: is truncated or damaged after {self.position} unpacked bytes "
                f"({error}); copy or download it again"
            ) from error
        self.position += len(data)
        bound = min(MAX_TOTAL_BYTES, max(FREE_BYTES, MAX_RATIO * self.size))
        if self.is_packed and self.position > bound:
            raise CheckpointError(
                f"{self.path}: unpacks to more than {bound} bytes from {self.size}, which no "
                "weights do; refused as a decompression bomb"
            )
        return data

    def skip_to(self, offset: int) -> None:
        assert offset >= self.position
        if not self.is_packed:
            self.file.seek(offset)
            self.position = offset
        while self.position < offset:
            if not self.read(min(CHUNK, offset - self.position)):
                break  # the next read finds nothing and says so

    def chunks(self, member: Member) -> Iterator[bytes]:
        """The bytes of the member that begins here."""
        left = member.size
        while left:
            chunk = self.read(min(CHUNK, left))
            if not chunk:
                raise CheckpointError(
                    f"{self.path}: {member.name!r:.100} is truncated, {left} bytes are missing; "
                    "copy or download it again"
                )
            left -= len(chunk)
            yield chunk

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self.file.close()


def opened(path: Path) -> Source:
    """The bytes of an archive from its beginning; a context manager that closes it."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: is no file")
        return Source(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error


def scan(
    path: Path, source: Source, consume: Callable[[Member, Source], None] | None
) -> dict[str, Member]:
    """Every file of the archive; `consume` may read the member that begins at the source."""
    members: dict[str, Member] = {}
    taken: dict[str, bool] = {}  # every path -> whether it is a file
    num_headers = 0
    long_name: str | None = None
    extended: dict[str, str] = {}
    while True:
        header = source.read(BLOCK)
        if header == bytes(BLOCK):
            break
        num_headers += 1
        if num_headers > 3 * MAX_MEMBERS:
            raise CheckpointError(f"{path}: has more than {MAX_MEMBERS} members")
        if len(header) < BLOCK or not checksum_fits(header):
            what = "is truncated" if len(header) < BLOCK else "has no tar header"
            raise CheckpointError(
                f"{path}: {what} at unpacked byte {source.position - len(header)}, after "
                f"{_last(members)}; truncated, damaged or no tar archive"
            )
        kind, size = header[156:157], _number(path, header[124:136])
        name = _header_name(path, header)
        if kind in (b"x", b"g", b"L"):
            data = _read_extended(path, source, name, size)
            if kind == b"L":
                long_name = _decode(path, data.rstrip(b"\0"))
            else:
                found = _parse_pax(path, name, data)
                if kind == b"x":
                    extended = found
                elif found.keys() & {"path", "size"}:
                    raise CheckpointError(f"{path}: a global header gives every member one name")
            continue
        name = extended.get("path", long_name if long_name is not None else name)
        if "size" in extended:
            if not (extended["size"].isascii() and extended["size"].isdigit()):
                raise CheckpointError(f"{path}: {name!r:.100} has a size that is no number")
            size = int(extended["size"][:20])
        long_name, extended = None, {}
        is_folder = kind == b"5" or (kind in (b"0", b"\0") and name.endswith("/"))
        if not is_folder and kind not in (b"0", b"\0"):
            what = _FORBIDDEN.get(kind, f"a member of the unknown type {kind!r}")
            raise CheckpointError(f"{path}: {name!r:.100} is {what}; only plain files are unpacked")
        parts = _checked_parts(path, name)
        if is_folder:
            if size:
                raise CheckpointError(
                    f"{path}: the folder {name!r:.100} claims to hold {size} bytes"
                )
            _take(path, taken, parts, is_file=False)
            continue
        if not parts:
            raise CheckpointError(f"{path}: a member has the name {name!r:.100}")
        _take(path, taken, parts, is_file=True)
        if len(members) >= MAX_MEMBERS:
            raise CheckpointError(f"{path}: has more than {MAX_MEMBERS} members")
        member = Member("/".join(parts), size, source.position)
        _check_size(path, source, member)
        members[member.name] = member
        if consume is not None:
            consume(member, source)
        source.skip_to(member.offset + -(-size // BLOCK) * BLOCK)
    tail = source.read(_MAX_TAIL + 1)
    if len(tail) > _MAX_TAIL or tail.strip(b"\0"):
        raise CheckpointError(
            f"{path}: holds data after its end, which is read by some readers only"
        )
    return members


def _last(members: dict[str, Member]) -> str:
    return repr(next(reversed(members)))[:100] if members else "no member"


def checksum_fits(header: bytes) -> bool:
    """Whether a block of 512 bytes is a tar header, judged by its checksum."""
    try:
        stated = int(header[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return stated == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])


def _number(path: Path, field: bytes) -> int:
    """Octal digits, or big-endian binary where the highest bit is set, as GNU's for > 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise CheckpointError(f"{path}: a header has the size {field!r}; damaged or hostile")
    return int(digits, 8)


def _header_name(path: Path, header: bytes) -> str:
    name = _decode(path, header[:100].split(b"\0", 1)[0])
    prefix = b"" if header[257:263] != b"ustar\0" else header[345:500].split(b"\0", 1)[0]
    return f"{_decode(path, prefix)}/{name}" if prefix else name


def _decode(path: Path, name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the member name {name!r:.100} is not UTF-8") from error


def _read_extended(path: Path, source: Source, name: str, size: int) -> bytes:
    if size > _MAX_EXTENDED:
        raise CheckpointError(
            f"{path}: {name!r:.100} is an extended header of {size} bytes; at most {_MAX_EXTENDED} "
            "are expected"
        )
    start = source.position
    data = source.read(size)
    if len(data) < size:
        raise CheckpointError(f"{path}: is truncated in the extended header {name!r:.100}")
    source.skip_to(start + -(-size // BLOCK) * BLOCK)
    return data


def _parse_pax(path: Path, name: str, data: bytes) -> dict[str, str]:
    """Records of length, blank, key=value and newline; those that change what is read."""
    wrong = CheckpointError(f"{path}: {name!r:.100} is no valid extended header")
    found: dict[str, str] = {}
    while data.strip(b"\0"):
        digits, _, _ = data[:8].partition(b" ")
        if not digits.isdigit() or not len(digits) + 3 <= int(digits) <= len(data):
            raise wrong
        record, data = data[: int(digits)], data[int(digits) :]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n":
            raise wrong
        if key.startswith(b"GNU.sparse"):
            raise CheckpointError(
                f"{path}: {name!r:.100} describes a sparse file; only plain files are unpacked"
            )
        if key in (b"path", b"size"):
            if key.decode() in found:
                raise wrong
            found[key.decode()] = _decode(path, value)
    return found


def _checked_parts(path: Path, name: str) -> tuple[str, ...]:
    """The parts of a relative path below the archive's root; () is the root."""
    parts = name.removesuffix("/").split("/")
    while parts and parts[0] == ".":
        parts = parts[1:]
    if name.startswith("/") or ".." in parts:
        raise CheckpointError(f"{path}: {name!r:.100} leads out of the archive; it is refused")
    strange = any(part in ("", ".") or len(part.encode()) > 255 for part in parts)
    if strange or len(parts) > 16 or "\\" in name or not name.isprintable():
        raise CheckpointError(f"{path}: {name!r:.100} is no plain name of a member; it is refused")
    return tuple(parts)


def _take(path: Path, taken: dict[str, bool], parts: tuple[str, ...], *, is_file: bool) -> None:
    """Note a path; refuse one that is taken: which of two is meant depends on the reader."""
    for length in range(1, len(parts) + 1):
        name = "/".join(parts[:length])
        whole = length == len(parts)
        if name in taken and (taken[name] or (whole and is_file)):
            raise CheckpointError(f"{path}: {name!r:.100} occurs twice in it; it is refused")
        taken[name] = whole and is_file


def _check_size(path: Path, source: Source, member: Member) -> None:
    if member.size > MAX_MEMBER_BYTES:
        raise CheckpointError(
            f"{path}: {member.name!r:.100} claims {member.size} bytes; at most {MAX_MEMBER_BYTES} "
            "are unpacked"
        )
    if member.offset + member.size > MAX_TOTAL_BYTES:
        raise CheckpointError(
            f"{path}: unpacks to more than {MAX_TOTAL_BYTES} bytes at {member.name!r:.100}"
        )
    if not source.is_packed and member.offset + member.size > source.size:
        raise CheckpointError(
            f"{path}: {member.name!r:.100} is truncated: it claims {member.size} bytes, and "
            f"{max(0, source.size - member.offset)} are left; copy or download it again"
        )
