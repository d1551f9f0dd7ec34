"""Tests of unpacking: what a checkpoint's tar holds comes out, and whatever else a tar can hold is refused by name."""

import io
import random
import subprocess
import tarfile

import pytest

from openpi_flash_models.checkpoints import archive
from openpi_flash_models.checkpoints.archive import extract_tar
from openpi_flash_models.errors import CheckpointError


def entry(name, content=b"", kind=tarfile.REGTYPE, target="", **fields):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def write_tar(path, *entries, mode="w:", format=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=format) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return path


def tree(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


GOOD = (
    entry("./", kind=tarfile.DIRTYPE),
    entry("./wrapper", kind=tarfile.DIRTYPE, mode=0),
    entry("./wrapper/params/_METADATA", b"{}", mode=0o4777, uid=0, uname="root"),
    entry("./wrapper/params/d/" + "long" * 24, bytes(3_000_000)),
    entry("./wrapper/params/empty", kind=tarfile.DIRTYPE),
)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_and_folders_come_out_with_content_alone(tmp_path, format):
    reported = []
    path = write_tar(tmp_path / "good.tar", *GOOD, format=format)
    extract_tar(path, tmp_path / "out", reported.append)
    assert tree(tmp_path / "out/wrapper/params") == {"_METADATA": b"{}", "d/" + "long" * 24: bytes(3_000_000)}
    assert (tmp_path / "out/wrapper/params/empty").is_dir()
    assert (tmp_path / "out/wrapper/params/_METADATA").stat().st_mode & 0o7111 == 0
    assert sum(reported) == path.stat().st_size
    assert len(reported) > 3


def test_what_the_tar_program_writes_comes_out(tmp_path):
    (tmp_path / "in/params/d").mkdir(parents=True)
    (tmp_path / "in/params/d/data").write_bytes(bytes(range(256)) * 100)
    subprocess.run(["tar", "-cf", tmp_path / "in.tar", "-C", tmp_path / "in", "."], check=True)
    extract_tar(tmp_path / "in.tar", tmp_path / "out")
    assert tree(tmp_path / "out") == {"params/d/data": bytes(range(256)) * 100}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("../evil", b"x")], r"'\.\./evil' leads out of the directory; expected a path below it"),
        ([entry("params/../../evil", b"x")], r"'params/\.\./\.\./evil' leads out"),
        ([entry("params/..", kind=tarfile.DIRTYPE)], r"'params/\.\.' leads out"),
        ([entry("/evil", b"x")], "'/evil' leads out"),
        ([entry("//evil", b"x")], "'//evil' leads out"),
        ([entry("evil", b"x", pax_headers={"path": "../evil"})], r"'\.\./evil' leads out"),
        ([entry("evil", b"x", pax_headers={"path": "a\0b"})], r"'a\\x00b' leads out"),
        ([entry("l", kind=tarfile.SYMTYPE, target="/etc")], "'l' is a symbolic link to '/etc'; expected files and fol"),
        ([entry("l", kind=tarfile.SYMTYPE, target="..")], r"'l' is a symbolic link to '\.\.'"),
        (
            [entry("l", kind=tarfile.SYMTYPE, target="/etc"), entry("l/evil", b"x")],
            "'l' is a symbolic link to '/etc'",
        ),
        ([entry("params/l", kind=tarfile.SYMTYPE, target="_METADATA")], "'params/l' is a symbolic link"),
        ([entry("l", kind=tarfile.LNKTYPE, target="/etc/passwd")], "'l' is a hard link to '/etc/passwd'"),
        ([entry("l", kind=tarfile.LNKTYPE, target="../x")], r"'l' is a hard link to '\.\./x'"),
        ([entry("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)], "'null' is a character device; expected files"),
        ([entry("disk", kind=tarfile.BLKTYPE, devmajor=8)], "'disk' is a block device"),
        ([entry("pipe", kind=tarfile.FIFOTYPE)], "'pipe' is a FIFO"),
        ([entry("odd", kind=b"Z")], "'odd' is of an unknown type"),
        (
            [
                entry(
                    "bomb",
                    b"x",
                    pax_headers={
                        "GNU.sparse.map": "0,1",
                        "GNU.sparse.size": str(1 << 40),
                        "GNU.sparse.numblocks": "1",
                    },
                )
            ],
            "'bomb' is a sparse file",
        ),
        ([entry("a", b"x"), entry("./a", b"y")], r"'\./a' is there twice"),
        ([entry("a/b", b"x"), entry("a", b"y")], "'a' is there twice"),
        ([entry("a", b"x"), entry("a/b/c", b"y")], "'a/b/c' lies below a file of the same archive"),
        ([entry("a", b"x"), entry("a", kind=tarfile.DIRTYPE)], "'a' lies below a file"),
        ([entry(".", b"x")], r"'\.' is a file without a name"),
        ([entry("a/" * 600 + "b", b"x")], "'(a/)+' has a name of 1201 characters; expected at most 1024"),
    ],
)
def test_what_no_checkpoint_has_is_refused_by_name(tmp_path, entries, message):
    """After good members, so that a check at the time of writing would come too late."""
    path = write_tar(tmp_path / "evil.tar", *GOOD, *entries)
    with pytest.raises(CheckpointError, match=rf"evil\.tar: {message}"):
        extract_tar(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["evil.tar"]


def test_too_much_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "bomb.tar", *(entry(f"{i}", bytes(10)) for i in range(50)))
    with pytest.raises(CheckpointError, match="'40' is beyond the 40 members that an archive may have"):
        extract_tar(path, tmp_path / "out", max_members=40)
    with pytest.raises(CheckpointError, match="'40' is beyond the 400 bytes that an archive may hold"):
        extract_tar(path, tmp_path / "out", max_bytes=400)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 499}))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB in .*, which has 0\.00 GB free"):
        extract_tar(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused(tmp_path, mode):
    path = write_tar(tmp_path / "packed.tar", entry("zeros", bytes(100_000)), mode=mode)
    with pytest.raises(CheckpointError, match=r"packed\.tar: not a plain tar archive, or a damaged one"):
        extract_tar(path, tmp_path / "out")


def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path):
    body = write_tar(tmp_path / "whole.tar", entry("a", bytes(700)), entry("b", bytes(700))).read_bytes()
    end = 2 * (512 + 1024)
    assert body[end:] == bytes(len(body) - end)
    for length in (0, 100, 512, 900, 512 + 700, 1536, 2000, 2048, end - 1, end):
        path = tmp_path / "cut.tar"
        path.write_bytes(body[:length])
        with pytest.raises(CheckpointError, match=r"cut\.tar: .*(damaged)"):
            extract_tar(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(body[: end + 512])
    extract_tar(path, tmp_path / "out")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "damaged.tar", entry("a", bytes(10)), entry("b", bytes(10)))
    body = bytearray(path.read_bytes())
    body[1024 + 5] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match="no end mark at byte 1024: truncated or damaged"):
        extract_tar(path, tmp_path / "out")


def test_headers_that_are_out_of_all_proportion_are_refused(tmp_path):
    long_name = entry("a", b"x", pax_headers={"comment": "x" * (2 << 20)})
    with pytest.raises(CheckpointError, match=r"a header of .* bytes; expected at most 1048576"):
        extract_tar(write_tar(tmp_path / "long.tar", long_name), tmp_path / "out")
    chain = b"".join(entry("g", bytes(10), kind=tarfile.XGLTYPE)[0].tobuf() + bytes(512) for _ in range(5000))
    (tmp_path / "chain.tar").write_bytes(chain + bytes(1024))
    with pytest.raises(CheckpointError, match=r"chain\.tar: not a plain tar archive, or a damaged one"):
        extract_tar(tmp_path / "chain.tar", tmp_path / "out")


def test_random_damage_is_an_error_of_ours_or_harmless(tmp_path):
    """Never another exception, and never a file outside the directory."""
    whole = write_tar(tmp_path / "whole.tar", *GOOD[:3], entry("params/d/0", bytes(3000)), entry("é" * 90, b"x"))
    body = whole.read_bytes()[:9000]
    rng = random.Random(0)  # noqa: S311
    outcomes = set()
    (tmp_path / "box").mkdir()
    for attempt in range(400):
        damaged = bytearray(body + bytes(1024))
        for _ in range(rng.randint(1, 4)):
            header = rng.choice((0, 512, 1024, 2048, 2560, 6144, 6656, 7168, 7680))
            damaged[header + rng.randrange(512)] = rng.randrange(256)
        for header in range(0, 9000 - 512, 512):  # most damage would end at the checksum
            if damaged[header + 257 : header + 262] == b"ustar":
                checksum = sum(damaged[header : header + 148]) + 256 + sum(damaged[header + 156 : header + 512])
                damaged[header + 148 : header + 156] = b"%06o\0 " % checksum
        path = tmp_path / "damaged.tar"
        path.write_bytes(damaged)
        try:
            extract_tar(path, tmp_path / f"box/{attempt}")
            outcomes.add("extracted")
        except CheckpointError as error:
            outcomes.add("refused")
            assert str(path) in str(error)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.tar", "damaged.tar", "box"}
    assert all(file.name.isdecimal() for file in (tmp_path / "box").iterdir())
    assert outcomes == {"extracted", "refused"}
