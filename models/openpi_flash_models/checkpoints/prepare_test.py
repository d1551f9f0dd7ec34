"""Tests of preparing checkpoints, against servers that speak the hub's and the bucket's protocols."""

import contextlib
import functools
import hashlib
import io
import json
import tarfile
import threading

import pytest
from safetensors.numpy import load_file, save

from openpi_flash_models.checkpoints import prepare
from openpi_flash_models.checkpoints.detect import Layout
from openpi_flash_models.checkpoints.download import find
from openpi_flash_models.checkpoints.fetch import Fetcher
from openpi_flash_models.checkpoints.prepare import (
    MANIFEST_NAME,
    default_asset_id,
    prepare_checkpoint,
    prepare_planner_checkpoint,
)
from openpi_flash_models.checkpoints.safetensors_source_test import GOLDEN
from openpi_flash_models.errors import CheckpointError, DownloadError
from tests.remotes import HUB_COMMIT, BucketHandler, HubHandler, serving

MODEL = GOLDEN / "pi05_e2e"
PARAMS = {
    str(path.relative_to(MODEL / "checkpoint")): path.read_bytes()
    for path in (MODEL / "checkpoint/params").rglob("*")
    if path.is_file()
}
STATS = (MODEL / "checkpoint/assets/droid/norm_stats.json").read_bytes()
ASSETS = "checkpoints/pi05_base/assets"
LEROBOT = save({f"model.{name}": array for name, array in load_file(MODEL / "model.safetensors").items()})


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setitem(Fetcher.__init__.__kwdefaults__, "backoff_s", 0.01)


@pytest.fixture
def hub(monkeypatch):
    objects = {
        "model.safetensors": LEROBOT,
        "config.json": b'{"type": "pi05"}',
        "README.md": b"a model card",
        "policy_preprocessor.json": b"{}",
        "training_state/optimizer_state.safetensors": b"twice the weights",
    }
    with serving(HubHandler, "lerobot/pi05_base", objects) as server:
        monkeypatch.setattr(prepare, "find", functools.partial(find, hub_url=server.url))  # HF_ENDPOINT is read once
        yield server


@pytest.fixture
def bucket(monkeypatch):
    objects = {f"{ASSETS}/{name}/norm_stats.json": STATS for name in ("trossen", "droid", "physical-intelligence/x")}
    with serving(BucketHandler, "openpi-assets", objects) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def make_tar(files, mode="w:"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return packed.getvalue()


TAR = "jax/planner.tar"


@pytest.fixture
def planner_hub(hub):
    hub.store = "org/planner"
    hub.objects = {TAR: make_tar({f"planner/{name}": body for name, body in PARAMS.items()})}
    return hub


def prepare_planner(directory, **options):
    return prepare_planner_checkpoint(directory, hf_repo="org/planner", tar_path_in_repo=TAR, **options)


def tree(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def beside(directory):
    return sorted(entry.name for entry in directory.parent.iterdir())


def test_weights_and_statistics_come_together_with_a_manifest(hub, bucket, tmp_path):
    prepared = prepare_checkpoint(tmp_path / "out")
    assert prepared.fresh
    assert (prepared.checkpoint.root, prepared.checkpoint.layout) == (tmp_path / "out", Layout.TORCH)
    assert prepared.checkpoint.assets == tmp_path / "out/assets"
    files = tree(tmp_path / "out")
    manifest = json.loads(files.pop(MANIFEST_NAME))
    assert files.keys() == {"model.safetensors", "config.json"} | {
        f"assets/{name}/norm_stats.json" for name in ("trossen", "droid", "physical-intelligence/x")
    }
    assert manifest == prepared.manifest
    assert manifest["files"] == {
        name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in files.items()
    }
    weights, assets = manifest["sources"]
    assert (weights["uri"], weights["revision"]) == ("hf://lerobot/pi05_base", HUB_COMMIT)
    sha256 = hashlib.sha256(LEROBOT).hexdigest()
    assert weights["files"]["model.safetensors"] == {
        "size": len(LEROBOT),
        "version": sha256,
        "checksum": f"sha256:{sha256}",
    }
    assert (assets["uri"], assets["revision"]) == (f"gs://openpi-assets/{ASSETS}", None)
    generation = str(int.from_bytes(hashlib.md5(STATS, usedforsecurity=False).digest()[:4]))
    assert assets["files"]["trossen/norm_stats.json"]["version"] == generation
    assert manifest["prepared_at"].endswith("+00:00")
    assert beside(tmp_path / "out") == [".out.lock", "out"]


def test_what_was_prepared_is_left_alone_without_asking_anyone(hub, bucket, tmp_path):
    made = prepare_checkpoint(tmp_path / "out")
    hub.shutdown()
    bucket.shutdown()
    again = prepare_checkpoint(tmp_path / "out", required_asset_ids=["droid", "physical-intelligence/x"])
    assert not again.fresh
    assert again.manifest == made.manifest
    with pytest.raises(CheckpointError, match=r"out/assets: no arx/norm_stats\.json; it has statistics of droid, "):
        prepare_checkpoint(tmp_path / "out", required_asset_ids=["arx"])
    with pytest.raises(CheckpointError, match=r"was prepared from hf://lerobot/pi05_base, gs://.*, not from hf://o/r,"):
        prepare_checkpoint(tmp_path / "out", hf_repo="o/r")
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 1000 bytes, expected \d+ bytes; --force-download"):
        prepare_checkpoint(tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing, expected"):
        prepare_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("manifest", [None, "not json", "[]", '{"format": 2}', '{"format": 1, "request": 3}'])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_another_origin_is_never_touched(tmp_path, manifest, force):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    if manifest is not None:
        (tmp_path / "out" / MANIFEST_NAME).write_text(manifest)
    before = tree(tmp_path)
    for run in (prepare_checkpoint, prepare_planner):
        with pytest.raises(CheckpointError, match=r"out: .*; name a new directory, or remove this one first"):
            run(tmp_path / "out", force_download=force)
    assert tree(tmp_path) == before | {".out.lock": b""}


def test_force_fetches_everything_anew_and_replaces_what_was_prepared(hub, bucket, tmp_path):
    prepare_checkpoint(tmp_path / "out")
    (tmp_path / "out/mine.txt").touch()
    hub.requests.clear()
    hub.objects["config.json"] = b'{"type": "newer"}'
    prepared = prepare_checkpoint(tmp_path / "out", force_download=True)
    assert prepared.fresh
    assert (tmp_path / "out/config.json").read_bytes() == b'{"type": "newer"}'
    assert not (tmp_path / "out/mine.txt").exists()
    assert sorted(hub.requests) == [("config.json", None), ("model.safetensors", None)]
    assert beside(tmp_path / "out") == [".out.lock", "out"]


def test_a_forced_run_that_fails_leaves_what_was_there(hub, bucket, tmp_path):
    prepare_checkpoint(tmp_path / "out")
    before = tree(tmp_path / "out")
    hub.faults["model.safetensors"] = [403]
    with pytest.raises(DownloadError):
        prepare_checkpoint(tmp_path / "out", force_download=True)
    assert tree(tmp_path / "out") == before
    assert (tmp_path / ".out.preparing").is_dir()
    assert not prepare_checkpoint(tmp_path / "out").fresh
    assert beside(tmp_path / "out") == [".out.lock", "out"]


def test_a_run_killed_between_the_two_renames_is_mended(hub, bucket, tmp_path):
    prepare_checkpoint(tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    hub.shutdown()
    assert not prepare_checkpoint(tmp_path / "out").fresh
    assert tree(tmp_path / "out") == before
    assert beside(tmp_path / "out") == [".out.lock", "out"]


def test_a_missing_asset_id_is_said_before_the_weights_are_fetched(hub, bucket, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=rf"gs://openpi-assets/{ASSETS}: no ur5e/norm_stats\.json; it has statistics of droid, physical-intel",
    ):
        prepare_checkpoint(tmp_path / "out", required_asset_ids=["droid", "ur5e"])
    assert not hub.requests
    assert not (tmp_path / "out").exists()


def test_what_is_fetched_is_checked_before_it_is_put_in_place(hub, bucket, tmp_path):
    """And what was good of it is not fetched again once the source is mended, unless one insists."""
    stats = f"{ASSETS}/trossen/norm_stats.json"
    for broken, message in (
        (b"{", r"trossen/norm_stats\.json: expected an object"),
        (b'{"norm_stats": {"state": {"mean": [0], "std": [1]}}}', r"statistics of \['state'\]; expected state and act"),
    ):
        bucket.objects[stats] = broken
        with pytest.raises(CheckpointError, match=message):
            prepare_checkpoint(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=message):
        prepare_checkpoint(tmp_path / "out", force_download=True)
    assert sorted(hub.requests) == [("config.json", None), ("model.safetensors", None)]
    bucket.objects[stats] = STATS
    hub.requests.clear()
    prepare_checkpoint(tmp_path / "out")
    assert not hub.requests


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"README.md": b"soon", "config.json": b"{}"}, r"no weights; expected model\.safetensors or params/"),
        ({"model.safetensors": LEROBOT[:-1]}, r"model\.safetensors: truncated"),
        ({"model.safetensors": save({})}, "0 tensors, none of them paligemma.*; expected weights of pi0 or pi0"),
        ({"params/_METADATA": b"{}"}, "holds no Orbax arrays"),
    ],
)
def test_weights_that_are_none_are_refused(hub, bucket, tmp_path, objects, message):
    hub.objects = objects
    with pytest.raises(CheckpointError, match=message):
        prepare_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_orbax_weights_of_a_folder_and_revision_are_served_too(hub, bucket, tmp_path):
    hub.objects = {f"step/{name}": body for name, body in PARAMS.items()}
    prepared = prepare_checkpoint(tmp_path / "out", hf_repo="lerobot/pi05_base/step@v1", required_asset_ids=["droid"])
    assert prepared.checkpoint.layout is Layout.JAX
    assert prepared.manifest["request"]["weights"] == "hf://lerobot/pi05_base/step@v1"


def test_a_source_that_changed_meanwhile_is_not_mixed_with_its_old_self(hub, bucket, tmp_path):
    hub.objects |= {"model-00001-of-00001.safetensors": b"an old shard"}
    bucket.faults[f"{ASSETS}/droid/norm_stats.json"] = [403]
    with pytest.raises(DownloadError):
        prepare_checkpoint(tmp_path / "out")
    del hub.objects["model-00001-of-00001.safetensors"]
    hub.objects["config.json"] = b"new"
    prepare_checkpoint(tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == b"new"
    assert not (tmp_path / "out/model-00001-of-00001.safetensors").exists()


def test_a_mount_point_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.Path, "is_mount", lambda path: True)
    with pytest.raises(CheckpointError, match=r"out: a mount point, .*; name a folder in it"):
        prepare_checkpoint(tmp_path / "out")


def test_the_disk_is_measured_before_it_is_filled(hub, bucket, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("openpi_flash_models.checkpoints.download.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"needs .* GB more in .*; name an output directory on a larger disk"):
        prepare_checkpoint(tmp_path / "out")
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "asset_id"),
    [
        ("pi05_base", "trossen"),
        ("pi0_base", "trossen"),
        ("pi05_droid", "droid"),
        ("pi05_libero", "physical-intelligence/libero"),
        ("pi0_aloha_sim", "lerobot/aloha_sim_transfer_cube_human"),
    ],
)
def test_the_asset_id_of_a_released_checkpoint_is_known(name, asset_id):
    assert default_asset_id(f"gs://openpi-assets/checkpoints/{name}/assets") == asset_id
    assert default_asset_id(f"gs://openpi-assets/checkpoints/{name}/assets/") == asset_id


def test_the_asset_id_of_others_has_to_be_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gs://mine/run7/assets: which statistics .*; name an asset id"):
        prepare_checkpoint(tmp_path / "out", assets_uri="gs://mine/run7/assets")


@pytest.mark.parametrize("wrapper", ["planner/", "./planner/", "./", ""])
def test_a_planner_comes_out_of_its_tar_without_its_wrapper(planner_hub, tmp_path, wrapper):
    planner_hub.objects[TAR] = make_tar({f"{wrapper}{name}": body for name, body in PARAMS.items()})
    prepared = prepare_planner(tmp_path / "out")
    files = tree(tmp_path / "out")
    manifest = json.loads(files.pop(MANIFEST_NAME))
    assert files == PARAMS
    archive = manifest["sources"][0]
    assert (archive["uri"], archive["revision"]) == (f"hf://org/planner/{TAR}", HUB_COMMIT)
    sha256 = hashlib.sha256(planner_hub.objects[TAR]).hexdigest()
    assert archive["files"]["planner.tar"]["checksum"] == f"sha256:{sha256}"
    assert prepared.checkpoint.layout is Layout.JAX
    assert beside(tmp_path / "out") == [".out.lock", "out"]
    planner_hub.shutdown()
    assert not prepare_planner(tmp_path / "out").fresh


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (make_tar({"planner/../../evil": b"x"}), r"'planner/\.\./\.\./evil' leads out of the directory"),
        (make_tar({"a/params/_METADATA": b"{}", "b/x": b""}), "no params/_METADATA in the tar, only a, b"),
        (make_tar({f"outer/inner/{name}": b"" for name in PARAMS}), "no params/_METADATA in the tar, only inner"),
        (make_tar({}), "no params/_METADATA in the tar, only nothing"),
        (make_tar({"params/_METADATA": b"{"}), "_METADATA: not JSON"),
        (make_tar({"params/_METADATA": b"{}"}), "holds no Orbax arrays"),
        (make_tar(PARAMS, "w:gz"), "not a plain tar archive, or a damaged one"),
        (make_tar(PARAMS)[:-20_000], "truncated or damaged"),
        (b"<html>", "not a plain tar archive, or a damaged one"),
    ],
)
def test_a_tar_that_is_no_planner_is_refused(planner_hub, tmp_path, body, message):
    planner_hub.objects[TAR] = body
    with pytest.raises(CheckpointError, match=message):
        prepare_planner(tmp_path / "out")
    assert beside(tmp_path / "out") == [".out.lock", ".out.preparing"]


def test_a_path_that_is_no_tar_file_is_refused(planner_hub, tmp_path):
    with pytest.raises(CheckpointError, match="hf://org/planner/jax: a folder; expected a tar file"):
        prepare_planner_checkpoint(tmp_path / "out", hf_repo="org/planner", tar_path_in_repo="jax")
    with pytest.raises(DownloadError, match=r"hf://org/planner/none\.tar@v1: .*no files below none\.tar"):
        prepare_planner_checkpoint(tmp_path / "out", hf_repo="org/planner@v1", tar_path_in_repo="none.tar")


def test_a_run_killed_while_it_unpacked_is_cleaned_up_and_the_tar_kept(planner_hub, tmp_path, monkeypatch):
    def killed(*arguments):
        arguments[1].joinpath("params").mkdir(parents=True)
        (arguments[1] / "params/half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(prepare, "extract_tar", killed)
        prepare_planner(tmp_path / "out")
    assert (tmp_path / ".out.preparing/content/params/half").exists()
    planner_hub.requests.clear()
    prepare_planner(tmp_path / "out")
    assert not planner_hub.requests
    assert tree(tmp_path / "out").keys() == PARAMS.keys() | {MANIFEST_NAME}
    assert beside(tmp_path / "out") == [".out.lock", "out"]


def test_of_two_at_once_one_prepares_and_the_other_waits(hub, bucket, tmp_path):
    results = []
    runs = [threading.Thread(target=lambda: results.append(prepare_checkpoint(tmp_path / "out"))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert sorted(result.fresh for result in results) == [False, True]
    assert sorted(name for name, _ in hub.requests) == ["config.json", "model.safetensors"]
