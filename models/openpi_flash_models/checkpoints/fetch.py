"""Fetches files over HTTP so that nothing is lost when a connection, or this process, dies half-way."""

import dataclasses
import hashlib
import http.client
import json
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from openpi_flash_models.errors import DownloadError

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_WORKERS = 8
_NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    Attributes:
        url: answers with the content, and to ranges of it.
        size: bytes.
        version: differs when the content does; a part of another version is not continued.
        checksum: algorithm (`md5`, `sha256` or `git`, a SHA-1 with git's prefix) and hexadecimal digest; None when
            unknown, and then only the size is checked.
        authorization: header for this host; it is not sent on to another one.
    """

    url: str
    size: int
    version: str
    checksum: tuple[str, str] | None
    authorization: str | None = None


class NotFoundError(DownloadError):
    """HTTP 404."""


class Fetcher:
    """Requests of one download, repeated as long as they make progress.

    Args:
        attempts: failures in a row, without a byte of progress between them, before giving up.
        backoff_s: wait after the first of them; doubles with each.
        timeout_s: for a connection, and for each read from it.
    """

    def __init__(self, *, attempts: int = 5, backoff_s: float = 0.5, timeout_s: float = 30.0) -> None:
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._timeout_s = timeout_s
        self._stopped = threading.Event()
        self._opener = urllib.request.build_opener(_Redirects)

    def json(self, url: str) -> dict[str, Any]:
        """The JSON object at `url`. Raises NotFoundError, or DownloadError after the last attempt."""

        def attempt() -> dict[str, Any]:
            with self._open(url) as response:
                try:
                    return json.load(response)
                except ValueError as error:
                    raise _TransientError(f"{url}: the answer is not JSON") from error

        return self._retry(attempt, progress=lambda: 0)

    def fetch(self, files: Mapping[Path, RemoteFile], report: Callable[[int], None]) -> None:
        """Writes each file to its path, several at a time. A path appears only when it is whole and verified.

        Parts that an earlier call left are continued; files that are there already are verified and kept.

        Args:
            report: called with each number of bytes that is now there (negative when bytes were thrown away).

        Raises:
            DownloadError: from the first file that failed; the others are stopped.
        """
        with ThreadPoolExecutor(_WORKERS) as pool:
            fetches = [pool.submit(self._fetch_file, file, path, report) for path, file in files.items()]
            try:
                done, _ = wait(fetches, return_when=FIRST_EXCEPTION)
                for fetch in done:
                    fetch.result()
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_file(self, file: RemoteFile, path: Path, report: Callable[[int], None]) -> None:
        if _is_whole(path, file):
            report(file.size)
            return
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{file.version[:16]}.part")
        report(_size(part))

        def attempt() -> None:
            self._append(file, part, report)
            if not _is_whole(part, file):
                report(-_size(part))
                part.unlink()
                raise _TransientError(f"{file.url}: the content does not match its checksum")

        self._retry(attempt, progress=lambda: _size(part))
        part.rename(path)

    def _append(self, file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
        """Fetches what the part lacks."""
        done = _size(part)
        if done >= file.size:
            part.touch()
            return
        headers = {"Range": f"bytes={done}-"} if done else {}
        if file.authorization is not None:
            headers["Authorization"] = file.authorization
        with self._open(file.url, headers) as response, part.open("ab", 0) as output:
            if done and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                report(-done)  # a server that sends all of it again
                output.truncate(0)
            while chunk := response.read1(_CHUNK_BYTES):
                if self._stopped.is_set():
                    raise DownloadError(f"{file.url}: stopped")
                output.write(chunk)
                report(len(chunk))
        if _size(part) < file.size:
            raise _TransientError(f"{file.url}: the connection ended at byte {_size(part)} of {file.size}")

    def _open(self, url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        try:
            return self._opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=self._timeout_s)  # noqa: S310
        except urllib.error.HTTPError as error:
            message = f"{url}: HTTP {error.code} {error.reason}"
            if error.code == http.HTTPStatus.NOT_FOUND:
                raise NotFoundError(f"{message}; check the name") from error
            if error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
                raise DownloadError(
                    f"{message}; it is not public, and no credentials that open it were given"
                ) from error
            if error.code in _TRANSIENT_STATUSES:
                raise _TransientError(message) from error
            raise DownloadError(message) from error

    def _retry(self, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        failures = 0
        while True:
            reached = progress()
            try:
                return attempt()
            except (_TransientError, http.client.HTTPException, *_NETWORK_ERRORS) as error:
                failures = 1 if progress() > reached else failures + 1
                if failures >= self._attempts:
                    raise DownloadError(f"gave up after {failures} failures in a row: {error}") from error
            self._stopped.wait(self._backoff_s * 2 ** (failures - 1))


def relative_path(name: str, prefix: str) -> Path:
    """Where a remote file goes below the directory that stands for `prefix`.

    Raises:
        DownloadError: its name leads out of that directory.
    """
    path = PurePosixPath(name.removeprefix(prefix))
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise DownloadError(f"it has a file with the unsafe name {name!r}")
    return Path(*path.parts)


class _TransientError(Exception):
    """Worth another attempt."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and takes the authorization along only to the host that it was meant for."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:  # noqa: PLR0917
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            request.remove_header("Authorization")
        return request


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.checksum is None:
        return True
    algorithm, expected = file.checksum
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == expected
