"""Brings checkpoints and assets to this machine: `gs://` and `hf://`, cached, resumable, never seen half-done."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from openpi_flash_models.checkpoints.bucket import PUBLIC_URL, Bucket
from openpi_flash_models.checkpoints.fetch import Fetcher, RemoteFile, relative_path
from openpi_flash_models.checkpoints.progress import gigabytes, show_progress
from openpi_flash_models.errors import DownloadError

logger = logging.getLogger(__name__)

DEFAULT_DATA_HOME = Path("~/.cache/openpi")

_TRAINING_ONLY = "train_state"
"""Folder of a training step that holds the optimizer's state: twice the weights, and of no use to inference."""

_ANOTHER_CACHE = "OPENPI_DATA_HOME names another place"


@dataclasses.dataclass(frozen=True)
class Remote:
    """What is at a URI.

    Attributes:
        files: one file, or those of a directory by their paths below it.
        revision: commit of the hub's repository; None in a bucket, where each file's `version` is its generation.
    """

    files: RemoteFile | dict[Path, RemoteFile]
    revision: str | None = None


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
    if "://" not in uri:
        return Path(uri).expanduser()
    location = _parse(uri)
    home = (data_home or Path(os.environ.get("OPENPI_DATA_HOME") or DEFAULT_DATA_HOME)).expanduser()
    final = home / location.cached_at
    try:
        if _is_complete(final):
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(final.name + ".lock"), f"downloading {uri}"):
            if not _is_complete(final):  # another process may just have finished it
                _fetch(uri, final, _find(location, storage_url, hub_url), shown=progress)
    except DownloadError as error:
        raise DownloadError(f"{uri}: {error}") from error
    except OSError as error:
        message = f"{uri}: cannot be stored in {final.parent}: {error.strerror or error}"
        raise DownloadError(f"{message}; {_ANOTHER_CACHE}") from error
    return final


def find(uri: str, *, storage_url: str | None = None, hub_url: str | None = None) -> Remote:
    """Asks what is at a `gs://` or `hf://` URI, and fetches nothing. Arguments and errors as those of `resolve`."""
    location = _parse(uri)
    try:
        return _find(location, storage_url, hub_url)
    except DownloadError as error:
        raise DownloadError(f"{uri}: {error}") from error


def fill(directory: Path, files: Mapping[Path, RemoteFile], *, job: str, shown: bool, advice: str) -> None:
    """Makes the directory hold these files and no others, continuing what an earlier call left there.

    What is there already is kept when it matches its checksum.

    Args:
        directory: is made when it is not there.
        files: by the path that each is to have, below the directory.
        job: what the progress is headed with.
        shown: show progress.
        advice: what to do where the disk is too small.

    Raises:
        DownloadError: a file could not be fetched, or there is no space; what has arrived stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in files.values())
    _check_space(directory, total, advice)
    with show_progress(job, total, shown=shown) as report:
        Fetcher().fetch(files, report)
    for stale in {path for path in directory.rglob("*") if path.is_file()} - files.keys():
        stale.unlink()  # from an earlier attempt, and gone or changed at the source since


@contextlib.contextmanager
def locked(path: Path, job: str) -> Iterator[None]:
    """Holds a lock between processes; the system lets go of it when a process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is %s; waiting for it", job)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True)
class _Location:
    """What a URI names: `path` below a bucket (`gs`) or below a repository `org/name` (`hf`, where it may be empty)."""

    scheme: str
    store: str
    path: str
    revision: str | None = None

    @property
    def cached_at(self) -> Path:
        if self.scheme == "gs":
            return Path(self.store) / self.path
        below = f"{self.store}/{self.path}".strip("/")
        return Path("huggingface") / f"{below}@{self.revision or 'main'}".replace("/", "--")


def _parse(uri: str) -> _Location:
    scheme, _, rest = uri.partition("://")
    if scheme == "gs":
        bucket, _, path = rest.strip("/").partition("/")
        if not bucket or not _is_plain(path):
            raise DownloadError(f"{uri}: expected gs://bucket/path")
        return _Location(scheme, bucket, path)
    if scheme == "hf":
        path, _, revision = rest.partition("@")
        org, _, below = path.strip("/").partition("/")
        name, _, folder = below.partition("/")
        if not _is_plain(path.strip("/")) or not name:
            raise DownloadError(f"{uri}: expected hf://org/repo, hf://org/repo/path or hf://org/repo/path@revision")
        return _Location(scheme, f"{org}/{name}", folder, revision or None)
    raise DownloadError(f"{uri}: unknown scheme {scheme}://; expected a local path, gs:// or hf://")


def _is_plain(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _find(location: _Location, storage_url: str | None, hub_url: str | None) -> Remote:
    if location.scheme == "gs":
        url = storage_url or os.environ.get("STORAGE_EMULATOR_HOST") or PUBLIC_URL
        return _list_bucket(Bucket(Fetcher(), location.store, url if "://" in url else f"http://{url}"), location.path)
    return _list_hub(location.store, location.path, location.revision, hub_url)


def _fetch(uri: str, final: Path, found: Remote, *, shown: bool) -> None:
    """Fills a directory beside `final`, which a later call continues, and renames what is whole."""
    partial = final.with_name(final.name + ".partial")
    content = partial / "content"
    if isinstance(found.files, RemoteFile):
        files = {content: found.files}
    else:
        files = {content / path: file for path, file in found.files.items() if _TRAINING_ONLY not in path.parts}
    if not files:
        raise DownloadError("it has nothing but training state")
    fill(partial, files, job=f"downloading {uri}", shown=shown, advice=_ANOTHER_CACHE)
    content.rename(final)
    shutil.rmtree(partial)


def _is_complete(final: Path) -> bool:
    if final.is_dir() and any(lock.with_suffix("").exists() for lock in final.rglob("*.lock")):
        raise DownloadError(
            f"{final} holds parts of it that were fetched on their own; name one of them, or delete that directory"
        )
    return final.exists()


def _list_bucket(bucket: Bucket, path: str) -> Remote:
    # An object first, because reading one needs fewer rights than listing a bucket.
    found = bucket.find(path) or bucket.list(path)
    if not found:
        raise DownloadError(f"the bucket {bucket.name} has nothing under that name")
    return Remote(found)


def _list_hub(repo: str, folder: str, revision: str | None, url: str | None) -> Remote:
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
            return Remote(file, info.sha)
        if item.rfilename.startswith(prefix):
            found[relative_path(item.rfilename, prefix)] = file
    if not found:
        raise DownloadError(f"the repository has no files{f' below {folder}' if folder else ''}")
    return Remote(found, info.sha)


def _check_space(directory: Path, total: int, advice: str) -> None:
    there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    free = shutil.disk_usage(directory).free
    if total - there > free:
        raise DownloadError(
            f"needs {gigabytes(total - there)} more in {directory.parent}, which has {gigabytes(free)} free; {advice}"
        )
