"""What one process of a machine does for all of them: unpacking an archive, comparing checksums.

The ranks of a job read the same file. The first to come does it, the others wait for that; whoever
is the last to need the folder with the result removes it, and one that a killed process left is
used or replaced by the next. The folder is below one that only the user can enter.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

_COMPLETE = ".complete"


class PerHost:
    """A folder that holds what `fill` put there, and goes when no process needs it any more.

    Args:
        path: the file that it is about.
        purpose: a word for what is done; the folder is shared by those who say the same.
        fill: called with an empty folder, by one process; what it raises, each of them raises.

    Raises:
        OSError: there is no place for the folder.
    """

    folder: Path

    def __init__(self, path: Path, purpose: str, fill: Callable[[Path], object]) -> None:
        lock = _private_root() / f"{_key(path, purpose)}.lock"
        self.folder = lock.with_suffix("")
        descriptor = -1
        while descriptor < 0:
            descriptor = self._take(lock, fill)
        weakref.finalize(self, _release, lock, self.folder, descriptor, os.getpid())

    def _take(self, lock: Path, fill: Callable[[Path], object]) -> int:
        """The lock, shared, with the folder complete; -1: to be tried again."""
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            # Changing a lock's kind is not atomic, so each time what it guards is looked at again.
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits while somebody fills the folder
            if not self._is_complete(lock, descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(lock, descriptor):
                    self._fill(fill)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if self._is_complete(lock, descriptor):
                return descriptor
        except BlockingIOError:
            # Another asked at the same time; not both again after the same pause.
            time.sleep(0.01 + os.getpid() % 17 / 400)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return -1

    def _is_complete(self, lock: Path, descriptor: int) -> bool:
        return _is_at(lock, descriptor) and (self.folder / _COMPLETE).exists()

    def _fill(self, fill: Callable[[Path], object]) -> None:
        if (self.folder / _COMPLETE).exists():
            return
        _sweep(self.folder.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        try:
            fill(self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        (self.folder / _COMPLETE).touch()


def _key(path: Path, purpose: str) -> str:
    """What changes when the file does."""
    about = path.stat()
    facts = (purpose, path.resolve(), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _sweep(root: Path) -> None:
    """Remove what killed processes left: folders whose lock nobody holds."""
    for lock in root.glob("*.lock"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(lock, descriptor):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink()
            finally:
                os.close(descriptor)


def _shared_name() -> str:
    return f"tpcore-{os.getuid()}"


def _private_root() -> Path:
    """A folder that nobody else can put anything into."""
    root = Path(tempfile.gettempdir()) / _shared_name()
    root.mkdir(mode=0o700, exist_ok=True)
    about = root.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
        return root
    # Somebody else was there first: then without sharing.
    return Path(tempfile.mkdtemp(prefix="tpcore-"))


def _is_at(lock: Path, descriptor: int) -> bool:
    """Whether the opened file is the one of that name, and not one that was removed since."""
    try:
        return lock.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _release(lock: Path, folder: Path, descriptor: int, process: int) -> None:
    if os.getpid() != process:
        return  # a fork: the lock is its parent's
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)  # another process needs it, and will remove it
        return
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
    if lock.parent.name != _shared_name():
        shutil.rmtree(lock.parent, ignore_errors=True)
    os.close(descriptor)
