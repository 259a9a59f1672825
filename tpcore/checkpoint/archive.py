"""Reading tar archives (plain or gzip) that nobody vouches for, such as `.nemo` files.

with Archive(path) as archive:
    settings = archive.read("model_config.yaml")
    files = archive.extract(["model_weights.ckpt"], folder)
"""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, cast

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.tar_members import BLOCK, CHUNK, Member, Source, checksum_fits, opened, scan

MAX_SMALL_BYTES = 16 * 2**20
"""Of a member that is read into memory: settings and vocabularies."""

_KEPT_BYTES = 2**20


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


def unpack(path: Path, folder: Path) -> dict[str, Path]:
    """Write every member below an existing folder, in one pass; name -> where it is.

    Raises:
        CheckpointError: as `Archive`; some members may have been written by then.
    """
    files: dict[str, Path] = {}

    def consume(member: Member, source: Source) -> None:
        files[member.name] = _write(path, member, source, folder)

    with opened(path) as source:
        scan(path, source, consume)
    return files


class Archive:
    """The members of a tar archive, listed when it is opened.

    A plain archive is read at its headers only. A gzip one is unpacked once to be listed (small
    members are kept), and once more by each `extract` or `open` of a large member; `unpack` does
    all in one pass.

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
            raise CheckpointError(
                f"{self.path}: {name} has {member.size} bytes; at most {limit} are expected"
            )
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


def _unwritable(path: Path, member: Member, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: {member.name!r:.100} ({member.size} bytes) cannot be unpacked into a temporary "
        f"folder ({error.strerror}); TMPDIR chooses another"
    )
