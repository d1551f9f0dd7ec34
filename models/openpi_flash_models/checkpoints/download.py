"""Brings checkpoints and assets to this machine: `gs://` and `hf://`, cached, resumable, never seen half-done."""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from openpi_flash_models.checkpoints.bucket import PUBLIC_URL, Bucket
from openpi_flash_models.checkpoints.fetch import Fetcher, RemoteFile, relative_path
from openpi_flash_models.errors import DownloadError

logger = logging.getLogger(__name__)

DEFAULT_DATA_HOME = Path("~/.cache/openpi")
LOG_INTERVAL_S = 10.0

_TRAINING_ONLY = "train_state"
"""Folder of a training step that holds the optimizer's state: twice the weights, and of no use to inference."""


def resolve(
    uri: str,
    *,
    data_home: Path | None = None,
    progress: bool = True,
    storage_url: str | None = None,
    hub_url: str | None = None,
) -> Path:
    """Makes a checkpoint, directory or file available locally. What was fetched before is used without the network.

    Args:
        uri: a local path; `gs://bucket/path` in a bucket that anyone may read; or `hf://org/repo[/path][@revision]`.
        data_home: the cache, laid out as openpi lays out its own (`<data_home>/<bucket>/<path>`). `OPENPI_DATA_HOME`
            when None, or else `~/.cache/openpi`. To fetch something anew, delete it there.
        progress: show a bar when stderr is a terminal, and log how far it is otherwise.
        storage_url: service that answers for `gs://`; `STORAGE_EMULATOR_HOST` when None, or else Google's.
        hub_url: service that answers for `hf://`; `HF_ENDPOINT` when None, or else huggingface.co.

    Returns:
        A path that holds all of it. A local path is returned as it is.

    Raises:
        DownloadError: names the URI and what went wrong. What had arrived is kept, and the next call continues.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Path(uri).expanduser()
    home = (data_home or Path(os.environ.get("OPENPI_DATA_HOME") or DEFAULT_DATA_HOME)).expanduser()
    fetcher = Fetcher()
    if scheme == "gs":
        bucket, _, path = rest.strip("/").partition("/")
        if not bucket or not _is_plain(path):
            raise DownloadError(f"{uri}: expected gs://bucket/path")
        url = storage_url or os.environ.get("STORAGE_EMULATOR_HOST") or PUBLIC_URL
        source = Bucket(fetcher, bucket, url if "://" in url else f"http://{url}")
        return _cached(uri, home / bucket / path, lambda: _list_bucket(source, path), fetcher, shown=progress)
    if scheme == "hf":
        path, _, revision = rest.partition("@")
        org, _, below = path.strip("/").partition("/")
        name, _, folder = below.partition("/")
        if not _is_plain(path.strip("/")) or not name:
            raise DownloadError(f"{uri}: expected hf://org/repo, hf://org/repo/path or hf://org/repo/path@revision")
        final = home / "huggingface" / f"{path.strip('/')}@{revision or 'main'}".replace("/", "--")
        return _cached(
            uri, final, lambda: _list_hub(f"{org}/{name}", folder, revision or None, hub_url), fetcher, shown=progress
        )
    raise DownloadError(f"{uri}: unknown scheme {scheme}://; expected a local path, gs:// or hf://")


def _is_plain(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _cached(
    uri: str,
    final: Path,
    find: Callable[[], RemoteFile | dict[Path, RemoteFile]],
    fetcher: Fetcher,
    *,
    shown: bool,
) -> Path:
    """Returns `final`, after fetching it when it is not there: one file, or a directory of files."""
    try:
        if _is_complete(final):
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(final.name + ".lock"), uri):
            if not _is_complete(final):  # another process may just have finished it
                _fetch(uri, final, find(), fetcher, shown=shown)
    except DownloadError as error:
        raise DownloadError(f"{uri}: {error}") from error
    except OSError as error:
        message = f"{uri}: cannot be stored in {final.parent}: {error.strerror or error}"
        raise DownloadError(f"{message}; OPENPI_DATA_HOME names another place") from error
    return final


def _fetch(uri: str, final: Path, found: RemoteFile | dict[Path, RemoteFile], fetcher: Fetcher, *, shown: bool) -> None:
    """Fills a directory beside `final`, which a later call continues, and renames what is whole."""
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(exist_ok=True)
    content = partial / "content"
    if isinstance(found, RemoteFile):
        files = {content: found}
    else:
        files = {content / path: file for path, file in found.items() if _TRAINING_ONLY not in path.parts}
    if not files:
        raise DownloadError("it has nothing but training state")
    total = sum(file.size for file in files.values())
    _check_space(partial, total)
    with _progress(uri, total, shown=shown) as report:
        fetcher.fetch(files, report)
    for stale in {path for path in content.rglob("*") if path.is_file()} - files.keys():
        stale.unlink()  # from an earlier attempt, and gone or changed at the source since
    content.rename(final)
    shutil.rmtree(partial)


def _is_complete(final: Path) -> bool:
    if final.is_dir() and any(lock.with_suffix("").exists() for lock in final.rglob("*.lock")):
        raise DownloadError(
            f"{final} holds parts of it that were fetched on their own; name one of them, or delete that directory"
        )
    return final.exists()


def _list_bucket(bucket: Bucket, path: str) -> RemoteFile | dict[Path, RemoteFile]:
    # An object first, because reading one needs fewer rights than listing a bucket.
    found = bucket.find(path) or bucket.list(path)
    if not found:
        raise DownloadError(f"the bucket {bucket.name} has nothing under that name")
    return found


def _list_hub(repo: str, folder: str, revision: str | None, url: str | None) -> RemoteFile | dict[Path, RemoteFile]:
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi(endpoint=url).model_info(repo, revision=revision, files_metadata=True)
        authorization = huggingface_hub.utils.build_hf_headers().get("authorization")
    except Exception as error:  # the client raises its own errors, the HTTP library's and the system's
        raise DownloadError(str(error)) from error
    prefix = f"{folder}/" if folder else ""
    found: dict[Path, RemoteFile] = {}
    for item in info.siblings or []:
        if item.size is None or item.blob_id is None:
            raise DownloadError(f"the hub does not tell the size of {item.rfilename}")
        checksum = ("sha256", item.lfs.sha256) if item.lfs else ("git", item.blob_id)
        content_url = huggingface_hub.hf_hub_url(repo, item.rfilename, revision=info.sha, endpoint=url)
        file = RemoteFile(content_url, item.size, checksum[1], checksum, authorization)
        if item.rfilename == folder:
            return file
        if item.rfilename.startswith(prefix):
            found[relative_path(item.rfilename, prefix)] = file
    if not found:
        raise DownloadError(f"the repository has no files{f' below {folder}' if folder else ''}")
    return found


def _check_space(directory: Path, total: int) -> None:
    there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    free = shutil.disk_usage(directory).free
    if total - there > free:
        raise DownloadError(
            f"needs {_gigabytes(total - there)} more in {directory.parent}, which has {_gigabytes(free)} free; "
            "OPENPI_DATA_HOME names another place"
        )


@contextlib.contextmanager
def _progress(uri: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes there are: a bar on a terminal, otherwise a log line now and then.

    Yields what is to be called, from any thread, with each number of bytes that came.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(total=total, desc=uri, unit="B", unit_scale=True, disable=not (shown and terminal))
    lock, done, next_log = threading.Lock(), 0, time.monotonic() + LOG_INTERVAL_S

    def report(num_bytes: int) -> None:
        nonlocal done, next_log
        with lock:
            done += num_bytes
            bar.update(num_bytes)
            if shown and not terminal and time.monotonic() > next_log:
                logger.info("downloading %s: %s of %s", uri, _gigabytes(done), _gigabytes(total))
                next_log = time.monotonic() + LOG_INTERVAL_S

    logger.info("downloading %s: %s", uri, _gigabytes(total))
    with bar:
        yield report


@contextlib.contextmanager
def _locked(path: Path, uri: str) -> Iterator[None]:
    """Holds a lock between processes; the system lets go of it when a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is downloading %s; waiting for it", uri)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
