"""Reading tar archives (plain or gzip) that nobody vouches for, such as `.nemo` files.

with Archive(path) as archive:
    settings = archive.read("model_config.yaml")
    files = archive.extract(["model_weights.ckpt"], folder)
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO, cast

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.untrusted.tar_members import (
    BLOCK,
    CHUNK,
    Member,
    Source,
    checksum_fits,
    opened,
    scan,
)

MAX_SMALL_BYTES = 16 * 2**20
"""Of a member that is read into memory: settings and vocabularies."""

_KEPT_BYTES = 2**20
_MAX_SMALL_TOTAL = 256 * 2**20
_MEMBERS, _LISTING = "members", "listing.json"


def recognise(path: Path) -> bool:
    """Whether a file begins as a tar archive, plain or in gzip."""
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
            if head[:2] == b"\x1f\x8b":
                file.seek(0)
                head = gzip.GzipFile(fileobj=file).read(BLOCK)
    except (OSError, EOFError, zlib.error):
        return False
    return len(head) == BLOCK and checksum_fits(head)


def is_packed(path: Path) -> bool:
    """Whether an archive is in gzip, so that nothing in it can be read in place.

    Raises:
        CheckpointError: it cannot be opened.
    """
    with opened(path) as source:
        return source.is_packed


def unpack(
    path: Path, folder: Path, wanted: Callable[[Member], bool] = lambda member: True
) -> dict[str, Path]:
    """Write the wanted members below an existing folder, in one pass; name -> where it is.

    Raises:
        CheckpointError: as `Archive`; some members may have been written by then.
    """
    files: dict[str, Path] = {}

    def consume(member: Member, source: Source) -> None:
        if wanted(member):
            files[member.name] = _write(path, member, source, folder)

    with opened(path) as source:
        scan(path, source, consume)
    return files


class Archive:
    """The members of a tar archive, listed when it is opened.

    A plain archive is read at its headers only. A gzip one is unpacked once to be listed (small
    members are kept), and once more by each `extract` or `open` of a large member; `unpack` and
    `UnpackedArchive.fill` do all in one pass.

    Args:
        path: the archive.

    Raises:
        CheckpointError: it is damaged or truncated, or has a member that is refused; names both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, bytes] = {}
        with opened(path) as source:
            keep = self._keep if source.is_packed else None
            self.members: dict[str, Member] = scan(path, source, keep)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str, limit: int = MAX_SMALL_BYTES) -> bytes:
        """The bytes of a small member.

        Raises:
            CheckpointError: there is none of that name, or it has more than `limit` bytes.
        """
        member = self._member(name)
        if member.size > limit:
            raise _too_large(self.path, name, member.size, limit)
        if name in self._kept:
            return self._kept[name]
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """A member as a seekable file; from a gzip archive by way of an unnamed temporary file.

        Raises:
            CheckpointError: there is none of that name.
        """
        member = self._member(name)
        if name in self._kept:
            return io.BytesIO(self._kept[name])
        with opened(self.path) as source:
            if not source.is_packed:
                window = Window(os.dup(source.file.fileno()), member.offset, member.size)
                return cast(BinaryIO, io.BufferedReader(window, CHUNK))
            source.skip_to(member.offset)
            file = tempfile.TemporaryFile()  # noqa: SIM115  # handed to the caller
            try:
                for chunk in source.chunks(member):
                    file.write(chunk)
            except OSError as error:
                file.close()
                raise _unwritable(self.path, member, error) from error
            except BaseException:
                file.close()
                raise
        file.seek(0)
        return cast(BinaryIO, file)

    def place(self, name: str) -> tuple[Path, int, int]:
        """The file that a member of a plain archive lies in, where it begins there, its size.

        Raises:
            CheckpointError: there is none of that name.
        """
        member = self._member(name)
        return self.path, member.offset, member.size

    def extract(self, names: Collection[str], folder: Path) -> dict[str, Path]:
        """Write members below an existing folder, under their names; name -> where it is.

        Raises:
            CheckpointError: there is none of that name, or it cannot be written.
        """
        members = sorted({self._member(name) for name in names}, key=lambda entry: entry.offset)
        files: dict[str, Path] = {}
        with opened(self.path) as source:
            for member in members:
                source.skip_to(member.offset)
                files[member.name] = _write(self.path, member, source, folder)
        return files

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise CheckpointError(f"{self.path}: there is no member {name!r:.100} in it")
        return self.members[name]

    def _keep(self, member: Member, source: Source) -> None:
        held = sum(map(len, self._kept.values()))
        if member.size <= _KEPT_BYTES and held + member.size <= MAX_SMALL_BYTES:
            self._kept[member.name] = b"".join(source.chunks(member))


class UnpackedArchive:
    """The small members of an archive and those that were asked for, in a folder of files.

    Args:
        path: the archive.
        folder: where `fill` was before, maybe by another process.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder / _MEMBERS
        self.members: dict[str, int] = json.loads((folder / _LISTING).read_text())

    @staticmethod
    def fill(path: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Unpack into an empty folder, in one pass: what is small, and what is wanted.

        Raises:
            CheckpointError: as `Archive`, or there is no room.
        """
        sizes: dict[str, int] = {}
        total = 0

        def take(member: Member) -> bool:
            nonlocal total
            sizes[member.name] = member.size
            if wanted(member.name):
                return True
            total += member.size
            return member.size <= MAX_SMALL_BYTES and total <= _MAX_SMALL_TOTAL

        (folder / _MEMBERS).mkdir()
        unpack(path, folder / _MEMBERS, take)
        (folder / _LISTING).write_text(json.dumps(sizes))

    @staticmethod
    def extract(archive: Archive, names: Collection[str], folder: Path) -> None:
        """Put some members of a listed archive into an empty folder.

        Raises:
            CheckpointError: there is no room.
        """
        (folder / _MEMBERS).mkdir()
        archive.extract(names, folder / _MEMBERS)
        sizes = {name: archive.members[name].size for name in names}
        (folder / _LISTING).write_text(json.dumps(sizes))

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str) -> bytes:
        """The bytes of a small member.

        Raises:
            CheckpointError: there is none of that name, or it is not small.
        """
        file, _, size = self.place(name)
        if size > MAX_SMALL_BYTES or not file.is_file():
            raise _too_large(self.path, name, size, MAX_SMALL_BYTES)
        return file.read_bytes()

    def place(self, name: str) -> tuple[Path, int, int]:
        """The file of a member, 0, and its size.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.members:
            raise CheckpointError(f"{self.path}: there is no member {name!r:.100} in it")
        return self.folder / name, 0, self.members[name]


class Window(io.RawIOBase):
    """A range of a file as a seekable file of its own; owns the descriptor."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._size, self._at = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the file begins")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._descriptor, wanted, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _write(path: Path, member: Member, source: Source, folder: Path) -> Path:
    target = folder / member.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for chunk in source.chunks(member):
                file.write(chunk)
    except OSError as error:
        raise _unwritable(path, member, error) from error
    return target


def _too_large(path: Path, name: str, size: int, limit: int) -> CheckpointError:
    return CheckpointError(f"{path}: {name} has {size} bytes; at most {limit} are expected")


def _unwritable(path: Path, member: Member, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: {member.name!r:.100} ({member.size} bytes) cannot be unpacked into a temporary "
        f"folder ({error.strerror}); TMPDIR chooses another"
    )
