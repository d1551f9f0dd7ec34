"""What runs on Modal, without Modal: the tunnel's server and QUIC by the portal, found as robots find them."""

import argparse
import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openpi_flash_cli import latency, modal_host
from openpi_flash_cli.demo import small_settings
from openpi_flash_client import portal
from openpi_flash_client.portal import Relay
from openpi_flash_client.portal_test import Store

Run = Callable[..., Store]


@dataclasses.dataclass
class Tunnel:
    """A tunnel of Modal's that leads from this machine to this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_socket(self) -> tuple[str, int]:
        return "127.0.0.1", self.port


@contextlib.contextmanager
def forward(port: int, *, h2_enabled: bool = False) -> Iterator[Tunnel]:
    yield Tunnel(port)


@pytest.fixture
def run(tiny_policies, tmp_path, monkeypatch) -> Iterator[Run]:
    """Runs a function of an app with a store, until the engine is ready; ends it in order."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(small_settings(tiny_policies["jax"], tmp_path)))
    monkeypatch.setenv("INFERENCE_CONFIG_PATH", str(path))
    monkeypatch.setenv("OPENPI_FLASH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(modal_host.AUTH_VARIABLE, "")
    store, results, engines = Store(), [], []
    serving = modal_host.serving

    @contextlib.contextmanager
    def recorded() -> Iterator[Any]:
        with serving() as process:
            engines.append(process)
            yield process

    monkeypatch.setattr(modal_host, "serving", recorded)
    monkeypatch.setattr(modal_host, "open_dict", lambda name: store)
    threads = []

    def start(serve: Callable[..., int], key: str, *arguments: Any, **options: Any) -> Store:
        threads.append(threading.Thread(target=lambda: results.append(serve(store, *arguments, **options))))
        threads[-1].start()
        store.wait_for(lambda: key in store)
        return store

    yield start
    for process in engines:
        process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert results == [0] * len(threads)
    assert set(store) <= {modal_host.TOKEN_KEY}, "nothing that has ended stays published"


def times(capsys, transport: str, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    assert latency.run(parser.parse_args([transport, *arguments])) == 0
    return capsys.readouterr().out


def test_a_tunnel_is_found_with_its_token(run, capsys):
    store = run(modal_host.serve_tunnel, modal_host.TUNNEL_KEY, forward)
    assert store["tunnel"]["websocket"].startswith("ws://127.0.0.1:")
    output = times(capsys, "modal-tunnel")
    assert "modal-tunnel://openpi-flash, 5 calls" in output
    with pytest.raises(Exception, match="401"):
        times(capsys, "modal-tunnel", "--token", "wrong")


def test_quic_by_a_relay_alone(run, capsys, monkeypatch):
    relay, stop = Relay(("127.0.0.1", 0), "sesame"), threading.Event()
    threading.Thread(target=relay.run, args=(stop,), daemon=True).start()
    monkeypatch.setenv("QUIC_RELAY_IP", f"127.0.0.1:{relay.port}")
    monkeypatch.setenv("QUIC_RELAY_ONLY", "1")
    monkeypatch.setenv("QUIC_RELAY_KEY", "sesame")
    run(modal_host.serve_quic, "quic", stun_servers=())
    output = times(capsys, "modal-quic", "--timeout", "100")
    assert "path to the server: relay" in output
    assert "modal-quic://openpi-flash, 5 calls" in output
    stop.set()


def test_quic_directly(run, capsys, monkeypatch):
    monkeypatch.setattr(portal, "STUN_SERVERS", ())
    run(modal_host.serve_quic, "quic", stun_servers=())
    assert "path to the server: direct" in times(capsys, "modal-quic", "--timeout", "100")


def test_a_robot_is_told_when_nothing_is_served(monkeypatch, capsys):
    monkeypatch.setattr(modal_host, "open_dict", lambda name: Store())
    with pytest.raises(Exception, match="no tunnel has been published"):
        times(capsys, "modal-tunnel")
    with pytest.raises(Exception, match="no QUIC server has published itself"):
        times(capsys, "modal-quic")
    with pytest.raises(Exception, match="HOST, name or address of the server, is missing"):
        times(capsys, "ws")
