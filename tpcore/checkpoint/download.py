"""One file from a URL: resumed, tried again, checked, and there only when it is whole.

`pooch` checks the digest and moves the file into place; this is its downloader. What an attempt got
stays beside the target as `<file>.part`, and the next attempt, or the next process, goes on from
there if the server says that the file is still the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcore.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    import requests

ATTEMPTS = 5
TIMEOUT_S = 30.0
"""Without a byte; then the attempt has failed."""
WAIT_S = 1.0
"""Before the second attempt; doubled before each further one."""
MAX_BYTES = 32 * 2**30

_CHUNK = 2**16
_TRANSIENT = (408, 416, 425, 429)


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    attempts: int = ATTEMPTS,
    timeout_s: float = TIMEOUT_S,
    wait_s: float = WAIT_S,
) -> None:
    """Put the file at `url` at `target`; processes that ask for the same file wait for the first.

    Raises:
        CheckpointError: it cannot be had, or is not the file that the digest belongs to; says why
            and after how many attempts. Nothing is at `target` then.
    """
    try:
        import pooch
        import requests
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{url} cannot be downloaded without the package {error.name}, which tpcore's extra "
            "[finetune] brings"
        ) from error
    fetcher = _Resuming(target, attempts, timeout_s, wait_s)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if target.is_file():
                return
            _announce(f"downloading {url} to {target}")
            known_hash = None if sha256 is None else f"sha256:{sha256}"
            with _quiet(pooch.get_logger()):
                pooch.retrieve(
                    url,
                    known_hash,
                    fname=target.name,
                    path=target.parent,
                    downloader=fetcher,
                )
    except requests.RequestException as error:
        tried = f" after {attempts} attempts" if attempts > 1 else ""
        raise CheckpointError(f"{url} cannot be downloaded{tried} ({_reason(error)})") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{url} has another SHA-256 digest than the {sha256} that is known; it was thrown away"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror})") from error


class _Resuming:
    """What pooch calls to get a file."""

    def __init__(self, target: Path, attempts: int, timeout_s: float, wait_s: float) -> None:
        self.part = target.with_name(f"{target.name}.part")
        self.tag = target.with_name(f"{target.name}.part.tag")
        self.attempts, self.timeout_s, self.wait_s = attempts, timeout_s, wait_s

    def __call__(self, url: str, output_file: str, _: Any) -> None:
        import requests

        for attempt in range(1, self.attempts + 1):
            try:
                self._attempt(url)
                break
            except requests.RequestException:
                if attempt == self.attempts:
                    raise
                time.sleep(self.wait_s * 2 ** (attempt - 1))
        self.tag.unlink(missing_ok=True)
        os.replace(self.part, output_file)

    def _attempt(self, url: str) -> None:
        import requests

        start = self.part.stat().st_size if self.part.exists() else 0
        tag = self.tag.read_text(encoding="latin-1") if start and self.tag.exists() else None
        headers = {"Accept-Encoding": "identity"}
        if tag is not None:
            headers |= {"Range": f"bytes={start}-", "If-Range": tag}
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout_s) as response:
            start = self._begin(url, response, start)
            self._remember(response)
            length = response.headers.get("Content-Length", "")
            total = start + int(length) if length.isdigit() else None
            if (total or 0) > MAX_BYTES:
                raise CheckpointError(f"{url} claims {total} bytes, more than any checkpoint")
            got = start
            with self.part.open("ab" if start else "wb") as file, _progress(start, total) as step:
                for chunk in response.iter_content(_CHUNK):
                    got += len(chunk)
                    if got > (total or MAX_BYTES):
                        raise CheckpointError(f"{url} sends more bytes than it announced")
                    file.write(chunk)
                    step(len(chunk))
            if total is not None and got != total:
                raise requests.ConnectionError(f"the connection ended at byte {got} of {total}")

    def _begin(self, url: str, response: requests.Response, start: int) -> int:
        """Where the bytes of this response belong."""
        import requests

        status = response.status_code
        if status == 416:
            self.part.unlink(missing_ok=True)
        if status in _TRANSIENT or status >= 500:
            raise requests.ConnectionError(f"the server answers {status} {response.reason}")
        if status not in (200, 206):
            raise CheckpointError(
                f"{url} cannot be downloaded (the server answers {status} {response.reason})"
            )
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise CheckpointError(
                f"{url} cannot be downloaded (the server sends a web page instead of the file)"
            )
        if status == 200:
            return 0
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            self.part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server sends another part than was asked for")
        return start

    def _remember(self, response: requests.Response) -> None:
        """What identifies this version of the file, so that no two versions are joined."""
        tag = response.headers.get("ETag", "")
        if not tag or tag.startswith("W/"):
            tag = response.headers.get("Last-Modified", "")
        if tag:
            self.tag.write_text(tag, encoding="latin-1")
        else:
            self.tag.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The cause that says most, without addresses of objects and without nested brackets."""
    text = str(error).lower()
    for sign, meaning in (
        ("name resolution", "no network, or the name of the server is unknown"),
        ("getaddrinfo", "no network, or the name of the server is unknown"),
        ("refused", "the connection is refused"),
        ("timed out", "the server does not answer in time"),
        ("reset by peer", "the connection is reset"),
        ("incompleteread", "the connection ends too early"),
    ):
        if sign in text:
            return meaning
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _announce(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _progress(start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=start)
        yield lambda size: bar.advance(task, size)
