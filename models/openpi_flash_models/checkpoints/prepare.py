"""Puts a folder together that a service can serve: fetched, checked, described by a manifest, and only then in place.

Everything happens in a hidden folder beside the result, which a later run continues, and under a lock.
"""

import contextlib
import dataclasses
import datetime
import fnmatch
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi_flash_models.checkpoints.archive import extract_tar
from openpi_flash_models.checkpoints.detect import Checkpoint, Layout, detect
from openpi_flash_models.checkpoints.download import Remote, fill, find, locked
from openpi_flash_models.checkpoints.fetch import RemoteFile
from openpi_flash_models.checkpoints.layout import JAX_EMBEDDING, TORCH_EMBEDDING
from openpi_flash_models.checkpoints.progress import show_progress
from openpi_flash_models.errors import CheckpointError
from openpi_flash_models.normalize import load_norm_stats
from openpi_flash_models.policy_configs import POLICY_CONFIGS

MANIFEST_NAME = "source_manifest.json"
MANIFEST_FORMAT = 1

DEFAULT_WEIGHTS = "lerobot/pi05_base"
DEFAULT_ASSETS = "gs://openpi-assets/checkpoints/pi05_base/assets"

_BASE_ASSET_ID = "trossen"
"""The base models are released with statistics of many robots; openpi serves them for ALOHA."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", "config.json", "params/*")
"""What is fetched of a repository; model cards, training state and processors of other programs are not."""

_ADVICE = "name an output directory on a larger disk"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A folder that is ready to be served.

    Attributes:
        checkpoint: what it holds.
        manifest: its `source_manifest.json`.
        fresh: made by this call; otherwise it was there already.
    """

    checkpoint: Checkpoint
    manifest: Mapping[str, Any]
    fresh: bool


def prepare_checkpoint(
    output_dir: Path,
    *,
    hf_repo: str = DEFAULT_WEIGHTS,
    assets_uri: str = DEFAULT_ASSETS,
    required_asset_ids: Sequence[str] = (),
    force_download: bool = False,
    progress: bool = True,
) -> Prepared:
    """Joins weights from the Hugging Face hub and normalisation statistics from a bucket in one checkpoint.

    A folder that was prepared from the same sources is left alone: its files are checked by size, nothing is fetched.

    Args:
        output_dir: appears only when it is whole. Must not exist, be empty, or have been prepared before.
        hf_repo: `org/repo[/folder][@revision]`, with `model.safetensors` (openpi's or LeRobot's naming) or `params/`.
        assets_uri: `gs://` or `hf://` folder that holds `<asset_id>/norm_stats.json`.
        required_asset_ids: robots whose statistics must be there. When empty, the one that openpi's configuration of
            the assets' checkpoint uses; see `default_asset_id`.
        force_download: fetch everything anew, and replace what was prepared before. Never a folder of another origin.
        progress: show progress.

    Raises:
        CheckpointError: `output_dir` is of another origin or damaged, or what was fetched is no checkpoint, or lacks an
            asset id.
        DownloadError: names the URI and what went wrong. What had arrived is kept, and the next call continues.
    """
    asset_ids = tuple(required_asset_ids) or (default_asset_id(assets_uri),)
    weights_uri = f"hf://{hf_repo}"

    def build(work: Path) -> tuple[Path, dict[str, Remote]]:
        found = {uri: find(uri) for uri in (weights_uri, assets_uri)}
        weights = {
            path: file
            for path, file in _directory(weights_uri, found[weights_uri]).items()
            if any(fnmatch.fnmatchcase(path.as_posix(), pattern) for pattern in _WEIGHTS)
        }
        if all(path == Path("config.json") for path in weights):
            raise CheckpointError(f"{weights_uri}: no weights; expected model.safetensors or params/")
        assets = _directory(assets_uri, found[assets_uri])
        _require_assets(assets_uri, assets, asset_ids)  # before gigabytes are fetched
        found[weights_uri] = dataclasses.replace(found[weights_uri], files=weights)
        content = work / "content"
        files = {content / path: file for path, file in weights.items()}
        files |= {content / "assets" / path: file for path, file in assets.items()}
        fill(content, files, job=f"downloading {weights_uri}", shown=progress, advice=_ADVICE)
        return content, found

    def check(directory: Path) -> Checkpoint:
        checkpoint = _check_weights(detect(directory))
        assets = directory / "assets"
        found = (path.relative_to(assets) for path in assets.rglob("norm_stats.json"))
        _require_assets(str(assets), found, asset_ids)
        for asset_id in asset_ids:
            path = assets / asset_id / "norm_stats.json"
            stats = load_norm_stats(path)
            if not {"state", "actions"} <= stats.keys():
                raise CheckpointError(f"{path}: statistics of {sorted(stats)}; expected state and actions")
        return checkpoint

    request = {"weights": weights_uri, "assets": assets_uri}
    return _prepare(output_dir, request, build, check, force_download=force_download, progress=progress)


def prepare_planner_checkpoint(
    output_dir: Path, *, hf_repo: str, tar_path_in_repo: str, force_download: bool = False, progress: bool = True
) -> Prepared:
    """Unpacks a planner's Orbax checkpoint from a tar in a repository of the Hugging Face hub.

    A folder around `params/` in the tar is left out.

    Args:
        output_dir: as of `prepare_checkpoint`.
        hf_repo: `org/repo[@revision]`.
        tar_path_in_repo: an uncompressed tar, e.g. `jax/pi05_subtask.tar`.
        force_download: as of `prepare_checkpoint`.
        progress: show progress.

    Raises:
        CheckpointError: as of `prepare_checkpoint`; or the tar is damaged, or has members that no checkpoint has.
        DownloadError: as of `prepare_checkpoint`.
    """
    repo, _, revision = hf_repo.partition("@")
    uri = f"hf://{repo}/{tar_path_in_repo.strip('/')}" + (f"@{revision}" if revision else "")

    def build(work: Path) -> tuple[Path, dict[str, Remote]]:
        found = find(uri)
        if not isinstance(found.files, RemoteFile):
            raise CheckpointError(f"{uri}: a folder; expected a tar file")
        archive = work / "download/archive.tar"
        fill(archive.parent, {archive: found.files}, job=f"downloading {uri}", shown=progress, advice=_ADVICE)
        content = work / "content"
        shutil.rmtree(content, ignore_errors=True)  # of a run that was killed while it unpacked
        with show_progress(f"unpacking {uri}", archive.stat().st_size, shown=progress) as report:
            extract_tar(archive, content, report)
        entries = list(content.iterdir())
        wrapped = len(entries) == 1 and entries[0].is_dir() and entries[0].name != "params"
        return entries[0] if wrapped else content, {uri: found}

    def check(directory: Path) -> Checkpoint:
        metadata = directory / "params/_METADATA"
        try:
            json.loads(metadata.read_bytes())
        except OSError as error:
            top = ", ".join(sorted(entry.name for entry in directory.iterdir())[:5])
            raise CheckpointError(f"{uri}: no params/_METADATA in the tar, only {top or 'nothing'}") from error
        except ValueError as error:
            raise CheckpointError(f"{metadata}: not JSON: {error}") from error
        return _check_weights(detect(directory, layout=Layout.JAX))

    return _prepare(output_dir, {"archive": uri}, build, check, force_download=force_download, progress=progress)


def default_asset_id(assets_uri: str) -> str:
    """Whose statistics a released checkpoint is served with: `…/checkpoints/NAME/assets`, by openpi's name.

    `trossen` for the base models, and what openpi's configuration of the name says for the others: `droid` for
    `pi05_droid`, `physical-intelligence/libero` for `pi05_libero`.

    Raises:
        CheckpointError: the name is none that openpi has a configuration of.
    """
    name = assets_uri.rstrip("/").removesuffix("/assets").rpartition("/")[2]
    if name.endswith("_base"):
        return _BASE_ASSET_ID
    if name in POLICY_CONFIGS and (asset_id := POLICY_CONFIGS[name].asset_id):
        return asset_id
    raise CheckpointError(f"{assets_uri}: which statistics are needed cannot be told from its name; name an asset id")


def _prepare(
    output_dir: Path,
    request: Mapping[str, str],
    build: Callable[[Path], tuple[Path, Mapping[str, Remote]]],
    check: Callable[[Path], Checkpoint],
    *,
    force_download: bool,
    progress: bool,
) -> Prepared:
    """Builds, checks, describes and puts in place, unless that has been done.

    Args:
        request: what makes two preparations the same.
        build: makes the content somewhere below the folder that it is given; tells what it was made from, by URI.
        check: raises CheckpointError when a folder cannot be served.
    """
    output_dir = output_dir.expanduser().resolve()
    if output_dir.is_mount():
        raise CheckpointError(f"{output_dir}: a mount point, which cannot be put in place at once; name a folder in it")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    lock, work, replaced = (output_dir.with_name(f".{output_dir.name}.{end}") for end in ("lock", "preparing", "old"))
    with locked(lock, f"preparing {output_dir}"):
        if replaced.is_dir() and not output_dir.exists():
            replaced.rename(output_dir)  # a run was killed between the two renames below
        shutil.rmtree(replaced, ignore_errors=True)
        manifest = _read_manifest(output_dir)
        if manifest is not None and not force_download:
            _compare(output_dir, manifest, request)
            prepared = Prepared(check(output_dir), manifest, fresh=False)
            shutil.rmtree(work, ignore_errors=True)  # of a forced run that was killed
            return prepared
        if force_download:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        content, sources = build(work)
        check(content)
        manifest = _describe(content, request, sources, progress=progress)
        (content / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if output_dir.exists():
            output_dir.rename(replaced)
        content.rename(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(work)
        return Prepared(check(output_dir), manifest, fresh=True)


def _read_manifest(output_dir: Path) -> dict[str, Any] | None:
    """None where there is nothing yet."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    try:
        manifest = json.loads((output_dir / MANIFEST_NAME).read_bytes())
        if manifest["format"] == MANIFEST_FORMAT and all(
            isinstance(manifest[key], dict) for key in ("request", "files")
        ):
            return dict(manifest)
        problem = f"{MANIFEST_NAME} is of another version"
    except OSError:
        problem = f"exists already, and no {MANIFEST_NAME} says that it was prepared by this command"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{MANIFEST_NAME} is damaged ({error!r})"
    raise CheckpointError(f"{output_dir}: {problem}; name a new directory, or remove this one first")


def _compare(output_dir: Path, manifest: Mapping[str, Any], request: Mapping[str, str]) -> None:
    anew = "--force-download prepares it anew"
    if manifest["request"] != request:
        made, wanted = (", ".join(dict(sources).values()) for sources in (manifest["request"], request))
        raise CheckpointError(f"{output_dir}: was prepared from {made}, not from {wanted}; {anew}")
    for name, file in manifest["files"].items():
        path = output_dir / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise CheckpointError(f"{path}: {found}, expected {file['size']} bytes; {anew}")


def _describe(
    content: Path, request: Mapping[str, str], sources: Mapping[str, Remote], *, progress: bool
) -> dict[str, Any]:
    """The manifest: where everything came from, and what it was made into."""
    paths = sorted(path for path in content.rglob("*") if path.is_file() and path != content / MANIFEST_NAME)
    files = {}
    with show_progress("hashing", sum(path.stat().st_size for path in paths), shown=progress) as report:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    report(len(chunk))
            name = path.relative_to(content).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": digest.hexdigest()}
    return {
        "format": MANIFEST_FORMAT,
        "openpi_flash_version": importlib.metadata.version("openpi-flash-models"),
        "prepared_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "request": dict(request),
        "sources": [
            {"uri": uri, "revision": remote.revision, "files": _describe_remote(uri, remote)}
            for uri, remote in sources.items()
        ],
        "files": files,
    }


def _describe_remote(uri: str, remote: Remote) -> dict[str, dict[str, Any]]:
    """`version` is the hub's blob or LFS id, and the generation of a bucket's object."""
    files = {Path(uri).name: remote.files} if isinstance(remote.files, RemoteFile) else remote.files
    return {
        str(path): {
            "size": file.size,
            "version": file.version,
            "checksum": ":".join(file.checksum) if file.checksum else None,
        }
        for path, file in files.items()
    }


def _directory(uri: str, found: Remote) -> dict[Path, RemoteFile]:
    if isinstance(found.files, RemoteFile):
        raise CheckpointError(f"{uri}: one file; expected a folder")
    return found.files


def _require_assets(where: str, files: Iterable[Path], asset_ids: Sequence[str]) -> None:
    found = sorted(path.parent.as_posix() for path in files if path.name == "norm_stats.json")
    if missing := [asset_id for asset_id in asset_ids if asset_id not in found]:
        raise CheckpointError(
            f"{where}: no {missing[0]}/norm_stats.json; it has statistics of {', '.join(found) or 'no robot'}"
        )


def _check_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Reads every tensor's name, shape and type; of the values, none."""
    with contextlib.closing(checkpoint.open()) as source:
        names = set(source.names())
        for name in names:
            source.shape(name), source.dtype(name)
    embedding = TORCH_EMBEDDING if checkpoint.layout is Layout.TORCH else JAX_EMBEDDING
    if embedding not in names:
        raise CheckpointError(
            f"{checkpoint.root}: {len(names)} tensors, none of them {embedding}; expected weights of pi0 or pi0.5"
        )
    return checkpoint
