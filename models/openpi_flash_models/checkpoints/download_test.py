"""Tests of downloads against servers on loopback that speak the bucket's and the hub's protocols, and misbehave."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from openpi_flash_models.checkpoints import download, progress
from openpi_flash_models.checkpoints.detect import detect
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.checkpoints.fetch import Fetcher
from openpi_flash_models.checkpoints.safetensors_source_test import GOLDEN
from openpi_flash_models.errors import CheckpointError, DownloadError
from tests.remotes import BucketHandler, HubHandler, serving

CHECKPOINT = GOLDEN / "pi0_a/checkpoint"
FILES = {str(path.relative_to(CHECKPOINT)): path.read_bytes() for path in CHECKPOINT.rglob("*") if path.is_file()}
LARGEST = max(FILES, key=lambda name: len(FILES[name]))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    defaults = Fetcher.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "backoff_s", 0.01)
    monkeypatch.setitem(defaults, "timeout_s", 5.0)


@pytest.fixture
def bucket():
    objects = {f"checkpoints/pi0_a/{name}": body for name, body in FILES.items()}
    extra = {
        "checkpoints/pi0_a/": b"",  # stands for a folder
        "checkpoints/pi0_a/train_state/d/0": b"the optimizer's, not wanted",
        "checkpoints/pi0_another/params/_METADATA": b"shares only the beginning of its name",
        "tokenizer.model": b"pieces",
    }
    with serving(BucketHandler, "assets", objects | extra) as server:
        yield server


@pytest.fixture
def hub():
    objects = {f"step/{name}": body for name, body in FILES.items()} | {"README.md": b"hello"}
    with serving(HubHandler, "org/repo", objects) as server:
        yield server


def assert_checkpoint(path):
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == FILES
    checkpoint = detect(path)
    assert len(list(checkpoint.open().names())) == 50


def media_requests(server):
    return [request for request in server.requests if request[0].endswith(LARGEST)]


URI = "gs://assets/checkpoints/pi0_a"
OBJECT = f"checkpoints/pi0_a/{LARGEST}"


def test_a_bucket_s_directory_is_fetched_once_and_laid_out_as_openpi_does(bucket, tmp_path):
    path = resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    assert path == tmp_path / "assets/checkpoints/pi0_a"
    assert_checkpoint(path)
    assert len(bucket.requests) == len(FILES)
    bucket.shutdown()  # from now on nobody answers
    assert resolve(URI + "/", data_home=tmp_path, storage_url=bucket.url) == path


def test_a_single_object_is_fetched_as_a_file(bucket, tmp_path):
    path = resolve("gs://assets/tokenizer.model", data_home=tmp_path, storage_url=bucket.url)
    assert path == tmp_path / "assets/tokenizer.model"
    assert path.read_bytes() == b"pieces"


def test_the_environment_names_cache_and_service(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    for value in (bucket.url, bucket.url.removeprefix("http://")):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", value)
        path = resolve("gs://assets/tokenizer.model")
        assert path == tmp_path / "assets/tokenizer.model"
        path.unlink()


def test_what_openpi_itself_has_cached_is_used(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "assets/checkpoints/pi0_a")
    (tmp_path / "assets/checkpoints/pi0_a.lock").touch()
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url="http://127.0.0.1:1"))


def test_a_local_path_is_returned_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    assert "~" not in str(resolve("~/checkpoint"))


DOWNLOADER = """
import sys
from pathlib import Path
from openpi_flash_models.checkpoints.download import resolve
from openpi_flash_models.checkpoints.fetch import Fetcher
print(resolve(sys.argv[1], data_home=Path(sys.argv[2]), storage_url=sys.argv[3], hub_url=sys.argv[3]))
"""


def start_download(uri, data_home, server):
    return subprocess.Popen([sys.executable, "-c", DOWNLOADER, uri, data_home, server.url], stdout=subprocess.PIPE)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(FileNotFoundError):  # renamed while we looked
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_only_the_largest_is_missing(tmp_path, size):
    """Until `size` bytes of the largest file have arrived, and all others are whole."""

    def reached():
        files = [file for file in tmp_path.rglob("content/**/*") if file.is_file()]
        parts = [file for file in files if file.suffix == ".part"]
        return len(files) == len(FILES) and len(parts) == 1 and parts[0].stat().st_size == size

    wait_for(reached)


def test_a_process_killed_half_way_leaves_no_checkpoint_and_the_next_one_continues(bucket, tmp_path):
    bucket.cut_after[OBJECT] = 100_000
    bucket.hold = threading.Event()
    process = start_download(URI, tmp_path, bucket)
    wait_until_only_the_largest_is_missing(tmp_path, 100_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    bucket.hold.set()
    final = tmp_path / "assets/checkpoints/pi0_a"
    assert not final.exists()
    with pytest.raises(CheckpointError):
        detect(final)
    bucket.cut_after.clear()
    bucket.requests.clear()
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))
    assert bucket.requests == [(OBJECT, "bytes=100000-")]
    assert sorted(entry.name for entry in final.parent.iterdir()) == ["pi0_a", "pi0_a.lock"]


def test_a_connection_that_keeps_breaking_still_gets_there(bucket, tmp_path):
    bucket.cut_after[OBJECT] = 40_000  # nine pieces, more than the failures in a row that are borne
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))
    assert [value for _, value in media_requests(bucket)][:3] == [None, "bytes=40000-", "bytes=80000-"]


def test_a_server_that_ignores_ranges_starts_over(bucket, tmp_path):
    bucket.ranges = False
    bucket.faults[OBJECT] = [lambda body: body[:50_000]]
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))


def test_passing_faults_are_tried_again(bucket, tmp_path):
    bucket.faults[OBJECT] = [503, 429, 500]
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))


def damaged(body):
    return bytes([body[0] ^ 1]) + body[1:]


def test_content_that_does_not_match_its_checksum_is_fetched_again_and_never_kept(bucket, tmp_path):
    bucket.faults[OBJECT] = [damaged]
    assert_checkpoint(resolve(URI, data_home=tmp_path / "once", storage_url=bucket.url))
    bucket.faults[OBJECT] = [damaged] * 100
    with pytest.raises(DownloadError, match=f"{URI}: .*does not match its checksum"):
        resolve(URI, data_home=tmp_path / "always", storage_url=bucket.url)
    assert not (tmp_path / "always/assets/checkpoints/pi0_a").exists()


def test_a_finished_file_of_an_interrupted_download_is_verified_before_it_is_kept(bucket, tmp_path):
    bucket.faults[OBJECT] = [403]
    with pytest.raises(DownloadError):
        resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    content = tmp_path / "assets/checkpoints/pi0_a.partial/content"
    content.mkdir(exist_ok=True)
    (content / "_CHECKPOINT_METADATA").write_bytes(damaged(FILES["_CHECKPOINT_METADATA"]))
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))


def test_objects_without_md5_are_checked_by_size(bucket, tmp_path):
    bucket.without_md5.add(OBJECT)
    bucket.faults[OBJECT] = [lambda body: body[:-1]]
    assert_checkpoint(resolve(URI, data_home=tmp_path, storage_url=bucket.url))


def test_an_object_that_changed_meanwhile_is_not_mixed_with_its_old_self(bucket, tmp_path):
    bucket.faults[OBJECT] = [lambda body: body[:50_000], 403]
    with pytest.raises(DownloadError, match="it is not public"):
        resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    bucket.objects[OBJECT] = bytes(1000)
    del bucket.objects["checkpoints/pi0_a/_CHECKPOINT_METADATA"]
    path = resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    assert (path / LARGEST).read_bytes() == bytes(1000)
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == FILES.keys() - {
        "_CHECKPOINT_METADATA"
    }


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://assets/checkpoints/nothing", "the bucket assets has nothing under that name"),
        ("gs://elsewhere/checkpoints/pi0_a", "HTTP 404 .* check the name"),
        ("gs://assets", "expected gs://bucket/path"),
        ("gs://assets/../../etc", "expected gs://bucket/path"),
        ("hf://org", "expected hf://org/repo"),
        ("hf://org/../repo", "expected hf://org/repo"),
        ("s3://assets/x", "unknown scheme s3://; expected a local path, gs:// or hf://"),
    ],
)
def test_errors_name_the_uri_and_say_what_to_do(bucket, tmp_path, uri, message):
    with pytest.raises(DownloadError, match=f"^{re.escape(uri)}: .*{message}"):
        resolve(uri, data_home=tmp_path, storage_url=bucket.url)


def test_a_folder_of_training_state_alone_is_no_checkpoint(bucket, tmp_path):
    bucket.objects["run/train_state/d/0"] = b"the optimizer's"
    with pytest.raises(DownloadError, match="nothing but training state"):
        resolve("gs://assets/run", data_home=tmp_path, storage_url=bucket.url)


def test_an_unreachable_service_is_given_up_after_a_few_attempts(tmp_path):
    with pytest.raises(DownloadError, match=f"{URI}: gave up after 5 failures in a row: .*refused"):
        resolve(URI, data_home=tmp_path, storage_url="http://127.0.0.1:1")


@pytest.mark.parametrize("name", ["checkpoints/pi0_a/../../../evil", "checkpoints/pi0_a//etc/passwd"])
def test_object_names_that_lead_elsewhere_are_refused(bucket, tmp_path, name):
    bucket.objects[name] = b"evil"
    with pytest.raises(DownloadError, match="unsafe name"):
        resolve(URI, data_home=tmp_path, storage_url=bucket.url)


def test_a_cache_that_cannot_be_written_or_is_too_small_is_said(bucket, tmp_path, monkeypatch):
    (tmp_path / "assets").touch()
    with pytest.raises(DownloadError, match=r"cannot be stored in .*OPENPI_DATA_HOME names another place"):
        resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    with pytest.raises(DownloadError, match=r"needs 0\.00 GB more in .*, which has 0\.00 GB free"):
        resolve(URI, data_home=tmp_path / "small", storage_url=bucket.url)


def test_a_parent_of_what_is_cached_is_not_taken_for_a_whole_download(bucket, tmp_path):
    resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    with pytest.raises(DownloadError, match="holds parts of it"):
        resolve("gs://assets/checkpoints", data_home=tmp_path, storage_url=bucket.url)


def test_two_processes_share_one_download(bucket, tmp_path):
    bucket.cut_after[OBJECT] = 1000
    bucket.hold = threading.Event()
    first = start_download(URI, tmp_path, bucket)
    wait_until_only_the_largest_is_missing(tmp_path, 1000)
    second = start_download(URI, tmp_path, bucket)
    time.sleep(0.5)
    bucket.cut_after.clear()
    bucket.hold.set()
    for process in (first, second):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.decode().strip() == str(tmp_path / "assets/checkpoints/pi0_a")
    assert_checkpoint(tmp_path / "assets/checkpoints/pi0_a")
    assert len([name for name, _ in bucket.requests if name != OBJECT]) == len(FILES) - 1


def test_progress_is_logged_where_there_is_no_terminal(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.01)
    bucket.cut_after[OBJECT] = 40_000
    with caplog.at_level("INFO"):
        resolve(URI, data_home=tmp_path, storage_url=bucket.url)
    assert re.search(rf"downloading {URI}: 0\.00 GB of 0\.00 GB", caplog.text)


def test_progress_is_a_bar_on_a_terminal(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bucket.cut_after[OBJECT] = 100_000
    resolve(URI, data_home=tmp_path / "shown", storage_url=bucket.url)
    assert f"{URI}: 100%" in capsys.readouterr().err
    resolve(URI, data_home=tmp_path / "silent", storage_url=bucket.url, progress=False)
    assert "%" not in capsys.readouterr().err


def test_a_hub_repository_and_a_folder_of_it_are_fetched_once(hub, tmp_path):
    path = resolve("hf://org/repo", data_home=tmp_path, hub_url=hub.url)
    assert (path / "README.md").read_bytes() == b"hello"
    assert_checkpoint(path / "step")
    assert sorted(entry.name for entry in path.iterdir()) == ["README.md", "step"]
    assert_checkpoint(resolve("hf://org/repo/step@v1", data_home=tmp_path, hub_url=hub.url))
    hub.shutdown()
    assert resolve("hf://org/repo", data_home=tmp_path, hub_url=hub.url) == path
    assert_checkpoint(resolve("hf://org/repo/step@v1", data_home=tmp_path, hub_url=hub.url))


def test_a_hub_download_that_is_killed_continues_where_it_was(hub, tmp_path):
    hub.cut_after[f"step/{LARGEST}"] = 100_000
    hub.hold = threading.Event()
    process = start_download("hf://org/repo/step", tmp_path, hub)
    wait_until_only_the_largest_is_missing(tmp_path, 100_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.hold.set()
    with pytest.raises(DownloadError, match="hf://org/repo/step: "):
        resolve("hf://org/repo/step", data_home=tmp_path, hub_url="http://127.0.0.1:1")
    hub.cut_after.clear()
    hub.requests.clear()
    assert_checkpoint(resolve("hf://org/repo/step", data_home=tmp_path, hub_url=hub.url))
    assert hub.requests == [(f"step/{LARGEST}", "bytes=100000-")]


def test_a_single_file_of_a_hub_repository_is_fetched_as_a_file(hub, tmp_path):
    path = resolve("hf://org/repo/README.md@main", data_home=tmp_path, hub_url=hub.url)
    assert path.read_bytes() == b"hello"


def test_the_hub_s_token_is_sent_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(HubHandler, "org/repo", hub.objects) as content_network:
        hub.redirect_to = content_network.url
        assert_checkpoint(resolve("hf://org/repo/step", data_home=tmp_path, hub_url=hub.url))
        assert set(hub.authorizations) == {"Bearer hf_secret"}
        assert content_network.authorizations == [None] * len(FILES)


def test_a_hub_file_with_a_wrong_checksum_is_refused_and_fetched_again(hub, tmp_path):
    hub.wrong_sha256 = "0" * 64
    with pytest.raises(DownloadError, match="does not match its checksum"):
        resolve("hf://org/repo", data_home=tmp_path, hub_url=hub.url)
    hub.wrong_sha256 = None
    assert_checkpoint(resolve("hf://org/repo", data_home=tmp_path, hub_url=hub.url) / "step")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://org/other", "404|not found|Repository"),
        ("hf://org/repo@nonsense", "404|Revision"),
        ("hf://org/repo/nothing", "no files below nothing"),
    ],
)
def test_what_the_hub_does_not_have_is_a_typed_error(hub, tmp_path, uri, message):
    with pytest.raises(DownloadError, match=rf"(?s)^{re.escape(uri)}: .*({message})"):
        resolve(uri, data_home=tmp_path, hub_url=hub.url)
