"""Unpacks a tar that nobody vouches for: files and folders below one directory, and nothing else, ever.

Nothing is left to the archive but names, sizes and contents: no owners, modes, times, links or devices are made.
"""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from openpi_flash_models.checkpoints.progress import Report, gigabytes
from openpi_flash_models.errors import CheckpointError

MAX_BYTES = 128 << 30
"""Contents in all; nine times a pi0.5 in float32."""

MAX_MEMBERS = 100_000
"""Files and folders; old Orbax checkpoints have thousands."""

_MAX_HEADER_BYTES = 1 << 20
"""Of one extended header, which tarfile reads at once. Names and times take some hundred bytes."""

_MAX_NAME = 1024
_CHUNK_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE

_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}


def extract_tar(
    archive: Path,
    directory: Path,
    report: Report = lambda num_bytes: None,
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> None:
    """Writes the files of an uncompressed tar below `directory`, once every member has been checked.

    Refused are names that lead out of the directory (absolute, or with `..`), links of either kind wherever they point,
    devices, FIFOs and sparse files: no checkpoint has any. A compressed tar is refused too: packed weights hardly
    shrink, and so an archive can never hold more than it weighs.

    Args:
        archive: the tar.
        directory: must not exist; its parent must.
        report: called with numbers of bytes of the archive that were dealt with; in all, its size.
        max_bytes, max_members: most that it may hold.

    Raises:
        CheckpointError: names the archive, the member at fault and what was expected; nothing has been written unless
            the disk is at fault.
    """
    try:
        with archive.open("rb") as file:
            members = list(_checked_members(archive, file, max_bytes, max_members))
            total = sum(member.size for member, _ in members)
            free = shutil.disk_usage(directory.parent).free
            if total > free:
                raise CheckpointError(
                    f"{archive}: needs {gigabytes(total)} in {directory.parent}, which has {gigabytes(free)} free"
                )
            directory.mkdir()
            report(archive.stat().st_size - total)
            for member, path in members:
                if member.isdir():
                    (directory / path).mkdir(parents=True, exist_ok=True)
                else:
                    _write(file, member, directory / path, report)
    except (tarfile.TarError, ValueError, RecursionError) as error:  # tarfile's own, and what odd headers do to it
        raise CheckpointError(f"{archive}: not a plain tar archive, or a damaged one: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{archive}: cannot be unpacked to {directory}: {error}") from error


def _checked_members(
    archive: Path, file: BinaryIO, max_bytes: int, max_members: int
) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    """Every member and its path below the directory."""
    size = archive.stat().st_size
    seen: dict[PurePosixPath, bool] = {}
    total = 0
    with tarfile.open(fileobj=_HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
        for count, member in enumerate(tar, start=1):
            path, fault = PurePosixPath(member.name), None
            if path.is_absolute() or ".." in path.parts or "\0" in member.name:
                fault = "leads out of the directory; expected a path below it"
            elif len(member.name) > _MAX_NAME:
                fault = f"has a name of {len(member.name)} characters; expected at most {_MAX_NAME}"
            elif not (member.isreg() or member.isdir()) or member.issparse():
                kind = _KINDS.get(member.type, "a sparse file" if member.issparse() else "of an unknown type")
                target = f" to {member.linkname!r}" if member.linkname else ""
                fault = f"is {kind}{target}; expected files and folders only"
            elif not member.isdir() and (not path.parts or path in seen):
                fault = "is there twice" if path.parts else "is a file without a name"
            elif any(seen.get(parent) is False for parent in (path, *path.parents)):
                fault = "lies below a file of the same archive"
            elif member.size < 0 or member.offset_data + member.size > size:
                fault = f"claims {member.size} bytes, beyond the end of the archive: truncated or damaged"
            elif (total := total + member.size) > max_bytes:
                fault = f"is beyond the {max_bytes} bytes that an archive may hold"
            elif count > max_members:
                fault = f"is beyond the {max_members} members that an archive may have"
            if fault:
                raise CheckpointError(f"{archive}: {member.name[:200]!r} {fault}")
            seen |= dict.fromkeys(path.parents, True) | {path: member.isdir()}
            yield member, Path(path)
        # tarfile takes a header that it cannot read for the end.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise CheckpointError(f"{archive}: no end mark at byte {tar.offset}: truncated or damaged")


class _HeaderReader:
    """The file as tarfile sees it while it looks for members: what it reads at once is bounded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes; expected at most {_MAX_HEADER_BYTES}")
        return self._file.read(num_bytes)


def _write(file: BinaryIO, member: tarfile.TarInfo, path: Path, report: Report) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file.seek(member.offset_data)
    left = member.size
    with path.open("xb") as output:
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise tarfile.ReadError(f"it ends within {member.name}")
            output.write(chunk)
            left -= len(chunk)
            report(len(chunk))
